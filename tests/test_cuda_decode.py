"""What only a GPU shows: graphs, streams, long contexts, and every shape of the tuned kernels.

The contract itself is tested in test_attention.py, for all backends at small sizes. Large problems
are compared with float64 attention on the GPU, small ones with oracles.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import oracles
import pytest
import torch
from attention_checks import call, check
from backends import CUDA, DIMS, GPU, ON_GPU
from gpu_problems import (
    DTYPE_IDS,
    DTYPES,
    assert_a_graph_follows,
    assert_rows,
    cosine,
    exact,
    gpu_cache,
    gpu_randn,
    heavy_keys_with_small_values,
    identical,
    ints,
    ops,
)
from oracles import Cache, randn, random_cache, same_bits
from torch import Tensor, nn

import turboquant as tq

pytestmark = [*ON_GPU, pytest.mark.usefixtures("one_thread")]


# --------------------------------------------------------------------------- every size and ratio


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, **DTYPE_IDS)
def test_every_length(dim: int, dtype: torch.dtype) -> None:
    """1 to 300 keys: every place in a tile where a context may end."""
    longest = random_cache(1, 2, 300, dim, seed=1)
    k, v = longest.k(), longest.v()
    query = randn(1, 8, 1, dim, seed=2, dtype=dtype)
    for L in range(1, 301):
        cache = longest.map(lambda t: t[:, :, :L].contiguous())  # noqa: B023
        check(CUDA, query, cache, dense=(k[:, :, :L], v[:, :, :L]))


@pytest.mark.parametrize("dim", DIMS)
def test_every_number_of_rows(dim: int) -> None:
    cache = random_cache(1, 1, 150, dim, seed=3)
    dense = cache.k(), cache.v()
    for Lq in range(1, 71):
        query = randn(1, 3, Lq, dim, seed=Lq, dtype=DTYPES[Lq % 2])
        check(CUDA, query, cache, dense=dense, mask_is_causal=True)
        check(CUDA, query, cache, dense=dense, kv_len=torch.tensor(101))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("group", [1, 2, 4, 5, 6, 7, 8, 16, 32])
@pytest.mark.parametrize("Hkv", [1, 2])
def test_every_group(dim: int, group: int, Hkv: int) -> None:
    cache = random_cache(2, Hkv, 333, dim, seed=4)
    dense = cache.k(), cache.v()
    for Lq in (1, 3):
        query = randn(2, Hkv * group, Lq, dim, seed=5, dtype=torch.bfloat16)
        check(CUDA, query, cache, dense=dense, mask_is_causal=True)


@pytest.mark.parametrize("dim", DIMS)
def test_many_rows_of_many_heads(dim: int) -> None:
    """Rows of a group beyond what one tile of queries holds."""
    cache = random_cache(1, 2, 200, dim, seed=6)
    for Lq in (2, 5, 17, 130):
        query = randn(1, 14, Lq, dim, seed=7, dtype=torch.bfloat16)
        check(CUDA, query, cache, mask_is_causal=True)


@pytest.mark.parametrize("dim", [64, 128, 512])
def test_a_tall_batch(dim: int) -> None:
    """More rows than SMs, each of another length."""
    g = torch.Generator().manual_seed(8)
    lengths = torch.randint(0, 200, (300,), generator=g, dtype=torch.int32).to(GPU)
    cache, query = gpu_cache(300, 2, 199, dim, seed=9), gpu_randn(300, 8, 1, dim, seed=10)
    assert_rows(
        ops.tq4_sdpa(query, *cache.args, kv_len=lengths), exact(query, cache, length=lengths)
    )


# ------------------------------------------------------------------------------- long contexts

LONG = [(16, 2, 256), (32, 4, 512), (32, 8, 128)]


@pytest.mark.parametrize(("Hq", "Hkv", "dim"), LONG)
@pytest.mark.parametrize("tail", ["1000 times as large", "NaN"])
def test_a_short_context_in_a_long_buffer(Hq: int, Hkv: int, dim: int, tail: str) -> None:
    """8192 of 32768 and of 131072 slots: the same bits, whatever lies behind them."""
    query, length = gpu_randn(1, Hq, 1, dim, seed=11), ints(8192)
    longest = gpu_cache(1, Hkv, 131072, dim, seed=12)
    for norms in (longest.k_norms, longest.v_norms):
        norms[:, :, 8192:] *= math.nan if tail == "NaN" else 1000.0
    filled = longest.map(lambda t: t[:, :, :8192])
    want = exact(query, filled)
    got = {}
    for L in (32768, 131072):
        cache = longest.map(lambda t: t[:, :, :L].contiguous())  # noqa: B023
        got[L] = ops.tq4_sdpa(query, *cache.args, kv_len=length)
        assert_rows(got[L], want)
        # The test would notice if kv_len were ignored.
        assert not cosine(ops.tq4_sdpa(query, *cache.args), want) >= 0.5
    assert identical(got[32768], got[131072])
    assert identical(ops.tq4_sdpa(query, *longest.args, kv_len=length), got[131072])


@pytest.mark.parametrize(("Hq", "Hkv", "dim"), LONG)
@pytest.mark.parametrize("dtype", DTYPES, **DTYPE_IDS)
def test_a_full_long_context(Hq: int, Hkv: int, dim: int, dtype: torch.dtype) -> None:
    cache = gpu_cache(1, Hkv, 131072, dim, seed=13)
    query = gpu_randn(1, Hq, 2, dim, seed=14, dtype=dtype)
    got = ops.tq4_sdpa(query, *cache.args, mask_is_causal=True)
    assert_rows(got, exact(query, cache, causal=True))
    one = query[:, :, 1:].contiguous()
    assert_rows(ops.tq4_sdpa(one, *cache.args), exact(one, cache))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("Lq", [1, 4])
def test_ragged_lengths_and_starts(dim: int, Lq: int) -> None:
    """A batch of empty, tiny and long rows, NaN in all that is unseen."""
    L = 6000
    lengths, starts = ints(0, 1, 31, 32, 33, 5000, L), ints(0, 0, 7, 31, 40, 2999, 1)
    cache, query = gpu_cache(7, 2, L, dim, seed=15), gpu_randn(7, 8, Lq, dim, seed=16)
    key = torch.arange(L, device=GPU)

    def dirty(unseen: Tensor) -> Cache:
        return cache.map(
            lambda t: t if t.dtype == torch.uint8
            else t.masked_fill(unseen[:, None, :, None], math.nan)
        )  # fmt: skip

    behind = key >= lengths.unsqueeze(-1)
    before = key < starts.unsqueeze(-1)
    for causal in (False, True):
        options = {"mask_is_causal": causal, "kv_len": lengths}
        got = ops.tq4_sdpa(query, *dirty(behind).args, **options)
        assert_rows(got, exact(query, cache, length=lengths, causal=causal))
        got, lse = ops.tq4_attention(
            query, *dirty(behind | before).args, **options, kv_start=starts
        )
        want = exact(query, cache, length=lengths, start=starts, causal=causal)
        assert_rows(got, want)
        assert torch.equal(lse == -math.inf, (want == 0).all(-1))


@pytest.mark.parametrize("dim", DIMS)
def test_kv_start_alone(dim: int) -> None:
    cache, query = gpu_cache(3, 2, 3000, dim, seed=17), gpu_randn(3, 8, 1, dim, seed=18)
    starts = ints(2999, 1000, 3000, dtype=torch.int64)
    got, _ = ops.tq4_attention(query, *cache.args, kv_start=starts)
    assert_rows(got, exact(query, cache, start=starts))


# ----------------------------------------------------------------------------- blocks that give up


@pytest.mark.parametrize("dim", DIMS)
def test_blocks_that_give_up_waiting(impatient: None, dim: int) -> None:
    cache, query = gpu_cache(1, 2, 9000, dim, seed=25), gpu_randn(1, 8, 1, dim, seed=26)
    assert_rows(ops.tq4_sdpa(query, *cache.args), exact(query, cache))
    cache, query = gpu_cache(3, 2, 5000, dim, seed=27), gpu_randn(3, 8, 1, dim, seed=28)
    lengths = ints(5000, 31, 3333)
    got = ops.tq4_sdpa(query, *cache.args, kv_len=lengths)
    assert_rows(got, exact(query, cache, length=lengths))


# ------------------------------------------------------------------- masks, softcap, sinks, norms


def masks(B: int, Lq: int, L: int) -> dict[str, Tensor]:
    some = torch.rand(B, 1, Lq, L, generator=oracles.generator(19)) < 0.5
    halves, blind, one = some.clone(), some.clone(), torch.zeros_like(some)
    halves[..., : L // 2] = False
    blind[0] = False
    one[..., L // 3] = True
    return {"some": some, "second half": halves, "a row without keys": blind, "one key": one,
            "no keys": torch.zeros_like(some), "broadcast": some[:1]}  # fmt: skip


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("Lq", [1, 5])
def test_masks(dim: int, Lq: int) -> None:
    cache = random_cache(2, 2, 700, dim, seed=20)
    dense, query = (cache.k(), cache.v()), randn(2, 8, Lq, dim, seed=21, dtype=torch.bfloat16)
    for mask in masks(2, Lq, 700).values():
        check(CUDA, query, cache, dense=dense, attn_mask=mask)
        check(CUDA, query, cache, dense=dense, attn_mask=mask, kv_len=torch.tensor([650, 2]))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("Lq", [1, 5])
def test_softcap_and_sinks(dim: int, Lq: int) -> None:
    cache = random_cache(2, 2, 700, dim, seed=22)
    dense, query = (cache.k(), cache.v()), randn(2, 8, Lq, dim, seed=23, dtype=torch.bfloat16)
    lengths = torch.tensor([0, 641])
    for sinks in (randn(8, seed=24), randn(8, seed=24).bfloat16() + 6, torch.full((8,), -math.inf)):
        check(CUDA, query, cache, dense=dense, sinks=sinks)
        check(CUDA, query, cache, dense=dense, sinks=sinks, softcap=1.5, kv_len=lengths)
    for softcap in (0.3, 20.0):
        check(CUDA, query, cache, dense=dense, softcap=softcap, mask_is_causal=True)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, **DTYPE_IDS)
def test_float32_norms(dim: int, dtype: torch.dtype) -> None:
    query = randn(2, 8, 1, dim, seed=25, dtype=dtype)
    check(CUDA, query, random_cache(2, 2, 555, dim, seed=26, norm_dtype=torch.float32))


# ------------------------------------------------------------------------- strides and alignment


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("Lq", [1, 3])
def test_slices_that_start_anywhere(dim: int, Lq: int) -> None:
    """From an odd slot the norms, and at some dims the rows, lie at no multiple of 16 bytes."""
    whole = random_cache(2, 3, 420, dim, seed=27)
    k, v = whole.k(), whole.v()
    query = randn(2, 6, Lq, dim, seed=28, dtype=torch.bfloat16)
    for first, last in [(1, 420), (3, 400), (8, 419), (17, 50), (411, 412)]:
        cache = whole.map(lambda t: t[:, :, first:last])  # noqa: B023
        check(CUDA, query, cache, dense=(k[:, :, first:last], v[:, :, first:last]))
    check(CUDA, query[:, :4], whole.map(lambda t: t[:, 1:, ::2]), mask_is_causal=True)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("offset", [1, 2, 4, 8, 15])
def test_storage_that_starts_anywhere(dim: int, offset: int) -> None:
    plain = random_cache(2, 2, 260, dim, seed=29)
    query = randn(2, 8, 1, dim, seed=30, dtype=torch.bfloat16)

    def shifted(t: Tensor) -> Tensor:
        storage = t.new_empty(t.numel() + offset)
        return storage[offset:].view(t.shape).copy_(t)

    want = check(CUDA, query, plain)
    got = check(CUDA, shifted(query), plain.map(shifted))
    torch.testing.assert_close(got[0], want[0], rtol=0.02, atol=1e-2 * oracles.rms(want[0]))


@pytest.mark.parametrize("dim", DIMS)
def test_tokens_before_heads(dim: int) -> None:
    """[B, L, H, D] as many models store it, keys and values side by side."""
    cache = random_cache(2, 4, 300, dim, seed=31)
    both = cache.map(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))
    check(CUDA, randn(2, 8, 1, dim, seed=32, dtype=torch.bfloat16), both)


# ---------------------------------------------------------------------------------- magnitudes


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("score", [23.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], **DTYPE_IDS)
def test_the_heaviest_keys_have_the_smallest_values(
    dim: int, score: float, dtype: torch.dtype
) -> None:
    query, cache = heavy_keys_with_small_values(1, 4, 1, dim, score, dtype, seed=33)
    want = exact(query, cache)
    assert 1e-10 < float(want.abs().max()) < 1e-4
    assert_rows(ops.tq4_sdpa(query, *cache.args), want, bound=0.02)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("factor", [1e4, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, **DTYPE_IDS)
def test_huge_and_tiny_queries(dim: int, factor: float, dtype: torch.dtype) -> None:
    """The scale undoes the factor: the same attention, if nothing overflows on the way."""
    cache = gpu_cache(2, 2, 500, dim, seed=34)
    query = (gpu_randn(2, 8, 1, dim, seed=35, dtype=torch.float32) * factor).to(dtype)
    assert query.isfinite().all()
    scale = dim**-0.5 / factor
    assert_rows(ops.tq4_sdpa(query, *cache.args, scale=scale), exact(query, cache, scale=scale))


@pytest.mark.parametrize("dim", DIMS)
def test_queries_of_all_sizes_side_by_side(dim: int) -> None:
    """Each head of a group has a scale of its own."""
    cache = gpu_cache(1, 2, 500, dim, seed=36)
    factors = torch.tensor([1e-6, 1.0, 1e-3, 3.0, 1.0, 0.0, 1e-12, 2.0], device=GPU)
    query = (gpu_randn(1, 8, 1, dim, seed=37) * factors.view(1, 8, 1, 1)).bfloat16()
    assert_rows(ops.tq4_sdpa(query, *cache.args), exact(query, cache))


@pytest.mark.parametrize("dim", DIMS)
def test_scores_in_the_tens_of_thousands(dim: int) -> None:
    """Nothing overflows, and the largest score is found: its key's value is the result."""
    cache = gpu_cache(1, 1, 900, dim, seed=38)
    cache.k_norms[:, :, 700] *= 4
    last = cache.map(lambda t: t[0, 0, 700:701])
    pairs = last.args[:2], last.args[2:4]
    key, value = (
        ops.decompress(*pair, cache.centroids, cache.rotation, dtype=torch.float32)[0]
        for pair in pairs
    )
    query = (key * 100).expand(1, 4, 1, dim).bfloat16().contiguous()
    out = ops.tq4_sdpa(query, *cache.args)
    assert_rows(out, value.double().expand(1, 4, 1, dim))


