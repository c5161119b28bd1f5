"""tq4_sdpa and tq4_attention: every rule of the contract, on every backend, against float64."""

from __future__ import annotations

import inspect
import math
from typing import Any

import oracles
import pytest
import torch
from attention_checks import call, check, on_device
from backends import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    LAYOUTS,
    NORM_DTYPES,
    QUERY_DTYPES,
    Cache,
    randn,
    random_cache,
    relayout,
    same_bits,
    visible_keys,
)
from torch import Tensor

import turboquant as tq

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def backend(attention_backend: Backend) -> Backend:
    """Here the matrix units too."""
    return attention_backend


INTS = [torch.int32, torch.int64]


def ints(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def some_mask(B: int, Lq: int, Lkv: int, seed: int = 0, share: float = 0.6) -> Tensor:
    return torch.rand(B, 1, Lq, Lkv, generator=oracles.generator(seed)) < share


# ----------------------------------------------------------------------------------- interface


def test_the_published_signature() -> None:
    parameters = inspect.signature(tq.tq4_sdpa).parameters
    assert [(p.name, p.default) for p in parameters.values()] == [
        ("query", inspect.Parameter.empty), ("k_packed", inspect.Parameter.empty),
        ("k_norms", inspect.Parameter.empty), ("v_packed", inspect.Parameter.empty),
        ("v_norms", inspect.Parameter.empty), ("centroids", inspect.Parameter.empty),
        ("rotation", inspect.Parameter.empty), ("attn_mask", None), ("is_causal", False),
        ("scale", None), ("kv_len", None), ("mask_is_causal", False),
    ]  # fmt: skip
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters.values())
    more = list(inspect.signature(tq.tq4_attention).parameters.values())
    assert [p.name for p in more[:12]] == list(parameters)
    assert [(p.name, p.default) for p in more[12:]] == [
        ("kv_start", None), ("softcap", None), ("sinks", None)
    ]  # fmt: skip
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in more[12:])


def test_all_twelve_by_position(backend: Backend) -> None:
    query, cache = randn(1, 2, 3, 16, seed=1), random_cache(1, 1, 7, 16)
    query, cache, mask, length = on_device(
        backend, query, cache, some_mask(1, 3, 7), ints(6, dtype=torch.int32)
    )
    by_name = backend.ops.tq4_sdpa(
        query, *cache.args, attn_mask=mask, is_causal=False, scale=0.7, kv_len=length,
        mask_is_causal=True,
    )  # fmt: skip
    by_position = backend.ops.tq4_sdpa(query, *cache.args, mask, False, 0.7, length, True)
    assert same_bits(by_name, by_position)
    both = backend.ops.tq4_attention(query, *cache.args, mask, False, 0.7, length, True)
    assert same_bits(both[0], by_name)


# --------------------------------------------------------------------------------------- shapes


def test_every_even_head_dim(backend: Backend) -> None:
    for i, dim in enumerate(range(16, 513, 2)):
        query = randn(1, 2, 2, dim, seed=dim, dtype=QUERY_DTYPES[i % 3])
        cache = random_cache(1, 1, 5 + i % 40, dim, seed=dim, norm_dtype=NORM_DTYPES[i % 2])
        check(backend, query, cache, mask_is_causal=i % 5 == 0)


@pytest.mark.parametrize("dim", [16, 18, 30, 64, 80, 96, 98, 128, 192, 256, 510, 512])
@pytest.mark.parametrize("dtype", QUERY_DTYPES)
def test_decode_and_prefill(backend: Backend, dim: int, dtype: torch.dtype) -> None:
    cache = random_cache(2, 2, 70, dim, seed=1)
    check(backend, randn(2, 6, 1, dim, seed=2, dtype=dtype), cache)
    check(backend, randn(2, 6, 19, dim, seed=3, dtype=dtype), cache, mask_is_causal=True)


HEADS = [(1, 1), (3, 3), (4, 2), (8, 2), (10, 2), (12, 2), (14, 2), (16, 2), (32, 2), (64, 2),
         (8, 1), (71, 1), (6, 3)]  # fmt: skip


