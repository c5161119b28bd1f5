"""`turboquant diagnose`: what of a model's cache can be stored in 4 bits, and what then fits."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from turboquant.cli import models, terminal
from turboquant.cli.generate import positive_integer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from turboquant.hf import LayerReport, Report

HELP = "what of a model's cache can be stored in 4 bits, and what then fits"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def memory(text: str) -> int:
    """
    >>> memory("32GiB"), memory("1.5 MB"), memory("4096")
    (34359738368, 1500000, 4096)
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 32GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "diagnose",
        help=HELP,
        description=f"Prints {HELP}. Reads the config alone, or with --weights what the keys of "
        "each layer look like: one forward pass of 512 tokens.",
        epilog="example: turboquant diagnose --model Qwen/Qwen3-0.6B --context 32768 --memory 8GiB",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="a hub id or a local folder")
    add("--context", type=positive_integer, metavar="N",
        help="tokens of a sequence (default: the model's context, at most 32768)")  # fmt: skip
    add(
        "--batch-size", type=positive_integer, default=1, metavar="N", help="sequences (default: 1)"
    )
    add("--memory", type=memory, metavar="SIZE",
        help="such as 32GiB: how long a context fits beside the weights")  # fmt: skip
    add("--weights", action="store_true", help="load them and look at the keys")
    add("--device", help="for --weights (default: a GPU, if our kernels run on it)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    with models.quiet():
        from turboquant.hf import diagnose
        from turboquant.hf.support import weight_bytes

        source = models.locate(arguments.model)
        config = models.load_config(source)
        subject: PreTrainedModel | PretrainedConfig = config
        context = arguments.context or min(models.context_length(config) or 32768, 32768)
        if arguments.weights:
            device = models.pick_device(arguments.device, needs_kernels=False)
            subject = models.load_weights(source, config, "auto", device)
        with terminal.status("looking at the keys"):
            report = diagnose(subject)
        if report.refusal is not None:
            print(report)
            return
        print(str(report).splitlines()[0])
        print()
        show_layers(report, context)
        print()
        show_memory(report, weight_bytes(subject), context, arguments.batch_size, arguments.memory)
        for warning in report.warnings:
            print(f"warning: {warning}")


def show_layers(report: Report, context: int) -> None:
    """A row for all layers that are alike."""
    from turboquant.hf.report import ranges

    alike: dict[tuple[str, ...], list[int]] = {}
    for layer in report.layers:
        alike.setdefault(_cells(layer, context), []).append(layer.index)
    columns = ["layers", "dense", "ours", f"dense at {context}", "ours", "plain", "offset", ""]
    rows = [[ranges(indices), *cells] for cells, indices in alike.items()]
    print("bytes a token, bytes of a sequence, error of 4-bit keys as a multiple of the usual one:")
    terminal.table(columns, rows)


def _cells(layer: LayerReport, context: int) -> tuple[str, ...]:
    noise = layer.key_noise
    return (
        str(layer.dense_bytes or "-"),
        str(layer.bytes_per_token or "-"),
        size(layer.cache_bytes(context, dense=True)),
        size(layer.cache_bytes(context)),
        "-" if noise is None else f"{noise.plain:.1f}x",
        "-" if noise is None else f"{noise.offset:.1f}x",
        str(layer).partition(";")[0],
    )


def show_memory(
    report: Report, weights: int, context: int, batch_size: int, available: int | None
) -> None:
    sequences = "" if batch_size == 1 else f", {batch_size} sequences"
    dense, ours = (report.cache_bytes(context, batch_size, dense=d) for d in (True, False))
    facts = [
        ("weights", size(weights)),
        (f"cache of {context:,} tokens{sequences}", f"{size(ours)}; dense {size(dense)}"),
    ]
    if available is not None:
        room = available - weights
        fit = [report.longest_context(max(room, 0), batch_size, dense=d) for d in (True, False)]
        facts.append((f"fits {size(available)}{sequences}", f"{fit[1]:,} tokens; dense {fit[0]:,}"))
    settings = [
        f"{name}={layers}"
        for name, layers in {
            "skip_layers": [
                r.index for r in report.layers if r.window is None and not r.compressed
            ],
            "k_offset": [r.index for r in report.layers if r.k_offset],
        }.items()
        if layers
    ]
    facts.append(("recommended", f"enable(model), which means {', '.join(settings)}"
                  if settings else "enable(model)"))  # fmt: skip
    terminal.facts(facts)


def size(bytes: int) -> str:
    """
    >>> size(0), size(1000), size(34359738368)
    ('0', '1000 B', '32.0 GiB')
    """
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if bytes >= 1 << power:
            return f"{bytes / (1 << power):.1f} {name}"
    return f"{bytes} B" if bytes else "0"