# ---------------------------------------------------------------------- graphs, streams, memory


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("Lq", [1, 4])
def test_a_graph_follows_the_growing_context(dim: int, Lq: int) -> None:
    """At every fill from 1 to the end of the buffer."""
    cache, query = gpu_cache(2, 2, 601, dim, seed=39), gpu_randn(2, 8, Lq, dim, seed=40)
    assert_a_graph_follows(query, cache, range(1, 602))


@pytest.mark.parametrize(("Hq", "Hkv", "dim"), LONG)
def test_a_graph_in_a_long_buffer(Hq: int, Hkv: int, dim: int) -> None:
    cache, query = gpu_cache(1, Hkv, 40000, dim, seed=41), gpu_randn(1, Hq, 1, dim, seed=42)
    length = ints(1)
    ops.tq4_sdpa(query, *cache.args, kv_len=length)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.tq4_sdpa(query, *cache.args, kv_len=length)
    for n in (1, 100, 40000, 8192, 0, 39999, 33, 20001):
        length.fill_(n)
        graph.replay()
        first = out.clone()
        graph.replay()
        assert identical(out, first)
        assert identical(out, ops.tq4_sdpa(query, *cache.args, kv_len=length))


@contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def five_ops(dim: int, Lq: int) -> dict[str, Callable[[], Any]]:
    """Every op with all of its optional tensors, on the GPU."""
    pi, (centroids, boundaries) = tq.rotation(dim).to(GPU), tq.codebook(dim)
    centroids, boundaries = centroids.to(GPU), boundaries.to(GPU)
    x, offset = gpu_randn(2, 2, 40, dim), gpu_randn(2, 2, 1, dim)
    cache, pos = gpu_cache(2, 2, 300, dim), torch.arange(40, device=GPU).expand(2, 40)
    query, lengths, starts = gpu_randn(2, 8, Lq, dim), ints(300, 17), ints(1, 2)
    mask, sinks = torch.ones(2, 1, Lq, 300, dtype=torch.bool, device=GPU), gpu_randn(8)
    common = {"attn_mask": mask, "kv_len": lengths, "mask_is_causal": True}
    return {
        "compress": lambda: tq.compress(x, pi, boundaries, centroids=centroids, norm="unbiased",
                                        offset=offset),
        "decompress": lambda: ops.decompress(*cache.args[:2], centroids, pi, offset=offset),
        "update_": lambda: tq.update_(x, x, pos, pi, boundaries, *cache.args[:4],
                                      centroids=centroids, k_norm="preserve", k_offset=offset),
        "tq4_sdpa": lambda: ops.tq4_sdpa(query, *cache.args, **common),
        "tq4_attention": lambda: ops.tq4_attention(query, *cache.args, **common, kv_start=starts,
                                                  softcap=3.0, sinks=sinks),
    }  # fmt: skip