@pytest.mark.parametrize(("Hq", "Hkv"), HEADS)
@pytest.mark.parametrize("Lq", [1, 7])
def test_grouped_queries(backend: Backend, Hq: int, Hkv: int, Lq: int) -> None:
    cache = random_cache(2, Hkv, 37, 64, seed=4)
    check(backend, randn(2, Hq, Lq, 64, seed=5), cache, mask_is_causal=True)


@pytest.mark.parametrize("Lq", [1, 2, 15, 16, 17, 23, 24, 25, 47, 48, 49, 70])
@pytest.mark.parametrize("Lkv", [1, 15, 16, 17, 31, 32, 33, 64, 65, 300])
def test_lengths_around_the_tiles(backend: Backend, Lq: int, Lkv: int) -> None:
    cache = random_cache(1, 1, Lkv, 32, seed=6)
    query = randn(1, 2, Lq, 32, seed=7)
    check(backend, query, cache)
    check(backend, query, cache, mask_is_causal=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Cache, dict[str, Any]]:
    """Anything that the contract allows, all at once."""
    B, Hkv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    Lkv, D = draw(st.integers(1, 90)), draw(st.sampled_from([16, 18, 30, 64, 98, 128]))
    square = draw(st.booleans())
    Lq = Lkv if square else draw(st.integers(1, 70))
    dtype, layout = draw(st.sampled_from(QUERY_DTYPES)), st.sampled_from(LAYOUTS)
    seed = draw(st.integers(0, 3))
    query = relayout(randn(B, Hkv * group, Lq, D, seed=seed, dtype=dtype), draw(layout))
    cache_layout = draw(layout)
    cache = random_cache(
        B, Hkv, Lkv, D, seed=seed + 10, norm_dtype=draw(st.sampled_from(NORM_DTYPES)),
        sharpness=draw(st.sampled_from([0.1, 1.0, 10.0])),
    ).map(lambda t: relayout(t, cache_layout))  # fmt: skip
    options: dict[str, Any] = {}

    def lengths(low: int, high: int) -> Tensor:
        n = draw(st.sampled_from([1, B]))
        values = draw(st.lists(st.integers(low, high), min_size=n, max_size=n))
        t = torch.tensor(values, dtype=draw(st.sampled_from(INTS)))
        return t[0] if n == 1 and draw(st.booleans()) else t

    causal = draw(st.sampled_from(["", "mask_is_causal", *(["is_causal"] if square else [])]))
    if causal:
        options[causal] = True
    if draw(st.booleans()):
        options["kv_len"] = lengths(-2, Lkv + 3)
    if draw(st.booleans()):
        options["kv_start"] = lengths(-2, Lkv + 1)
    if draw(st.booleans()):
        mask = some_mask(
            draw(st.sampled_from([1, B])), Lq, Lkv, seed, draw(st.sampled_from([0.1, 0.7]))
        )
        if causal == "mask_is_causal":  # the mask's own promise
            mask = mask & visible_keys(
                B, Lq, Lkv, causal=True, kv_len=options.get("kv_len")
            ).unsqueeze(1)
        options["attn_mask"] = relayout(mask, draw(layout))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.5, 2.0, 30.0]))
    if draw(st.booleans()):
        sink_dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        options["sinks"] = randn(Hkv * group, seed=seed + 20, dtype=sink_dtype)
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.0, 0.05, 1.0, -0.3]))
    return query, cache, options


@settings(max_examples=150)
@given(problem=problems())
def test_any_combination(backend: Backend, problem: tuple[Tensor, Cache, dict[str, Any]]) -> None:
    query, cache, options = problem
    check(backend, query, cache, **options)


# --------------------------------------------------------------------------------------- kv_len


@pytest.mark.parametrize("dtype", INTS)
@pytest.mark.parametrize("Lq", [1, 4])
@pytest.mark.parametrize("length", [-(2**31), -1, 0, 1, 3, 4, 5, 20, 32, 39, 40, 41, 2**31 - 1])
def test_kv_len_and_its_clamping(
    backend: Backend, dtype: torch.dtype, Lq: int, length: int
) -> None:
    """Also smaller than Lq: under the causal rule the first rows then see nothing."""
    query, cache = randn(2, 4, Lq, 32, seed=1), random_cache(2, 2, 40, 32)
    for kv_len in (torch.tensor(length, dtype=dtype), ints(length, dtype=dtype),
                   ints(length, length, dtype=dtype)):  # fmt: skip
        check(backend, query, cache, kv_len=kv_len)
        check(backend, query, cache, kv_len=kv_len, mask_is_causal=True)


