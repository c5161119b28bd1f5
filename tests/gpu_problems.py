"""Problems on the GPU that the CPU would take long to make or to check, for its tests."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from backends import CUDA, GPU
from oracles import Cache
from torch import Tensor

import turboquant as tq

ops = CUDA.ops  # turboquant itself
DTYPES = [torch.bfloat16, torch.float16]
DTYPE_IDS = {"ids": lambda d: str(d).removeprefix("torch.")}
# Of a row's RMS against the exact row: rounding of the result, and what fp16 operands add.
ROW_ERROR = {torch.bfloat16: 0.01, torch.float16: 0.005, torch.float32: 1e-3}


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=GPU)


def gpu_randn(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    g = torch.Generator(GPU).manual_seed(seed)
    return torch.randn(*sizes, device=GPU, generator=g).to(dtype)


def gpu_cache(B: int, H: int, L: int, D: int, *, seed: int = 0) -> Cache:
    """Like oracles.random_cache, for sizes that the CPU takes long to make."""
    g = torch.Generator(GPU).manual_seed(seed)

    def packed() -> Tensor:
        return torch.randint(0, 256, (B, H, L, D // 2), dtype=torch.uint8, device=GPU, generator=g)

    def norms() -> Tensor:
        u = torch.rand(B, H, L, 1, device=GPU, generator=g)
        return (math.sqrt(D) * (0.5 + u)).bfloat16()

    constants = tq.codebook(D)[0].to(GPU), tq.rotation(D).to(GPU)
    return Cache(packed(), norms(), packed(), norms(), *constants)


def heavy_keys_with_small_values(
    heads: int, group: int, Lq: int, dim: int, score: float, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Cache]:
    """A query, and 1024 keys: values of 1e-6 that carry the weight, beside values of 1e4 that carry
    next to none.

    At a score of 23 both sides contribute alike, at 40 the large ones do not count.
    """
    L, cache = 1024, gpu_cache(1, heads, 1024, dim, seed=seed)
    heavy = torch.arange(L, device=GPU) % 2 == 0
    heavy[: L // 4] = False  # whole tiles of one kind too
    heavy[-L // 4 :] = True
    cache.k_packed[:, :, heavy] = cache.k_packed[0, 0, 0].clone()
    cache.k_norms.fill_(1e-3)
    cache.k_norms[:, :, heavy] = 1.0
    cache.v_norms.fill_(1e4)
    cache.v_norms[:, :, heavy] = 1e-6
    key = ops.decompress(
        cache.k_packed[0, 0, -1:], cache.k_norms[0, 0, -1:], cache.centroids, cache.rotation,
        dtype=torch.float32,
    )[0]  # fmt: skip
    query = key / key.square().sum() * score * math.sqrt(dim)
    return query.expand(1, heads * group, Lq, dim).to(dtype).contiguous(), cache


def exact(
    query: Tensor,
    cache: Cache,
    *,
    length: Tensor | None = None,
    start: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """float64 attention over the decompressed cache, one head at a time, on the GPU."""
    B, Hq, Lq, D = query.shape
    Hkv, Lkv = cache.k_packed.shape[1:3]
    lengths = [Lkv] * B if length is None else length.expand(B).tolist()
    starts = [0] * B if start is None else start.expand(B).tolist()
    out = torch.zeros(query.shape, dtype=torch.float64, device=GPU)
    row = torch.arange(Lq, device=GPU).repeat(Hq // Hkv).unsqueeze(-1)
    for b in range(B):
        first, n = starts[b], min(lengths[b], Lkv)
        if first >= n:
            continue
        key = torch.arange(first, n, device=GPU)
        seen = key <= n - Lq + row if causal else (key >= 0).expand(len(row), -1)
        for h in range(Hkv):
            one = cache.map(lambda t: t[b, h, first:n])  # noqa: B023
            k, v = (
                ops.decompress(*side, cache.centroids, cache.rotation, dtype=torch.float32).double()
                for side in (one.args[:2], one.args[2:4])
            )
            heads = slice(h * Hq // Hkv, (h + 1) * Hq // Hkv)
            scores = query[b, heads].double().reshape(-1, D) @ k.T
            scores = scores * (D**-0.5 if scale is None else scale)
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
            out[b, heads] = (weights @ v).view(-1, Lq, D)
    return out


def assert_rows(got: Tensor, want: Tensor, bound: float | None = None) -> None:
    """Each row is right relative to its own size; rows that see nothing are exactly zero."""
    size = want.norm(dim=-1)
    assert (got[size == 0] == 0).all()
    error = (got.double() - want).norm(dim=-1) / size
    worst = float(error[size > 0].max()) if (size > 0).any() else 0.0
    assert worst <= (bound or ROW_ERROR[got.dtype]), f"a row is off by {worst:.3g} of its size"


def cosine(a: Tensor, b: Tensor) -> float:
    """NaN if one of them holds NaN."""
    return float(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def identical(a: Tensor, b: Tensor) -> bool:
    """The same bits, compared on the GPU."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def assert_a_graph_follows(query: Tensor, cache: Cache, lengths: Iterable[int]) -> None:
    """One capture; at every length it gives the eager bits."""
    length = ints(cache.k_packed.shape[2])

    def run() -> tuple[Tensor, Tensor]:
        return ops.tq4_attention(query, *cache.args, kv_len=length, mask_is_causal=True)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run()
    for n in lengths:
        length.fill_(n)
        graph.replay()
        want, want_lse = run()
        assert identical(out, want), n
        assert identical(lse, want_lse), n
