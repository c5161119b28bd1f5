"""Attention of one or a few new tokens over a packed cache, on the GPU: python -m benchmarks.decode

Beside ours, in the same run and the same way (CUDA graphs, buffers rotated past the L2): torch's
kernels over a bf16 cache, FlexAttention, a kernel that only reads as many bytes, and, from a
checkout of executorch, the published Triton kernel over the same packed tensors. A column that is
empty means that this kernel cannot do this shape.

The rows of a complete run go to ``benchmarks/results/h200.csv``, the plot beside it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import turboquant as tq
from benchmarks import dense, gpu, plot, rows
from benchmarks.problems import (
    Sets,
    Shape,
    dense_sets,
    in_long_buffers,
    packed_sets,
    random,
    relative,
)

Row = dict[str, Any]
sdpa: Callable[..., Tensor] = tq.tq4_sdpa
update_: Callable[..., None] = tq.update_

TORCH = ["flash", "cudnn", "efficient", "flex"]
PUBLISHED = "published Triton"
SHORT = 2048  # up to here a call is launches and latency
WORST_ERROR = 0.02


LENGTHS = [128, 512, 2048, 4096, 8192, 32768, 131072]
SHAPES = [
    *(Shape(1, 32, 8, 128, L) for L in LENGTHS),
    *(Shape(1, 16, 2, 256, L) for L in LENGTHS),
    *(Shape(1, 32, 4, 512, L) for L in LENGTHS),
    *(Shape(8, 32, 8, 128, L) for L in (128, 2048, 8192, 32768)),
    *(
        Shape(*batch, L)
        for batch in [
            (32, 32, 8, 128), (32, 14, 2, 64), (4, 32, 32, 128), (8, 64, 8, 64), (8, 16, 8, 128),
        ]
        for L in (128, 2048, 8192)
    ),
]  # fmt: skip
FEW_ROWS = Shape(1, 32, 8, 128, 32768)

# What ours must reach, as best bf16 time / our time: (B, heads) -> {L: ratio}.
RATIOS = {
    (1, "32:8 D128"): {4096: 1.4, 32768: 2.6, 131072: 3.3},
    (1, "16:2 D256"): {4096: 1.3, 32768: 2.2, 131072: 3.5},
    (8, "32:8 D128"): {8192: 2.9, 32768: 3.3},
    (32, "32:8 D128"): {8192: 2.5},
    (32, "14:2 D64"): {8192: 2.5},
    (4, "32:32 D128"): {8192: 2.5},
    (8, "64:8 D64"): {8192: 2.5},
    (8, "16:8 D128"): {8192: 2.5},
}
# No bf16 kernel does D 512 well, so there the rival is one that reads its bytes at full rate.
ROOFLINE_RATIOS = {(1, "32:4 D512"): {32768: 2.4, 131072: 3.2}}
PUBLISHED_RATIOS = {
    (1, "32:8 D128"): {131072: 7.0},
    (1, "16:2 D256"): {131072: 6.0},
    (1, "32:4 D512"): {131072: 7.0},
    (8, "32:8 D128"): {32768: 7.0},
}
SLOWDOWNS = {2: 1.15, 4: 1.3, 8: 1.7}  # of more query rows, against one


# --------------------------------------------------------------------------------- correctness


def exact(shape: Shape, args: tuple[Tensor, ...]) -> Tensor:
    """Attention over the decompressed cache in float32; the queries are the last tokens."""
    query, k_packed, k_norms, v_packed, v_norms, centroids, pi = args
    rows_of_head = query.float().view(shape.B, shape.Hkv, -1, shape.D)
    row = torch.arange(rows_of_head.shape[2], device="cuda") % shape.Lq
    hidden = torch.arange(shape.L, device="cuda") > (shape.L - shape.Lq + row).unsqueeze(-1)
    k = tq.decompress(k_packed, k_norms, centroids, pi, dtype=torch.float32)
    scores = (rows_of_head @ k.mT * shape.D**-0.5).masked_fill_(hidden, -torch.inf)
    del k
    v = tq.decompress(v_packed, v_norms, centroids, pi, dtype=torch.float32)
    return (scores.softmax(-1) @ v).view(query.shape)


# ---------------------------------------------------------------------------------- measuring


class Benchmark:
    def __init__(self, alone: bool, flex: bool, executorch: Path | None) -> None:
        self.alone = alone
        self.flex = flex
        self.published = None if executorch is None or alone else dense.published(executorch)
        self.streams: dict[int, float] = {}
        # GB/s of reading 1 GB: what the rooflines are drawn at.
        self.rate = 1e9 / self.stream(1_000_000_000) / 1e3

    def stream(self, nbytes: int) -> float:
        if nbytes not in self.streams:
            self.streams[nbytes] = gpu.stream_time(nbytes)
        return self.streams[nbytes]

    def torch_times(self, shape: Shape, before: Callable[[Sets, int], object] | None = None) -> Row:
        """Column -> µs of each of torch's kernels; `before` each call, something else to do."""
        if self.alone:
            return {}
        sets = dense_sets(shape)
        taken: Row = {}
        named = dense.for_few_rows(shape.Lq, shape.L, shape.group, self.flex)
        for name, attention in named.items():

            def call(i: int, attention: dense.Attention = attention) -> Tensor:
                if before is not None:
                    before(sets, i)
                return attention(*sets.args(i))

            taken[f"{name} µs"] = gpu.optional_time(name, call, len(sets))
        return taken

    def common(self, what: str, shape: Shape, ours: float) -> Row:
        stream = self.stream(shape.packed_bytes)
        return {
            "what": what, "B": shape.B, "Lq": shape.Lq, "L": shape.L, "ours µs": ours,
            "stream µs": stream, "% of stream": 100 * stream / ours,
            "packed MB": shape.packed_bytes / 1e6,
            "packed roofline µs": shape.packed_bytes / self.rate / 1e3,
            "bf16 roofline µs": shape.dense_bytes / self.rate / 1e3,
            "read GB/s": self.rate,
        }  # fmt: skip

    def ours(self, shape: Shape) -> Row:
        """Ours, the published kernel on the same tensors, and whether the results agree."""
        sets = packed_sets(shape)
        length = torch.tensor(shape.L, dtype=torch.int32, device="cuda")

        def ours(i: int) -> Tensor:
            return sdpa(*sets.args(i), mask_is_causal=True)

        row = self.common(f"decode {shape.heads}", shape, gpu.graph_time(ours, len(sets)))
        row["error"] = relative(ours(0), exact(shape, sets.args(0)))
        if self.published is not None:
            theirs = self.published

            def published(i: int) -> Tensor:  # without kv_len it does not split the keys
                return theirs(*sets.args(i), kv_len=length, mask_is_causal=True)

            row[f"{PUBLISHED} µs"] = gpu.optional_time(PUBLISHED, published, len(sets))
            if row[f"{PUBLISHED} µs"] is not None:
                row["from published"] = relative(ours(0), published(0))
        return row

    def shape(self, shape: Shape) -> Row:
        return judged(self.ours(shape) | self.torch_times(shape), shape)

    def few_rows(self, Lq: int) -> Row:
        """Lq > 1 against Lq = 1, as in speculative decoding."""
        sets = packed_sets(FEW_ROWS)
        one = gpu.graph_time(lambda i: sdpa(*sets.args(i)), len(sets))
        row = self.shape(replace(FEW_ROWS, Lq=Lq))
        row |= {"against": "Lq 1", "against µs": one, "ratio": one / row["ours µs"]}
        return row | verdict({"ratio": (row["ratio"], 1 / SLOWDOWNS[Lq])})

    def fill(self) -> Row:
        """A long buffer filled to 1 %, told by kv_len, against a buffer of that length."""
        full = replace(FEW_ROWS, L=1312)
        exact_sets = packed_sets(full)
        sets = in_long_buffers(exact_sets, full, 131072)
        length = torch.tensor(full.L, dtype=torch.int32, device="cuda")

        def filled(i: int) -> Tensor:
            return sdpa(*sets.args(i), kv_len=length)

        short = gpu.graph_time(lambda i: sdpa(*exact_sets.args(i)), len(sets))
        time = gpu.graph_time(filled, len(sets))
        row = self.common("decode 32:8 D128, 1 % of 131072", full, time)
        cuts = tuple(t[:, :, : full.L] for t in sets.states[0])
        first = (sets.queries[0], *cuts, *sets.constants)
        row |= {
            "error": relative(filled(0), exact(full, first)),
            "against": "a buffer of 1312", "against µs": short, "ratio": short / row["ours µs"],
        }  # fmt: skip
        return row | verdict({"ratio": (row["ratio"], 1 / 1.1)})

    def layer(self, L: int) -> Row:
        """A layer's whole step: store one token, attend to all; beside the same in bf16."""
        shape = replace(FEW_ROWS, L=L)
        sets = packed_sets(shape)
        boundaries = tq.codebook(shape.D)[1].cuda()
        pos = torch.tensor([L - 1], device="cuda")
        length = torch.tensor(L, dtype=torch.int32, device="cuda")
        new = random(2, shape.B, shape.Hkv, 1, shape.D)

        def ours(i: int) -> Tensor:
            query, *state, centroids, pi = sets.args(i)
            update_(*new, pos, pi, boundaries, *state)
            return sdpa(query, *state, centroids, pi, kv_len=length)

        def store(sets: Sets, i: int) -> None:
            for cache, token in zip(sets.states[i], new):
                cache.index_copy_(2, pos, token)

        row = self.common(f"layer step {shape.heads}", shape, gpu.graph_time(ours, len(sets)))
        row["error"] = relative(ours(0), exact(shape, sets.args(0)))
        row |= self.torch_times(shape, store)
        return row | dense.best_of(row, TORCH) | verdict({})