@pytest.mark.parametrize("length", [2**32, 2**32 + 3, -(2**32) + 3, 2**62, -(2**63), 2**63 - 1])
def test_kv_len_and_kv_start_of_64_bits(backend: Backend, length: int) -> None:
    query, cache = randn(1, 2, 2, 32, seed=1), random_cache(1, 1, 9, 32)
    for flag in (False, True):
        check(backend, query, cache, kv_len=ints(length), mask_is_causal=flag)
        check(backend, query, cache, kv_start=ints(length), mask_is_causal=flag)


@pytest.mark.parametrize("dtype", INTS)
def test_kv_len_per_batch_row(backend: Backend, dtype: torch.dtype) -> None:
    query, cache = randn(5, 2, 3, 64, seed=2), random_cache(5, 1, 50, 64)
    lengths = ints(50, 0, 2, 3, 29, dtype=dtype)
    check(backend, query, cache, kv_len=lengths)
    check(backend, query, cache, kv_len=lengths, mask_is_causal=True)
    strided = torch.stack([lengths, lengths - 7], dim=1)[:, 0]
    assert not strided.is_contiguous()
    check(backend, query, cache, kv_len=strided, mask_is_causal=True)
    expanded = ints(29, dtype=dtype).expand(5)
    check(backend, query, cache, kv_len=expanded, kv_start=expanded // 2)


def test_one_element_of_any_rank(backend: Backend) -> None:
    query, cache = randn(3, 2, 2, 32, seed=3), random_cache(3, 1, 20, 32)
    for shape in [(), (1,), (1, 1), (1, 1, 1, 1)]:
        one = torch.full(shape, 11)
        check(backend, query, cache, kv_len=one, kv_start=one // 4)


# ---------------------------------------------------------------------------------- causal rules


@pytest.mark.parametrize("Lq", [1, 2, 9, 33, 50])
def test_bottom_right(backend: Backend, Lq: int) -> None:
    """Without a mask the flag is the mask; beside an equivalent one it changes nothing."""
    query, cache = randn(1, 2, Lq, 64, seed=4), random_cache(1, 1, 50, 64)
    for length in (50, 37):
        kv_len = ints(length)
        mask = visible_keys(1, Lq, 50, causal=True, kv_len=kv_len).unsqueeze(1)
        flag, flag_lse = check(backend, query, cache, kv_len=kv_len, mask_is_causal=True)
        for other in (
            check(backend, query, cache, kv_len=kv_len, attn_mask=mask),
            check(backend, query, cache, kv_len=kv_len, attn_mask=mask, mask_is_causal=True),
        ):
            assert torch.allclose(other[0], flag, rtol=1e-5, atol=1e-5)
            assert torch.allclose(other[1], flag_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [None, 33, 20, 1, 0])
def test_is_causal(backend: Backend, length: int | None) -> None:
    """The square case of the same rule; kv_len shifts the diagonal; a mask applies too."""
    query, cache = randn(2, 4, 33, 64, seed=5), random_cache(2, 2, 33, 64)
    options = {} if length is None else {"kv_len": ints(length)}
    out = check(backend, query, cache, is_causal=True, **options)
    flag = check(backend, query, cache, mask_is_causal=True, **options)
    assert same_bits(out[0], flag[0])
    assert same_bits(out[1], flag[1])
    check(backend, query, cache, is_causal=True, attn_mask=some_mask(2, 33, 33), **options)


def test_no_mask_and_no_flag_is_everything(backend: Backend) -> None:
    query, cache = randn(1, 2, 6, 32, seed=6), random_cache(1, 1, 12, 32)
    out, _ = check(backend, query, cache, kv_len=ints(9))
    permuted, _ = call(backend, query.flip(2), cache, kv_len=ints(9))
    assert torch.allclose(permuted.flip(2), out, atol=1e-5)


# ----------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("Lq", [1, 5, 40])
@pytest.mark.parametrize("batch", [1, 3])
def test_masks(backend: Backend, Lq: int, batch: int) -> None:
    query, cache = randn(3, 4, Lq, 32, seed=7), random_cache(3, 2, 70, 32)
    mask = some_mask(batch, Lq, 70, seed=8)
    for layout in LAYOUTS:
        check(backend, query, cache, attn_mask=relayout(mask, layout), kv_len=ints(61))


def test_expanded_masks(backend: Backend) -> None:
    query, cache = randn(3, 4, 5, 32, seed=9), random_cache(3, 2, 40, 32)
    one = some_mask(1, 5, 40, seed=10)
    for mask in (one, one[:, :, :1], one[..., :1], some_mask(3, 1, 40), some_mask(3, 5, 1)):
        expanded = mask.expand(3, 1, 5, 40)
        assert 0 in expanded.stride()
        check(backend, query, cache, attn_mask=expanded)
    check(backend, query, cache, attn_mask=one[:, :, :1].expand(1, 1, 5, 40))


def test_mask_as_a_slice_and_transposed(backend: Backend) -> None:
    query, cache = randn(2, 4, 5, 32, seed=11), random_cache(2, 2, 40, 32)
    whole = some_mask(4, 64, 128, seed=12)
    check(backend, query, cache, attn_mask=whole[1:3, :, 7:12, 30:70])
    check(backend, query, cache, attn_mask=some_mask(2, 40, 5, seed=13).mT)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_that_see_nothing(backend: Backend, with_sinks: bool) -> None:
    """Zeros, and -inf or the sink: never NaN, whatever the reason."""
    query, cache = randn(2, 4, 6, 32, seed=14), random_cache(2, 2, 40, 32)
    sinks = randn(4, seed=15) if with_sinks else None
    mask = some_mask(2, 6, 40, seed=16)
    mask[0, 0, 2] = False
    mask[1] = False
    blind = {
        "masked": ({"attn_mask": mask}, [(0, 2), *((1, i) for i in range(6))]),
        "no keys": ({"kv_len": ints(0, 40)}, [(0, i) for i in range(6)]),
        "before the context": ({"kv_len": ints(40, 4), "mask_is_causal": True}, [(1, 0), (1, 1)]),
        "before the start": (
            {"kv_start": ints(36, 100), "mask_is_causal": True},
            [(0, 0), (0, 1), *((1, i) for i in range(6))],
        ),
        "start is the end": ({"kv_start": ints(17), "kv_len": ints(17, 18)},
                             [(0, i) for i in range(6)]),
    }  # fmt: skip
    for reason, (options, rows) in blind.items():
        out, lse = check(backend, query, cache, sinks=sinks, **options)
        expected = torch.zeros(2, 6, dtype=torch.bool)
        for b, i in rows:
            expected[b, i] = True
            assert (out[b, :, i] == 0).all(), reason
            want = torch.full((4,), -math.inf) if sinks is None else sinks
            assert torch.allclose(lse[b, :, i].cpu(), want, atol=1e-6), reason
        assert torch.equal((out == 0).all(-1).all(1).cpu(), expected), reason


# ------------------------------------------------------------------------- what is never looked at


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e4, -3e38])
@pytest.mark.parametrize("Lq", [1, 9])
@pytest.mark.parametrize("norm_dtype", NORM_DTYPES)
def test_unseen_slots_may_hold_anything(
    backend: Backend, value: float, Lq: int, norm_dtype: torch.dtype
) -> None:
    """Bit for bit: past kv_len, before kv_start, and wherever the mask says no."""
    query = randn(2, 4, Lq, 64, seed=17)
    clean = random_cache(2, 2, 100, 64, seed=18, norm_dtype=norm_dtype)
    mask = some_mask(2, Lq, 100, seed=19, share=0.1)
    cases: list[dict[str, Any]] = [
        {"kv_len": ints(71)},
        {"kv_len": ints(71, 30), "mask_is_causal": True},
        {"kv_len": ints(0, 5)},
        {"kv_start": ints(33)},
        {"kv_start": ints(40, 99), "mask_is_causal": True},
        {"kv_len": ints(90), "kv_start": ints(10, 85)},
        {"attn_mask": mask},
        {"attn_mask": mask[:1], "kv_len": ints(65), "kv_start": ints(3)},
    ]
    for options in cases:
        flag = options.get("mask_is_causal", False)
        rules = {k: v for k, v in options.items() if k != "mask_is_causal"}
        seen = visible_keys(2, Lq, 100, causal=flag, **rules).any(1)
        assert not seen.all()
        dirty = clean.poisoned(~seen, value)
        want = check(backend, query, clean, **options)
        got = call(backend, query, dirty, **options)
        assert same_bits(got[0], want[0])
        assert same_bits(got[1], want[1])


