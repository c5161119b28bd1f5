"""Attention of many new tokens over a packed cache, on the GPU: python -m benchmarks.prefill

The new tokens are the last ones of the context; each sees those before it and itself. TFLOP/s count
this alone: 4 · Hq · D for each visible pair of a query and a key.

Beside ours, in the same run and the same way (CUDA graphs, buffers rotated past the L2): torch's
kernels over a bf16 cache, cuDNN called once for the context and once for the causal square (without
the time to merge the two), FlexAttention with --flex, and, from a checkout of executorch, the
published Triton kernel over the same packed tensors. A column that is empty means that this kernel
cannot do this shape.

Errors are against float64 attention over the decompressed cache; those of the best bf16 kernel are
over that cache rounded to bf16. The rows go to ``benchmarks/results/h200.csv``, the plot beside it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import turboquant as tq
from benchmarks import dense, gpu, plot, rows
from benchmarks.problems import Sets, Shape, dense_sets, in_long_buffers, packed_sets, relative

Row = dict[str, Any]
sdpa: Callable[..., Tensor] = tq.tq4_sdpa
attention: Callable[..., tuple[Tensor, Tensor]] = tq.tq4_attention

PUBLISHED = "published Triton"
WORST_ERROR = 0.01
SAMPLE = 64  # query rows of each head whose error is measured
LONG_CALL = 3e12  # operations

# What ours must reach at least; a ratio is another's time / our time.
SHAPES: dict[Shape, dict[str, float]] = {
    Shape(1, 32, 8, 64, 2048, Lq=2048): {},
    Shape(1, 32, 8, 128, 2048, Lq=2048): {},
    Shape(1, 32, 8, 128, 8192, Lq=8192): {"ratio": 0.9},
    Shape(1, 32, 8, 128, 32768, Lq=16): {"ratio": 2.7},
    Shape(1, 32, 8, 128, 32768, Lq=64): {"ratio": 1.5},
    Shape(1, 32, 8, 128, 32768, Lq=256): {"ratio": 1.3},
    Shape(1, 32, 8, 128, 32768, Lq=2048): {"ratio": 0.8, "ratio to flash": 1.4, "TFLOP/s": 500},
    Shape(1, 32, 8, 128, 131072, Lq=8192): {"ratio": 0.8, "ratio to flash": 1.4, "TFLOP/s": 500},
    Shape(1, 16, 2, 256, 2048, Lq=2048): {},
    Shape(1, 16, 2, 256, 8192, Lq=8192): {"ratio": 0.85},
    Shape(1, 16, 2, 256, 32768, Lq=2048): {"ratio": 0.75, "ratio to flash": 1.4},
    Shape(1, 32, 4, 512, 8192, Lq=8192): {"TFLOP/s": 350},
    Shape(1, 32, 4, 512, 32768, Lq=2048): {"TFLOP/s": 350},
    Shape(1, 32, 4, 512, 131072, Lq=2048): {"TFLOP/s": 350},
}
PORTABLE = {"ratio to flash": 0.6}  # of the portable kernels, in place of all these
PUBLISHED_RATIOS = {128: 8.0, 256: 8.0, 512: 5.5}  # by head dim
MOST_EXTRA = 256  # MB

PROMPT = Shape(1, 32, 8, 128, 2048, Lq=2048)
CAPACITY = 131072
PADDED = Shape(4, 32, 8, 128, 2048, Lq=2048)
STARTS = (0, 200, 600, 1100)  # of the sequences of PADDED

SWEEP = [(32, 8, 128), (16, 2, 256)]
SWEEP_CONTEXTS = [2048, 32768, 131072]
SWEEP_ROWS = sorted(n for k in range(15) for n in (2**k, 3 * 2**k) if n <= 16384)


# ------------------------------------------------------------------------------- the computation


def flop(shape: Shape, starts: Sequence[int] = ()) -> int:
    """Of the visible pairs; the sequences start at key 0, or at ``starts``."""
    lasts = range(shape.L - shape.Lq, shape.L)
    pairs = sum(max(last + 1 - start, 0) for start in starts or [0] * shape.B for last in lasts)
    return 4 * shape.Hq * shape.D * pairs


def rounds(shape: Shape) -> int:
    """How often to measure it."""
    return 3 if flop(shape) > LONG_CALL else gpu.ROUNDS


def visible(shape: Shape, row: Tensor, starts: Sequence[int] = ()) -> Tensor:
    """bool ``[B or 1, 1, rows, L]``: what these query rows see."""
    key = torch.arange(shape.L, device=row.device)
    first = torch.tensor(starts or [0], device=row.device).view(-1, 1, 1, 1)
    return (key >= first) & (key <= shape.L - shape.Lq + row.unsqueeze(-1))


def decompressed(shape: Shape, args: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """Keys and values."""
    _, *state, centroids, pi = args
    k_packed, k_norms, v_packed, v_norms = (t[:, :, : shape.L] for t in state)
    sides = (k_packed, k_norms), (v_packed, v_norms)
    return [tq.decompress(*side, centroids, pi, dtype=dtype) for side in sides]


def exact(shape: Shape, args: tuple[Any, ...], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Some query rows, from the first to the last, and float64 attention of these.

    Rows that see nothing are zeros.
    """
    count = min(shape.Lq, SAMPLE)
    row = torch.linspace(0, shape.Lq - 1, count, device="cuda").round().long()
    chosen = args[0][:, :, row].double().view(shape.B, shape.Hkv, -1, shape.D)
    k, v = (t.double() for t in decompressed(shape, args, torch.float32))
    hidden = ~visible(shape, row, starts).repeat(1, 1, shape.group, 1)
    scores = (chosen * shape.D**-0.5 @ k.mT).masked_fill_(hidden, -torch.inf)
    weights = scores.softmax(-1).nan_to_num_(0.0)
    return row, (weights @ v).view(shape.B, shape.Hq, -1, shape.D)


