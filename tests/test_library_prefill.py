"""Many bf16 rows on the CPU through torch's attention, under all rules.

Processors with AMX take this road by themselves; here it is forced. Small head dims make it short:
it is taken from 2·D rows a KV head on, where one call of torch's gives the result.
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


def test_the_switch(library: Backend) -> None:
    """It is another road: its bits differ, its values do not; and it is off for other types."""
    switch = torch.ops.turboquant._cpu_library_prefill
    assert switch() is True
    q, cache = query(1, 4, 64, 32), random_cache(1, 2, 64, 32)
    on = check(library, q, cache, mask_is_causal=True)
    exact = call(library, q.float(), cache, mask_is_causal=True)
    assert switch(False) is False
    assert switch() is False
    off = call(library, q, cache, mask_is_causal=True)
    assert not same_bits(on[0], off[0])
    assert torch.allclose(on[0].float(), off[0].float(), atol=0.05)
    assert same_bits(call(library, q.float(), cache, mask_is_causal=True)[0], exact[0])


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
def test_any_combination(library: Backend, problem: tuple[Any, ...]) -> None:
    q, cache, options = problem
    check(library, q, cache, **options)


@pytest.mark.parametrize("flag", [False, True])
def test_many_rows(library: Backend, two_threads: None, flag: bool) -> None:
    """A prompt of thousands of tokens, with padding on its left."""
    q, cache = query(1, 1, 2200, 16), random_cache(1, 1, 2300, 16, sharpness=0.3)
    for start, length in [(90, 2200), (0, 2300), (7, 2000)]:
        rule = {"kv_start": torch.tensor(start), "kv_len": torch.tensor(length)}
        check(library, q, cache, mask_is_causal=flag, **rule)


@pytest.mark.parametrize("flag", [False, True])
def test_unseen_slots_may_hold_anything(library: Backend, flag: bool) -> None:
    q, clean = query(2, 2, 64, 16), random_cache(2, 1, 100, 16)
    key = torch.arange(100)
    kv_len, kv_start = torch.tensor([60, 40]), torch.tensor([3, 11])
    unseen = (key >= kv_len.unsqueeze(-1)) | (key < kv_start.unsqueeze(-1))
    options = {"kv_len": kv_len, "kv_start": kv_start, "mask_is_causal": flag}
    want = check(library, q, clean, **options)
    got = call(library, q, clean.poisoned(unseen), **options)
    assert same_bits(got[0], want[0])
    assert same_bits(got[1], want[1])


@pytest.mark.parametrize("layout", ["transposed", "fused", "last stride"])
def test_query_layouts(library: Backend, layout: str) -> None:
    B, H, L, D = 2, 2, 40, 16
    q = {
        "transposed": query(B, L, H, D).transpose(1, 2),
        "fused": query(B, L, 3 * H, D)[:, :, H : 2 * H].transpose(1, 2),
        "last stride": query(B, H, L, 2 * D)[..., ::2],
    }[layout]
    check(library, q, random_cache(B, 1, 50, D), mask_is_causal=True)
