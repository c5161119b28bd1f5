"""`turboquant demo`: the packaged model continues a real source file from both caches."""

from __future__ import annotations

import argparse
import json
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import turboquant.demo
from turboquant.cli import generate, models, terminal
from turboquant.cli.errors import UserError

HELP = "a dense and a 4-bit cache side by side, on a model that comes along"
PROMPT_BYTES = 6000
FILE_BYTES = 8192  # of the smallest file taken, so that its text goes on behind the prompt
SHOWN_LINES = 6
NEXT = """\
Now with a model of yours, and a prompt as long as you like:
  turboquant generate --model <hub id or folder> --prompt-file <file> --compare
or in Python, for everything that calls generate():
  import turboquant.hf; turboquant.hf.enable(model)"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help=HELP,
        description=(
            "A small byte-level Llama that comes with the package reads a standard library file "
            "that it was not trained on, and goes on writing it: once from a dense KV cache, once "
            "from a 4-bit one. Nothing is downloaded."
        ),
        epilog="example: turboquant demo --max-new-tokens 400",
    )
    parser.add_argument(
        "--max-new-tokens", type=generate.positive_integer, default=192, metavar="N",
        help="length of the continuations in bytes (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    folder = turboquant.demo.MODEL_FOLDER
    with models.quiet():
        device = models.pick_device(None, needs_kernels=True)
        try:
            source = models.locate(str(folder))
            config = models.load_config(source)
            tokenizer = models.load_tokenizer(source)
            model = models.load_weights(source, config, "auto", device)
            held_out = json.loads((folder / "training_log.json").read_bytes())["held_out"]
        except (UserError, OSError, ValueError, KeyError) as error:
            raise UserError(
                f"the demo model is damaged ({error}); reinstall it: "
                'pip install --force-reinstall --no-deps "turboquant-tq4"'
            ) from None

        from turboquant.cli import report
        from turboquant.cli.measure import greedy

        name, prompt = beginning(held_out)
        # Every document that the model learned from began with this token.
        ids = [config.bos_token_id, *tokenizer(prompt).input_ids]
        context = {"the model's context": models.context_length(config)}
        new_tokens = generate.room(len(ids), arguments.max_new_tokens, context)
        terminal.heading(f"prompt: {name}, {len(prompt.encode()):,} bytes; the last of them")
        terminal.quote("\n".join(prompt.splitlines()[-SHOWN_LINES:]))
        threads = torch.get_num_threads()
        # The passes of so small a model are short: on a busy machine they would wait for a second
        # thread longer than they compute (measured: 170 s instead of 23).
        torch.set_num_threads(1)
        try:
            report.both(report.Task(model, tokenizer, ids, new_tokens, lambda: greedy))
        finally:
            torch.set_num_threads(threads)
    print(f"\n{NEXT}")


def beginning(held_out: Iterable[str]) -> tuple[str, str]:
    """The name and the beginning of a standard library file that the model never saw.

    The beginning has at most PROMPT_BYTES and ends with the head of a function, so that the model
    writes the body.

    Args:
        held_out: names as in the model's log, such as `stdlib/json/decoder.py`.

    Raises:
        UserError: this Python has none that is long enough.
    """
    library = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for name in held_out:
        path = library / name.removeprefix("stdlib/")
        if path.is_file() and path.stat().st_size >= FILE_BYTES:
            texts[name] = path.read_bytes()
    if not texts:
        raise UserError(
            f"none of the files held out for the demo is in {library}; try instead: "
            f"turboquant generate --model {turboquant.demo.MODEL_FOLDER} --compare --prompt-file "
            "<a Python file>"
        )
    name = min(texts, key=lambda name: len(texts[name]))
    start = texts[name][:PROMPT_BYTES]
    heads = list(re.finditer(rb"^ *def .*:\n", start, re.MULTILINE))
    return name, start[: heads[-1].end() if heads else start.rfind(b"\n") + 1].decode()