def extra_memory(call: Callable[[int], Tensor]) -> float:
    """MB that a call takes from torch beside its inputs and its output."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = call(0)
    return (torch.cuda.max_memory_allocated() - before - output.nbytes) / 1e6


# ---------------------------------------------------------------------------------- measuring


class Benchmark:
    def __init__(self, alone: bool, flex: bool, portable: bool, executorch: Path | None) -> None:
        self.alone = alone
        self.portable = portable
        self.flex = flex
        self.published = None if executorch is None or alone else dense.published(executorch)

    def row(
        self,
        what: str,
        shape: Shape,
        sets: Sets,
        ours: Callable[[int], Tensor],
        starts: Sequence[int] = (),
        others: dict[str, dense.Attention] | None = None,
    ) -> Row:
        """Ours and torch's kernels, their times and errors."""
        args = sets.args(0)
        extra = extra_memory(ours)
        time = gpu.graph_time(ours, len(sets), rounds(shape))
        sampled, want = exact(shape, args, starts)
        row: Row = {
            "what": what, "B": shape.B, "Lq": shape.Lq, "L": shape.L, "buffer": args[1].shape[2],
            "ours µs": time, "TFLOP/s": flop(shape, starts) / time / 1e6, "extra MB": extra,
            "error": relative(ours(0)[:, :, sampled], want),
        }  # fmt: skip
        if not others:
            return row
        theirs = dense_sets(shape)
        for name, other in others.items():

            def call(i: int, other: dense.Attention = other) -> Any:
                return other(*theirs.args(i))

            row[f"{name} µs"] = gpu.optional_time(name, call, len(theirs), rounds(shape))
        row |= dense.best_of(row, others)
        if "best bf16" in row:
            query = args[0]
            result = others[row["best bf16"]](query, *decompressed(shape, args, torch.bfloat16))
            got = dense.whole(result, query)[:, :, sampled]
            got = torch.where(want.any(-1, keepdim=True), got, 0.0)  # NaN where nothing is seen
            row["bf16 error"] = relative(got, want)
        return row

    def published_time(self, shape: Shape, sets: Sets, **options: Any) -> Row:
        """The published kernel on the same tensors."""
        if self.published is None:
            return {}
        theirs, length = self.published, scalar(shape.L)

        def call(i: int) -> Tensor:
            return theirs(*sets.args(i), kv_len=length, **options)

        return {f"{PUBLISHED} µs": gpu.optional_time(PUBLISHED, call, len(sets), rounds(shape))}

    def causal(self, what: str, shape: Shape, sets: Sets, alone: bool) -> Row:
        """Rows at the end of a context, which its length on the device tells."""
        length = scalar(shape.L)

        def ours(i: int) -> Tensor:
            return sdpa(*sets.args(i), kv_len=length, mask_is_causal=True)

        others = {}
        if not alone:
            others = dense.for_prompts(shape.Lq, shape.L, shape.D, shape.group, self.flex)
        return self.row(what, shape, sets, ours, others=others)

    def shape(self, shape: Shape, bars: dict[str, float]) -> Row:
        sets = packed_sets(shape)
        row = self.causal(f"prefill {shape.heads}", shape, sets, self.alone)
        row |= self.published_time(shape, sets, mask_is_causal=True)
        return judged(row, PORTABLE if self.portable else bars | published_bar(shape))

    def sweep(self, shape: Shape) -> Row:
        """Ours alone."""
        return judged(self.causal(f"sweep {shape.heads}", shape, packed_sets(shape), True), {})

    def long_buffer(self) -> Row:
        """A prompt in a long buffer, against a buffer of its length."""
        sets = packed_sets(PROMPT)
        longer = in_long_buffers(sets, PROMPT, CAPACITY)
        short = self.causal("", PROMPT, sets, True)["ours µs"]
        what = f"prefill {PROMPT.heads}, in a buffer of {CAPACITY}"
        row = self.causal(what, PROMPT, longer, True)
        return against(row, f"a buffer of {PROMPT.L}", short, 1.15)

    def padding_by_start(self) -> Row:
        """Left padding told by kv_start, against none."""
        sets, length = packed_sets(PADDED), scalar(PADDED.L)
        starts = torch.tensor(STARTS, dtype=torch.int32, device="cuda")

        def ours(i: int) -> Tensor:
            args = sets.args(i)
            return attention(*args, kv_len=length, mask_is_causal=True, kv_start=starts)[0]

        none = self.causal("", PADDED, sets, True)["ours µs"]
        row = self.row(f"prefill {PADDED.heads}, padding by kv_start", PADDED, sets, ours, STARTS)
        return against(row, "no padding", none, 1.05)

    def padding_by_mask(self) -> Row:
        """Left padding told by a bool mask, beside torch with the same mask."""
        sets, length = packed_sets(PADDED), scalar(PADDED.L)
        mask = visible(PADDED, torch.arange(PADDED.Lq, device="cuda"), STARTS)

        def ours(i: int) -> Tensor:
            return sdpa(*sets.args(i), attn_mask=mask, kv_len=length, mask_is_causal=True)

        others = {} if self.alone else dense.for_padding(mask, PADDED.group)
        what = f"prefill {PADDED.heads}, padding by mask"
        row = self.row(what, PADDED, sets, ours, STARTS, others)
        # Told that the mask is causal, the published kernel would not look at it.
        row |= self.published_time(PADDED, sets, attn_mask=mask)
        return judged(row, {"ratio": 1.8} | published_bar(PADDED))


