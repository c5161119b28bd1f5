"""Which models, and which of their layers, can be compressed; and the reason for every refusal.

Everything here works on the config alone, so that a model is judged before its weights are
loaded. What cannot be compressed is refused, never quietly left dense.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

# Causal decoders that hand keys and values from the cache to the attention function unopened,
# each of them tested in tests/hf/test_generate.py. Others may work; they are not tested.
TESTED_MODEL_TYPES = (
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
# k_proj has a bias whatever the config says.
ALWAYS_BIASED_KEYS = ("qwen2",)


class UnsupportedError(ValueError):
    """The 4-bit cache cannot serve this model, layer or call; the message says why."""


@dataclass(frozen=True)
class LayerReport:
    """What becomes of one layer's cache.

    Attributes:
        index: position of the layer in the model.
        kind: of attention.
        compressed: stored in 4 bits?
        reason: why not; empty for a compressed layer.
        n_heads: KV heads H.
        head_dim: D.
        dense_bytes: of one token's keys and values in the model's dtype.
        packed_bytes: of one token's keys and values in 4 bits.
    """

    index: int
    kind: str
    compressed: bool
    reason: str
    n_heads: int
    head_dim: int
    dense_bytes: int
    packed_bytes: int

    @property
    def bytes_per_token(self) -> int:
        return self.packed_bytes if self.compressed else self.dense_bytes


@dataclass(frozen=True)
class Report:
    """What is compressed, what is not and why. ``print`` it.

    Attributes:
        model_type: as in the config.
        layers: one entry a layer; empty if the model is refused as a whole.
        warnings: known risks to quality or memory.
        refusal: why the model cannot be served at all; None if it can.
    """

    model_type: str
    layers: tuple[LayerReport, ...] = ()
    warnings: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def compressed(self) -> list[int]:
        """Indices of the layers that are stored in 4 bits."""
        return [layer.index for layer in self.layers if layer.compressed]

    @property
    def dense_bytes(self) -> int:
        """Of one token in all layers, were none compressed."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Of one token in all layers, as planned here."""
        return sum(layer.bytes_per_token for layer in self.layers)

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.model_type}: not supported: {self.refusal}"
        ratio = self.dense_bytes / self.bytes_per_token
        lines = [
            f"{self.model_type}: {len(self.compressed)} of {len(self.layers)} layers in 4 bits, "
            f"{self.bytes_per_token} instead of {self.dense_bytes} bytes a token ({ratio:.2f}x)"
        ]
        for group in _runs(self.layers):
            first, last = group[0], group[-1]
            where = (
                f"layers {first.index}-{last.index}" if len(group) > 1 else f"layer {first.index}"
            )
            how = "4-bit" if first.compressed else f"dense, {first.reason}"
            lines.append(
                f"  {where}: {first.kind}, {how}; {first.n_heads} KV heads of {first.head_dim}, "
                f"{first.bytes_per_token} bytes a token"
            )
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _runs(layers: Iterable[LayerReport]) -> list[list[LayerReport]]:
    """Neighbouring layers that differ in nothing but their index, together."""
    runs: list[list[LayerReport]] = []
    for layer in layers:
        if runs and replace(runs[-1][-1], index=layer.index) == layer:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def diagnose(model_or_config: PreTrainedModel | PretrainedConfig) -> Report:
    """What :func:`turboquant.hf.enable` would do with a model, without touching it.

    Args:
        model_or_config: a model, or its config alone.

    Returns:
        the plan for every layer, with warnings; or the reason of the refusal. Never raises for
        an unsupported model.

    Raises:
        TypeError: neither a model nor a config.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(num_hidden_layers=2, hidden_size=512, num_attention_heads=8,
    ...                      num_key_value_heads=2, dtype="bfloat16")
    >>> print(diagnose(config))
    llama: 2 of 2 layers in 4 bits, 272 instead of 1024 bytes a token (3.76x)
      layers 0-1: full attention, 4-bit; 2 KV heads of 64, 136 bytes a token
    """
    config = config_of(model_or_config)
    try:
        return plan(model_or_config)
    except UnsupportedError as error:
        return Report(model_type=config.model_type, refusal=str(error))


