"""TurboQuantKVCache and replace_kv_cache."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from attention_checks import check, compare
from backends import Backend
from oracles import Cache, randn, same_bits
from torch import Tensor, nn

import turboquant as tq
from turboquant import TurboQuantKVCache, replace_kv_cache

pytestmark = pytest.mark.usefixtures("one_thread")

H, D, S = 2, 32, 24
STATE = ("k_packed", "k_norms", "v_packed", "v_norms")
CONSTANTS = ("centroids", "boundaries", "rotation", "rotation_T")
DTYPES = {
    "k_packed": torch.uint8, "k_norms": torch.bfloat16, "v_packed": torch.uint8,
    "v_norms": torch.bfloat16, **dict.fromkeys(CONSTANTS, torch.float32),
}  # fmt: skip


def cache(B: int = 1, **options: Any) -> TurboQuantKVCache:
    return TurboQuantKVCache(H, D, S, batch_size=B, **options)


def tokens(
    B: int, T: int, seed: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    k, v = randn(2, B, H, T, D, seed=seed, dtype=dtype)
    return k, v


def filled(B: int = 1, T: int = 9, **options: Any) -> TurboQuantKVCache:
    c = cache(B, **options)
    c.update(torch.arange(T), *tokens(B, T))
    return c


def as_cache(c: TurboQuantKVCache) -> Cache:
    return Cache(c.k_packed, c.k_norms, c.v_packed, c.v_norms, c.centroids, c.rotation)


def equal_state(a: TurboQuantKVCache, b: TurboQuantKVCache) -> bool:
    return all(same_bits(getattr(a, n), getattr(b, n)) for n in STATE)


# ---------------------------------------------------------------------------------- construction


def test_the_published_signature() -> None:
    parameters = list(inspect.signature(TurboQuantKVCache).parameters.values())
    empty = inspect.Parameter.empty
    assert [(p.name, p.default) for p in parameters[:5]] == [
        ("n_heads", empty), ("head_dim", empty), ("max_seq_len", empty), ("bits", 4), ("seed", 42)
    ]  # fmt: skip
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[5:])
    assert inspect.signature(TurboQuantKVCache).parameters["batch_size"].default == 1
    assert list(inspect.signature(TurboQuantKVCache.update).parameters) == [
        "self", "input_pos", "k_val", "v_val"
    ]  # fmt: skip


@pytest.mark.parametrize("B", [1, 3])
def test_buffers(B: int) -> None:
    c = TurboQuantKVCache(H, D, S, batch_size=B)
    shapes = {
        "k_packed": (B, H, S, D // 2), "k_norms": (B, H, S, 1), "v_packed": (B, H, S, D // 2),
        "v_norms": (B, H, S, 1), "centroids": (16,), "boundaries": (15,), "rotation": (D, D),
        "rotation_T": (D, D),
    }  # fmt: skip
    buffers = dict(c.named_buffers())
    assert {n: tuple(t.shape) for n, t in buffers.items()} == shapes
    assert {n: t.dtype for n, t in buffers.items()} == DTYPES
    assert all((buffers[n] == 0).all() for n in STATE)
    centroids, boundaries = tq.codebook(D)
    assert same_bits(c.centroids, centroids)
    assert same_bits(c.boundaries, boundaries)
    assert same_bits(c.rotation, tq.rotation(D, 42))
    assert same_bits(c.rotation_T, tq.rotation(D, 42).T)
    assert c.rotation_T.is_contiguous()
    assert not list(c.parameters())
    assert c.state_dict() == {}
    assert "n_heads=2" in repr(c)


def test_seed() -> None:
    assert same_bits(TurboQuantKVCache(H, D, S, 4, 7).rotation, tq.rotation(D, 7))
    assert same_bits(TurboQuantKVCache(H, D, S, seed=8).rotation, tq.rotation(D, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "TurboQuantKVCache: bits must be 4, got 3"),
        ({"bits": 8}, "TurboQuantKVCache: bits must be 4, got 8"),
        ({"head_dim": 33}, "head dim must be even, from 16 to 512, got 33"),
        ({"head_dim": 14}, "head dim must be even, from 16 to 512, got 14"),
        ({"head_dim": 514}, "head dim must be even, from 16 to 512, got 514"),
        ({"n_heads": 0}, "TurboQuantKVCache: n_heads must be at least 1, got 0"),
        ({"max_seq_len": 0}, "TurboQuantKVCache: max_seq_len must be at least 1, got 0"),
        ({"batch_size": -1}, "TurboQuantKVCache: batch_size must be at least 1, got -1"),
        ({"k_norm": "l1"}, "k_norm must be 'l2', 'preserve' or 'unbiased', got 'l1'"),
        ({"v_norm": ""}, "v_norm must be 'l2', 'preserve' or 'unbiased', got ''"),
    ],
)  # fmt: skip
def test_wrong_constructor_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TurboQuantKVCache(**{"n_heads": H, "head_dim": D, "max_seq_len": S, **options})


def test_constants_are_not_shared_between_caches() -> None:
    a, b = cache(), cache()
    for name in CONSTANTS:
        getattr(a, name).zero_()
    c = cache()
    for name in CONSTANTS:
        assert same_bits(getattr(b, name), getattr(c, name))
        assert (getattr(b, name) != 0).any()
    assert same_bits(b.rotation, tq.rotation(D))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_default_dtype_does_not_matter(default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        c = TurboQuantKVCache(H, 46, S, seed=123)
    finally:
        torch.set_default_dtype(before)
    assert {n: t.dtype for n, t in c.named_buffers()} == DTYPES


def test_built_in_inference_mode_spoils_nothing() -> None:
    """The constants that all caches share must not become inference tensors."""
    with torch.inference_mode():
        TurboQuantKVCache(H, 44, S, seed=321)
    c = TurboQuantKVCache(H, 44, S, seed=321)
    for name in CONSTANTS:
        t = getattr(c, name)
        assert not t.is_inference(), name
        t.mul_(1)
    x = torch.ones(44, requires_grad=True)
    (c.rotation_T @ x).sum().backward()
    c.reset()


# ------------------------------------------------------------------------------- moving it about


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to(float16)": lambda m: m.to(torch.float16),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(cpu, float64)": lambda m: m.to("cpu", torch.float64),
    "float": lambda m: m.float(),
    "type": lambda m: m.type(torch.float64),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_dtypes_are_kept(conversion: str) -> None:
    """In a model that is converted, too; and not a bit of the content is lost."""
    c = filled()
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "cache": c})
    before = {n: t.clone() for n, t in c.named_buffers()}
    CONVERSIONS[conversion](model)
    assert {n: t.dtype for n, t in c.named_buffers()} == DTYPES
    for name, t in c.named_buffers():
        assert same_bits(t, before[name]), name
    CONVERSIONS[conversion](c)
    for name, t in c.named_buffers():
        assert same_bits(t, before[name]), name


@pytest.mark.parametrize("convert", [None, torch.float16, torch.bfloat16])
def test_meta_construction(convert: torch.dtype | None) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), cache(2))
    assert all(t.is_meta for t in model.buffers())
    if convert:
        model = model.to(convert)
    c = model.to_empty(device="cpu")[1]
    for name in (*STATE, *CONSTANTS):
        getattr(c, name).fill_(77)
    c.reset()
    fresh = cache(2)
    assert {n: t.dtype for n, t in c.named_buffers()} == DTYPES
    for name, t in fresh.named_buffers():
        assert same_bits(getattr(c, name), t), name
    c.update(torch.arange(3), *tokens(2, 3))
    fresh.update(torch.arange(3), *tokens(2, 3))
    assert equal_state(c, fresh)


def test_moving_to_meta_and_back() -> None:
    c = filled().to("meta").to_empty(device="cpu")
    c.reset()
    assert equal_state(c, cache())
    assert same_bits(c.rotation, tq.rotation(D))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch.load(_saved(m), weights_only=False),
}


def _saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("how", COPIES)
def test_copies_carry_state_and_rotation_by_value(how: str) -> None:
    c = filled()
    with torch.no_grad():  # a rotation that no seed gives, as another machine's would be
        c.rotation.copy_(c.rotation.flip(0).clone())
        c.rotation_T.copy_(c.rotation.T)
        c.update(torch.arange(9), *tokens(1, 9))
    twin = COPIES[how](c)
    for name, t in c.named_buffers():
        assert same_bits(getattr(twin, name), t), name
    query = randn(1, 4, 2, D)
    pos = torch.arange(7, 9)
    assert same_bits(twin.attend(query, pos), c.attend(query, pos))
    before = {n: t.clone() for n, t in c.named_buffers()}
    twin.update(torch.tensor([3]), *tokens(1, 1, seed=5))
    twin.rotation.zero_()
    for name, t in c.named_buffers():
        assert same_bits(t, before[name]), name  # they share nothing


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_resets_to_its_own_rotation(how: str) -> None:
    """A pickle from elsewhere must not fall back to this process's rotation bits."""
    c = TurboQuantKVCache(H, D, S, seed=9)
    payload = COPIES[how](c)
    payload.rotation.zero_()
    payload.k_packed.fill_(3)
    payload.reset()
    assert same_bits(payload.rotation, tq.rotation(D, 9))
    assert same_bits(payload.rotation_T, tq.rotation(D, 9).T)
    assert (payload.k_packed == 0).all()
    assert same_bits(c.rotation, tq.rotation(D, 9))