def scalar(length: int) -> Tensor:
    return torch.tensor(length, dtype=torch.int32, device="cuda")


def published_bar(shape: Shape) -> dict[str, float]:
    bar = PUBLISHED_RATIOS.get(shape.D)
    return {} if bar is None else {"ratio to published": bar}


def against(row: Row, what: str, time: float, slowdown: float) -> Row:
    """The row beside another of ours, than which it may be this much slower."""
    row |= {"against": what, "against µs": time, "ratio": time / row["ours µs"]}
    return judged(row, {"ratio": 1 / slowdown})


def judged(row: Row, at_least: dict[str, float]) -> Row:
    """The row, with its ratios, and what was asked of it and what was missed."""
    for name, column in {"flash": "flash µs", "published": f"{PUBLISHED} µs"}.items():
        if row.get(column):
            row[f"ratio to {name}"] = row[column] / row["ours µs"]
    at_least = {name: bar for name, bar in at_least.items() if name in row}
    at_most = {"extra MB": MOST_EXTRA, "error": row.get("bf16 error", WORST_ERROR)}
    missed = [f"{name} {row[name]:.3g} < {bar:.3g}" for name, bar in at_least.items()
              if row[name] < bar]  # fmt: skip
    missed += [f"{name} {row[name]:.3g} > {bar:.3g}" for name, bar in at_most.items()
               if row[name] > bar]  # fmt: skip
    asked = {"bar" if name == "ratio" else f"bar, {name}": bar for name, bar in at_least.items()}
    return {**row, **asked, "missed": "; ".join(missed)}


# ------------------------------------------------------------------------------------ the run