def test_nan_reaches_only_the_rows_that_see_it(backend: Backend) -> None:
    """The last keys are hidden from the first rows by the causal rule alone."""
    query, clean = randn(1, 2, 6, 64, seed=20), random_cache(1, 1, 40, 64)
    last = torch.zeros(1, 40, dtype=torch.bool)
    last[0, 37:] = True
    dirty = clean.poisoned(last)
    want = call(backend, query, clean, mask_is_causal=True)
    got = call(backend, query, dirty, mask_is_causal=True)
    assert same_bits(got[0][:, :, :3], want[0][:, :, :3])
    assert same_bits(got[1][:, :, :3], want[1][:, :, :3])
    assert got[0][:, :, 3:].isnan().all()
    assert got[1][:, :, 3:].isnan().all()


@pytest.mark.parametrize(("Lkv", "where"), [(1, 0), *((50, i) for i in (0, 5, 15, 16, 31, 32, 49))])
@pytest.mark.parametrize("side", ["k_norms", "v_norms", "query"])
def test_a_visible_nan_is_not_hidden(backend: Backend, Lkv: int, where: int, side: str) -> None:
    """A broken key, value or query gives NaN in the rows concerned: no plausible numbers."""
    query, cache = randn(1, 2, 2, 64, seed=21), random_cache(1, 1, Lkv, 64)
    if side == "query":
        query[0, 1, 1, where] = math.nan
        clean = call(backend, randn(1, 2, 2, 64, seed=21), cache)
        out, lse = call(backend, query, cache)
        assert out[0, 1, 1].isnan().all()
        assert lse[0, 1, 1].isnan()
        for b, h, i in [(0, 0, 0), (0, 0, 1), (0, 1, 0)]:
            assert same_bits(out[b, h, i], clean[0][b, h, i])
        return
    getattr(cache, side)[0, 0, where] = math.nan
    out, lse = call(backend, query, cache)
    assert out.isnan().all()
    assert lse.isnan().all() == (side == "k_norms")


