"""Attention of many query rows on the GPU: tiles, rounds, chunks at the end of a context.

What test_cuda_decode.py shows of few rows holds here too; large problems are compared with float64
attention on the GPU, small ones with oracles.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import oracles
import pytest
import torch
from attention_checks import check
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
from oracles import randn, random_cache

pytestmark = [*ON_GPU, pytest.mark.usefixtures("one_thread")]

# Heads enough that a few hundred tokens are work for prefill kernels: 16 KV heads, groups of 2.
B, HKV, HQ = 4, 4, 8


@pytest.fixture(params=[None, 300_000], ids=["", "windows"])
def workspace(request: pytest.FixtureRequest) -> Iterator[None]:
    """Bytes for images of keys and values; if they are few, the kernels attend to a window of keys
    after the other, and carry sums from one to the next."""
    images = torch.ops.turboquant._cuda_prefill_images
    before = images()
    images(request.param)
    yield
    images(before)


def extra_memory(query: torch.Tensor, cache: oracles.Cache) -> int:
    """Bytes that a call takes beside its result."""
    ops.tq4_sdpa(query, *cache.args, kv_len=ints(1), mask_is_causal=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = ops.tq4_sdpa(query, *cache.args, kv_len=ints(1), mask_is_causal=True)
    return torch.cuda.max_memory_allocated() - before - out.nbytes


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, **DTYPE_IDS)
@pytest.mark.parametrize("Lq", [96, 127, 128, 129, 300])
def test_rows_and_keys_around_tiles(dim: int, dtype: torch.dtype, Lq: int) -> None:
    query = gpu_randn(B, HQ, Lq, dim, seed=1, dtype=dtype)
    for L in (1, 63, 64, 65, 127, 128, 129, 500):
        cache = gpu_cache(B, HKV, L, dim, seed=L)
        for causal in (False, True):
            got = ops.tq4_sdpa(query, *cache.args, mask_is_causal=causal)
            assert_rows(got, exact(query, cache, causal=causal))


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(
    ("Hq", "Hkv", "Lq"), [(71, 71, 130), (32, 1, 100), (12, 4, 333), (7, 1, 600)]
)
def test_groups(dim: int, Hq: int, Hkv: int, Lq: int) -> None:
    cache, query = gpu_cache(1, Hkv, 700, dim, seed=2), gpu_randn(1, Hq, Lq, dim, seed=3)
    got = ops.tq4_sdpa(query, *cache.args, mask_is_causal=True)
    assert_rows(got, exact(query, cache, causal=True))


@pytest.mark.parametrize("workspace", [None, 2_000_000], indirect=True, ids=["", "windows"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("Lq", [70, 130, 300])
def test_blocks_that_give_up_waiting(impatient: None, workspace: None, dim: int, Lq: int) -> None:
    """Few rows, whose keys are split: the last block has more to add up, in the same order."""
    cache, query = gpu_cache(1, 3, 9000, dim, seed=25), gpu_randn(1, 12, Lq, dim, seed=26)
    patience = torch.ops.turboquant._cuda_patience()
    got = [ops.tq4_attention(query, *cache.args, mask_is_causal=True) for _ in range(3)]
    torch.ops.turboquant._cuda_patience(1 << 40)
    want = ops.tq4_attention(query, *cache.args, mask_is_causal=True)
    torch.ops.turboquant._cuda_patience(patience)
    assert_rows(want[0], exact(query, cache, causal=True))
    for one in got:
        assert identical(one[0], want[0])
        assert identical(one[1], want[1])


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("Lq", [200, 515])
def test_ragged_lengths_and_starts(dim: int, Lq: int) -> None:
    """A batch of empty, tiny and long rows, NaN in all that is unseen."""
    L = 3000
    lengths, starts = ints(0, 1, 127, 128, 129, 2500, L), ints(0, 0, 7, 127, 130, 1999, 1)
    cache, query = gpu_cache(7, 2, L, dim, seed=4), gpu_randn(7, 8, Lq, dim, seed=5)
    key = torch.arange(L, device=GPU)
    behind, before = key >= lengths.unsqueeze(-1), key < starts.unsqueeze(-1)
    dirty = [
        cache.map(
            lambda t: t if t.dtype == torch.uint8
            else t.masked_fill(unseen[:, None, :, None], math.nan)  # noqa: B023
        )
        for unseen in (behind, behind | before)
    ]  # fmt: skip
    for causal in (False, True):
        options = {"mask_is_causal": causal, "kv_len": lengths}
        got = ops.tq4_sdpa(query, *dirty[0].args, **options)
        assert_rows(got, exact(query, cache, length=lengths, causal=causal))
        got, lse = ops.tq4_attention(query, *dirty[1].args, **options, kv_start=starts)
        want = exact(query, cache, length=lengths, start=starts, causal=causal)
        assert_rows(got, want)
        assert torch.equal(lse == -math.inf, (want == 0).all(-1))


@pytest.mark.parametrize(("Hq", "Hkv", "dim"), [(16, 2, 256), (32, 4, 512), (32, 8, 128)])
@pytest.mark.parametrize("tail", ["1000 times as large", "NaN"])
def test_a_chunk_at_the_end_of_a_short_context(Hq: int, Hkv: int, dim: int, tail: str) -> None:
    """512 tokens at the end of 8192 of 32768 slots: the same bits, whatever lies behind them."""
    query, length = gpu_randn(1, Hq, 512, dim, seed=6), ints(8192)
    cache = gpu_cache(1, Hkv, 32768, dim, seed=7)
    for norms in (cache.k_norms, cache.v_norms):
        norms[:, :, 8192:] *= math.nan if tail == "NaN" else 1000.0
    filled = cache.map(lambda t: t[:, :, :8192].contiguous())
    want = exact(query, filled, causal=True)
    got = ops.tq4_sdpa(query, *cache.args, kv_len=length, mask_is_causal=True)
    assert_rows(got, want)
    assert identical(got, ops.tq4_sdpa(query, *filled.args, mask_is_causal=True))
    # The test would notice if kv_len were ignored.
    assert not cosine(ops.tq4_sdpa(query, *cache.args, mask_is_causal=True), want) >= 0.5


@pytest.mark.parametrize("dim", DIMS)
def test_chunks_are_the_whole(dim: int) -> None:
    cache, query = gpu_cache(1, 4, 2000, dim, seed=8), gpu_randn(1, 16, 2000, dim, seed=9)
    whole = ops.tq4_sdpa(query, *cache.args, mask_is_causal=True)
    for first in range(0, 2000, 500):
        chunk = query[:, :, first : first + 500]
        got = ops.tq4_sdpa(chunk, *cache.args, kv_len=ints(first + 500), mask_is_causal=True)
        torch.testing.assert_close(got, whole[:, :, first : first + 500], rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_more_heads_than_fit_into_the_workspace(dim: int) -> None:
    """In rounds; how many heads each takes is up to the lengths."""
    L = 400_000 * 64 // dim
    cache, query = gpu_cache(1, 8, L, dim, seed=10), gpu_randn(1, 8, 800, dim, seed=11)
    for n in (L, L // 3, 5000, 17):
        filled = cache.map(lambda t: t[:, :, :n])  # noqa: B023
        got = ops.tq4_sdpa(query, *cache.args, kv_len=ints(n), mask_is_causal=True)
        assert_rows(got, exact(query, filled, causal=True))


@pytest.mark.parametrize(
    ("dim", "L"), [(64, 760_000), (128, 390_000), (256, 190_000), (512, 100_000)]
)
def test_a_context_that_the_workspace_does_not_hold(dim: int, L: int) -> None:
    cache, query = gpu_cache(1, 1, L, dim, seed=39), gpu_randn(1, 2, 500, dim, seed=40)
    for n in (L, 7000):
        filled = cache.map(lambda t: t[:, :, :n])  # noqa: B023
        got = ops.tq4_sdpa(query, *cache.args, kv_len=ints(n), mask_is_causal=True)
        assert_rows(got, exact(query, filled, causal=True))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("Hq", "Hkv", "Lq"), [(8, 2, 30), (32, 8, 64), (4, 1, 300)])
def test_few_row_tiles_and_many_keys(dim: int, Hq: int, Hkv: int, Lq: int) -> None:
    """Several blocks share a tile of rows; some of them have no keys."""
    cache, query = gpu_cache(1, Hkv, 20000, dim, seed=30), gpu_randn(1, Hq, Lq, dim, seed=31)
    for n in (20000, 5000, 129, 1, 0):
        filled = cache.map(lambda t: t[:, :, :n])  # noqa: B023
        for _ in range(3):  # whichever block is the last
            got = ops.tq4_sdpa(query, *cache.args, kv_len=ints(n), mask_is_causal=True)
            assert_rows(got, exact(query, filled, causal=True))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("Lq", [20, 140])
def test_options_where_keys_are_split(dim: int, Lq: int) -> None:
    cache = random_cache(1, 2, 1800, dim, seed=31)
    dense, query = (cache.k(), cache.v()), randn(1, 8, Lq, dim, seed=32, dtype=torch.bfloat16)
    mask = torch.rand(1, 1, Lq, 1800, generator=oracles.generator(33)) < 0.6
    mask[..., 500:1100] = False  # all that some blocks have
    check(CUDA, query, cache, dense=dense, attn_mask=mask)
    options = {"kv_start": torch.tensor([400]), "kv_len": torch.tensor([1701]), "softcap": 2.0}
    check(CUDA, query, cache, dense=dense, sinks=randn(8, seed=34), **options)
    check(CUDA, query, cache, dense=dense, mask_is_causal=True, kv_len=torch.tensor([900]))


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("dim", DIMS)
def test_masks(dim: int) -> None:
    L, Lq = 700, 200
    cache = random_cache(2, 4, L, dim, seed=12)
    dense, query = (cache.k(), cache.v()), randn(2, 16, Lq, dim, seed=13, dtype=torch.bfloat16)
    some = torch.rand(2, 1, Lq, L, generator=oracles.generator(14)) < 0.5
    padded = torch.arange(L).expand(2, 1, Lq, L) >= torch.tensor([0, 333]).view(2, 1, 1, 1)
    one = torch.zeros_like(some)
    one[..., L // 3] = True
    document = torch.arange(L) // 150  # packed one after the other
    packed = document == document[-Lq:].unsqueeze(-1)
    packed = packed.expand(1, 1, Lq, L)
    for mask in (some, padded, one, torch.zeros_like(some), some[:1], packed):
        check(CUDA, query, cache, dense=dense, attn_mask=mask)
        check(CUDA, query, cache, dense=dense, attn_mask=mask, kv_len=torch.tensor([650, 2]),
              mask_is_causal=True)  # fmt: skip


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("dim", DIMS)
def test_a_start_behind_the_end(dim: int) -> None:
    """Then nothing is seen, whatever is there."""
    cache, query = gpu_cache(3, 4, 5000, dim, seed=32), gpu_randn(3, 16, 200, dim, seed=33)
    lengths, starts = ints(100, 4097, 1), torch.tensor([4096, 2**32, 1], device=GPU)
    for _ in range(2):
        out, lse = ops.tq4_attention(query, *cache.args, kv_len=lengths, kv_start=starts)
        assert (out == 0).all()
        assert (lse == -math.inf).all()


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_norms_of_hidden_keys(dim: int, value: float) -> None:
    """What the mask or the causal rule hides from all rows may be anything."""
    L, Lq = 700, 200
    cache, query = gpu_cache(2, 4, L, dim, seed=34), gpu_randn(2, 16, Lq, dim, seed=35)
    hidden = torch.rand(L, device=GPU, generator=torch.Generator(GPU).manual_seed(36)) < 0.3
    mask = (~hidden).expand(2, 1, Lq, L)
    dirty = cache.map(
        lambda t: t if t.dtype == torch.uint8 else t.masked_fill(hidden[:, None], value)
    )
    for causal in (False, True):
        options = {"attn_mask": mask, "mask_is_causal": causal}
        want = ops.tq4_sdpa(query, *cache.args, **options)
        got = ops.tq4_sdpa(query, *dirty.args, **options)
        assert_rows(got, want.double())  # rounded otherwise, where norms in a tile differ so much


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("dim", [dim for dim in DIMS if dim <= 256])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_queries_that_are_no_numbers(dim: int, value: float) -> None:
    """They see nothing, or spoil their own row and no other."""
    cache, query = gpu_cache(1, 4, 300, dim, seed=41), gpu_randn(1, 16, 350, dim, seed=42)
    clean = ops.tq4_sdpa(query, *cache.args, mask_is_causal=True)
    query[:, :, [3, 100]] = value  # the first sees no key
    got, lse = ops.tq4_attention(query, *cache.args, mask_is_causal=True)
    assert (got[:, :, 3] == 0).all()
    assert (lse[:, :, 3] == -math.inf).all()
    assert got[:, :, 100].isnan().all()
    others = [i for i in range(350) if i not in (3, 100)]
    assert identical(got[:, :, others].contiguous(), clean[:, :, others].contiguous())


@pytest.mark.parametrize("dim", DIMS)
def test_repeated_runs_are_identical(dim: int) -> None:
    cache, query = gpu_cache(1, 2, 30000, dim, seed=37), gpu_randn(1, 8, 64, dim, seed=38)
    out, lse = ops.tq4_attention(query, *cache.args, mask_is_causal=True)
    for _ in range(30):
        again = ops.tq4_attention(query, *cache.args, mask_is_causal=True)
        assert identical(again[0], out)
        assert identical(again[1], lse)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("dim", DIMS)
def test_softcap_and_sinks(dim: int) -> None:
    cache = random_cache(2, 4, 700, dim, seed=15)
    dense, query = (cache.k(), cache.v()), randn(2, 16, 200, dim, seed=16, dtype=torch.bfloat16)
    lengths = torch.tensor([0, 641])
    for sinks in (
        randn(16, seed=17),
        randn(16, seed=17).bfloat16() + 6,
        torch.full((16,), -math.inf),
    ):
        check(CUDA, query, cache, dense=dense, sinks=sinks, mask_is_causal=True)
        check(CUDA, query, cache, dense=dense, sinks=sinks, softcap=1.5, kv_len=lengths)
    for softcap in (0.3, 20.0):
        check(CUDA, query, cache, dense=dense, softcap=softcap, mask_is_causal=True)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("scale", [-0.1, 0.0, 0.01, 1.0])
def test_scales(dim: int, scale: float) -> None:
    cache, query = gpu_cache(B, HKV, 600, dim, seed=18), gpu_randn(B, HQ, 130, dim, seed=19)
    query = query / 10
    got = ops.tq4_sdpa(query, *cache.args, scale=scale)
    assert_rows(got, exact(query, cache, scale=scale))


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, **DTYPE_IDS)
def test_float32_norms_and_strides(dim: int, dtype: torch.dtype) -> None:
    query = randn(2, 16, 200, dim, seed=20, dtype=dtype)
    check(CUDA, query, random_cache(2, 4, 555, dim, seed=21, norm_dtype=torch.float32))
    whole = random_cache(2, 4, 420, dim, seed=22)
    for first, last in [(3, 400), (17, 50)]:
        check(CUDA, query, whole.map(lambda t: t[:, :, first:last]))  # noqa: B023
    tokens_first = whole.map(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))
    check(CUDA, query.transpose(1, 2).contiguous().transpose(1, 2), tokens_first)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("score", [23.0, 40.0])
def test_the_heaviest_keys_have_the_smallest_values(dim: int, score: float) -> None:
    query, cache = heavy_keys_with_small_values(16, 1, 250, dim, score, torch.bfloat16, seed=23)
    want = exact(query, cache)
    assert 1e-10 < float(want.abs().max()) < 1e-4
    assert_rows(ops.tq4_sdpa(query, *cache.args), want, bound=0.02)


@pytest.mark.parametrize("dim", DIMS)
def test_queries_of_all_sizes_side_by_side(dim: int) -> None:
    cache = gpu_cache(B, HKV, 500, dim, seed=24)
    factors = torch.tensor([1e-6, 1.0, 1e-3, 3.0, 1.0, 0.0, 1e-12, 2.0], device=GPU)
    query = (gpu_randn(B, HQ, 130, dim, seed=25) * factors.view(1, HQ, 1, 1)).bfloat16()
    got = ops.tq4_sdpa(query, *cache.args, mask_is_causal=True)
    assert_rows(got, exact(query, cache, causal=True))


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("Lq", [80, 200])
def test_a_graph_follows_the_growing_context(dim: int, Lq: int) -> None:
    """Fused, and expanded."""
    cache, query = gpu_cache(2, 4, 3001, dim, seed=26), gpu_randn(2, 16, Lq, dim, seed=27)
    assert_a_graph_follows(query, cache, (1, 199, 200, 201, 1000, 0, 3001, 77))


@pytest.mark.parametrize(
    ("B", "Hq", "Hkv", "dim", "Lq", "L"),
    [
        (1, 16, 2, 256, 4096, 131072),
        (1, 32, 4, 512, 4096, 131072),
        (1, 32, 8, 128, 4096, 131072),
        (8, 32, 8, 128, 192, 32768),
        (16, 32, 4, 512, 32, 16384),
    ],
)
def test_memory_is_bounded(B: int, Hq: int, Hkv: int, dim: int, Lq: int, L: int) -> None:
    """Beyond the result at most 256 MB, whatever the context."""
    query, cache = gpu_randn(B, Hq, Lq, dim, seed=28), gpu_cache(B, Hkv, L, dim, seed=29)
    assert extra_memory(query, cache) <= 256 * 2**20


@pytest.mark.parametrize("workspace", [1_000_000], indirect=True)
@pytest.mark.parametrize("dim", DIMS)
def test_windows_take_the_place_of_a_larger_workspace(workspace: None, dim: int) -> None:
    query, cache = gpu_randn(1, 4, 900, dim, seed=43), gpu_cache(1, 1, 200_000, dim, seed=44)
    assert extra_memory(query, cache) <= 20e6  # images of all keys would take 51 MB or more