def judged(row: Row, shape: Shape) -> Row:
    """The row, with its ratio and whether it meets what is asked of its shape."""
    row |= dense.best_of(row, TORCH)
    ours, place, bars = row["ours µs"], (shape.B, shape.heads), {}
    if shape.Lq == 1 and shape.L in ROOFLINE_RATIOS.get(place, {}):
        roofline = row["bf16 roofline µs"]
        row |= {"against": "bf16 roofline", "against µs": roofline, "ratio": roofline / ours}
        bars["ratio"] = (row["ratio"], ROOFLINE_RATIOS[place][shape.L])
    elif shape.Lq == 1 and "ratio" in row:
        asked = RATIOS.get(place, {}).get(shape.L)
        if asked is None and shape.L <= SHORT:  # no slower, or 7 µs
            asked = min(1.0, row["against µs"] / 7.0)
        if asked is not None:
            bars["ratio"] = (row["ratio"], asked)
    streaming = 87 if shape.packed_bytes >= 256e6 else 80 if (
        place == (1, "32:8 D128") and shape.L == 131072) else None  # fmt: skip
    if shape.Lq == 1 and streaming is not None:
        bars["% of stream"] = (row["% of stream"], streaming)
    if row.get(f"{PUBLISHED} µs"):
        row["ratio to published"] = row[f"{PUBLISHED} µs"] / ours
        if shape.Lq == 1 and shape.L in PUBLISHED_RATIOS.get(place, {}):
            asked = PUBLISHED_RATIOS[place][shape.L]
            bars["ratio to published"] = (row["ratio to published"], asked)
    return row | verdict(bars)