# -------------------------------------------------------------- kv_start, softcap, sinks and lse


@pytest.mark.parametrize("dtype", INTS)
@pytest.mark.parametrize("start", [-3, 0, 1, 15, 16, 17, 32, 33, 49, 50, 51])
def test_kv_start(backend: Backend, dtype: torch.dtype, start: int) -> None:
    query, cache = randn(2, 2, 4, 32, seed=22), random_cache(2, 1, 50, 32)
    for kv_start in (torch.tensor(start, dtype=dtype), ints(start, 7, dtype=dtype)):
        check(backend, query, cache, kv_start=kv_start)
        check(backend, query, cache, kv_start=kv_start, mask_is_causal=True, kv_len=ints(45))
        check(backend, query, cache, kv_start=kv_start, attn_mask=some_mask(1, 4, 50))


@pytest.mark.parametrize("softcap", [1e-3, 0.1, 1.0, 50.0, 1e4, 1e30])
@pytest.mark.parametrize("sharpness", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("scale", [None, 0.9])
def test_softcap(backend: Backend, softcap: float, sharpness: float, scale: float | None) -> None:
    """Applied after the scale; a very large one is none."""
    query, cache = randn(1, 4, 3, 64, seed=23), random_cache(1, 2, 50, 64, sharpness=sharpness)
    out, _ = check(backend, query, cache, softcap=softcap, scale=scale)
    if softcap == 1e30:
        plain, _ = call(backend, query, cache, scale=scale)
        assert torch.allclose(out, plain, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [-80.0, -5.0, 0.0, 5.0, 60.0])
def test_sinks(backend: Backend, dtype: torch.dtype, level: float) -> None:
    query, cache = randn(2, 6, 3, 64, seed=24), random_cache(2, 2, 50, 64)
    sinks = (randn(6, seed=25) + level).to(dtype)
    out, lse = check(backend, query, cache, sinks=sinks)
    plain, plain_lse = call(backend, query, cache)
    # The sink only takes its share of the weight.
    sink = sinks.double().view(1, 6, 1)
    share = torch.sigmoid(plain_lse.cpu().double() - sink)
    assert torch.allclose(out.cpu().double(), plain.cpu().double() * share.unsqueeze(-1), atol=1e-4)
    strided = torch.stack([sinks, sinks + 9], dim=1)[:, 0]
    check(backend, query, cache, sinks=strided, mask_is_causal=True)


def test_a_sink_of_minus_infinity_is_none(backend: Backend) -> None:
    query, cache = randn(1, 2, 3, 64, seed=26), random_cache(1, 1, 20, 64)
    sinks = torch.full((2,), -math.inf)
    kv_len = ints(2)
    out, lse = call(backend, query, cache, sinks=sinks, kv_len=kv_len, mask_is_causal=True)
    plain, plain_lse = call(backend, query, cache, kv_len=kv_len, mask_is_causal=True)
    assert torch.allclose(out, plain, atol=1e-6)
    assert torch.equal(lse.isinf(), plain_lse.isinf())
    assert (out[:, :, 0] == 0).all()


def test_lse_merges_halves_of_a_context(backend: Backend) -> None:
    """What it is for: out and lse of two parts give those of the whole."""
    query, cache = randn(1, 4, 2, 64, seed=27), random_cache(1, 2, 80, 64)
    whole, lse = check(backend, query, cache)
    left, left_lse = call(backend, query, cache.map(lambda t: t[:, :, :31]))
    right, right_lse = call(backend, query, cache.map(lambda t: t[:, :, 31:]))
    assert torch.allclose(torch.logaddexp(left_lse, right_lse), lse, atol=1e-5)
    weight = torch.exp(left_lse - lse).unsqueeze(-1)
    assert torch.allclose(left * weight + right * (1 - weight), whole, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.5, 2.0, -1.0])
