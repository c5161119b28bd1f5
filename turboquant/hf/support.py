"""Which models, and which of their layers, can be compressed; and the reason for every refusal.

Everything here works on the config alone, so that a model is judged before its weights are
loaded. What cannot be compressed is refused, never quietly left dense.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class LayerReport:
    """What becomes of one layer's cache.

    Attributes:
        index: position of the layer in the model.
        kind: of attention.
        compressed: stored in 4 bits?
        reason: why not; empty for a compressed layer.
        n_heads: KV heads H; 0 for a layer that stores no keys.
        head_dim: D.
        dense_bytes: of one stored token's keys and values in the model's dtype.
        packed_bytes: of one stored token's keys and values in 4 bits.
        k_offset: are keys stored without what all of them have in common?
        key_noise: of a model with weights whose keys have a bias, or that was asked about: how
            much a part in common enlarges the error of 4 bits.
        window: tokens that it stores at most; None if its cache grows with the context.
        state_bytes: of what does not depend on the context, for a sequence.
    """

    index: int
    kind: str
    compressed: bool
    reason: str
    n_heads: int
    head_dim: int
    dense_bytes: int
    packed_bytes: int
    k_offset: bool = False
    key_noise: KeyNoise | None = None
    window: int | None = None
    state_bytes: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Of a token that it stores, as planned."""
        return self.packed_bytes if self.compressed else self.dense_bytes

    def cache_bytes(self, context: int, *, dense: bool = False) -> int:
        """For a sequence of so many tokens, as planned; or were it dense."""
        stored = context if self.window is None else min(context, self.window)
        return stored * (self.dense_bytes if dense else self.bytes_per_token) + self.state_bytes

    def __str__(self) -> str:
        if not self.n_heads:
            return self.kind
        how = "4-bit" if self.compressed else f"dense, {self.reason}"
        if self.k_offset:
            how += " with a key offset"
        return (
            f"{self.kind}, {how}; {self.n_heads} KV heads of {self.head_dim}, "
            f"{self.bytes_per_token} bytes "
            f"{'a token' if self.window is None else 'for each of its tokens'}"
        )


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
        """That a token adds to the cache of a long context, were no layer compressed."""
        return sum(layer.dense_bytes for layer in self.layers if layer.window is None)

    @property
    def bytes_per_token(self) -> int:
        """That a token adds to the cache of a long context, as planned here."""
        return sum(layer.bytes_per_token for layer in self.layers if layer.window is None)

    def cache_bytes(self, context: int, batch_size: int = 1, *, dense: bool = False) -> int:
        """Of a cache that is made for so many tokens, as planned; or were no layer compressed."""
        return batch_size * sum(layer.cache_bytes(context, dense=dense) for layer in self.layers)

    def longest_context(self, memory: int, batch_size: int = 1, *, dense: bool = False) -> int:
        """Tokens of each sequence whose cache fits so many bytes; 0 if none does.

        >>> from transformers import LlamaConfig
        >>> report = diagnose(LlamaConfig(dtype="bfloat16"))
        >>> report.longest_context(2**33), report.longest_context(2**33, dense=True)
        (63550, 16384)
        """
        if self.cache_bytes(0, batch_size) > memory:
            return 0
        # Windows fill up at different lengths: search.
        low, high = 0, memory + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.cache_bytes(middle, batch_size, dense=dense) <= memory
            low, high = (middle, high) if fits else (low, middle)
        return low

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.model_type}: not supported: {self.refusal}"
        ratio = self.dense_bytes / self.bytes_per_token
        lines = [
            f"{self.model_type}: {len(self.compressed)} of {len(self.layers)} layers in 4 bits, "
            f"{self.bytes_per_token} instead of {self.dense_bytes} bytes a token ({ratio:.2f}x)"
        ]
        alike: dict[str, list[int]] = {}
        for layer in self.layers:
            alike.setdefault(str(layer), []).append(layer.index)
        for text, indices in alike.items():
            lines.append(f"  layer{'s' if len(indices) > 1 else ''} {ranges(indices)}: {text}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def ranges(indices: list[int]) -> str:
    """
    >>> ranges([0, 1, 2, 5, 7, 8]), ranges([3])
    ('0-2, 5, 7-8', '3')
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


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
    _refuse_model(config)
    n_layers = text_config.num_hidden_layers
    for name, argument in {"skip_layers": skip_layers, "k_offset": k_offset}.items():
        allowed = (Iterable, bool) if name == "k_offset" else Iterable
        if argument is not None and not isinstance(argument, allowed):
            raise ValueError(f"{name} must name layers, got {argument!r}")
    skipped = None if skip_layers is None else set(skip_layers)
    if isinstance(k_offset, bool):
        centred: set[int] | None = set(range(n_layers)) if k_offset else set()
    else:
        centred = None if k_offset is None else set(k_offset)
    for name, given in {"skip_layers": skipped, "k_offset": centred}.items():
        if unknown := sorted(i for i in given or () if not 0 <= i < n_layers):
            raise ValueError(f"{name} must name layers from 0 to {n_layers - 1}, got {unknown}")
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
        for i, native in enumerate(_native_layers(config))
    )
    if not any(layer.compressed for layer in layers):
        reasons = sorted({layer.reason for layer in layers if layer.window is None})
        raise UnsupportedError(f"nothing to compress: all layers stay dense, {'; '.join(reasons)}")
    warnings = tuple(_warnings(model_or_config, biased and not noises))
    return Report(config.model_type, layers, warnings)


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


def _refuse_model(config: PretrainedConfig) -> None:
    """Raise the most telling reason first: a list of tested models alone would explain little."""
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
