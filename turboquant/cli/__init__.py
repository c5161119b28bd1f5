"""The command `turboquant`: one module per subcommand, `measure` for the figures they print.

Only what a subcommand needs is imported, when it runs: `turboquant info` works with torch and
NumPy alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import turboquant
from turboquant.cli import demo, diagnose, generate, info
from turboquant.cli.errors import UserError

COMMANDS = (demo, generate, diagnose, info)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other bad input: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        the exit code: 0; 2 for bad input, after one line on stderr; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # Models write any character; a terminal that lacks one shall show a question mark.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"turboquant: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        # Or the interpreter would flush, and complain, once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="turboquant",
        description="Attention over a KV cache stored in 4 bits a number.",
        epilog="Start with: turboquant demo",
    )
    parser.add_argument("--version", action="version", version=turboquant.__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