# ---------------------------------------------------------------------------------------- update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B", [1, 3])
def test_update_returns_the_whole_buffers(best: Backend, dtype: torch.dtype, B: int) -> None:
    c = cache(B).to(best.device)
    k, v = (t.to(best.device) for t in tokens(B, 5, dtype=dtype))
    pos = torch.tensor([2, 9, 0, 23, 4], device=best.device)
    result = c.update(pos, k, v)
    assert isinstance(result, tuple)
    for returned, name in zip(result, STATE):
        assert returned is getattr(c, name)
    for x, packed, norms in ((k, *result[:2]), (v, *result[2:])):
        oracles.assert_codes(packed[:, :, pos], oracles.encode(x, c.rotation, c.boundaries))
        oracles.assert_rounded(
            norms[:, :, pos], x.cpu().double().square().sum(-1, keepdim=True).sqrt()
        )
        rest = torch.ones(S, dtype=torch.bool)
        rest[pos.cpu()] = False
        assert (packed.cpu()[:, :, rest] == 0).all()
        assert (norms.cpu()[:, :, rest] == 0).all()


def test_forward_is_update() -> None:
    a, b = cache(), cache()
    result = a(torch.arange(4), *tokens(1, 4))
    b.update(torch.arange(4), *tokens(1, 4))
    assert result[0] is a.k_packed
    assert equal_state(a, b)


