"""Headings, tables and progress; in colour where rich is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_WIDTH = 80
_CLEAR = "\r\033[K"  # this line of a terminal


def heading(text: str) -> None:
    """An empty line, then one across the terminal with a title in it."""
    print()
    if console := _console():
        from rich.text import Text

        console.rule(Text(text, style="bold"), align="left", style="dim")
    else:
        print(f"-- {text} ".ljust(_WIDTH, "-"))


def quote(text: str) -> None:
    """Text that is context rather than result."""
    if console := _console():
        console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
    else:
        print(text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need; all but the first and the last are flush right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [
            cell.rjust(width) if 0 < i < len(columns) - 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("   ".join(cells).rstrip())


def facts(pairs: Sequence[tuple[str, str]], *, file: Any = None) -> None:
    """`label  value` lines; a long value is never broken, so that it can be copied."""
    width = max(len(label) for label, _ in pairs)
    for label, value in pairs:
        print(f"{label:{width}}  {value}".rstrip(), file=file)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while tokens are read, if a person is looking.

    Yields:
        a function to call with the number done so far.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    if console := _console(stderr=True):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        # Narrow enough for 80 columns and a prompt of a million tokens.
        columns = (TextColumn(label), BarColumn(24), MofNCompleteColumn(), TextColumn("tokens"))
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done: bar.update(task, completed=done)
        return

    def show(done: int) -> None:
        print(f"\r{label} {done}/{total} tokens", end="", file=sys.stderr, flush=True)

    show(0)
    try:
        yield show
    finally:
        print(_CLEAR, end="", file=sys.stderr, flush=True)


@contextmanager
def status(text: str) -> Iterator[None]:
    """A line on stderr while something runs, if a person is looking."""
    if not sys.stderr.isatty():
        yield
        return
    print(f"\r{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(_CLEAR, end="", file=sys.stderr, flush=True)


def _console(stderr: bool = False) -> Any:
    """rich's console; None without rich."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(stderr=stderr, highlight=False)
