"""What the CPU kernels reach, beside torch: python -m benchmarks.cpu

Both sides of each ratio are measured in turn, ``--repeats`` times, and the best of each counts: on
a shared or virtual machine the others measure the neighbours. The rows go to
``benchmarks/results/cpu-<name>.csv``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tqdm import tqdm

import turboquant as tq
from benchmarks import rows

Row = dict[str, object]


def best(repeats: int, *calls: Callable[[], object]) -> list[float]:
    """Seconds of the fastest run of each call; they take turns."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, times):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def read_stream(repeats: int) -> float:
    """Bytes a second that all threads together read from memory."""
    data = torch.ones(1 << 28, dtype=torch.float32)  # 1 GiB
    return data.nbytes / best(repeats, data.max)[0]


def gemm_rate(repeats: int) -> float:
    """float32 operations a second of torch's matrix product: the practical FMA peak."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / best(repeats, lambda: a @ a)[0]


def cache(heads: int, length: int, dim: int) -> tuple[torch.Tensor, ...]:
    """Random keys or values: dense f32 ``[1, H, L, D]``, packed, norms."""
    x = torch.randn(1, heads, length, dim)
    return x, *tq.compress(x, tq.rotation(dim), tq.codebook(dim)[1])


def attention(q_heads: int, kv_heads: int, dim: int, Lq: int, L: int, repeats: int,
              dtype: torch.dtype, stream: float, gemm: float) -> Row:  # fmt: skip
    k, k_packed, k_norms = cache(kv_heads, L, dim)
    v, v_packed, v_norms = cache(kv_heads, L, dim)
    k, v = k.to(dtype), v.to(dtype)
    query = torch.randn(1, q_heads, Lq, dim, dtype=dtype)
    centroids, pi, causal = tq.codebook(dim)[0], tq.rotation(dim), Lq > 1
    ours, torch_ = best(
        repeats,
        lambda: tq.tq4_sdpa(
            query, k_packed, k_norms, v_packed, v_norms, centroids, pi, is_causal=causal
        ),
        lambda: F.scaled_dot_product_attention(query, k, v, is_causal=causal, enable_gqa=True),
    )
    flops = 4 * q_heads * Lq * L * dim / (2 if causal else 1)
    packed_bytes = sum(t.nbytes for t in (k_packed, k_norms, v_packed, v_norms))
    bound = max(flops / gemm, packed_bytes / stream)
    kind = "decode" if Lq == 1 else "prefill"
    dtype_name = str(dtype).removeprefix("torch.")
    bar = 0.8 if causal else (5.0 if L >= 32768 else 3.0)
    return {
        "what": f"{kind} {q_heads}:{kv_heads} D{dim} {dtype_name}",
        "Lq": Lq, "L": L, "ours": ours * 1e3, "unit": "ms", "torch sdpa": torch_ * 1e3,
        "ratio": torch_ / ours, "bar": bar,
        "packed GB/s": packed_bytes / ours / 1e9, "read stream GB/s": stream / 1e9,
        "GFLOP/s": flops / ours / 1e9, "f32 gemm GFLOP/s": gemm / 1e9,
        "% of bound": 100 * bound / ours,
    }  # fmt: skip


def codec(dim: int, repeats: int, gemm: float) -> list[Row]:
    """compress and decompress on one thread, so that the rate is a core's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.randn(1, 8, 4096, dim, dtype=torch.bfloat16)
    (centroids, boundaries), pi = tq.codebook(dim), tq.rotation(dim)
    packed, norms = tq.compress(x, pi, boundaries)
    seconds = best(
        repeats,
        lambda: tq.compress(x, pi, boundaries),
        lambda: tq.decompress(packed, norms, centroids, pi),
    )
    torch.set_num_threads(threads)
    bound = 2 * dim * x.numel() / (gemm / threads)  # the rotation's multiply-adds
    return [
        {
            "what": f"{name} D{dim} bfloat16, one core", "L": 8 * 4096,
            "ours": x.numel() / taken / 1e9, "unit": "G elements/s",
            "bar": 0.25 if (name, dim) == ("compress", 128) else None,
            "% of bound": 100 * bound / taken,
        }
        for name, taken in zip(("compress", "decompress"), seconds)
    ]  # fmt: skip


