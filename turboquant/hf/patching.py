"""Turning a model's ``generate()`` over to the 4-bit cache, and back.

Only the instance is changed: the attention implementation that its config names, and three of its
methods. Its class, its parameters and every other model stay as they are. (Another model that was
built from the same config object takes its attention from there too; on its dense cache ours
computes the same, but enable only one of the two at a time.)
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from turboquant.hf.attention import NAME
from turboquant.hf.cache import TurboQuantCache
from turboquant.hf.layers import overflow
from turboquant.hf.report import Report
from turboquant.hf.support import UnsupportedError, plan

# The instance attribute that marks an enabled model.
_MARK = "_turboquant"

SUPPORTED_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)


@dataclass(frozen=True)
class _Patch:
    """How to make a cache for the model, and what to put back in the end."""

    report: Report
    cache_options: dict[str, Any]
    attention: str
    methods: dict[str, Any]

    def new_cache(self, model: PreTrainedModel) -> TurboQuantCache:
        return TurboQuantCache(model, **self.cache_options, _plan=self.report)


class _Method:
    """A function that stands before a method of the model. Unlike a bound method of Python's, it is
    the same after pickling."""

    def __init__(self, function: Callable[..., Any], model: PreTrainedModel) -> None:
        self.function = function
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.model, *args, **kwargs)


def enable(
    model: PreTrainedModel,
    *,
    max_cache_len: int | None = None,
    skip_layers: Iterable[int] | None = None,
    k_offset: Iterable[int] | bool | None = None,
    k_norm: str = "l2",
    v_norm: str = "l2",
    seed: int = 42,
    offloading: bool = False,
) -> Report:
    """Make every ``model.generate()`` use a fresh :class:`TurboQuantCache`.

    A call that names a cache of its own (``past_key_values``, ``cache_implementation`` or
    ``use_cache=False``) keeps it; a dense one is computed as by SDPA. So does a bare
    ``model(...)``: pass ``past_key_values=TurboQuantCache(model)`` to it.

    On a model that is enabled already, the new options take the place of the old.

    Args:
        model: with a ``generate()``; changed in place until :func:`disable`.
        max_cache_len, skip_layers, k_offset, k_norm, v_norm, seed, offloading: see
            :class:`TurboQuantCache`.

    Returns:
        what is compressed and what not; print it.

    Raises:
        UnsupportedError: the model cannot be served; it is left as it was.
        ValueError: an option is out of range; the model is left as it was.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(num_hidden_layers=2, hidden_size=128, intermediate_size=64,
    ...                      num_attention_heads=2, vocab_size=32)
    >>> model = LlamaForCausalLM(config)
    >>> print(enable(model))
    llama: 2 of 2 layers in 4 bits, 272 instead of 2048 bytes a token (7.53x)
      layers 0-1: full attention, 4-bit; 2 KV heads of 64, 136 bytes a token
    >>> disable(model)
    """
    options: dict[str, Any] = {
        "max_cache_len": max_cache_len,
        "skip_layers": tuple(skip_layers) if isinstance(skip_layers, Iterable) else skip_layers,
        "k_offset": tuple(k_offset) if isinstance(k_offset, Iterable) else k_offset,
        "k_norm": k_norm,
        "v_norm": v_norm,
        "seed": seed,
        "offloading": offloading,
    }
    if not isinstance(model, GenerationMixin):
        raise UnsupportedError(
            f"{type(model).__name__} has no generate(); call "
            f"model.set_attn_implementation({NAME!r}) and pass it a TurboQuantCache yourself"
        )
    _refuse_settings(model)
    report = plan(model, options["skip_layers"], options["k_offset"])
    earlier: _Patch | None = vars(model).get(_MARK)
    methods = {name: vars(model)[name] for name in _OURS if name in vars(model)}
    patch = _Patch(report, options, _attention_of(model), methods)
    patch.new_cache(model)  # refuses what is wrong with the options
    _set_attention(model, NAME)
    if earlier is not None:
        setattr(model, _MARK, replace(earlier, report=report, cache_options=options))
        return report
    setattr(model, _MARK, patch)
    for name, function in _OURS.items():
        setattr(model, name, _Method(function, model))
    return report


def disable(model: PreTrainedModel) -> None:
    """Undo :func:`enable`; does nothing on a model that is not enabled."""
    patch: _Patch | None = vars(model).get(_MARK)
    if patch is None:
        return
    for name in _OURS:
        delattr(model, name)
        if name in patch.methods:
            setattr(model, name, patch.methods[name])
    delattr(model, _MARK)
    if _attention_of(model) == NAME:  # else somebody has chosen another meanwhile
        _set_attention(model, patch.attention)


@contextmanager
def enabled(model: PreTrainedModel, **options: Any) -> Iterator[Report]:
    """:func:`enable` for the length of a ``with`` block; then everything is as it was before.

    May be nested, also inside :func:`enable`: the outer options return with the outer block.

    Args:
        model, options: see :func:`enable`.
    """
    earlier: _Patch | None = vars(model).get(_MARK)
    report = enable(model, **options)
    try:
        yield report
    finally:
        if earlier is None:
            disable(model)
        else:
            setattr(model, _MARK, earlier)
            _set_attention(model, NAME)


def _refuse_settings(model: PreTrainedModel) -> None:
    """What would be refused at the first call."""
    config = model.config.get_text_config(decoder=True)
    if model.training and getattr(config, "attention_dropout", None):
        raise UnsupportedError("dropout in its attention is not supported; call model.eval()")
    settings = (config, model.generation_config)
    if any(getattr(setting, "output_attentions", None) for setting in settings):
        raise UnsupportedError("output_attentions is set, but the weights are never formed")


def _attention_of(model: PreTrainedModel) -> str:
    """What the decoder's attention layers go by."""
    return model.config.get_text_config(decoder=True)._attn_implementation


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Of the decoder alone; a vision tower keeps its own.

    transformers only warns when it cannot; a model left dense would be our silent failure.
    """
    config = model.config
    decoder = config.get_text_config(decoder=True)
    parts = [part for part in config.sub_configs if getattr(config, part, None) is decoder]

    def use(name: str) -> None:
        model.set_attn_implementation(dict.fromkeys(parts, name) if parts else name)

    before = decoder._attn_implementation
    use(name)
    if decoder._attn_implementation != name:
        use(before)
        raise UnsupportedError(
            f"{type(model).__name__} does not take its attention function from transformers' "
            "registry (a class defined in a notebook cannot)"
        )


def _prepare_cache_for_generation(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Stands before the method of the same name on an enabled model."""
    patch: _Patch = getattr(self, _MARK)
    if (attention := _attention_of(self)) != NAME:
        raise UnsupportedError(
            f"the attention implementation was changed to {attention!r} "
            "after turboquant.hf.enable(model); enable the model again, or disable it"
        )
    cache = model_kwargs.get("past_key_values")
    named = generation_config.cache_implementation is not None
    if cache is None and not named and generation_config.use_cache is not False:
        cache = model_kwargs["past_key_values"] = patch.new_cache(self)
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
    else:
        _original(self, "_prepare_cache_for_generation")(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
    if isinstance(cache, TurboQuantCache):
        if generation_mode not in SUPPORTED_MODES:
            raise UnsupportedError(
                f"{generation_mode.value} is not supported yet with a 4-bit cache; "
                "use greedy search, sampling or beam search"
            )
        if generation_mode is GenerationMode.ASSISTED_GENERATION and not all(
            hasattr(layer, "crop") for layer in cache.layers
        ):
            raise UnsupportedError(
                "assisted generation takes tokens back, which static layers that stay dense "
                "cannot; make a dynamic cache (no max_cache_len)"
            )
        # Before the first token is computed: a full cache notices only when it is full.
        if cache.capacity is not None:
            needed = max_cache_length + _tokens_before(cache, generation_config)
            if needed > cache.capacity:
                raise UnsupportedError(overflow(needed, cache.capacity))


def _tokens_before(cache: TurboQuantCache, generation_config: Any) -> int:
    """Tokens in the cache that are not among those that generate() is given."""
    stored, new = int(cache.get_seq_length()), generation_config.max_new_tokens
    if new is None or generation_config.max_length - new > stored:
        return 0
    return stored


def _prepare_inputs_for_generation(self: Any, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
    """Phi-3 drops its cache when the context outgrows the original one, to compute all keys anew
    with other rotary factors: into a dense cache, if it is left to that."""
    inputs = _original(self, "prepare_inputs_for_generation")(input_ids, **kwargs)
    cache = kwargs.get("past_key_values")
    if isinstance(cache, TurboQuantCache) and inputs.get("past_key_values") is None:
        cache.reset()
        inputs["past_key_values"] = cache
    return inputs


def _original(model: Any, name: str) -> Callable[..., Any]:
    """The method that ours stands before."""
    patch: _Patch = getattr(model, _MARK)
    method: Callable[..., Any] = getattr(type(model), name)
    return patch.methods.get(name, types.MethodType(method, model))


def _init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedError(
        "continuous batching has a paged cache of its own; call turboquant.hf.disable(model) first"
    )


# The methods that stand before the model's own while it is enabled.
_OURS: dict[str, Callable[..., Any]] = {
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "prepare_inputs_for_generation": _prepare_inputs_for_generation,
    "init_continuous_batching": _init_continuous_batching,
}
