"""Runs a model with one cache or with both, and shows the text as it comes and the figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from turboquant.cli import models, terminal
from turboquant.cli.errors import UserError
from turboquant.cli.measure import (
    CachedModel,
    CacheKind,
    Fidelity,
    Generation,
    Pick,
    cache_bytes,
    compare_caches,
)
from turboquant.hf import UnsupportedError
from turboquant.hf.support import plan

KINDS: tuple[CacheKind, ...] = ("dense", "tq4")
NAMES: dict[CacheKind, str] = {"dense": "dense cache", "tq4": "4-bit cache"}
_WARM_UP = 16  # tokens


@dataclass(frozen=True)
class Task:
    """What to continue, and how.

    Attributes:
        ids: the prompt's tokens.
        max_new_tokens: for which the model and the cache have room.
        new_pick: makes a fresh choice of tokens, for each run the same.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: list[int]
    max_new_tokens: int
    new_pick: Callable[[], Pick]

    @property
    def prompt(self) -> torch.Tensor:
        """int64 `[1, T]` on the model's device."""
        return torch.tensor([self.ids], device=self.model.device)


class Detokenizer:
    """Turns tokens into text as they come.

    Some tokenizers write the space between two words only where a token follows another, so a
    piece of text is what the latest token adds to those before it.

    >>> class Bytes:
    ...     def decode(self, ids, **_): return bytes(ids).decode(errors="replace")
    >>> pieces = Detokenizer(Bytes(), [65])
    >>> [pieces.add(byte) for byte in "bé!".encode()], pieces.rest()
    (['b', '', 'é', '!'], '')
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._shown = prompt[-8:]  # the latest tokens whose text is out
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is half done."""
        self._held.append(token)
        piece = self.rest()
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._shown, self._held = self._held, []
        return piece

    def rest(self) -> str:
        """What is held back."""
        before = self._text(self._shown)
        return self._text(self._shown + self._held)[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def one(task: Task, kind: CacheKind) -> None:
    """Prints the continuation from one cache to stdout, then its figures to stderr."""
    with _one_line_errors(task):
        result = _stream(task, _cached(task, kind))
    size = f"{_size(result.cache_bytes)} for {result.cached_tokens:,} tokens"
    if kind == "tq4":
        dense_bytes = plan(task.model).cache_bytes(result.cached_tokens, dense=True)
        size += f"; a dense one: {_size(dense_bytes)}"
    terminal.facts(
        [
            ("", ""),
            ("prompt", f"{result.prompt_tokens:,} tokens, {_rate(result.prefill_rate)}"),
            ("first token", f"after {result.first_token_s:.2f} s"),
            ("generated", f"{len(result.tokens):,} tokens, {_rate(result.decode_rate)}"),
            (NAMES[kind], size),
        ],
        file=sys.stderr,
    )


def both(task: Task) -> None:
    """Prints the continuations from both caches, then speed, memory and what differs, to stdout."""
    results: dict[CacheKind, Generation] = {}
    cached: dict[CacheKind, CachedModel] = {}
    with _one_line_errors(task):
        for kind in KINDS:
            _warm_up(task, kind)
        for kind in KINDS:
            cached[kind] = _cached(task, kind)
            terminal.heading(NAMES[kind])
            results[kind] = _stream(task, cached[kind])
        fidelity = _along_the_dense_continuation(task, cached, results["dense"].tokens)
    _print_costs(task, results, cached)
    _print_fidelity(results, fidelity)


# ---------------------------------------------------------------------------------- running


def _cached(task: Task, kind: CacheKind) -> CachedModel:
    # The last token is chosen but never read.
    return CachedModel(task.model, kind, len(task.ids) + task.max_new_tokens - 1)


def _warm_up(task: Task, kind: CacheKind) -> None:
    """Pay what only the first pass costs, so that it burdens neither side of a comparison."""
    cached = CachedModel(task.model, kind, _WARM_UP + 1)
    cached.prefill(task.prompt[:, :_WARM_UP])
    cached.logits(task.prompt[:, -1:])


def _stream(task: Task, cached: CachedModel) -> Generation:
    """Generate: a progress bar while the prompt is read, then the text as it comes."""
    text = Detokenizer(task.tokenizer, task.ids)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    with ExitStack() as bar:
        label = f"reading the prompt, {NAMES[cached.kind]}"
        progress = bar.enter_context(terminal.progress(label, len(task.ids)))

        def on_token(token: int) -> None:
            bar.close()  # at the first token; or it would be drawn over the text
            write(text.add(token))

        result = cached.generate(
            task.prompt,
            task.max_new_tokens,
            pick=task.new_pick(),
            stop=models.stop_tokens(task.model),
            on_token=on_token,
            progress=progress,
        )
    write(text.rest() + "\n")
    return result


def _along_the_dense_continuation(
    task: Task, cached: dict[CacheKind, CachedModel], tokens: list[int]
) -> Fidelity:
    """Both caches read what the dense one wrote, so they differ by nothing but the cache."""
    for one_of_them in cached.values():
        one_of_them.rewind(len(task.ids) - 1)
    ids = torch.tensor([[task.ids[-1], *tokens[:-1]]], device=task.model.device)
    return compare_caches(cached["dense"], cached["tq4"], ids)


@contextmanager
def _one_line_errors(task: Task) -> Iterator[None]:
    try:
        yield
    except UnsupportedError as error:
        raise UserError(f"no 4-bit cache for this model: {error}") from None
    except FloatingPointError as error:
        raise UserError(
            f"{error}: the weights are damaged, or their numbers too large for "
            f"{task.model.dtype}; try --dtype float32"
        ) from None
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory on {task.model.device}; shorten the prompt, or try --device cpu"
        ) from None