def verdict(bars: dict[str, tuple[float, float]]) -> Row:
    """Columns for what was asked and for what was missed."""
    missed = [f"{name} {got:.3g} < {asked:.3g}" for name, (got, asked) in bars.items()
              if got < asked]  # fmt: skip
    asked = {("bar" if name == "ratio" else f"bar, {name}"): bar for name, (_, bar) in bars.items()}
    return {**asked, "missed": "; ".join(missed)}


# ------------------------------------------------------------------------------------ the run


def jobs(benchmark: Benchmark | None, longest: int) -> dict[str, Callable[[], Row]]:
    """Name -> what makes the row. Without a benchmark only the names are of use."""
    run: Any = benchmark or Benchmark
    found: dict[str, Callable[[], Row]] = {}
    for shape in SHAPES:
        name = f"decode {shape.heads} B{shape.B} Lq1 L{shape.L}"
        found[name] = functools.partial(run.shape, shape)
    for Lq in SLOWDOWNS:
        name = f"decode {FEW_ROWS.heads} B1 Lq{Lq} L{FEW_ROWS.L}"
        found[name] = functools.partial(run.few_rows, Lq)
    found["decode 32:8 D128 B1 Lq1, 1 % of L131072"] = run.fill
    for L in (4096, 32768):
        found[f"layer step 32:8 D128 B1 Lq1 L{L}"] = functools.partial(run.layer, L)
    return {name: job for name, job in found.items() if int(name.rpartition("L")[2]) <= longest}