def test_scale(backend: Backend, scale: float) -> None:
    query, cache = randn(1, 2, 3, 64, seed=28), random_cache(1, 1, 40, 64, sharpness=0.5)
    check(backend, query, cache, scale=scale)


def test_default_scale_is_the_root_of_the_head_dim(backend: Backend) -> None:
    query, cache = randn(1, 2, 3, 50, seed=29), random_cache(1, 1, 40, 50)
    default, written = call(backend, query, cache), call(backend, query, cache, scale=50**-0.5)
    assert same_bits(default[0], written[0])


@pytest.mark.parametrize("sharpness", [100.0, 1e4])
def test_very_sharp_scores(backend: Backend, sharpness: float) -> None:
    """Scores in the thousands: exp must not overflow, nor the largest be missed."""
    query, cache = randn(2, 2, 3, 32, seed=30), random_cache(2, 1, 70, 32, sharpness=sharpness)
    out, lse = call(backend, query, cache, mask_is_causal=True)
    visible = visible_keys(2, 3, 70, causal=True)
    want, want_lse = oracles.attention(query, cache.k(), cache.v(), visible)
    # float32 scores of this size are only good to a part of their size.
    slack = float(want_lse.abs().max()) * 2.0**-20
    assert (lse.cpu().double() - want_lse).abs().max() < slack
    assert out.isfinite().all()
    clear = (lse.cpu().double() - want_lse).abs().max() < 0.01
    if clear:
        assert torch.allclose(out.cpu().double(), want, atol=0.05 * float(want.abs().max()))