# ---------------------------------------------------------------------------------- figures


def _print_costs(
    task: Task, results: dict[CacheKind, Generation], cached: dict[CacheKind, CachedModel]
) -> None:
    dense, tq4 = results["dense"], results["tq4"]
    # Measured now, when both hold the same tokens.
    dense_bytes, tq4_bytes = (cache_bytes(cached[kind].cache) for kind in KINDS)
    where = str(task.model.device)
    if where == "cpu":
        threads = torch.get_num_threads()
        where += f", {threads} thread{'s' * (threads > 1)}"
    terminal.heading(f"cost ({where}, {str(task.model.dtype).removeprefix('torch.')})")
    terminal.table(
        ("", "dense", "4-bit", ""),
        [
            (
                f"KV cache, {cached['dense'].length:,} tokens",
                _size(dense_bytes),
                _size(tq4_bytes),
                f"{dense_bytes / tq4_bytes:.2f}x smaller",
            ),
            (
                f"prefill, {dense.prompt_tokens:,} tokens",
                _rate(dense.prefill_rate),
                _rate(tq4.prefill_rate),
                _faster(dense.prefill_rate, tq4.prefill_rate),
            ),
            (
                "time to first token",
                f"{dense.first_token_s:.2f} s",
                f"{tq4.first_token_s:.2f} s",
                "",
            ),
            (
                "decode",
                _rate(dense.decode_rate),
                _rate(tq4.decode_rate),
                _faster(dense.decode_rate, tq4.decode_rate),
            ),
        ],
    )
    terminal.quote("dense: what transformers does by default. One run each: speeds vary.")


def _print_fidelity(results: dict[CacheKind, Generation], fidelity: Fidelity) -> None:
    dense, tq4 = results["dense"].tokens, results["tq4"].tokens
    agree, positions = int(fidelity.same_top1.sum()), len(fidelity.kl)
    differ = f"differ from token {len(os.path.commonprefix([dense, tq4])) + 1:,} on"
    terminal.heading("quality: both caches read the dense continuation, and predict each token")
    terminal.facts(
        [
            ("top-1 agreement", f"{fidelity.top1_agreement:.1%} ({agree:,} of {positions:,})"),
            ("mean KL", f"{fidelity.mean_kl:.5f} nats (median {float(fidelity.kl.median()):.5f})"),
            ("texts above", "are the same" if dense == tq4 else differ),
        ]
    )


def _size(count: int) -> str:
    """
    >>> _size(999), _size(18_438_144), _size(4_294_967_296)
    ('999 bytes', '18.44 MB', '4.29 GB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"


def _rate(rate: float | None) -> str:
    """Tokens a second."""
    return "-" if rate is None else f"{rate:,.1f} tokens/s"


def _faster(dense: float | None, tq4: float | None) -> str:
    if dense is None or tq4 is None:
        return ""
    ratio = tq4 / dense
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