def test_update_overwrites_like_index_copy() -> None:
    c, pos = filled(T=9), torch.tensor([8, 1])
    old = [getattr(c, n).clone() for n in STATE]
    k, v = tokens(1, 2, seed=6)
    c.update(pos, k, v)
    new = cache()
    new.update(torch.arange(2), k, v)
    for name, before in zip(STATE, old):
        want = before.index_copy(2, pos, getattr(new, name)[:, :, :2])
        assert same_bits(getattr(c, name), want), name


def test_update_per_batch_row() -> None:
    """[B, T]: each row at its own place; padding is skipped."""
    c, (k, v) = cache(2), tokens(2, 3)
    c.update(torch.tensor([[0, 1, 2], [-1, 7, 8]]), k, v)
    for b, (slots, used) in enumerate([([0, 1, 2], [0, 1, 2]), ([7, 8], [1, 2])]):
        alone = cache()
        alone.update(torch.tensor(slots), k[b : b + 1, :, used], v[b : b + 1, :, used])
        for name in STATE:
            assert same_bits(getattr(c, name)[b], getattr(alone, name)[0]), name


def test_norm_policies_reach_the_op() -> None:
    (k, v), pos = tokens(1, 5), torch.arange(5)
    c = cache(k_norm="unbiased", v_norm="preserve")
    c.update(pos, k, v)
    options = {"centroids": c.centroids}
    want_k = tq.compress(k, c.rotation, c.boundaries, norm="unbiased", **options)
    want_v = tq.compress(v, c.rotation, c.boundaries, norm="preserve", **options)
    for name, want in zip(STATE, (*want_k, *want_v)):
        assert same_bits(getattr(c, name)[:, :, :5], want), name
    assert not same_bits(c.k_norms[:, :, :5], tq.compress(k, c.rotation, c.boundaries)[1])