@pytest.mark.parametrize("dim", [*DIMS, 50])
@pytest.mark.parametrize("Lq", [1, 100])
def test_no_op_synchronises(dim: int, Lq: int) -> None:
    for run in five_ops(dim, Lq).values():
        run()  # what happens once, at the first call, may
        with synchronisation_is_an_error():
            run()


@pytest.mark.parametrize("dim", [*DIMS, 50])
@pytest.mark.parametrize("Lq", [1, 100])
def test_every_op_can_be_captured(dim: int, Lq: int) -> None:
    """Which also proves that no library call of ours waits for the GPU."""
    for run in five_ops(dim, Lq).values():
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
    torch.cuda.synchronize()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("Lq", [1, 4])
def test_repeated_runs_are_identical(dim: int, Lq: int) -> None:
    cache, query = gpu_cache(1, 4, 9000, dim, seed=43), gpu_randn(1, 16, Lq, dim, seed=44)
    out, lse = ops.tq4_attention(query, *cache.args, mask_is_causal=True)
    for _ in range(50):
        again = ops.tq4_attention(query, *cache.args, mask_is_causal=True)
        assert identical(again[0], out)
        assert identical(again[1], lse)


@pytest.mark.parametrize("dims", [(128, 128), (64, 512), (256, 80), (192, 96)])
def test_two_streams_at_once(dims: tuple[int, int]) -> None:
    """Different problems at the same time share nothing."""
    problems = []
    for i, (dim, B, L) in enumerate(zip(dims, (1, 3), (20000, 3001))):
        cache = gpu_cache(B, 2, L, dim, seed=45 + i)
        problems.append((gpu_randn(B, 8, 1, dim, seed=47 + i), *cache.args))
    want = [ops.tq4_sdpa(*problem) for problem in problems]
    streams = [torch.cuda.Stream(GPU) for _ in problems]
    got: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(200):
        for stream, problem, results in zip(streams, problems, got):
            with torch.cuda.stream(stream):
                results.append(ops.tq4_sdpa(*problem))
    torch.cuda.synchronize()
    for results, right in zip(got, want):
        assert all(identical(out, right) for out in results)


