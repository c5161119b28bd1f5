"""`turboquant diagnose`: what the 4-bit cache would do with a model, from its config alone."""

from __future__ import annotations

import argparse
from typing import Any

from turboquant.cli import models

HELP = "what of a model's cache can be stored in 4 bits"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "diagnose",
        help=HELP,
        description=f"Prints {HELP}. Reads the config alone.",
        epilog="example: turboquant diagnose --model Qwen/Qwen3-0.6B",
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="a hub id or a local folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    with models.quiet():
        from turboquant.hf import diagnose

        print(diagnose(models.load_config(models.locate(arguments.model))))
