"""What a KV cache costs, and what it changes: speed, bytes, and how far predictions move.

For any transformers causal LM in eval mode, one sequence at a time. Prints nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from turboquant.hf import TurboQuantCache, enabled
from turboquant.hf.cache import held_tensors

CacheKind = Literal["dense", "tq4"]
Pick = Callable[[Tensor], int]
"""Chooses the next token from its logits, f32 `[V]`."""

STEP = 512  # tokens in one forward pass of a prefill
_LOGITS = 1 << 22  # numbers held at once, of each model compared: 16 MB


class CachedModel:
    """A model with a cache of its own, fed piece by piece.

    Args:
        model: a causal LM in eval mode. Several may share it, one call at a time.
        kind: ``"dense"``: the cache and the attention that transformers takes by default.
            ``"tq4"``: a static :class:`turboquant.hf.TurboQuantCache`.
        capacity: tokens that the 4-bit cache has room for; the dense one grows.

    Attributes:
        cache: the transformers cache.
        length: tokens in it.

    Raises:
        turboquant.hf.UnsupportedError: the model has no 4-bit cache.
    """

    def __init__(self, model: PreTrainedModel, kind: CacheKind, capacity: int) -> None:
        self.model = model
        self.kind = kind
        self.cache: Cache = (
            TurboQuantCache(model, max_cache_len=capacity)
            if kind == "tq4"
            else DynamicCache(config=model.config)
        )
        self.length = 0

    def prefill(self, ids: Tensor, progress: Callable[[int], None] | None = None) -> None:
        """Read tokens, int64 `[1, T]`, STEP at a time, and compute no logits.

        Args:
            progress: called with the number of these tokens read so far.
        """
        with self._in_use():
            for start in range(0, ids.shape[1], STEP):
                self._feed(self.model.base_model, ids[:, start : start + STEP])
                if progress is not None:
                    progress(min(start + STEP, ids.shape[1]))

    def logits(self, ids: Tensor) -> Tensor:
        """Read tokens, int64 `[1, T]`, in one pass: f32 `[T, V]`, what follows each of them."""
        with self._in_use():
            return self._feed(self.model, ids).logits[0].float()

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if length < self.length:
            self.cache.crop(length - self.length)
            self.length = length

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        pick: Pick,
        stop: Collection[int] = (),
        on_token: Callable[[int], None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Generation:
        """Continue a prompt.

        Args:
            ids: the prompt, int64 `[1, T]`.
            max_new_tokens: at least 1.
            pick: chooses each token.
            stop: tokens that end the text; the last of the result, if one was met.
            on_token: called with each token as it is chosen.
            progress: see :meth:`prefill`.

        Raises:
            FloatingPointError: the model predicts NaN.
        """
        tokens: list[int] = []
        started = time.perf_counter()
        with self._in_use():
            self.prefill(ids[:, :-1], progress)
            token = int(ids[0, -1])
            while len(tokens) < max_new_tokens:
                last = torch.tensor([[token]], device=ids.device)
                logits = self._feed(self.model, last).logits[0, -1].float()
                if logits.isnan().any():
                    raise FloatingPointError("the model's predictions are NaN")
                token = pick(logits)
                tokens.append(token)
                if len(tokens) == 1:
                    first = time.perf_counter()
                if on_token is not None:
                    on_token(token)
                if token in stop:
                    break
        return Generation(
            tokens=tokens,
            prompt_tokens=ids.shape[1],
            first_token_s=first - started,
            decode_s=time.perf_counter() - first,
            cached_tokens=self.length,
            cache_bytes=cache_bytes(self.cache),
        )

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """The model computes with the attention that belongs to the cache."""
        attention: Any = enabled(self.model) if self.kind == "tq4" else nullcontext()
        with torch.inference_mode(), attention:
            yield

    def _feed(self, part: Any, ids: Tensor) -> Any:
        out = part(ids, past_key_values=self.cache, use_cache=True)
        self.length += ids.shape[1]
        return out


@dataclass(frozen=True)
class Generation:
    """A continuation and what it took.

    Attributes:
        tokens: the continuation, with the token that ended it.
        prompt_tokens: number of tokens read.
        first_token_s: seconds from the first token read to the first one chosen.
        decode_s: seconds for the others.
        cached_tokens: in the cache at the end: all but the last one chosen.
        cache_bytes: see :func:`cache_bytes`.
    """

    tokens: list[int]
    prompt_tokens: int
    first_token_s: float
    decode_s: float
    cached_tokens: int
    cache_bytes: int

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, up to the first token of the continuation."""
        return self.prompt_tokens / self.first_token_s

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first one; None if there was only one."""
        return (len(self.tokens) - 1) / self.decode_s if len(self.tokens) > 1 else None


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory that hold keys and values: whole allocations, free room included."""
    storages = {}
    for layer in cache.layers:
        for tensor in held_tensors(layer):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# --------------------------------------------------------------------------------- sampling


