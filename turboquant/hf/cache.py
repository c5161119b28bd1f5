"""A transformers ``Cache`` whose full-attention layers store 4 bits a number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from turboquant.hf.layers import Codec, DynamicPackedLayer, PackedLayer, StaticPackedLayer
from turboquant.hf.report import Report
from turboquant.hf.support import config_of, plan


class TurboQuantCache(Cache):
    """KV cache that stores the keys and values of full-attention layers in 4 bits.

    Pass it as ``past_key_values`` to a model whose attention implementation is ``"turboquant"``,
    or let :func:`turboquant.hf.enable` make one for every ``generate()``.

    Args:
        config_or_model: of the model that it is for.
        max_cache_len: capacity in tokens. None grows with the context (up to a quarter of the
            buffers is slack); a number allocates once and suits compiled decoding.
        skip_layers: indices of layers to leave dense; None: those whose keys 4 bits would spoil
            (:func:`turboquant.hf.diagnose` tells).
        k_offset: indices of layers whose keys are stored without what all of them have in common;
            True is all, False none; None: where it is of use. Exact under the softmax. Takes the
            model with its weights, and a forward pass of 512 tokens.
        k_norm, v_norm: norm policies of keys and values; see :func:`turboquant.compress`.
        seed: of the rotation.
        offloading: keep the layers in host memory, but for the one at work and the next (CUDA).

    Attributes:
        capacity: max_cache_len.
        nbytes: bytes held for keys and values now, slack included.

    Raises:
        UnsupportedError: the model is not supported, or there is nothing to compress.
        ValueError: an argument is out of range.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(num_hidden_layers=2, hidden_size=128, intermediate_size=64,
    ...                      num_attention_heads=2, vocab_size=32)
    >>> model = LlamaForCausalLM._from_config(config, attn_implementation="turboquant")
    >>> cache = TurboQuantCache(model)
    >>> tokens = model.generate(torch.arange(5)[None], past_key_values=cache, max_new_tokens=4)
    >>> cache.get_seq_length(), cache.nbytes < 128 * 2 * 2 * 2 * 64 * 4
    (8, True)
    """

    def __init__(
        self,
        config_or_model: PreTrainedModel | PretrainedConfig,
        max_cache_len: int | None = None,
        *,
        skip_layers: Iterable[int] | None = None,
        k_offset: Iterable[int] | bool | None = None,
        k_norm: str = "l2",
        v_norm: str = "l2",
        seed: int = 42,
        offloading: bool = False,
        _plan: Report | None = None,  # of the same arguments
    ) -> None:
        for name, policy in {"k_norm": k_norm, "v_norm": v_norm}.items():
            if policy not in ("l2", "preserve", "unbiased"):
                raise ValueError(
                    f"TurboQuantCache: {name} must be 'l2', 'preserve' or 'unbiased', "
                    f"got {policy!r}"
                )
        if max_cache_len is not None and not (isinstance(max_cache_len, int) and max_cache_len > 0):
            raise ValueError(
                f"TurboQuantCache: max_cache_len must be an int from 1 on, got {max_cache_len!r}"
            )
        if offloading and not torch.cuda.is_available():
            raise ValueError("TurboQuantCache: offloading needs a GPU to offload from")
        config = config_of(config_or_model)
        report = _plan or plan(config_or_model, skip_layers, k_offset)
        planned_layers = [layer for layer in report.layers if layer.compressed]
        codecs = {d: Codec(d, seed) for d in {layer.head_dim for layer in planned_layers}}
        # transformers knows which layers a model needs; the plan, which of them are replaced.
        if max_cache_len is None:
            layers: list[Any] = DynamicCache(config=config).layers
        else:
            layers = StaticCache(config=config, max_cache_len=max_cache_len).layers
        for planned in planned_layers:
            assert type(layers[planned.index]) in (DynamicLayer, StaticLayer)
            offset = planned.key_noise.mean if planned.k_offset and planned.key_noise else None
            options = (codecs[planned.head_dim], k_norm, v_norm, offset)
            layers[planned.index] = (
                DynamicPackedLayer(*options)
                if max_cache_len is None
                else StaticPackedLayer(*options, max_cache_len)
            )
            # Buffers that come and go have no address that a compiled graph could rely on.
            layers[planned.index].is_compileable &= not offloading
        super().__init__(layers=layers, offloading=offloading)
        self.capacity = max_cache_len

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.layers for t in held_tensors(layer))


def held_tensors(layer: Any) -> Iterator[Tensor]:
    """What a layer holds of the tokens, ours or one of transformers'."""
    if isinstance(layer, PackedLayer):
        yield from layer.buffers if layer.is_initialized else ()
        return
    for name in ("keys", "values", "conv_states", "recurrent_states"):
        held = getattr(layer, name, None)
        for tensor in held.values() if isinstance(held, dict) else (held,):
            if isinstance(tensor, Tensor):
                yield tensor