def jobs(benchmark: Benchmark | None, sweep: bool) -> dict[str, Callable[[], Row]]:
    """Name -> what makes the row. Without a benchmark only the names are of use."""
    run: Any = benchmark or Benchmark
    found: dict[str, Callable[[], Row]] = {}
    for shape, bars in SHAPES.items():
        name = f"prefill {shape.heads} B{shape.B} Lq{shape.Lq} L{shape.L}"
        found[name] = functools.partial(run.shape, shape, bars)
    found["prefill 32:8 D128 B1 Lq2048 L2048, in a buffer of 131072"] = run.long_buffer
    found["prefill 32:8 D128 B4 Lq2048 L2048, padding by kv_start"] = run.padding_by_start
    found["prefill 32:8 D128 B4 Lq2048 L2048, padding by mask"] = run.padding_by_mask
    for heads in SWEEP if sweep else []:
        for L in SWEEP_CONTEXTS:
            for Lq in SWEEP_ROWS:
                shape = Shape(1, *heads, L, Lq)
                if Lq <= L:
                    name = f"sweep {shape.heads} B1 Lq{Lq} L{L}"
                    found[name] = functools.partial(run.sweep, shape)
    return found


def right(row: Row) -> bool:
    """Whether ours, and the kernel that it is compared with, compute attention."""
    return all(row.get(name, 0.0) <= WORST_ERROR for name in ("error", "bf16 error"))


def line(row: Row) -> str:
    """A row for the terminal."""
    text = f"{row['what']:<41} B{row['B']} Lq{row['Lq']:<5} L{row['L']:<6}"
    text += f"{row['ours µs']:10.2f} µs {row['TFLOP/s']:6.1f} TFLOP/s"
    if "ratio" in row:
        other = row["against"] if row["against"] != "best bf16" else row["best bf16"]
        text += f"  {row['ratio']:5.2f}x {other}"
    if "ratio to published" in row:
        text += f"  {row['ratio to published']:5.2f}x published"
    text += f"  {row['extra MB']:.0f} MB  error {row['error']:.5f}"
    if "bf16 error" in row:
        text += f" (bf16 {row['bf16 error']:.5f})"
    return text + (f"  MISSED {row['missed']}" if row["missed"] else "")


def main() -> None:
    # fmt: off
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefill", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--only", default="", metavar="TEXT",
           help="rows whose name contains this, for example 'D256 B1'; --list shows the names")
    option("--sweep", action="store_true",
           help="also ours alone at every number of rows, 1 to 16384, in contexts of "
                f"{', '.join(map(str, SWEEP_CONTEXTS))}; only this: --sweep --only sweep")
    option("--alone", action="store_true", help="only ours, for tuning; nothing is written")
    option("--flex", action="store_true",
           help="FlexAttention too, which compiles for each shape")
    option("--executorch", type=Path, metavar="PATH",
           help="a checkout of executorch, for the published Triton kernel")
    option("--portable", action="store_true",
           help="with the bars of the portable kernels (give a --name, too)")
    option("--name", default="h200",
           help="of the results file; a run of some rows replaces only these (default: h200)")
    option("--commit", help="of the code, where git is not there to tell")
    option("--plot-only", action="store_true", help="draw the plot from the rows that exist")
    option("--list", action="store_true", help="print the names of the rows")
    # fmt: on
    args = parser.parse_args()

    if args.plot_only:
        print("written:", plot.draw_prefill(args.name))
        return
    if args.list:
        print(*jobs(None, args.sweep), sep="\n")
        return
    gpu.require("benchmarks.prefill")
    torch.manual_seed(0)
    benchmark = Benchmark(args.alone, args.flex, args.portable, args.executorch)
    everything = jobs(benchmark, args.sweep)
    chosen = {name: job for name, job in everything.items() if args.only in name}
    if not chosen:
        parser.error(f"--only {args.only!r} matches no row; --list shows the names")
    print(f"{gpu.name()}, torch {torch.__version__}")
    results: list[Row] = []
    progress = tqdm(chosen.items(), unit="row", disable=None)
    for name, job in progress:
        progress.set_description(name)
        results.append(job())
        tqdm.write(line(results[-1]))

    wrong = [line(row) for row in results if not right(row)]
    if wrong:
        raise SystemExit("\n".join(["WRONG RESULTS, nothing is written:", *wrong]))
    missed = sum(bool(row["missed"]) for row in results)
    print(f"{len(results)} rows, {missed} of them below a bar")
    if args.alone:
        return
    complete = chosen.keys() == jobs(None, sweep=True).keys()
    path = rows.write(args.name, gpu.name(), results, args.commit, complete=complete)
    print("written:", path)
    try:
        print("written:", plot.draw_prefill(args.name))
    except ImportError:
        print("no matplotlib, so no plot; later: python -m benchmarks.prefill --plot-only")


if __name__ == "__main__":
    main()