def greedy(logits: Tensor) -> int:
    """The most probable token."""
    return int(logits.argmax())


def sampler(temperature: float, top_p: float, seed: int) -> Pick:
    """Draws from the most probable tokens that together have the probability `top_p`.

    Args:
        temperature: above 0; the logits are divided by it.
        top_p: above 0, at most 1.
        seed: equal seeds draw equal tokens from equal logits.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(logits: Tensor) -> int:
        # Shifted first: divided by a tiny temperature, the largest would become infinite.
        scaled = (logits.cpu() - logits.max().cpu()) / temperature
        p, tokens = scaled.softmax(-1).sort(descending=True)
        before = p.cumsum(-1) - p  # of all that are more probable; 0 for the first
        p = p.where(before < top_p, 0.0)
        return int(tokens[p.multinomial(1, generator=generator)])

    return pick


# --------------------------------------------------------------------------------- fidelity


@dataclass(frozen=True)
class Fidelity:
    """How close a candidate's next-token distributions are to a reference's, by position.

    Attributes:
        kl: Kullback-Leibler divergence of the candidate from the reference, nats, f64 `[N]`.
        same_top1: bool `[N]`; do both find the same token the most probable?
    """

    kl: Tensor
    same_top1: Tensor

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def top1_agreement(self) -> float:
        """A share, 0 to 1."""
        return float(self.same_top1.double().mean())


def compare_logits(reference: Tensor, candidate: Tensor) -> Fidelity:
    """Compare the distributions that two sets of logits, `[N, V]`, stand for.

    >>> reference = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    >>> fidelity = compare_logits(reference, reference.flip(0))
    >>> [round(kl, 4) for kl in fidelity.kl.tolist()], fidelity.top1_agreement
    ([0.0671, 0.0826], 1.0)
    """
    log_p, log_q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    # A model may rule tokens out with a logit of -inf: those add 0, not 0 · (-inf - -inf).
    terms = (log_p.exp() * (log_p - log_q)).where(log_p > -torch.inf, 0.0)
    return Fidelity(terms.sum(-1).cpu(), (log_p.argmax(-1) == log_q.argmax(-1)).cpu())


def compare_caches(reference: CachedModel, candidate: CachedModel, ids: Tensor) -> Fidelity:
    """Feed the same tokens to both, and compare what each predicts after every one of them.

    Both read the tokens through their cache in use, on top of what it holds already.

    Args:
        ids: int64 `[1, N]`.
    """
    vocabulary = reference.model.config.get_text_config().vocab_size
    parts = [
        compare_logits(reference.logits(piece), candidate.logits(piece))
        for piece in ids.split(min(STEP, max(1, _LOGITS // vocabulary)), dim=1)
    ]
    return Fidelity(
        torch.cat([part.kl for part in parts]), torch.cat([part.same_top1 for part in parts])
    )
