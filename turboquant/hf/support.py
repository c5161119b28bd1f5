"""Which models, and which of their layers, can be compressed; and the reason for every refusal.

A config is enough, so that a model is judged before its weights are loaded; with them, what its
keys are like counts too. What cannot be compressed is refused, never quietly left dense.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from turboquant.hf.keys import TOO_LARGE, WORTH_AN_OFFSET, KeyNoise, measured_keys
from turboquant.hf.report import LayerReport, Report

# Causal decoders that hand keys and values from the cache to the attention function unopened,
# each of them tested in tests/hf/test_families.py. Others may work; they are not tested.
TESTED_MODEL_TYPES = (
    "cohere",
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt_oss",
    "granite",
    "granitemoe",
    "llama",
    "ministral",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "smollm3",
)
# k_proj has a bias whatever the config says.
ALWAYS_BIASED_KEYS = ("gpt_oss", "phi", "qwen2", "qwen2_moe")


class UnsupportedError(ValueError):
    """The 4-bit cache cannot serve this model, layer or call; the message says why."""


def weight_bytes(model_or_config: PreTrainedModel | PretrainedConfig) -> int:
    """Of a model's parameters and buffers; of a config's model, which is not made for that."""
    model: Any = model_or_config
    if isinstance(model_or_config, PretrainedConfig):
        config = copy.deepcopy(model_or_config)  # transformers writes into it
        known = AutoModelForImageTextToText._model_mapping
        auto = AutoModelForImageTextToText if type(config) in known else AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config, dtype=_dtype(model_or_config))
    return sum(t.nbytes for t in {*model.parameters(), *model.buffers()})


def diagnose(model_or_config: PreTrainedModel | PretrainedConfig) -> Report:
    """What :func:`turboquant.hf.enable` would do with a model, without touching it.

    Args:
        model_or_config: a model, whose keys are measured in a forward pass of 512 tokens; or its
            config alone.

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
        return plan(model_or_config, measure=True)
    except UnsupportedError as error:
        return Report(model_type=config.model_type, refusal=str(error))


def plan(
    model_or_config: PreTrainedModel | PretrainedConfig,
    skip_layers: Iterable[int] | None = None,
    k_offset: Iterable[int] | bool | None = None,
    measure: bool = False,
) -> Report:
    """The plan for every layer.

    Args:
        model_or_config: a model, or its config alone.
        skip_layers, k_offset: see :class:`TurboQuantCache`.
        measure: the keys of a model with weights, even if they have no bias.

    Raises:
        UnsupportedError: the model cannot be served.
        ValueError: a layer that is named does not exist.
    """
    config = config_of(model_or_config)
    text_config = config.get_text_config(decoder=True)
    native_layers = _served_layers(config)
    if isinstance(k_offset, bool):
        k_offset = range(len(native_layers)) if k_offset else ()
    skipped = _named("skip_layers", skip_layers, len(native_layers))
    centred = _named("k_offset", k_offset, len(native_layers))
    biased = _has_biased_keys(model_or_config, text_config)
    noises: dict[int, KeyNoise] = {}
    if measure or centred or (biased and (skipped is None or centred is None)):
        noises = _measured(model_or_config, anew=measure)
    capped = getattr(text_config, "attn_logit_softcapping", None) is not None
    if centred and capped:
        raise UnsupportedError("k_offset: under its logit cap an offset would not be exact")
    if centred and not noises:
        raise ValueError("k_offset takes the model with its weights")

    def treat(i: int) -> tuple[str, bool]:
        """Why layer i stays dense, or an empty reason; and whether its keys get an offset."""
        noise = noises.get(i)
        if centred is not None:
            offset = i in centred
        else:
            offset = noise is not None and not capped and _is_worth_an_offset(noise)
        if skipped is not None:
            return "in skip_layers" if i in skipped else "", offset
        left = 1.0 if noise is None else noise.offset if offset else noise.plain
        if left > TOO_LARGE:
            return f"its keys are so much alike that 4 bits cost {left:.1f}x the usual error", False
        return "", offset

    itemsize = _dtype(model_or_config).itemsize
    layers = tuple(
        _plan_layer(text_config, i, native, itemsize, *treat(i), noises.get(i))
        for i, native in enumerate(native_layers)
    )
    if not any(layer.compressed for layer in layers):
        reasons = sorted({layer.reason for layer in layers if layer.window is None})
        raise UnsupportedError(f"nothing to compress: all layers stay dense, {'; '.join(reasons)}")
    warnings = tuple(_warnings(model_or_config, biased and not noises))
    return Report(config.model_type, layers, warnings)