def test_one_graph_on_two_streams() -> None:
    """Two captures of one problem, replayed at once: no scratch memory of one is the other's."""
    cache, query = gpu_cache(1, 8, 16384, 128, seed=49), gpu_randn(1, 32, 1, 128, seed=50)
    want = ops.tq4_sdpa(query, *cache.args)
    torch.cuda.synchronize()
    graphs, outs, streams = [], [], [torch.cuda.Stream(GPU) for _ in range(2)]
    for _ in streams:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append([ops.tq4_sdpa(query, *cache.args) for _ in range(10)])
        graphs.append(graph)
    for _ in range(20):
        for out in (t for results in outs for t in results):
            out.zero_()
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(identical(out, want) for results in outs for out in results)


@pytest.mark.parametrize("dim", DIMS)
def test_beside_a_busy_stream(dim: int) -> None:
    """Where other work holds the SMs nothing waits for CTAs that cannot start."""
    cache, query = gpu_cache(1, 4, 30000, dim, seed=51), gpu_randn(1, 16, 1, dim, seed=52)
    want = ops.tq4_sdpa(query, *cache.args)
    a = gpu_randn(4096, 4096, seed=53)
    busy, ours = torch.cuda.Stream(GPU), torch.cuda.Stream(GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        for _ in range(150):
            torch.mm(a, a)
    with torch.cuda.stream(ours):
        got = [ops.tq4_sdpa(query, *cache.args) for _ in range(150)]
    torch.cuda.synchronize()
    assert all(identical(out, want) for out in got)


@pytest.mark.parametrize(("Hq", "Hkv", "dim"), LONG)
def test_memory_does_not_grow_with_the_context(Hq: int, Hkv: int, dim: int) -> None:
    """Beyond the result: some MB of partial sums, however long the context."""
    query, extra = gpu_randn(1, Hq, 1, dim, seed=54), {}
    longest = gpu_cache(1, Hkv, 131072, dim, seed=55)
    for L in (4096, 131072):
        cache = longest.map(lambda t: t[:, :, :L])  # noqa: B023
        ops.tq4_sdpa(query, *cache.args)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.tq4_sdpa(query, *cache.args)
        extra[L] = torch.cuda.max_memory_allocated() - before
    assert extra[131072] <= 16 * 2**20, extra
    assert extra[131072] <= max(2 * extra[4096], 8 * 2**20), extra


# ------------------------------------------------------------------------------- torch.compile


class Step(nn.Module):
    """One token through one layer's cache."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cache = tq.TurboQuantKVCache(2, dim, 64)

    def forward(self, query: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        self.cache.update(pos, k, v)
        return self.cache.attend(query, pos)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_compiled_decode_loop(dim: int) -> None:
    """Under fullgraph and CUDA graphs: the bits of the eager loop at every step."""
    torch._dynamo.reset()
    step, eager = Step(dim).to(GPU), Step(dim).to(GPU)
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for i in range(64):
            query = gpu_randn(1, 8, 1, dim, seed=3 * i)
            k, v = gpu_randn(2, 1, 2, 1, dim, seed=3 * i + 1)
            pos = torch.tensor([i], device=GPU)
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(query, k, v, pos).clone()
            assert identical(out, eager(query, k, v, pos)), i
    for name, state in eager.cache.named_buffers():
        assert same_bits(step.cache.get_buffer(name), state), name


@pytest.mark.parametrize("dim", DIMS)
def test_the_two_ops_agree(dim: int) -> None:
    """tq4_sdpa and tq4_attention are one kernel: call() compares their bits."""
    query = randn(2, 8, 1, dim, seed=56, dtype=torch.bfloat16)
    call(CUDA, query, random_cache(2, 2, 4000, dim, seed=57))