def plan(
    model_or_config: PreTrainedModel | PretrainedConfig, skip_layers: Iterable[int] = ()
) -> Report:
    """The plan for every layer.

    Args:
        model_or_config: a model, or its config alone.
        skip_layers: indices of layers to leave dense.

    Raises:
        UnsupportedError: the model cannot be served.
        ValueError: a layer to skip does not exist.
    """
    config = config_of(model_or_config)
    _refuse_model(config)
    n_layers = config.num_hidden_layers
    skipped = set(skip_layers)
    if unknown := sorted(i for i in skipped if not 0 <= i < n_layers):
        raise ValueError(f"skip_layers must name layers from 0 to {n_layers - 1}, got {unknown}")
    if len(skipped) == n_layers:
        raise UnsupportedError("nothing to compress: skip_layers names all layers")

    n_heads, head_dim = _kv_shape(config)
    if head_dim % 2 or not 16 <= head_dim <= 512:
        raise UnsupportedError(f"its head dim {head_dim} is not an even number from 16 to 512")
    dense_bytes = 2 * n_heads * head_dim * _dtype(model_or_config).itemsize
    packed_bytes = 2 * n_heads * (head_dim // 2 + 2)
    layers = tuple(
        LayerReport(
            index=i,
            kind="full attention",
            compressed=i not in skipped,
            reason="in skip_layers" if i in skipped else "",
            n_heads=n_heads,
            head_dim=head_dim,
            dense_bytes=dense_bytes,
            packed_bytes=packed_bytes,
        )
        for i in range(n_layers)
    )
    return Report(config.model_type, layers, tuple(_warnings(model_or_config, config)))


def config_of(model_or_config: PreTrainedModel | PretrainedConfig) -> PretrainedConfig:
    if isinstance(model_or_config, PreTrainedModel):
        return model_or_config.config
    if isinstance(model_or_config, PretrainedConfig):
        return model_or_config
    raise TypeError(
        f"expected a transformers model or config, got {type(model_or_config).__name__}"
    )


def _refuse_model(config: PretrainedConfig) -> None:
    """Raise the most telling reason first: a list of tested models alone would explain little."""
    text_config = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError("encoder-decoder models are not supported")
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedError("cross-attention is not supported")
    if text_config is not config:
        raise UnsupportedError("multimodal models are not supported yet")
    if not getattr(config, "is_causal", True):
        raise UnsupportedError("its attention is bidirectional (is_causal=False)")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise UnsupportedError(
            "multi-head latent attention (kv_lora_rank) already caches a compressed vector"
        )
    kinds = {type(layer) for layer in _native_layers(config)}
    found = ", ".join(sorted(kind.__name__ for kind in kinds - {DynamicLayer}))
    if DynamicLayer not in kinds:
        raise UnsupportedError(
            f"nothing to compress: no layer has full attention (found {found}, whose cache does "
            "not grow with the context); stay with the dense cache"
        )
    if found:
        raise UnsupportedError(
            f"full attention mixed with other layers is not supported yet (found {found})"
        )
    if config.model_type not in TESTED_MODEL_TYPES:
        raise UnsupportedError(
            f"model type {config.model_type!r} is not tested yet; tested are "
            f"{', '.join(TESTED_MODEL_TYPES)}"
        )


def _native_layers(config: PretrainedConfig) -> list[Any]:
    """The layers of the dense cache that transformers itself would build."""
    try:
        return DynamicCache(config=config).layers
    except Exception as error:  # whatever a foreign config lacks
        raise UnsupportedError(f"transformers builds no cache for it ({error})") from error


def _kv_shape(config: PretrainedConfig) -> tuple[int, int]:
    """KV heads and head dim."""
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None)
    return n_heads, head_dim or config.hidden_size // config.num_attention_heads


def _dtype(model_or_config: PreTrainedModel | PretrainedConfig) -> torch.dtype:
    """Of the model, or what the config names; a config that names none will be loaded in f32."""
    dtype = model_or_config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()


def _warnings(
    model_or_config: PreTrainedModel | PretrainedConfig, config: PretrainedConfig
) -> Iterable[str]:
    if isinstance(model_or_config, PreTrainedModel):
        biased = any(name.endswith("k_proj.bias") for name, _ in model_or_config.named_parameters())
    else:
        biased = getattr(config, "attention_bias", False) or config.model_type in ALWAYS_BIASED_KEYS
    if biased:
        yield (
            "k_proj has a bias: a large one dominates the norm of the keys and costs accuracy at "
            "4 bits; compare with the dense cache, and try skip_layers"
        )
    generation_config = getattr(model_or_config, "generation_config", None)
    if dense := getattr(generation_config, "cache_implementation", None):
        yield (
            f"generation_config.cache_implementation is {dense!r}, so generate() makes that dense "
            "cache; set it to None"
        )
