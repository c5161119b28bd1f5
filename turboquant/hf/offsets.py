"""Taking out of the keys what they have in common, before they are compressed.

A projection with a bias can give all keys of a head one large part in common. It says nothing about
which key a query prefers, for it adds the same to all scores of a row and the softmax takes that
out again; but 4 bits are 4 bits of the whole vector, and their error grows with it. So a fixed
vector for each sequence and KV head, the mean of the first keys, is subtracted first. Attention
stays exact, at no cost.

It cures only what rotary embeddings leave in place. :func:`measure_keys` tells how much that is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

# How much larger the error of 4 bits may be than that of keys without a part in common: above the
# first an offset is worth having, above the second the layer stays dense.
WORTH_AN_OFFSET = 1.5
TOO_LARGE = 2.0


class KeyOffset:
    """The offsets of one layer.

    Attributes:
        vector: f32 ``[B, H, 1, D]``; 0 until it is known.
        known: bool ``[B]``.
    """

    def __init__(self, vector: Tensor, known: Tensor) -> None:
        self.vector = vector
        self.known = known

    @classmethod
    def zeros(cls, keys: Tensor) -> KeyOffset:
        """For keys ``[B, H, T, D]``."""
        B, H, _, D = keys.shape
        with torch.inference_mode(False):
            return cls(
                torch.zeros(B, H, 1, D, device=keys.device),
                torch.zeros(B, dtype=torch.bool, device=keys.device),
            )

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.vector, self.known

    def map(self, fn: Callable[[Tensor], Tensor]) -> KeyOffset:
        return KeyOffset(fn(self.vector), fn(self.known))

    def learn(self, keys: Tensor, real: Tensor | None) -> None:
        """Where it is not known yet, the mean of these keys; in place.

        Args:
            keys: ``[B, H, T, D]``.
            real: bool ``[B, T]``, False for padding; None: there is none. Rows of padding alone
                leave theirs unknown.
        """
        B, _, T, _ = keys.shape
        weights = keys.new_ones(B, T) if real is None else real.to(keys.dtype)
        count = weights.sum(-1, dtype=torch.float32)
        mean = (weights / count.clamp(min=1).to(keys.dtype)[:, None])[:, None, None] @ keys
        new = ~self.known & (count > 0)
        self.vector.copy_(torch.where(new[:, None, None, None], mean.float(), self.vector))
        self.known.logical_or_(count > 0)


# ------------------------------------------------------------------------------ is one needed?


@dataclass(frozen=True)
class KeyNoise:
    """How large the error of 4 bits is in a layer's keys, in units of what it would be if they
    had no part in common. Of the worst KV head.

    Attributes:
        plain: as they are.
        offset: with an offset from the first tokens.
    """

    plain: float
    offset: float


_measured: weakref.WeakKeyDictionary[Any, dict[int, KeyNoise]] = weakref.WeakKeyDictionary()


def measured_keys(model: PreTrainedModel) -> dict[int, KeyNoise]:
    """:func:`measure_keys`, once for each model."""
    if model not in _measured:
        _measured[model] = measure_keys(model)
    return _measured[model]


@torch.no_grad()
def measure_keys(model: PreTrainedModel, tokens: int = 256) -> dict[int, KeyNoise]:
    """Measure the keys of the full-attention layers, by one forward pass.

    Two sequences of random tokens go through the model, at the same positions over its context.
    Two keys at one position differ by what the tokens say; what they share is the part in common.
    So this knows nothing of biases, norms and rotary embeddings, and finds what they do together.

    Args:
        model: with its weights, in any form it can run in.
        tokens: of each sequence.

    Returns:
        for the index of each layer.
    """
    config = model.config.get_text_config(decoder=True)
    context = min(getattr(config, "max_position_embeddings", None) or 8192, 32768)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, tokens), generator=generator)
    # A quarter at the start, as of a first prompt; the others evenly over the context.
    first = torch.arange(tokens // 4)
    rest = torch.linspace(tokens // 4, max(context - 1, tokens), tokens - len(first)).long()
    positions = torch.cat((first, rest)).expand(2, -1)
    cache = DynamicCache(config=model.config)
    device: Any = model.get_input_embeddings().weight.device
    training = model.training
    model.eval()
    try:
        model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=torch.ones_like(ids, device=device),  # or positions would mean documents
            past_key_values=cache,
            use_cache=True,
        )
    finally:
        model.train(training)
    return {
        i: _key_noise(layer.keys.float(), len(first))
        for i, layer in enumerate(cache.layers)
        if type(layer) is DynamicLayer and layer.keys is not None
    }


def _key_noise(keys: Tensor, first: int) -> KeyNoise:
    """Of keys ``[2, H, T, D]``, of which the offset is taken from the first tokens."""

    def size(x: Tensor) -> Tensor:  # root mean square of the norms, by head
        return x.square().sum(-1).mean((0, 2)).sqrt()

    content = size(keys[:1] - keys[1:]) / 2**0.5
    offset = keys[:, :, :first].mean(2, keepdim=True)
    content = content.clamp(min=torch.finfo(content.dtype).tiny)
    plain, centred = size(keys) / content, size(keys - offset) / content
    return KeyNoise(float(plain.max()), float(centred.max()))
