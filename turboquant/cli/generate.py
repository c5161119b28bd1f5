"""`turboquant generate`: continue a prompt with any supported model, from either cache or both."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path
from typing import Any

from turboquant.cli import models
from turboquant.cli.errors import UserError

HELP = "continue a prompt from a 4-bit cache, a dense one, or both"
NEW_TOKENS = 128
EXAMPLES = """\
examples:
  turboquant generate --model Qwen/Qwen3-0.6B --prompt "The three laws are"
  turboquant generate --model ./my-model --prompt-file long.txt --compare
  git diff | turboquant generate --model ./my-model --prompt - > out.txt

The continuation goes to stdout; progress and figures go to stderr. With
--compare, all but the progress goes to stdout."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help=HELP,
        description="Continues a prompt with a Hugging Face causal language model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="a hub id or a local folder")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt; - reads stdin")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file; - reads stdin")
    add(
        "--cache",
        choices=("tq4", "dense"),
        default="tq4",
        help="tq4 stores 4 bits a number, dense the model's own dtype (default: %(default)s)",
    )
    add(
        "--compare",
        action="store_true",
        help="run both caches; show both texts, speed, memory and agreement",
    )
    add(
        "--max-new-tokens",
        type=positive_integer,
        metavar="N",
        help=f"length of the continuation (default: {NEW_TOKENS}, or what there is room for)",
    )
    add(
        "--max-cache-len",
        type=positive_integer,
        metavar="N",
        help="limit prompt and continuation to N tokens (default: the model's context)",
    )
    add(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="0 takes the most probable token, more draws (default: 0)",
    )
    add(
        "--top-p",
        type=probability,
        default=1.0,
        metavar="P",
        help="draw from the most probable tokens that together reach P (default: 1)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="of the draws (default: 0)")
    add(
        "--dtype",
        choices=models.DTYPES,
        default="auto",
        help="auto is the dtype of the stored weights (default: %(default)s)",
    )
    add("--device", help="such as cpu or cuda:1 (default: a GPU, if our kernels run on it)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.top_p < 1 and arguments.temperature == 0:
        raise UserError("--top-p needs a --temperature above 0")
    packed = arguments.compare or arguments.cache == "tq4"
    device = models.pick_device(arguments.device, needs_kernels=packed)
    text = read_prompt(arguments.prompt, arguments.prompt_file)
    with models.quiet():
        source = models.locate(arguments.model)
        config = models.load_config(source)
        if packed:
            models.refuse_unsupported(config)
        # The weights come last: they take longest, and a prompt may not even fit.
        tokenizer = models.load_tokenizer(source)
        ids = tokenizer(text).input_ids
        if not ids:
            raise UserError("the prompt is empty")
        new_tokens = room(
            len(ids),
            arguments.max_new_tokens,
            {
                "the model's context": models.context_length(config),
                "--max-cache-len": arguments.max_cache_len,
            },
        )
        model = models.load_weights(source, config, arguments.dtype, device)

        from turboquant.cli import report
        from turboquant.cli.measure import greedy, sampler

        draw = functools.partial(sampler, arguments.temperature, arguments.top_p, arguments.seed)
        task = report.Task(
            model, tokenizer, ids, new_tokens, draw if arguments.temperature else lambda: greedy
        )
        if arguments.compare:
            report.both(task)
        else:
            report.one(task, arguments.cache)


def read_prompt(text: str | None, file: str | None) -> str:
    """The prompt: given, or read from a file or from standard input.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    if text is None or text == "-":
        where = "standard input" if file in (None, "-") else str(file)
        try:
            data = sys.stdin.buffer.read() if file in (None, "-") else Path(str(file)).read_bytes()
            text = data.decode()
        except OSError as error:
            raise UserError(f"cannot read {where}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{where} is not UTF-8 text") from None
    if not text:
        raise UserError("the prompt is empty")
    return text


def room(prompt_tokens: int, wanted: int | None, limits: dict[str, int | None]) -> int:
    """How many tokens shall follow the prompt.

    Args:
        wanted: None for as many as fit, up to NEW_TOKENS.
        limits: name of each limit, and how many tokens prompt and continuation may have; None
            for no limit.

    Raises:
        UserError: there is no room for them.
    """
    known = {name: limit for name, limit in limits.items() if limit is not None}
    if not known:
        return wanted or NEW_TOKENS
    name, limit = min(known.items(), key=lambda item: item[1])
    left = limit - prompt_tokens
    if left < 1:
        raise UserError(
            f"the prompt has {prompt_tokens:,} tokens and {name} is {limit:,}; shorten the prompt "
            "to leave room for the continuation"
        )
    if wanted is not None and left < wanted:
        raise UserError(
            f"a prompt of {prompt_tokens:,} tokens leaves room for {left:,} more ({name} is "
            f"{limit:,}); ask for no more, or shorten the prompt"
        )
    return wanted or min(left, NEW_TOKENS)


# argparse puts the names of these functions into its messages: "invalid temperature value: 'x'".


def positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, got {text}")
    return value