def line(row: Row) -> str:
    """A row for the terminal."""
    text = f"{row['what']:<32} B{row['B']:<3} Lq{row['Lq']:<2} L{row['L']:<7}"
    text += f"{row['ours µs']:8.2f} µs {row['% of stream']:6.1f} % of stream"
    if "ratio" in row:
        against = row["against"] if row["against"] != "best bf16" else row["best bf16"]
        text += f"  {row['ratio']:5.2f}x {against}"
    if "ratio to published" in row:
        text += f"  {row['ratio to published']:5.2f}x published"
    text += f"  error {row['error']:.4f}"
    return text + (f"  MISSED {row['missed']}" if row["missed"] else "")


def main() -> None:
    # fmt: off
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--only", default="", metavar="TEXT",
           help="rows whose name contains this, for example 'D256 B1'; --list shows the names")
    option("--max-length", type=int, default=max(LENGTHS), metavar="L",
           help="no longer contexts (default %(default)s)")
    option("--alone", action="store_true",
           help="only ours and the read stream, for tuning; nothing is written")
    option("--flex", action=argparse.BooleanOptionalAction, default=True,
           help="FlexAttention too, which compiles for each shape (default: yes)")
    option("--executorch", type=Path, metavar="PATH",
           help="a checkout of executorch, for the published Triton kernel")
    option("--name", default="h200",
           help="of the results file; a run of some rows replaces only these (default: h200)")
    option("--commit", help="of the code, where git is not there to tell")
    option("--plot-only", action="store_true", help="draw the plot from the rows that exist")
    option("--list", action="store_true", help="print the names of the rows")
    # fmt: on
    args = parser.parse_args()

    if args.plot_only:
        print("written:", plot.draw(args.name))
        return
    if args.list:
        print(*jobs(None, args.max_length), sep="\n")
        return
    gpu.require("benchmarks.decode")
    torch.manual_seed(0)
    benchmark = Benchmark(args.alone, args.flex, args.executorch)
    everything = jobs(benchmark, args.max_length)
    chosen = {name: job for name, job in everything.items() if args.only in name}
    if not chosen:
        parser.error(f"--only {args.only!r} matches no row; --list shows the names")
    print(f"{gpu.name()}, torch {torch.__version__}; reads {benchmark.rate:.0f} GB/s")
    results: list[Row] = []
    progress = tqdm(chosen.items(), unit="row", disable=None)
    for name, job in progress:
        progress.set_description(name)
        results.append(job())
        tqdm.write(line(results[-1]))

    wrong = [line(row) for row in results if not row["error"] <= WORST_ERROR]
    if wrong:
        raise SystemExit("\n".join(["WRONG RESULTS, nothing is written:", *wrong]))
    missed = sum(bool(row["missed"]) for row in results)
    print(f"{len(results)} rows, {missed} of them below a bar")
    if args.alone:
        return
    complete = chosen.keys() == jobs(benchmark, max(LENGTHS)).keys()
    path = rows.write(args.name, gpu.name(), results, args.commit, complete=complete)
    print("written:", path)
    try:
        print("written:", plot.draw(args.name))
    except ImportError:
        print("no matplotlib, so no plot; later: python -m benchmarks.decode --plot-only")


if __name__ == "__main__":
    main()
