"""bf16 queries on the CPU's matrix units, under all rules.

From 2·D rows a KV head on they go through torch's attention, where one call of it gives the result.
Processors with AMX take this road by themselves; here it is forced. Small head dims make it short.

With fewer rows, D >= 64 goes to kernels that need AMX; without it these tests see the float32 ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_checks import call, check
from backends import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import randn, random_cache, relayout, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


def query(B: int, H: int, L: int, D: int, seed: int = 1) -> torch.Tensor:
    return randn(B, H, L, D, seed=seed, dtype=torch.bfloat16)


def test_the_switch(amx: Backend) -> None:
    """It is another road: its bits differ, its values do not; and it is off for other types."""
    switch = torch.ops.turboquant._cpu_amx
    assert switch() is True
    q, cache = query(1, 4, 64, 32), random_cache(1, 2, 64, 32)
    on = check(amx, q, cache, mask_is_causal=True)
    exact = call(amx, q.float(), cache, mask_is_causal=True)
    assert switch(False) is False
    assert switch() is False
    off = call(amx, q, cache, mask_is_causal=True)
    assert not same_bits(on[0], off[0])
    assert torch.allclose(on[0].float(), off[0].float(), atol=0.05)
    assert same_bits(call(amx, q.float(), cache, mask_is_causal=True)[0], exact[0])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, ...]:
    B, Hkv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    D = draw(st.sampled_from([16, 18, 32]))
    Lq = -(-2 * D // group) + draw(st.integers(0, 30))
    Lkv = draw(st.sampled_from([Lq, Lq + 1, 2 * Lq + 7, max(1, Lq - 9), 3, 8]))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["mask_is_causal"] = True
    elif Lq == Lkv and draw(st.booleans()):
        options["is_causal"] = True

    def lengths(low: int, high: int) -> torch.Tensor:
        n = draw(st.sampled_from([1, B]))
        return torch.tensor(draw(st.lists(st.integers(low, high), min_size=n, max_size=n)))

    if draw(st.booleans()):
        options["kv_len"] = lengths(0, Lkv + 1)
    if draw(st.booleans()):
        options["kv_start"] = lengths(-1, Lkv)
    if draw(st.booleans()):
        options["sinks"] = randn(Hkv * group, seed=3)
    if draw(st.booleans()):
        options["scale"] = 0.15
    layout = draw(st.sampled_from(["contiguous", "reversed", "sliced", "gaps"]))
    q = relayout(query(B, Hkv * group, Lq, D), draw(st.sampled_from(["contiguous", "sliced"])))
    cache = random_cache(
        B,
        Hkv,
        Lkv,
        D,
        seed=4,
        norm_dtype=draw(st.sampled_from([torch.bfloat16, torch.float32])),
        sharpness=0.5,
    ).map(lambda t: relayout(t, layout))
    return q, cache, options


@settings(max_examples=150)
@given(problem=problems())
def test_any_combination(amx: Backend, problem: tuple[Any, ...]) -> None:
    q, cache, options = problem
    check(amx, q, cache, **options)


@pytest.mark.parametrize("flag", [False, True])
def test_many_rows(amx: Backend, two_threads: None, flag: bool) -> None:
    """A prompt of thousands of tokens, with padding on its left."""
    q, cache = query(1, 1, 2200, 16), random_cache(1, 1, 2300, 16, sharpness=0.3)
    for start, length in [(90, 2200), (0, 2300), (7, 2000)]:
        rule = {"kv_start": torch.tensor(start), "kv_len": torch.tensor(length)}
        check(amx, q, cache, mask_is_causal=flag, **rule)


@pytest.mark.parametrize("D", [64, 98, 128, 130, 256, 512])
@pytest.mark.parametrize("L", [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 600])
def test_around_the_tiles(amx: Backend, D: int, L: int) -> None:
    cache = random_cache(1, 1, L, D, seed=5)
    for rows in (2, 7, 8, 9, 47, 48, 49):
        check(amx, query(1, rows, 1, D), cache)
        check(amx, query(1, 1, rows, D), cache, mask_is_causal=True)


@pytest.mark.parametrize(("Lq", "D"), [(64, 16), (1, 64), (9, 130)])
@pytest.mark.parametrize("flag", [False, True])
def test_unseen_slots_may_hold_anything(amx: Backend, Lq: int, D: int, flag: bool) -> None:
    q, clean = query(2, 2, Lq, D), random_cache(2, 1, 100, D)
    key = torch.arange(100)
    kv_len, kv_start = torch.tensor([60, 40]), torch.tensor([3, 11])
    unseen = (key >= kv_len.unsqueeze(-1)) | (key < kv_start.unsqueeze(-1))
    options = {"kv_len": kv_len, "kv_start": kv_start, "mask_is_causal": flag}
    want = check(amx, q, clean, **options)
    got = call(amx, q, clean.poisoned(unseen), **options)
    assert same_bits(got[0], want[0])
    assert same_bits(got[1], want[1])


def test_a_visible_nan_is_seen(amx: Backend) -> None:
    """By its own row alone, among those of one tile."""
    cache = random_cache(1, 1, 70, 64)
    cache.v_norms[0, 0, 68] = torch.nan
    out, _ = call(amx, query(1, 2, 3, 64), cache, mask_is_causal=True)
    assert not out[:, :, 0].isnan().any()
    assert out[:, :, 1:].isnan().all()


@pytest.mark.parametrize("codebook", ["zeros", "one level", "tiny"])
def test_any_codebook(amx: Backend, codebook: str) -> None:
    """Whatever 16 numbers it holds."""
    cache = random_cache(1, 1, 90, 64)
    level = torch.arange(16)
    cache.centroids = {
        "zeros": torch.zeros(16),
        "one level": (level == 3) * -0.25,
        "tiny": (level - 4) * 1e-20,
    }[codebook]
    check(amx, query(1, 4, 1, 64), cache)


@pytest.mark.parametrize("layout", ["transposed", "fused", "last stride"])
@pytest.mark.parametrize(("L", "D"), [(40, 16), (5, 64)])
def test_query_layouts(amx: Backend, layout: str, L: int, D: int) -> None:
    B, H = 2, 2
    q = {
        "transposed": query(B, L, H, D).transpose(1, 2),
        "fused": query(B, L, 3 * H, D)[:, :, H : 2 * H].transpose(1, 2),
        "last stride": query(B, H, L, 2 * D)[..., ::2],
    }[layout]
    check(amx, q, random_cache(B, 1, 50, D), mask_is_causal=True)
