"""Launches every CUDA kernel at least once, on small problems: what .ci/sanitize runs.

The five ops, each tuned head dim and some general ones, few and many query rows, and every optional
tensor; each result is compared with the CPU's. Every case is printed before it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import oracles
import torch
from attention_checks import on_device
from backends import CUDA, DIMS
from oracles import Cache, randn, random_cache
from torch import Tensor

import turboquant as tq

GENERAL = [16, 50, 510]  # head dims without kernels of their own
ops = CUDA.ops  # turboquant itself

Case = tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def codec_cases(dim: int) -> Iterator[Case]:
    pi, (centroids, boundaries) = tq.rotation(dim), tq.codebook(dim)
    offset = randn(2, 3, 1, dim, seed=1)
    for dtype in oracles.QUERY_DTYPES:
        for T in (1, 37, 230):
            x = randn(2, 3, T, dim, seed=2, dtype=dtype)
            yield f"compress T{T} {dtype}", ops.compress, (x, pi, boundaries), {}
        stored = tq.compress(randn(2, 3, 75, dim, seed=3), pi, boundaries)
        options: dict[str, Any] = {
            "dtype": dtype,
            "offset": offset if dtype == torch.bfloat16 else None,
        }
        yield f"decompress to {dtype}", ops.decompress, (*stored, centroids, pi), options
    for norm in ("preserve", "unbiased"):
        options = {"centroids": centroids, "norm": norm}
        yield f"compress {norm}", ops.compress, (x, pi, boundaries), options
        options = {**options, "offset": offset}
        yield f"compress {norm}, offset", ops.compress, (x, pi, boundaries), options
    strided = x.transpose(1, 2)[:, :, ::2]
    yield "compress, strided", ops.compress, (strided, pi, boundaries), {}


def updated(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    """update_, and then the cache."""
    ops.update_(*args, **options)
    return args[5:9]


def update_cases(dim: int) -> Iterator[Case]:
    pi, (centroids, boundaries) = tq.rotation(dim), tq.codebook(dim)
    for T, name in [(1, "one token"), (5, "some tokens"), (230, "many tokens")]:
        k, v = randn(2, 2, 3, T, dim, seed=4, dtype=torch.bfloat16)
        pos = torch.stack([torch.arange(T), torch.arange(T).flip(0)])
        pos[1, 0] = -1  # skipped
        for policy in ("l2", "unbiased"):
            state = random_cache(2, 3, T + 1, dim, seed=5).args[:4]
            args = (k, v, pos, pi, boundaries, *state)
            options = {"centroids": centroids, "k_norm": policy, "v_norm": policy}
            yield f"update_, {name}, {policy}", updated, args, options


def attention_cases(dim: int) -> Iterator[Case]:
    def case(name: str, query: Tensor, cache: Cache, **options: Any) -> Case:
        more = {"kv_start", "softcap", "sinks"} & set(options)
        op = ops.tq4_attention if more else ops.tq4_sdpa
        shape = f"{list(query.shape)} over {cache.k_packed.shape[2]}"
        return f"{op.__name__} {shape} {query.dtype}, {name}", op, (query, *cache.args), options

    ragged = torch.tensor([0, 1, 33, 300])
    for dtype in oracles.QUERY_DTYPES:
        norm_dtype = torch.float32 if dtype == torch.float16 else torch.bfloat16
        cache = random_cache(4, 2, 300, dim, seed=6, norm_dtype=norm_dtype)
        for Lq in (1, 3, 9, 70):
            query = randn(4, 8, Lq, dim, seed=7, dtype=dtype)
            yield case("ragged", query, cache, kv_len=ragged, mask_is_causal=True)
    query = randn(4, 8, 1, dim, seed=8, dtype=torch.bfloat16)
    cache = random_cache(4, 2, 300, dim, seed=9)
    for Lq in (1, 5, 40):
        few = randn(4, 8, Lq, dim, seed=10, dtype=torch.bfloat16)
        mask = torch.rand(4, 1, Lq, 300, generator=oracles.generator(11)) < 0.5
        mask[1] = False
        yield case("mask", few, cache, attn_mask=mask, kv_len=ragged)
        yield case("broadcast mask", few, cache, attn_mask=mask[:1, :, :1].expand(4, 1, Lq, 300))
        yield case("start, softcap, sinks", few, cache, kv_start=ragged // 3, softcap=2.0,
                   sinks=randn(8, seed=12), mask_is_causal=True)  # fmt: skip
    for group in (1, 5, 8, 32):
        heads = randn(1, 2 * group, 1, dim, seed=13, dtype=torch.bfloat16)
        yield case(f"group of {group}", heads, random_cache(1, 2, 1111, dim, seed=14))
    for L in (1, 15, 16, 31, 128, 129):
        yield case("short", query[:1], random_cache(1, 2, L, dim, seed=15))
    yield case("odd slice", query, cache.map(lambda t: t[:, :, 3:296]), mask_is_causal=True)
    yield case("every second slot", query, cache.map(lambda t: t[:, :, ::2]))
    yield case("tokens before heads", query,
               cache.map(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)))  # fmt: skip
    yield case("long", query[:1], random_cache(1, 2, 9000, dim, seed=16))
    yield case("no keys", query[:1], random_cache(1, 2, 0, dim, seed=17))


def prefill_cases(dim: int) -> Iterator[Case]:
    """Rows enough for the prefill kernels: fused and expanded, with keys in one block or split, and
    in windows."""
    if dim not in DIMS:
        return
    tile = 256 * -(-dim // 64) * (128 if dim <= 128 else 64)  # bytes of the images of a tile
    for Lq, L, heads, images, dtype in [
        (40, 700, 2, 1 << 27, torch.float16), (140, 1700, 2, 1 << 27, torch.bfloat16),
        (210, 900, 2, 1 << 27, torch.bfloat16), (450, 500, 2, 1 << 27, torch.float16),
        (97, 600, 1, (4 if dim <= 128 else 6) * tile, torch.bfloat16),  # two windows
    ]:  # fmt: skip
        torch.ops.turboquant._cuda_prefill_images(images)
        query, cache = (
            randn(1, 8, Lq, dim, seed=18, dtype=dtype),
            random_cache(1, heads, L, dim, seed=19),
        )
        length = torch.tensor([L - 77])
        shape = f"tq4_attention {Lq} over {L} {dtype}"
        yield shape, ops.tq4_attention, (query, *cache.args), {"mask_is_causal": True}
        options: dict[str, Any] = {"kv_len": length, "kv_start": length // 3, "softcap": 3.0}
        yield f"{shape}, softcap", ops.tq4_attention, (query, *cache.args), options
        mask = torch.rand(1, 1, Lq, L, generator=oracles.generator(20)) < 0.7
        mask[..., 300:600] = False
        yield f"{shape}, mask", ops.tq4_sdpa, (query, *cache.args), {"attn_mask": mask}
        cache.v_norms[:, :, ::5] *= 1e-5
        cache.k_norms[:, :, ::7] *= 1e-5
        options = {"sinks": randn(8, seed=21)}
        yield f"{shape}, norms apart", ops.tq4_attention, (query, *cache.args), options


def close(got: Any, want: Any) -> bool:
    """Floats to a few roundings; packed bytes but for the codes that lie near a boundary."""
    pairs = zip(got, want) if isinstance(want, tuple) else [(got, want)]
    for g, w in pairs:
        g = g.cpu()
        if w.dtype == torch.uint8:
            if (g != w).double().mean() > 0.02:
                return False
        elif not torch.allclose(g.float(), w.float(), rtol=0.02, atol=0.02 * oracles.rms(w) + 1e-6):
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[*DIMS, *GENERAL],
                        help="head dims (default: %(default)s)")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="print no case but the wrong ones")
    options = parser.parse_args()
    run(options.dims, options.quiet)


def run(dims: list[int], quiet: bool) -> None:
    if not (torch.cuda.is_available() and tq.ops.HAS_CUDA):
        raise SystemExit("sanitize.py: needs a GPU and the CUDA kernels")
    # The tools slow blocks a hundredfold: none shall give up waiting for others because of that.
    torch.ops.turboquant._cuda_patience(1 << 50)
    count, wrong = 0, []
    for dim in dims:
        for cases in (codec_cases, update_cases, attention_cases, prefill_cases):
            for name, op, args, kwargs in cases(dim):
                name = f"D{dim} {name}"
                if not quiet:
                    print(name, flush=True)
                gpu_args = on_device(CUDA, *args)
                gpu_kwargs = dict(zip(kwargs, on_device(CUDA, *kwargs.values())))
                got = op(*gpu_args, **gpu_kwargs)
                torch.cuda.synchronize()
                count += 1
                if not close(got, op(*args, **kwargs)):
                    wrong.append(name)
    print(f"{count} cases, head dims {dims}")
    if wrong:
        print("not what the CPU computes:", *wrong, sep="\n  ", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
