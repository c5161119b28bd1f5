"""Where attention must give the same bits, and whom it must not disturb."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from attention_checks import call, on_device
from backends import Backend
from oracles import QUERY_DTYPES, Cache, randn, random_cache, same_bits, visible_keys
from torch import Tensor

import turboquant as tq

pytestmark = pytest.mark.usefixtures("one_thread")

# decode, a few rows, prefill, a whole prompt; and contexts of one split and of several.
SHAPES = [(1, 40), (1, 2500), (5, 300), (40, 70), (70, 70), (3, 3000)]


def problem(Lq: int, Lkv: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Cache]:
    return randn(2, 4, Lq, 64, seed=1, dtype=dtype), random_cache(2, 2, Lkv, 64, seed=2)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return same_bits(a[0], b[0]) and same_bits(a[1], b[1])


def same_on(backend: Backend, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """To the bit; where plain PyTorch computes, which sums in another order, to rounding."""
    if backend.bitwise:
        return same(a, b)
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b))


@pytest.mark.parametrize(("Lq", "Lkv"), SHAPES)
@pytest.mark.parametrize("dtype", QUERY_DTYPES)
def test_repeated_runs(
    attention_backend: Backend, two_threads: None, Lq: int, Lkv: int, dtype: torch.dtype
) -> None:
    query, cache = problem(Lq, Lkv, dtype)
    first = call(attention_backend, query, cache, mask_is_causal=True)
    for _ in range(3):
        assert same(call(attention_backend, query, cache, mask_is_causal=True), first)


@pytest.mark.parametrize(("Lq", "Lkv"), SHAPES)
@pytest.mark.parametrize("flag", [False, True])
def test_kv_len_of_the_whole_buffer_is_none(
    attention_backend: Backend, Lq: int, Lkv: int, flag: bool
) -> None:
    query, cache = problem(Lq, Lkv)
    want = call(attention_backend, query, cache, mask_is_causal=flag)
    for kv_len in (torch.tensor(Lkv), torch.tensor([Lkv, Lkv], dtype=torch.int32),
                   torch.tensor([Lkv + 1])):  # fmt: skip
        got = call(attention_backend, query, cache, mask_is_causal=flag, kv_len=kv_len)
        assert same(got, want)
    start = torch.tensor([0, -4])
    assert same(call(attention_backend, query, cache, mask_is_causal=flag, kv_start=start), want)


@pytest.mark.parametrize(("Lq", "length"), SHAPES)
@pytest.mark.parametrize("options", [{}, {"mask_is_causal": True}, {"kv_start": 7}])
def test_two_buffer_lengths(
    attention_backend: Backend, Lq: int, length: int, options: dict[str, Any]
) -> None:
    """What counts is the fill: the same bits from a buffer of any capacity, junk behind it."""
    query, short = problem(Lq, length)
    options = {k: torch.tensor(v) if k == "kv_start" else v for k, v in options.items()}
    want = call(attention_backend, query, short, kv_len=torch.tensor(length), **options)
    for extra in (1, 31, 2048):
        padding = random_cache(2, 2, extra, 64, seed=3)
        padding.k_norms.fill_(torch.nan)
        padding.v_norms.fill_(torch.nan)
        parts = zip(short.args[:4], padding.args[:4])
        longer = Cache(*(torch.cat(p, dim=2) for p in parts), short.centroids, short.rotation)
        got = call(attention_backend, query, longer, kv_len=torch.tensor(length), **options)
        assert same_on(attention_backend, got, want)


@pytest.mark.parametrize(("Lq", "Lkv"), SHAPES)
def test_the_flag_beside_an_equivalent_mask(attention_backend: Backend, Lq: int, Lkv: int) -> None:
    """It only allows keys to be skipped: equal to rounding, equal bits in repetition."""
    query, cache = problem(Lq, Lkv)
    mask = visible_keys(2, Lq, Lkv, causal=True).unsqueeze(1)
    without = call(attention_backend, query, cache, attn_mask=mask)
    beside = call(attention_backend, query, cache, attn_mask=mask, mask_is_causal=True)
    assert torch.allclose(beside[0], without[0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(beside[1], without[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("Lq", "Lkv"), SHAPES)
@pytest.mark.parametrize("dtype", QUERY_DTYPES)
def test_number_of_threads(
    attention_backend: Backend, two_threads: None, Lq: int, Lkv: int, dtype: torch.dtype
) -> None:
    query, cache = problem(Lq, Lkv, dtype)
    options = {"mask_is_causal": True, "sinks": randn(4, seed=4)}
    two = call(attention_backend, query, cache, **options)
    torch.set_num_threads(1)
    assert same_on(attention_backend, call(attention_backend, query, cache, **options), two)
    torch.set_num_threads(3)
    assert same_on(attention_backend, call(attention_backend, query, cache, **options), two)


def test_codec_does_not_depend_on_threads(kernels: Backend, two_threads: None) -> None:
    x, pi, (centroids, boundaries) = randn(700, 64, seed=5), tq.rotation(64), tq.codebook(64)
    x, pi, centroids, boundaries = on_device(kernels, x, pi, centroids, boundaries)
    stored = tq.compress(x, pi, boundaries)
    back = tq.decompress(*stored, centroids, pi)
    torch.set_num_threads(1)
    again = tq.compress(x, pi, boundaries)
    assert same_bits(again[0], stored[0])
    assert same_bits(again[1], stored[1])
    assert same_bits(tq.decompress(*stored, centroids, pi), back)


@pytest.mark.parametrize(("Lq", "Lkv"), [(1, 40), (1, 2500), (40, 70)])
def test_a_batch_row_does_not_see_its_neighbours(
    attention_backend: Backend, Lq: int, Lkv: int
) -> None:
    """The same rows in a larger batch, beside a row full of NaN: the same bits."""
    query, cache = problem(Lq, Lkv)
    want = call(attention_backend, query, cache, mask_is_causal=True)
    broken = random_cache(1, 2, Lkv, 64, seed=6)
    broken.k_norms.fill_(torch.nan)
    broken.v_norms.fill_(torch.nan)
    parts = zip(cache.args[:4], broken.args[:4])
    larger = Cache(*(torch.cat(p) for p in parts), cache.centroids, cache.rotation)
    three = torch.cat([query, query[:1]])
    got = call(attention_backend, three, larger, mask_is_causal=True)
    assert same_on(attention_backend, (got[0][:2], got[1][:2]), want)
    assert got[0][2].isnan().all()


@pytest.mark.parametrize(("Lq", "Lkv"), SHAPES)
def test_inputs_are_left_alone(attention_backend: Backend, Lq: int, Lkv: int) -> None:
    query, cache = problem(Lq, Lkv, torch.bfloat16)
    mask = visible_keys(2, Lq, Lkv, causal=True).unsqueeze(1)
    kv_len, sinks = torch.tensor([Lkv, Lkv // 2]), randn(4)
    inputs = [query, *cache.args, mask, kv_len, sinks]
    before = [t.clone() for t in inputs]
    call(attention_backend, query, cache, attn_mask=mask, kv_len=kv_len, sinks=sinks)
    for t, old in zip(inputs, before):
        assert same_bits(t, old)


def test_calls_from_many_python_threads(kernels: Backend) -> None:
    """No state is shared between calls."""
    jobs = [problem(Lq, Lkv) for Lq, Lkv in SHAPES]
    jobs = [tuple(on_device(kernels, *job)) for job in jobs]
    want = [tq.tq4_attention(q, *c.args, mask_is_causal=True) for q, c in jobs]

    def work(i: int) -> bool:
        torch.set_num_threads(1)
        q, c = jobs[i % len(jobs)]
        return same(tq.tq4_attention(q, *c.args, mask_is_causal=True), want[i % len(jobs)])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(20)))
