"""What is supported, what is refused with which words, and what the reports say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, BertConfig, LlamaConfig, StaticCache

from turboquant.cli.measure import cache_bytes
from turboquant.hf import TurboQuantCache, UnsupportedError, diagnose, enable
from turboquant.hf.support import plan, weight_bytes

from .tiny import FAMILIES, tiny_config, tiny_model


def family(name: str, **options: Any) -> Any:
    return AutoConfig.for_model(name, **options)


REFUSED = [
    (lambda: family("t5"), "encoder-decoder models are not supported"),
    (lambda: family("gpt2", add_cross_attention=True), "cross-attention is not supported"),
    (lambda: family("deepseek_v3"), r"multi-head latent attention \(kv_lora_rank\)"),
    (
        lambda: family("mistral"),
        "nothing to compress: .*SlidingWindowLayer.*stay with the dense",
    ),
    (lambda: family("mamba2"), "nothing to compress|builds no cache"),
    (lambda: family("gpt2"), "model type 'gpt2' is not tested yet; tested are cohere, cohere2"),
    (lambda: family("falcon_h1"), "nothing to compress|LinearAttentionAndFullAttentionLayer"),
    (lambda: BertConfig(is_decoder=False), "model type 'bert' is not tested yet"),
    (lambda: tiny_config(is_causal=False), r"bidirectional \(is_causal=False\)"),
    (lambda: tiny_config(head_dim=8), "head dim 8 of layer 0 is not an even number from 16 to 512"),
    (lambda: tiny_config(head_dim=514), "head dim 514 of layer 0 is not an even number"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refused_models(make: Any, message: str) -> None:
    config = make()
    with pytest.raises(UnsupportedError, match=message):
        TurboQuantCache(config)
    report = diagnose(config)
    assert report.refusal is not None
    assert report.layers == ()
    assert str(report).startswith(f"{config.model_type}: not supported: ")


def test_refusal_leaves_the_model_alone() -> None:
    model = tiny_model("mistral")  # its default is a sliding window in every layer
    before = (model.config._attn_implementation, set(vars(model)))
    with pytest.raises(UnsupportedError, match="nothing to compress"):
        enable(model)
    with pytest.raises(ValueError, match="skip_layers must name layers"):
        enable(tiny_model(), skip_layers=[5])
    assert (model.config._attn_implementation, set(vars(model))) == before


def test_report() -> None:
    report = plan(tiny_config(num_hidden_layers=4, dtype="bfloat16"), skip_layers=[2])
    assert report.compressed == [0, 1, 3]
    assert [layer.reason for layer in report.layers] == ["", "", "in skip_layers", ""]
    dense, packed = 2 * 2 * 64 * 2, 2 * 2 * (32 + 2)
    assert report.dense_bytes == 4 * dense
    assert report.bytes_per_token == 3 * packed + dense
    assert str(report).splitlines() == [
        "llama: 3 of 4 layers in 4 bits, 920 instead of 2048 bytes a token (2.23x)",
        "  layers 0-1, 3: full attention, 4-bit; 2 KV heads of 64, 136 bytes a token",
        "  layer 2: full attention, dense, in skip_layers; 2 KV heads of 64, 512 bytes a token",
    ]


def test_reports_of_layers_that_stay_dense() -> None:
    _, options = FAMILIES["gemma4, shared layers"]
    assert str(plan(tiny_config("gemma4_text", dtype="bfloat16", **options))).splitlines() == [
        "gemma4_text: 1 of 4 layers in 4 bits, 264 instead of 1024 bytes a token (3.88x)",
        "  layer 0: sliding window of 6, dense, its cache does not grow; 2 KV heads of 64, "
        "512 bytes for each of its tokens",
        "  layer 1: full attention, 4-bit; 2 KV heads of 128, 264 bytes a token",
        "  layers 2-3: the keys of another layer",
    ]
    _, options = FAMILIES["qwen3_5"]
    assert str(plan(tiny_config("qwen3_5_text", dtype="bfloat16", **options))).splitlines() == [
        "qwen3_5_text: 1 of 4 layers in 4 bits, 136 instead of 512 bytes a token (3.76x)",
        "  layers 0-2: linear attention, whose state does not grow",
        "  layer 3: full attention, 4-bit; 2 KV heads of 64, 136 bytes a token",
    ]


def test_reported_bytes_are_the_bytes_held() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(dtype=dtype, num_hidden_layers=3)
        model.set_attn_implementation("turboquant")
        cache = TurboQuantCache(model, 32, skip_layers=[1])
        model(torch.ones(2, 5, dtype=torch.long), past_key_values=cache)
        assert cache.nbytes == 2 * 32 * plan(model, [1]).bytes_per_token


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("context", [5, 32])  # below the window, and above
@torch.no_grad()
def test_predicted_memory_is_what_is_held(name: str, context: int) -> None:
    """Of ours and of transformers' own cache; sliding windows and linear attention included."""
    model_type, options = FAMILIES[name]
    model = tiny_model(model_type, dtype=torch.bfloat16, **options)
    report, ids = plan(model), torch.ones(2, 4, dtype=torch.long)
    model.set_attn_implementation("turboquant")
    cache = TurboQuantCache(model, context)
    model(ids, past_key_values=cache)
    assert cache.nbytes == report.cache_bytes(context, batch_size=2)
    assert cache_bytes(cache) == cache.nbytes  # what `turboquant generate` tells
    model.set_attn_implementation("eager")
    dense = StaticCache(config=model.config, max_cache_len=context)
    model(ids, past_key_values=dense)
    assert held_bytes(dense) == report.cache_bytes(context, batch_size=2, dense=True)
    assert weight_bytes(model.config) == weight_bytes(model)