def test_scores_far_below_zero(backend: Backend) -> None:
    """All scores very negative: the softmax is about differences."""
    cache = random_cache(1, 1, 40, 32, seed=31)
    query = -50 * cache.k()[:, :, :1].float() / 32  # against key 0
    out, lse = call(backend, query, cache, kv_len=ints(1))
    assert float(lse) < -20
    assert torch.allclose(out.cpu().double(), cache.v()[:, :, :1], rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------- strides


def query_layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    B, H, L, D = 2, 6, 5, 32
    plain = randn(B, H, L, D, seed=32, dtype=dtype)
    fused = randn(B, L, 3 * H, D, seed=33, dtype=dtype)
    return {
        "contiguous": plain,
        "[B, L, H, D] transposed": randn(B, L, H, D, seed=34, dtype=dtype).transpose(1, 2),
        "part of a fused projection": fused.transpose(1, 2)[:, H : 2 * H],
        "every second number": randn(B, H, L, 2 * D, seed=35, dtype=dtype)[..., ::2],
        "expanded over the batch": plain[:1].expand(B, H, L, D),
        "expanded over heads": plain[:, :1].expand(B, H, L, D),
        "expanded over tokens": plain[:, :, :1].expand(B, H, L, D),
        "head dim outermost": randn(D, B, H, L, seed=36, dtype=dtype).permute(1, 2, 3, 0),
        "channels last": plain.contiguous(memory_format=torch.channels_last),
        "one token": randn(B, 1, H, D, seed=37, dtype=dtype).transpose(1, 2),
        "one token of a longer run": randn(B, 9, H, D, seed=38, dtype=dtype)[:, 3:4].transpose(
            1, 2
        ),
        "one head": randn(B, L, 1, D, seed=39, dtype=dtype).transpose(1, 2).expand(B, 2, L, D),
        **{f"relayout {name}": relayout(plain, name) for name in LAYOUTS},
    }


@pytest.mark.parametrize("dtype", QUERY_DTYPES)
def test_query_layouts_and_output_strides(backend: Backend, dtype: torch.dtype) -> None:
    """The output lies in memory as torch.empty_like(query) would: check() asserts it."""
    for name, query in query_layouts(dtype).items():
        cache = random_cache(2, 2, 30, 32, seed=40)
        [moved] = on_device(backend, query)
        assert moved.stride() == query.stride(), name
        check(backend, query, cache, mask_is_causal=True)


def test_transposed_query_comes_back_transposed(backend: Backend) -> None:
    query, cache = randn(2, 5, 6, 32, seed=41).transpose(1, 2), random_cache(2, 2, 30, 32)
    out, _ = call(backend, query, cache)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm_dtype", NORM_DTYPES)
def test_cache_layouts(backend: Backend, layout: str, norm_dtype: torch.dtype) -> None:
    query = randn(2, 4, 3, 50, seed=42)
    cache = random_cache(2, 2, 45, 50, seed=43, norm_dtype=norm_dtype)
    strided = cache.map(lambda t: relayout(t, layout))
    want = check(backend, query, cache, kv_len=ints(40))
    got = check(backend, query, strided, kv_len=ints(40))
    assert same_bits(got[0], want[0])
    assert same_bits(got[1], want[1])


def test_cache_slices_and_interleaved_buffers(backend: Backend) -> None:
    query = randn(2, 4, 3, 32, seed=44)
    big = random_cache(3, 4, 90, 32, seed=45)
    check(backend, query, big.map(lambda t: t[1:, 1:3, 20:75]), mask_is_causal=True)
    check(backend, query, big.map(lambda t: t[1:, 1::2, ::3]), mask_is_causal=True)
    check(backend, query, big.map(lambda t: t[:1].expand(2, 4, 90, -1)))
    check(backend, query, big.map(lambda t: t[:2, :1].expand(2, 4, 90, -1)))
    g = oracles.generator(46)
    both = torch.randint(0, 256, (2, 30, 2, 2, 16), dtype=torch.uint8, generator=g)
    norms = torch.rand(2, 30, 2, 2, 1, generator=g)
    k_packed, v_packed = both.permute(2, 0, 3, 1, 4)
    k_norms, v_norms = norms.permute(2, 0, 3, 1, 4)
    cache = Cache(k_packed, k_norms, v_packed, v_norms, tq.codebook(32)[0], tq.rotation(32))
    check(backend, query, cache)


@pytest.mark.parametrize("dtype", oracles.FLOATS)
def test_constants_of_any_float_type_and_layout(backend: Backend, dtype: torch.dtype) -> None:
    query, cache = randn(1, 2, 3, 32, seed=47), random_cache(1, 1, 20, 32)
    given_constants = (relayout(cache.centroids.to(dtype), "gaps"),
                       relayout(cache.rotation.to(dtype), "reversed"))  # fmt: skip
    plain = tuple(t.float().contiguous() for t in given_constants)
    state = cache.args[:4]
    got = call(backend, query, Cache(*state, *given_constants))
    want = call(backend, query, Cache(*state, *plain))
    if backend.bitwise:
        assert same_bits(got[0], want[0])
        assert same_bits(got[1], want[1])
    else:
        torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("with_sinks", [False, True])
def test_empty_tensors(backend: Backend, with_sinks: bool) -> None:
    for B, Lq, Lkv in [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0), (2, 0, 0), (0, 3, 0)]:
        query, cache = randn(B, 4, Lq, 32), random_cache(B, 2, Lkv, 32)
        sinks = randn(4, seed=1) if with_sinks else None
        mask = torch.ones(B, 1, Lq, Lkv, dtype=torch.bool)
        for options in (
            {}, {"mask_is_causal": True}, {"attn_mask": mask}, {"kv_len": torch.tensor(3)},
            {"kv_len": torch.full((B,), 3)}, {"kv_start": torch.full((B,), 1)},
            {"kv_len": ints(0), "attn_mask": mask, "mask_is_causal": True},
        ):  # fmt: skip
            out, lse = call(backend, query, cache, sinks=sinks, **options)
            if Lkv == 0:
                assert (out == 0).all()
                want = torch.full((4,), -math.inf) if sinks is None else sinks
                want = want.view(1, 4, 1).expand(B, 4, Lq)
                assert torch.allclose(lse.cpu(), want)
    query, cache = randn(1, 4, 0, 32), random_cache(1, 2, 0, 32)
    assert call(backend, query, cache, is_causal=True)[0].shape == (1, 4, 0, 32)