def overhead(repeats: int) -> list[Row]:
    """Microseconds of a call with next to nothing to do: one head, one key, D = 16."""
    x = torch.randn(1, 1, 1, 16)
    (centroids, boundaries), pi = tq.codebook(16), tq.rotation(16)
    packed, norms = tq.compress(x, pi, boundaries)
    args = (x, packed, norms, packed, norms, centroids, pi)

    def thousand(op: Callable[..., object], *args: object) -> Callable[[], None]:
        def run() -> None:
            for _ in range(1000):
                op(*args)

        return run

    raw, wrapped, dense = best(
        max(repeats, 30),
        thousand(torch.ops.turboquant.tq4_sdpa.default, *args),
        thousand(tq.tq4_sdpa, *args),
        thousand(F.scaled_dot_product_attention, x, x, x),
    )
    calls = [("raw op", raw, 6), ("wrapper", wrapped, 8)]
    return [
        {"what": f"call of the {name}, tiny", "ours": taken * 1e3, "unit": "µs",
         "torch sdpa": dense * 1e3, "bar": bar}
        for name, taken, bar in calls
    ]  # fmt: skip


def error(dim: int, expected: float) -> Row:
    """Squared error of a random unit vector, to be within 1 % of the closed form."""
    (centroids, boundaries), pi = tq.codebook(dim), tq.rotation(dim)
    x = F.normalize(torch.randn(100_000, dim), dim=-1)
    x_hat = tq.decompress(*tq.compress(x, pi, boundaries), centroids, pi, dtype=torch.float32)
    squared = (x_hat - x).square().sum(-1).mean().item()
    cosine = F.cosine_similarity(x, x_hat, dim=-1).mean().item()
    return {
        "what": f"squared error on the unit sphere, D{dim}", "ours": squared, "unit": "",
        "bar": expected, "ratio": squared / expected, "cosine": cosine,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="runs of each side (default 9)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--isa", help="instruction set to use instead of the best one")
    parser.add_argument("--name", default="2core", help="of the results file (default 2core)")
    parser.add_argument("--commit", help="of the code, where git is not there to tell")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.isa:
        torch.ops.turboquant._cpu_isa(args.isa)
        torch.ops.turboquant._cpu_amx(False)

    stream, gemm = read_stream(args.repeats), gemm_rate(args.repeats)
    bf16, f32 = torch.bfloat16, torch.float32
    shapes = [
        (32, 8, 128, 1, 4096, bf16), (32, 8, 128, 1, 32768, bf16), (32, 8, 128, 1, 32768, f32),
        (16, 2, 256, 1, 4096, bf16), (16, 2, 256, 1, 32768, bf16), (16, 2, 256, 1, 32768, f32),
        (32, 8, 128, 2048, 2048, bf16), (32, 8, 128, 2048, 2048, f32),
    ]  # fmt: skip
    results: list[Row] = []
    for *shape, dtype in tqdm(shapes, desc="attention", unit="shape"):
        results.append(attention(*shape, args.repeats, dtype, stream, gemm))
    for dim in tqdm((64, 128, 256, 512), desc="codec", unit="D"):
        results += codec(dim, args.repeats, gemm)
    results += overhead(args.repeats)
    for dim, expected in {64: 0.00913, 128: 0.00931, 256: 0.00941, 512: 0.00945}.items():
        results.append(error(dim, expected))

    for row in results:
        numbers = [f"{row['ours']:10.4g} {row['unit']:<13}"]
        numbers += [f"{key} {row[key]:.4g}" for key in ("torch sdpa", "ratio", "bar", "% of bound")
                    if row.get(key) is not None]  # fmt: skip
        length = f"L={row['L']}" if "L" in row else ""
        print(f"{row['what']:<42} {length:<8} " + "  ".join(numbers))
    path = rows.write(f"cpu-{args.name}", rows.cpu_name(), results, args.commit)
    print("written:", path)


if __name__ == "__main__":
    main()
