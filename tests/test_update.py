"""update_ writes what compress finds where it is told to, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import oracles
import pytest
import torch
from backends import Backend
from hypothesis import given
from hypothesis import strategies as st
from oracles import FLOATS, LAYOUTS, NORM_DTYPES, randn, relayout, same_bits
from torch import Tensor

import turboquant as tq

pytestmark = pytest.mark.usefixtures("one_thread")

POLICIES = ["l2", "preserve", "unbiased"]


@dataclass
class State:
    """The four tensors of a cache, each a view into a larger buffer full of junk."""

    k_packed: Tensor
    k_norms: Tensor
    v_packed: Tensor
    v_norms: Tensor
    buffers: list[Tensor]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k_packed, self.k_norms, self.v_packed, self.v_norms

    def snapshot(self) -> list[Tensor]:
        return [b.clone() for b in self.buffers]

    def unchanged_since(self, before: list[Tensor]) -> bool:
        return all(same_bits(a, b) for a, b in zip(self.buffers, before))


def state(
    B: int, H: int, S: int, D: int, device: torch.device, *, layout: str = "contiguous",
    norm_dtype: torch.dtype = torch.bfloat16,
) -> State:  # fmt: skip
    g = oracles.generator(7)
    tensors, buffers = [], []
    for _ in "kv":
        packed = torch.randint(0, 256, (B, H, S, D // 2), dtype=torch.uint8, generator=g)
        norms = torch.randn(B, H, S, 1, generator=g).to(norm_dtype)
        for t in (packed, norms):
            view = relayout(t.to(device), layout)
            tensors.append(view)
            size = view.untyped_storage().nbytes() // view.element_size()
            buffers.append(torch.as_strided(view, (size,), (1,), 0))
    return State(*tensors, buffers)


def check_update(
    backend: Backend, cache: State, k: Tensor, v: Tensor, input_pos: Tensor, *,
    k_norm: str = "l2", v_norm: str = "l2", k_offset: Tensor | None = None,
) -> None:  # fmt: skip
    """Update, then account for every slot and for every byte outside."""
    B, H, T, D = k.shape
    centroids, boundaries, rotation = (
        t.to(backend.device) for t in (*tq.codebook(D), tq.rotation(D))
    )
    before = [t.clone() for t in cache.tensors]
    buffers = cache.snapshot()
    result = backend.ops.update_(
        k, v, input_pos, rotation, boundaries, *cache.tensors,
        centroids=centroids, k_norm=k_norm, v_norm=v_norm, k_offset=k_offset,
    )  # fmt: skip
    assert result is None

    positions = input_pos.cpu().long().expand(B, T)
    b, t = (positions >= 0).nonzero(as_tuple=True)  # the tokens that are written, one by one
    slot = positions[b, t]
    kept = torch.ones(B, cache.k_packed.shape[2], dtype=torch.bool)
    kept[b, slot] = False
    assert int((~kept).sum()) == len(slot)  # duplicates have a test of their own
    kept = kept.unsqueeze(1).expand(B, H, -1)
    for side, x, policy, offset in ((0, k, k_norm, k_offset), (2, v, v_norm, None)):
        packed, norms = (part.cpu() for part in cache.tensors[side : side + 2])
        old_packed, old_norms = (part.cpu() for part in before[side : side + 2])
        e = oracles.encode(x, rotation, boundaries, offset)
        e = replace(
            e, y=e.y[b, :, t], length=e.length[b, :, t], index=e.index[b, :, t],
            disputable=e.disputable[b, :, t],
        )  # fmt: skip
        oracles.assert_codes(packed[b, :, slot], e)
        y_hat = centroids.cpu().double()[oracles.unpack(packed[b, :, slot])]
        length = {
            "l2": e.length,
            "preserve": e.length / y_hat.square().sum(-1, keepdim=True).sqrt(),
            "unbiased": e.length / (e.y * y_hat).sum(-1, keepdim=True),
        }[policy]
        slack = 1e-6 + (e.error if policy == "unbiased" else 0.0)
        oracles.assert_rounded(norms[b, :, slot], length, slack=slack)
        assert same_bits(packed[kept], old_packed[kept])
        assert same_bits(norms[kept], old_norms[kept])

    # Put the old values back: then nothing outside of the cache may differ either.
    for part, old in zip(cache.tensors, before):
        part.copy_(old)
    assert cache.unchanged_since(buffers)


@given(
    B=st.integers(1, 3), H=st.integers(1, 3), S=st.integers(1, 20),
    D=st.sampled_from([16, 18, 30, 64, 98]), dtype=st.sampled_from(FLOATS),
    norm_dtype=st.sampled_from(NORM_DTYPES), pos_dtype=st.sampled_from([torch.int32, torch.int64]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    policies=st.tuples(*[st.sampled_from(POLICIES)] * 2), data=st.data(),
)  # fmt: skip
def test_update_any_shape_and_stride(
    backend: Backend, B: int, H: int, S: int, D: int, dtype: torch.dtype,
    norm_dtype: torch.dtype, pos_dtype: torch.dtype, layouts: tuple[str, ...],
    policies: tuple[str, str], data: st.DataObject,
) -> None:  # fmt: skip
    slots = st.lists(st.integers(0, S - 1), unique=True, max_size=S)
    if data.draw(st.booleans()):
        pos = torch.tensor(data.draw(slots), dtype=pos_dtype)
    else:
        T = data.draw(st.integers(1, S))
        rows = [data.draw(st.permutations(range(S)))[:T] for _ in range(B)]
        pos = torch.tensor(rows, dtype=pos_dtype)
    # Some are skipped.
    skip = torch.rand(pos.shape, generator=oracles.generator(3)) < 0.2
    pos = torch.where(skip, -1 - 5 * pos, pos)
    T = pos.shape[-1]
    k, v = (randn(B, H, T, D, seed=s, dtype=dtype).to(backend.device) for s in (1, 2))
    offset = randn(H, 1, D, seed=4).to(backend.device) if data.draw(st.booleans()) else None
    check_update(
        backend,
        state(B, H, S, D, backend.device, layout=layouts[0], norm_dtype=norm_dtype),
        relayout(k, layouts[1]),
        relayout(v, layouts[2]),
        relayout(pos.to(backend.device), layouts[1]),
        k_norm=policies[0], v_norm=policies[1], k_offset=offset,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tuned_head_dim(backend: Backend, dtype: torch.dtype) -> None:
    for D in (64, 80, 96, 128, 192, 256, 510, 512):
        k, v = randn(2, 2, 2, 7, D, seed=D, dtype=dtype).to(backend.device)
        pos = torch.tensor([3, 0, 11, 5, 7, 1, 2], device=backend.device)
        check_update(backend, state(2, 2, 12, D, backend.device), k, v, pos)


def test_many_tokens(backend: Backend, two_threads: None) -> None:
    """More than a block of rows, in an order that is not ascending, a row of its own each."""
    k, v = randn(2, 2, 2, 90, 64, seed=1).to(backend.device)
    pos = torch.stack([torch.randperm(120, generator=oracles.generator(i))[:90] for i in (1, 2)])
    check_update(backend, state(2, 2, 120, 64, backend.device), k, v, pos.to(backend.device))


@pytest.mark.parametrize("order", ["ascending", "left-padded", "shuffled"])
@pytest.mark.parametrize("pos_dtype", [torch.int32, torch.int64])
def test_a_prompt(backend: Backend, two_threads: None, order: str, pos_dtype: torch.dtype) -> None:
    k, v = randn(2, 2, 3, 350, 64, seed=2, dtype=torch.bfloat16).to(backend.device)
    pos = torch.arange(350) + 20
    if order == "left-padded":
        pos = torch.stack([pos - 150, pos]).clamp(min=-1)
    elif order == "shuffled":
        pos = pos[torch.randperm(350, generator=oracles.generator(3))]
    check_update(
        backend, state(2, 3, 400, 64, backend.device), k, v, pos.to(backend.device, pos_dtype),
        v_norm="unbiased",
    )  # fmt: skip


@pytest.mark.parametrize("norm_dtype", NORM_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_compress(
    backend: Backend, norm_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    k, v = randn(2, 2, 3, 40, 64, seed=5, dtype=dtype).to(backend.device)
    offset = randn(2, 3, 1, 64, seed=6).to(backend.device)
    centroids, boundaries, pi = (t.to(backend.device) for t in (*tq.codebook(64), tq.rotation(64)))
    cache = state(2, 3, 50, 64, backend.device, norm_dtype=norm_dtype)
    pos = torch.arange(5, 45, device=backend.device)
    backend.ops.update_(
        k, v, pos, pi, boundaries, *cache.tensors, centroids=centroids, k_norm="preserve",
        v_norm="unbiased", k_offset=offset,
    )  # fmt: skip
    stored = [
        *backend.ops.compress(
            k, pi, boundaries, centroids=centroids, norm="preserve", offset=offset
        ),
        *backend.ops.compress(v, pi, boundaries, centroids=centroids, norm="unbiased"),
    ]
    for have, want in zip(cache.tensors, stored):
        assert same_bits(have[:, :, 5:45].to(want.dtype), want)


def test_float32_norms_are_not_rounded_to_bfloat16(backend: Backend) -> None:
    k, v = randn(2, 1, 1, 3, 32, seed=8).to(backend.device)
    cache = state(1, 1, 3, 32, backend.device, norm_dtype=torch.float32)
    pi, boundaries = tq.rotation(32).to(backend.device), tq.codebook(32)[1].to(backend.device)
    backend.ops.update_(k, v, torch.arange(3, device=k.device), pi, boundaries, *cache.tensors)
    for x, norms in ((k, cache.k_norms), (v, cache.v_norms)):
        oracles.assert_rounded(norms, x.cpu().double().square().sum(-1, keepdim=True).sqrt())


def test_fused_and_expanded_inputs(backend: Backend) -> None:
    qkv = randn(2, 5, 3, 2, 64, seed=9, dtype=torch.bfloat16).to(backend.device)  # [B, T, 3, H, D]
    k, v = (qkv[:, :, i].transpose(1, 2) for i in (1, 2))
    pos = torch.arange(5, device=backend.device)
    check_update(backend, state(2, 2, 8, 64, backend.device), k, v, pos)
    check_update(backend, state(2, 2, 8, 64, backend.device), k[:, :, :1].expand(2, 2, 4, 64),
                 v[:, :1, :4].expand(2, 2, 4, 64), pos[:4])  # fmt: skip


def test_one_buffer_for_keys_and_values(backend: Backend) -> None:
    """[B, S, 2, H, D/2]: each is a strided slice, their bytes interleave."""
    both = torch.full((2, 10, 2, 3, 16), 0xA5, dtype=torch.uint8, device=backend.device)
    norms = torch.full((2, 10, 2, 3, 1), -7, dtype=torch.bfloat16, device=backend.device)
    tensors = [t[:, :, i].transpose(1, 2) for i in (0, 1) for t in (both, norms)]
    k, v = randn(2, 2, 3, 4, 32, seed=10).to(backend.device)
    cache = State(*tensors, buffers=[both.flatten(), norms.flatten()])
    check_update(backend, cache, k, v, torch.tensor([9, 0, 4, 3], device=backend.device))


# ------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("pos_dtype", [torch.int32, torch.int64])
def test_negative_positions_are_skipped(backend: Backend, pos_dtype: torch.dtype) -> None:
    k, v = randn(2, 2, 2, 4, 32, seed=11).to(backend.device)
    least = torch.iinfo(pos_dtype).min
    for row in ([-1, 2, -5, 0], [least, 3, least + 1, 1], [-1, -1, -1, -1]):
        pos = torch.tensor(row, dtype=pos_dtype, device=backend.device)
        check_update(backend, state(2, 2, 5, 32, backend.device), k, v, pos)
    pos = torch.tensor([[-1, -1, 0, 1], [3, -1, -2, 4]], dtype=pos_dtype, device=backend.device)
    check_update(backend, state(2, 2, 5, 32, backend.device), k, v, pos)


FAR = [
    (torch.int32, 6), (torch.int32, 2**31 - 1), (torch.int64, 6), (torch.int64, 7),
    (torch.int64, 2**31), (torch.int64, 2**32), (torch.int64, 2**32 + 1), (torch.int64, 2**62),
    (torch.int64, 2**63 - 1),
]  # fmt: skip


@pytest.mark.parametrize(("pos_dtype", "far"), FAR)
@pytest.mark.parametrize("place", [0, 1, 2, (0, 1), (1, 2)])
def test_a_position_past_the_end(
    backend: Backend, pos_dtype: torch.dtype, far: int, place: int | tuple[int, int]
) -> None:
    """On the CPU it raises and nothing at all is written; on CUDA it alone is dropped."""
    k, v = randn(2, 2, 2, 3, 32, seed=12).to(backend.device)
    cache = state(2, 2, 6, 32, backend.device, layout="sliced")
    pos = torch.tensor([4, 1, 0], dtype=pos_dtype, device=backend.device)
    if isinstance(place, tuple):
        pos = pos.repeat(2, 1)
    pos[place] = far
    before = cache.snapshot()
    if backend.device.type == "cpu":
        boundaries = tq.codebook(32)[1]
        with pytest.raises(RuntimeError, match=(
            rf"^update_: input_pos must be below the capacity 6, got {far}; nothing was written$"
        )):  # fmt: skip
            backend.ops.update_(k, v, pos, tq.rotation(32), boundaries, *cache.tensors)
        assert cache.unchanged_since(before)
    else:
        dropped = State(*(t.clone() for t in cache.tensors), buffers=[])
        dropped.buffers = [t.flatten() for t in dropped.tensors]
        pi, boundaries = tq.rotation(32).to(k.device), tq.codebook(32)[1].to(k.device)
        backend.ops.update_(k, v, pos, pi, boundaries, *cache.tensors)
        # What a skipped token writes is nothing, too.
        pos[place] = -1
        backend.ops.update_(k, v, pos, pi, boundaries, *dropped.tensors)
        for have, want in zip(cache.tensors, dropped.tensors):
            assert same_bits(have, want)
        for t, old in zip(cache.tensors, state(2, 2, 6, 32, k.device).tensors):
            t.copy_(old)
        assert cache.unchanged_since(before)


@pytest.mark.parametrize(("B", "H", "tokens"), [(2, 2, 2), (2, 3, 33), (1, 1, 900), (3, 1, 300)])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_duplicates_are_stored_whole(
    backend: Backend, two_threads: None, B: int, H: int, tokens: int, batched: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """All tokens for two slots, again and again: each vector is one token's, with its norm."""
    D = 128
    k, v = randn(2, B, H, tokens, D, seed=13, dtype=dtype).to(backend.device)
    boundaries, pi = tq.codebook(D)[1].to(backend.device), tq.rotation(D).to(backend.device)
    pos = torch.arange(tokens, device=backend.device) % 2
    pos = pos.repeat(B, 1) if batched else pos
    stored = [backend.ops.compress(x, pi, boundaries) for x in (k, v)]
    for _ in range(1 if backend.name == "reference" else 10):
        cache = state(B, H, tokens, D, backend.device)
        before = [t.clone() for t in cache.tensors]
        backend.ops.update_(k, v, pos, pi, boundaries, *cache.tensors)
        for side in (0, 1):
            packed, norms = cache.tensors[2 * side : 2 * side + 2]
            for slot in (0, 1):
                same = (stored[side][0] == packed[:, :, slot, None]).all(-1)
                same &= (stored[side][1] == norms[:, :, slot, None]).squeeze(-1)
                same[:, :, 1 - slot :: 2] = False  # those went to the other slot
                assert same.any(-1).all()
            assert same_bits(packed[:, :, 2:], before[2 * side][:, :, 2:])
            assert same_bits(norms[:, :, 2:], before[2 * side + 1][:, :, 2:])