@pytest.mark.parametrize("Lkv", [1023, 1024, 1025, 3000, 4097])
@pytest.mark.parametrize("Lq", [1, 3])
def test_long_contexts(backend: Backend, two_threads: None, Lkv: int, Lq: int) -> None:
    """Where work is split along the keys: limits, starts, masks and NaN at the seams."""
    query = randn(2, 4, Lq, 32, seed=48)
    cache = random_cache(2, 2, Lkv, 32, seed=49, sharpness=2.0)
    dense = cache.k(), cache.v()
    lengths = ints(Lkv - 1, 1030 if Lkv > 1030 else 7)
    start = ints(1024 if Lkv > 1024 else 3, 5)
    mask = some_mask(1, Lq, Lkv, seed=50)
    mask[..., : Lkv // 2] = False  # a part in which nothing is seen
    check(backend, query, cache, dense=dense)
    check(backend, query, cache, dense=dense, mask_is_causal=True, kv_len=lengths)
    check(backend, query, cache, dense=dense, kv_start=start, sinks=randn(4, seed=51))
    check(backend, query, cache, dense=dense, attn_mask=mask, softcap=3.0)
    unseen = torch.arange(Lkv) >= lengths.unsqueeze(-1)
    dirty = cache.poisoned(unseen)
    check(backend, query, dirty, dense=dense, kv_len=lengths, mask_is_causal=True)


def test_a_long_context_with_one_sharp_key(backend: Backend) -> None:
    """One key outweighs thousands: wherever it lies, the merge must keep it."""
    cache = random_cache(1, 1, 5000, 32, seed=52, sharpness=0.05)
    v = cache.v()
    for place in (0, 1023, 1024, 2500, 4999):
        sharp = cache.map(torch.clone)
        sharp.k_norms[0, 0, place] *= 20
        k = sharp.k()
        direction = k[0, 0, place] / k[0, 0, place].square().sum()  # of score 1
        query = (direction * 60 * math.sqrt(32)).float().view(1, 1, 1, 32).expand(1, 4, 1, 32)
        out, lse = check(backend, query, sharp, dense=(k, v))
        assert torch.allclose(out[0, :, 0].cpu().double(), v[0, 0, place].expand(4, 32), atol=1e-4)
        assert torch.allclose(lse.cpu(), torch.tensor(60.0), atol=1e-3)
