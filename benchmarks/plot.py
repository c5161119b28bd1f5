"""Draws ``results/decode.png`` and ``results/prefill.png`` from rows; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import rows

PANELS = {"32:8 D128": "32 query heads on 8, D = 128", "16:2 D256": "16 on 2, D = 256",
          "32:4 D512": "32 on 4, D = 512"}  # fmt: skip
OURS, DENSE, TRITON, FAINT = "#c2410c", "#1e3a8a", "#6b7280", "#d1d5db"
OUR_LABEL = "turboquant, 4 bit"


def draw(name: str) -> Path:
    """Decode time against context length, for one sequence: from ``results/<name>.csv``."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    source = rows.RESULTS / f"{name}.csv"
    found = rows.read(source)
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 5), sharey=True)
    for ax, (heads, title) in zip(axes, PANELS.items()):
        wanted = (f"decode {heads}", "1", "1")
        series = [row for row in found if (row["what"], row["B"], row["Lq"]) == wanted]
        panel(ax, sorted(series, key=lambda row: int(row["L"])))
        ax.set_title(title, loc="left", fontweight="bold", fontsize=12)
    axes[0].set_ylim(bottom=1)
    axes[0].set_ylabel("one attention call, µs")
    handles: dict[str, Any] = {}
    for ax in axes:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
    if not handles:
        raise SystemExit(f"{source} has no rows to draw; run python -m benchmarks.decode")
    labels = sorted(handles, key=lambda label: label != OUR_LABEL)
    figure.legend([handles[label] for label in labels], labels, loc="upper center",
                  ncols=len(handles),
                  frameon=False, bbox_to_anchor=(0.5, 0.945))  # fmt: skip
    device = next(row["device"] for row in found if row["what"].startswith("decode")).split(",")[0]
    figure.suptitle(f"Decoding one token on an {device}: time against context length",
                    fontsize=14, y=0.985)  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    path = rows.RESULTS / "decode.png"
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path


def draw_prefill(name: str) -> Path:
    """Rate of each shape by its rows, for one sequence: from ``results/<name>.csv``."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    source = rows.RESULTS / f"{name}.csv"
    found = [row for row in rows.read(source) if row["what"].startswith("prefill")]
    panels: dict[str, list[dict[str, str]]] = {}
    for heads in PANELS:
        series = [row for row in found if row["what"] == f"prefill {heads}"]
        if series:
            panels[heads] = sorted(series, key=lambda row: (int(row["Lq"]), int(row["L"])))
    if not panels:
        raise SystemExit(f"{source} has no rows to draw; run python -m benchmarks.prefill")
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    widths = {"width_ratios": [len(series) + 1 for series in panels.values()]}
    figure, [axes] = plt.subplots(
        1, len(panels), figsize=(14, 5), sharey=True, squeeze=False, gridspec_kw=widths
    )
    for ax, (heads, series) in zip(axes, panels.items()):
        bars(ax, series)
        ax.set_title(PANELS[heads], loc="left", fontweight="bold", fontsize=12)
    axes[0].set_ylabel("TFLOP/s of causal work")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(handles), frameon=False,
                  bbox_to_anchor=(0.5, 0.945))  # fmt: skip
    device = found[0]["device"].split(",")[0]
    figure.suptitle(f"Attention of many new tokens on an {device}", fontsize=14, y=0.985)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    path = rows.RESULTS / "prefill.png"
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path


def bars(ax: Any, series: list[dict[str, str]]) -> None:
    """Each shape's best bf16 and ours, with their ratio above."""
    for place, row in enumerate(series):
        first = place == 0
        ours = float(row["TFLOP/s"])
        best = ours / float(row["ratio"]) if row.get("ratio") else 0.0
        ax.bar(place - 0.2, best, 0.38, color=DENSE, label="best bf16 in torch" if first else None)
        ax.bar(place + 0.2, ours, 0.38, color=OURS, label=OUR_LABEL if first else None)
        if best:
            ax.annotate(f"{ours / best:.2f}x", (place, max(ours, best)), (0, 3), ha="center",
                        textcoords="offset points", fontweight="bold", color=OURS)  # fmt: skip
    labels = [f"{size(row['Lq'])}\nof {size(row['L'])}" for row in series]
    ax.set_xticks(range(len(series)), labels)
    ax.set(xlim=(-0.6, len(series) - 0.4), xlabel="new tokens, of a context")
    ax.grid(True, axis="y", color="#eeeeee")
    ax.set_axisbelow(True)


def size(tokens: str) -> str:
    return f"{int(tokens) // 1024}K" if int(tokens) >= 1024 else tokens


def panel(ax: Any, series: list[dict[str, str]]) -> None:
    def line(column: str, label: str, **style: Any) -> None:
        points = [(int(row["L"]), float(row[column])) for row in series if row.get(column)]
        if points:
            ax.plot(*zip(*points), label=label, **style)

    line("published Triton µs", "published Triton kernel, 4 bit", color=TRITON, marker="s",
         markersize=4, linewidth=1.3)  # fmt: skip
    line("best bf16 µs", "best bf16 in torch", color=DENSE, marker="o", markersize=5,
                 linewidth=2)  # fmt: skip
    line("bf16 roofline µs", "reading the bf16 bytes", color=DENSE, linestyle=(0, (4, 3)),
         linewidth=1, alpha=0.7)  # fmt: skip
    line("packed roofline µs", "reading the packed bytes", color=OURS, linestyle=(0, (4, 3)),
         linewidth=1, alpha=0.7)  # fmt: skip
    line("ours µs", OUR_LABEL, color=OURS, marker="o", markersize=5, linewidth=2.4,
                zorder=5)  # fmt: skip
    last = series[-1] if series else {}
    if last.get("ratio"):
        L, fast, slow = int(last["L"]), float(last["ours µs"]), float(last["against µs"])
        note = f"{slow / fast:.1f}x" + ("" if last["against"] == "best bf16" else "\nbf16 reading")
        ax.annotate("", (L, fast), (L, slow), arrowprops={"arrowstyle": "<->", "color": FAINT})
        ax.annotate(note, (L, (fast * slow) ** 0.5), (8, 0), fontweight="bold", color=OURS,
                    textcoords="offset points", va="center", annotation_clip=False)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="context, tokens")
    lengths = [int(row["L"]) for row in series]
    ax.set_xticks(lengths, [size(row["L"]) for row in series])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(True, which="major", color="#eeeeee")
    ax.set_axisbelow(True)