@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_nothing_to_write(backend: Backend, sizes: tuple[int, int, int]) -> None:
    B, H, T = sizes
    cache = state(B, H, 4, 32, backend.device)
    before = cache.snapshot()
    k = torch.zeros(B, H, T, 32, device=backend.device)
    pi, boundaries = tq.rotation(32).to(k.device), tq.codebook(32)[1].to(k.device)
    for shape in ((T,), (B, T)):
        pos = torch.zeros(shape, dtype=torch.int64, device=k.device)
        backend.ops.update_(k, k, pos, pi, boundaries, *cache.tensors)
    assert cache.unchanged_since(before)


def test_as_many_tokens_as_slots(backend: Backend) -> None:
    k, v = randn(2, 1, 1, 6, 32, seed=14).to(backend.device)
    pos = torch.arange(5, -1, -1, device=backend.device)
    check_update(backend, state(1, 1, 6, 32, backend.device), k, v, pos)


def test_a_bad_vector_leaves_its_neighbours_alone(backend: Backend) -> None:
    k, v = randn(2, 1, 2, 4, 32, seed=15).to(backend.device)
    bad = k.clone()
    bad[0, 0, 1, 5] = math.nan
    pi, boundaries = tq.rotation(32).to(k.device), tq.codebook(32)[1].to(k.device)
    pos = torch.arange(4, device=k.device)
    clean, dirty = state(1, 2, 4, 32, k.device), state(1, 2, 4, 32, k.device)
    backend.ops.update_(k, v, pos, pi, boundaries, *clean.tensors)
    backend.ops.update_(bad, v, pos, pi, boundaries, *dirty.tensors)
    assert dirty.k_norms[0, 0, 1].isnan().all()
    for t, want in zip(dirty.tensors, clean.tensors):
        if t.dtype != torch.uint8:
            t[0, 0, 1] = want[0, 0, 1] if t is dirty.k_norms else t[0, 0, 1]
        elif t is dirty.k_packed:
            t[0, 0, 1] = want[0, 0, 1]
        assert same_bits(t, want)