def _named(name: str, layers: Any, n_layers: int) -> set[int] | None:
    """The layers that an argument names, or None if it leaves that open."""
    if layers is None:
        return None
    if not isinstance(layers, Iterable):
        raise ValueError(f"{name} must name layers, got {layers!r}")
    named = set(layers)
    if unknown := sorted(i for i in named if not 0 <= i < n_layers):
        raise ValueError(f"{name} must name layers from 0 to {n_layers - 1}, got {unknown}")
    return named


def _plan_layer(
    config: PretrainedConfig,
    index: int,
    native: Any,
    itemsize: int,
    reason: str,
    k_offset: bool,
    key_noise: KeyNoise | None,
) -> LayerReport:
    """What becomes of a layer that transformers itself would make `native` for."""
    kind, window = _kind(native)
    n_heads, head_dim = (0, 0) if window == 0 else _kv_shape(config, index)
    compressed = window is None and not reason
    if compressed and (head_dim % 2 or not 16 <= head_dim <= 512):
        raise UnsupportedError(
            f"the head dim {head_dim} of layer {index} is not an even number from 16 to 512"
        )
    if window is not None:
        reason = "its cache does not grow" if n_heads else ""
    return LayerReport(
        index=index,
        kind=kind,
        compressed=compressed,
        reason=reason,
        n_heads=n_heads,
        head_dim=head_dim,
        dense_bytes=2 * n_heads * head_dim * itemsize,
        packed_bytes=2 * n_heads * (head_dim // 2 + 2) if n_heads else 0,
        k_offset=compressed and k_offset,
        key_noise=key_noise,
        window=window,
        state_bytes=_state_bytes(config, itemsize) if type(native) is LinearAttentionLayer else 0,
    )


def _kind(native: Any) -> tuple[str, int | None]:
    """Name and window of a native layer; None is one that has none of its own."""
    if type(native) is DynamicLayer:
        return "full attention", None
    if type(native) is DynamicSlidingWindowLayer:
        return f"sliding window of {native.sliding_window}", native.sliding_window
    if type(native) is LinearAttentionLayer:
        return "linear attention, whose state does not grow", 0
    if native is None or type(native).__name__ == "DummyLayer":
        return "the keys of another layer", 0
    raise UnsupportedError(f"layers of type {type(native).__name__} are not supported")


def config_of(model_or_config: PreTrainedModel | PretrainedConfig) -> PretrainedConfig:
    if isinstance(model_or_config, PreTrainedModel):
        return model_or_config.config
    if isinstance(model_or_config, PretrainedConfig):
        return model_or_config
    raise TypeError(
        f"expected a transformers model or config, got {type(model_or_config).__name__}"
    )


def _served_layers(config: PretrainedConfig) -> list[Any]:
    """The native layers of a model that can be served; or the most telling reason why it cannot: a
    list of tested models alone would explain little."""
    text_config = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError("encoder-decoder models are not supported")
    if getattr(text_config, "add_cross_attention", False):
        raise UnsupportedError("cross-attention is not supported")
    if not getattr(text_config, "is_causal", True):
        raise UnsupportedError("its attention is bidirectional (is_causal=False)")
    if getattr(text_config, "kv_lora_rank", None) is not None:
        raise UnsupportedError(
            "multi-head latent attention (kv_lora_rank) already caches a compressed vector"
        )
    layers = _native_layers(config)
    if DynamicLayer not in map(type, layers):
        found = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        raise UnsupportedError(
            f"nothing to compress: no layer has full attention (found {found}, whose cache does "
            "not grow with the context); stay with the dense cache"
        )
    if text_config.model_type not in TESTED_MODEL_TYPES:
        raise UnsupportedError(
            f"model type {text_config.model_type!r} is not tested yet; tested are "
            f"{', '.join(TESTED_MODEL_TYPES)}"
        )
    return layers


def _native_layers(config: PretrainedConfig) -> list[Any]:
    """The layers of the dense cache that transformers itself would build.

    None stands for the last ones where they use the keys of others: older versions leave these out.
    """
    try:
        layers: list[Any] = DynamicCache(config=config).layers
        missing = config.get_text_config(decoder=True).num_hidden_layers - len(layers)
    except Exception as error:  # whatever a foreign config lacks
        raise UnsupportedError(f"transformers builds no cache for it ({error})") from error
    if not layers:
        raise UnsupportedError("this version of transformers builds no cache for it")
    return layers + [None] * missing


def _kv_shape(config: PretrainedConfig, index: int) -> tuple[int, int]:
    """KV heads and head dim of a layer."""
    layer = config.per_layer_config[index] if hasattr(config, "per_layer_config") else config
    n_heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    head_dim = getattr(layer, "head_dim", None)
    return n_heads, head_dim or layer.hidden_size // layer.num_attention_heads


def _state_bytes(config: PretrainedConfig, itemsize: int) -> int:
    """Of a gated linear attention (Qwen3-Next and its like), for a sequence; 0 of any other."""
    if not hasattr(config, "linear_num_key_heads"):
        return 0
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    heads, dim = config.linear_num_value_heads, config.linear_value_head_dim
    convolution = (2 * keys + heads * dim) * config.linear_conv_kernel_dim * itemsize
    return convolution + 4 * heads * config.linear_key_head_dim * dim


def _dtype(model_or_config: PreTrainedModel | PretrainedConfig) -> torch.dtype:
    """Of the model, or what the config names; a config that names none will be loaded in f32."""
    dtype = model_or_config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()


def _is_worth_an_offset(noise: KeyNoise) -> bool:
    return noise.plain > WORTH_AN_OFFSET and noise.offset < noise.plain


def _measured(
    model_or_config: PreTrainedModel | PretrainedConfig, anew: bool
) -> dict[int, KeyNoise]:
    """Nothing for a config, or a model without its weights."""
    if not isinstance(model_or_config, PreTrainedModel):
        return {}
    if any(p.device.type == "meta" for p in model_or_config.parameters()):
        return {}
    return measured_keys(model_or_config, anew)


def _has_biased_keys(
    model_or_config: PreTrainedModel | PretrainedConfig, text_config: PretrainedConfig
) -> bool:
    if isinstance(model_or_config, PreTrainedModel):
        return any(name.endswith("k_proj.bias") for name, _ in model_or_config.named_parameters())
    biased = getattr(text_config, "attention_bias", False)
    return biased or text_config.model_type in ALWAYS_BIASED_KEYS


def _warnings(
    model_or_config: PreTrainedModel | PretrainedConfig, unknown_bias: bool
) -> Iterable[str]:
    if unknown_bias:
        yield (
            "k_proj has a bias, which can be so large that 4 bits spoil the keys: only the model "
            "with its weights tells which layers should stay dense"
        )
    generation_config = getattr(model_or_config, "generation_config", None)
    if dense := getattr(generation_config, "cache_implementation", None):
        yield (
            f"generation_config.cache_implementation is {dense!r}, so generate() makes that dense "
            "cache; set it to None"
        )
