"""What the keys of a layer have in common, and what it costs to store that in 4 bits.

A projection with a bias can give all keys of a head one large part in common. It says nothing about
which key a query prefers, for it adds the same to all scores of a row and the softmax takes that
out again; but 4 bits are 4 bits of the whole vector, and their error grows with it. So a fixed
vector for each KV head, the mean of sample keys, can be subtracted before keys are compressed:
attention stays exact.

It cures only what rotary embeddings leave in place; how much that is, is measured too.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

# How much larger the error of 4 bits may be than that of keys without a part in common: above the
# first an offset is worth having, above the second the layer stays dense.
WORTH_AN_OFFSET = 1.5
TOO_LARGE = 2.0


@dataclass(frozen=True)
class KeyNoise:
    """How large the error of 4 bits is in a layer's keys, in units of what it would be if they
    had no part in common. Of the worst KV head.

    Attributes:
        plain: as they are.
        offset: without their mean.
        mean: f32 ``[1, H, 1, D]``.
    """

    plain: float
    offset: float
    mean: Tensor = field(repr=False, compare=False)


_measured: weakref.WeakKeyDictionary[Any, dict[int, KeyNoise]] = weakref.WeakKeyDictionary()


def measured_keys(model: PreTrainedModel, anew: bool) -> dict[int, KeyNoise]:
    """:func:`measure_keys`, or what it found the last time."""
    if anew or model not in _measured:
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
    # Half of them close together, for most contexts are short; the others all over the longest.
    near = torch.arange(tokens // 2)
    far = torch.linspace(tokens // 2, max(context - 1, tokens), tokens - len(near)).long()
    positions = torch.cat((near, far)).expand(2, -1)
    cache = DynamicCache(config=model.config)
    device: Any = model.get_input_embeddings().weight.device
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=torch.ones_like(ids, device=device),  # or positions would mean documents
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    finally:
        for module, mode in training.items():
            module.training = mode
    return {
        i: _noise(layer.keys.float())
        for i, layer in enumerate(cache.layers)
        if type(layer) is DynamicLayer and layer.keys is not None
    }


def _noise(keys: Tensor) -> KeyNoise:
    """Of keys ``[2, H, T, D]``."""

    def size(x: Tensor) -> Tensor:  # root mean square of the norms, by head
        return x.square().sum(-1).mean((0, 2)).sqrt()

    content = size(keys[:1] - keys[1:]) / 2**0.5
    content = content.clamp(min=torch.finfo(content.dtype).tiny)
    mean = keys.mean((0, 2), keepdim=True)
    plain, centred = size(keys) / content, size(keys - mean) / content
    return KeyNoise(float(plain.max()), float(centred.max()), mean.cpu())