def held_bytes(cache: Any) -> int:
    found = 0
    for layer in cache.layers:
        states = [getattr(layer, name, None) for name in ("keys", "values")]
        for name in ("conv_states", "recurrent_states"):
            states += getattr(layer, name, {}).values()
        found += sum(t.nbytes for t in states if t is not None)
    return found


def test_the_longest_context() -> None:
    _, options = FAMILIES["gemma4"]
    report = plan(tiny_config("gemma4_text", dtype="bfloat16", **options))
    for memory in (0, 5000, 10_000, 1_000_000):
        for dense in (False, True):
            longest = report.longest_context(memory, 2, dense=dense)
            assert report.cache_bytes(longest, 2, dense=dense) <= memory
            assert report.cache_bytes(longest + 1, 2, dense=dense) > memory
    _, options = FAMILIES["qwen3_5"]
    report = plan(tiny_config("qwen3_5_text", dtype="bfloat16", **options))
    assert report.longest_context(1000) == 0  # not even the state


def test_dtype_comes_from_the_model_or_its_config() -> None:
    assert (
        diagnose(LlamaConfig()).dense_bytes
        == 2 * diagnose(LlamaConfig(dtype="float16")).dense_bytes
    )
    model = tiny_model(dtype=torch.bfloat16)
    assert diagnose(model).dense_bytes == 2 * 2 * 2 * 64 * 2


@pytest.mark.parametrize(
    ("name", "options", "biased"),
    [("llama", {}, False), ("llama", {"attention_bias": True}, True), ("qwen2", {}, True),
     ("qwen3", {}, False)],
)  # fmt: skip
def test_key_bias_is_reported(name: str, options: dict[str, Any], biased: bool) -> None:
    report = diagnose(tiny_config(name, **options))
    assert any("k_proj has a bias" in w for w in report.warnings) is biased
    assert not any(layer.k_offset for layer in report.layers)
    assert all(layer.key_noise is None for layer in report.layers)


def test_a_configured_dense_cache_is_reported() -> None:
    model = tiny_model()
    assert diagnose(model).warnings == ()
    model.generation_config.cache_implementation = "static"
    assert "cache_implementation is 'static'" in str(diagnose(model))


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match="expected a transformers model or config, got str"):
        diagnose("llama")  # type: ignore[arg-type]