def test_update_refusals_come_from_the_op() -> None:
    c = filled()
    before = [getattr(c, n).clone() for n in STATE]
    k, v = tokens(1, 2)
    for pos, new, message in [
        (torch.tensor([0, S]), k, "^update_: input_pos must be below the capacity 24, got 24"),
        (torch.tensor([0.0, 1.0]), k, "^update_: input_pos must be int32 or int64"),
        (torch.tensor([0, 1]), k[..., :16], "^update_: v must be"),
        (torch.tensor([0, 1]), k[:, :1], "^update_: v must be"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            c.update(pos, new, v)
    for name, old in zip(STATE, before):
        assert same_bits(getattr(c, name), old)


# ---------------------------------------------------------------------------------------- attend


def test_attend_is_attention_up_to_the_last_position(best: Backend) -> None:
    """Over several steps, against float64 over what is stored."""
    c = cache().to(best.device)
    for step, (T, at) in enumerate([(5, 0), (1, 5), (3, 6), (1, 9)]):
        pos = torch.arange(at, at + T)
        k, v = (t.to(best.device) for t in tokens(1, T, seed=step))
        c.update(pos.to(best.device), k, v)
        query = randn(1, 4, T, D, seed=step + 50)
        out = c.attend(query.to(best.device), pos.to(best.device))
        length = torch.tensor(at + T)
        want, want_lse = check(best, query, as_cache(c), kv_len=length, mask_is_causal=True)
        assert same_bits(out, want)
        visible = oracles.visible_keys(1, T, S, causal=True, kv_len=length)
        exact, exact_lse = oracles.attention(query, as_cache(c).k(), as_cache(c).v(), visible)
        compare(best, out, want_lse, exact, exact_lse, float(as_cache(c).v().abs().max()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_attend_per_batch_row(dtype: torch.dtype) -> None:
    c = filled(3, 20)
    pos = torch.tensor([[3, 4], [18, 19], [0, 1]], dtype=dtype)
    query = randn(3, 4, 2, D)
    out = c.attend(query, pos)
    for b in range(3):
        part = Cache(*(t[b : b + 1] for t in as_cache(c).args[:4]), c.centroids, c.rotation)
        want = tq.tq4_sdpa(
            query[b : b + 1], *part.args, kv_len=pos[b, -1:] + 1, mask_is_causal=True
        )
        assert same_bits(out[b : b + 1], want)


def test_attend_passes_everything_on() -> None:
    c, query, pos = filled(2, 20), randn(2, 4, 3, D), torch.arange(15, 18)
    mask = torch.rand(2, 1, 3, S, generator=oracles.generator(4)) < 0.7
    sinks, start = randn(4, seed=5), torch.tensor([1, 4])
    got = c.attend(query, pos, mask, scale=0.4, mask_is_causal=False, kv_start=start, softcap=3.0,
                   sinks=sinks)  # fmt: skip
    want, _ = tq.tq4_attention(
        query, *as_cache(c).args, mask, False, 0.4, torch.tensor(18), False, kv_start=start,
        softcap=3.0, sinks=sinks,
    )  # fmt: skip
    assert same_bits(got, want)
    everything = c.attend(query, pos, mask_is_causal=False)
    assert same_bits(everything, tq.tq4_sdpa(query, *as_cache(c).args, kv_len=torch.tensor(18)))
    assert not torch.allclose(everything, c.attend(query, pos))


def test_attend_ignores_what_lies_beyond() -> None:
    c, query, pos = filled(1, 12), randn(1, 4, 2, D), torch.arange(10, 12)
    want = c.attend(query, pos)
    c.k_norms[:, :, 12:] = torch.nan
    c.v_norms[:, :, 12:] = 1e4
    c.k_packed[:, :, 12:] = 0xA5
    assert same_bits(c.attend(query, pos), want)


# ------------------------------------------------------------------------- decompress, reset, ...


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.float64])
def test_decompress(best: Backend, dtype: torch.dtype | None) -> None:
    c = cache(2).to(best.device)
    k, v = (t.to(best.device) for t in tokens(2, 6))
    pos = torch.tensor([3, 0, 5, 11, 7, 20], device=best.device)
    c.update(pos, k, v)
    got = c.decompress() if dtype is None else c.decompress(dtype)
    state = as_cache(c)
    for x, exact, original in zip(got, (state.k(), state.v()), (k, v)):
        assert x.dtype == (dtype or torch.bfloat16)
        assert x.shape == (2, H, S, D)
        oracles.assert_rounded(x, exact, slack=3e-7, absolute=1e-5)
        unwritten = torch.ones(S, dtype=torch.bool, device=x.device)
        unwritten[pos] = False
        assert (x[:, :, unwritten] == 0).all()
        error = (x[:, :, pos].float() - original).square().sum() / original.square().sum()
        assert float(error) < 0.011


def test_reset_empties_in_place() -> None:
    c = filled(2)
    addresses = [t.data_ptr() for t in c.buffers()]
    c.reset()
    assert [t.data_ptr() for t in c.buffers()] == addresses
    assert equal_state(c, cache(2))
    c.update(torch.arange(4), *tokens(2, 4))
    again = cache(2)
    again.update(torch.arange(4), *tokens(2, 4))
    assert equal_state(c, again)


def test_a_subclass_may_store_its_own_way() -> None:
    """The rest uses only the buffers."""

    class Twice(TurboQuantKVCache):
        def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> Any:
            return super().update(input_pos, 2 * k_val, 2 * v_val)

    c, plain = Twice(H, D, S), cache()
    (k, v), pos = tokens(1, 5), torch.arange(5)
    c.update(pos, k, v)
    plain.update(pos, 2 * k, 2 * v)
    query = randn(1, 4, 5, D)
    assert same_bits(c.attend(query, pos), plain.attend(query, pos))
    assert same_bits(c.decompress()[0], plain.decompress()[0])


def test_memory_is_what_the_format_says() -> None:
    c = TurboQuantKVCache(8, 128, 1000, batch_size=2)
    stored = sum(getattr(c, n).nbytes for n in STATE)
    assert stored == 2 * 2 * 8 * 1000 * (64 + 2)
    assert 2 * 2 * 8 * 1000 * 256 / stored == pytest.approx(3.88, abs=0.005)


# ------------------------------------------------------------------------------ replace_kv_cache


class Dense(nn.Module):
    """The dense cache of a hand-written model."""

    def __init__(self, B: int = 1, heads: int = H, length: int = S, dim: int = D) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(B, heads, length, dim))
        self.register_buffer("v_cache", torch.zeros(B, heads, length, dim))

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        self.k_cache[:, :, input_pos] = k_val
        self.v_cache[:, :, input_pos] = v_val
        return self.k_cache, self.v_cache


class Layer(nn.Module):
    def __init__(self, cache: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.kv_cache = cache


def model(*caches: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(Layer(c) for c in caches)})


def test_replace_every_cache_with_its_geometry() -> None:
    m = model(Dense(), Dense(2, 4, 50, 64), Dense(1, 1, 7, 16))
    linears = [layer.linear for layer in m["layers"]]
    assert replace_kv_cache(m, Dense) == 3
    found = [layer.kv_cache for layer in m["layers"]]
    assert [type(c) for c in found] == [TurboQuantKVCache] * 3
    assert [tuple(c.k_packed.shape) for c in found] == [
        (1, H, S, D // 2),
        (2, 4, 50, 32),
        (1, 1, 7, 8),
    ]
    assert [layer.linear for layer in m["layers"]] == linears
    assert not [c for c in m.modules() if isinstance(c, Dense)]
    assert replace_kv_cache(m, Dense) == 0
    pos = torch.arange(3)
    found[0].update(pos, *tokens(1, 3))
    assert found[0].attend(randn(1, 4, 3, D), pos).shape == (1, 4, 3, D)


def test_replace_by_predicate_and_by_subclass() -> None:
    class Special(Dense):
        pass

    m = model(Dense(), Special(), Dense(length=9))
    assert replace_kv_cache(m, lambda c: isinstance(c, Dense) and c.k_cache.shape[2] == 9) == 1
    assert isinstance(m["layers"][2].kv_cache, TurboQuantKVCache)
    assert isinstance(m["layers"][0].kv_cache, Dense)
    assert replace_kv_cache(m, Dense) == 2  # a subclass is one, too


def test_replace_passes_options_on() -> None:
    m = model(Dense())
    replace_kv_cache(m, Dense, k_norm="unbiased", seed=5)
    c = m["layers"][0].kv_cache
    assert c.k_norm == "unbiased"
    assert same_bits(c.rotation, tq.rotation(D, 5))


def test_replace_follows_the_device() -> None:
    with torch.device("meta"):
        m = model(Dense())
    assert replace_kv_cache(m, Dense) == 1
    assert all(t.is_meta for t in m["layers"][0].kv_cache.buffers())
    m.to_empty(device="cpu")
    m["layers"][0].kv_cache.reset()
    assert same_bits(m["layers"][0].kv_cache.rotation, tq.rotation(D))


def test_a_cache_that_two_layers_share_stays_shared() -> None:
    shared = Dense()
    m = model(shared, shared, Dense())
    replace_kv_cache(m, Dense)
    caches = [layer.kv_cache for layer in m["layers"]]
    assert all(isinstance(c, TurboQuantKVCache) for c in caches)
    assert caches[0] is caches[1]
    assert caches[0] is not caches[2]


class NoBuffer(nn.Module):
    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> None: ...


class NoUpdate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(1, H, S, D))


class Flat(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.k_cache = torch.zeros(H, S, D)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (NoBuffer, r"layers\.1\.kv_cache \(NoBuffer\) must have update\(input_pos, k_val, v_val\)"),
        (NoUpdate, r"layers\.1\.kv_cache \(NoUpdate\) must have update\(input_pos, k_val, v_val\)"),
        (Flat, r"layers\.1\.kv_cache\.k_cache must be \[B, H, S, D\], got \[2, 24, 32\]"),
        (lambda: Dense(dim=33), "head dim must be even, from 16 to 512, got 33"),
        (lambda: Dense(dim=8), "head dim must be even, from 16 to 512, got 8"),
    ],
)
def test_a_module_that_is_no_such_cache_changes_nothing(
    bad: Callable[[], nn.Module], message: str
) -> None:
    m = model(Dense(), bad(), Dense())
    before = list(m.modules())
    with pytest.raises(ValueError, match=message):
        replace_kv_cache(m, (lambda c: isinstance(c, (Dense, NoBuffer, NoUpdate))))
    assert list(m.modules()) == before


def test_wrong_options_change_nothing() -> None:
    m = model(Dense())
    before = list(m.modules())
    with pytest.raises(ValueError, match="bits must be 4"):
        replace_kv_cache(m, Dense, bits=2)
    assert list(m.modules()) == before


def test_caches_by_other_names() -> None:
    m = nn.ModuleDict({"encoder": nn.Linear(2, 2), "inner": nn.ModuleDict({"cache": Dense()})})
    assert replace_kv_cache(m, Dense) == 1
    assert isinstance(m["inner"]["cache"], TurboQuantKVCache)
