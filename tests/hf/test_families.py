"""Every model family: which layers are compressed, and that ``generate()`` gives what it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForImageTextToText

from turboquant.hf import enabled
from turboquant.hf.support import TESTED_MODEL_TYPES

from .tiny import FAMILIES, Case, case, generate, left_padded, oracle_cache, tiny_config

KINDS = pytest.mark.parametrize("max_cache_len", [None, 64], ids=["dynamic", "static"])
EVERY = pytest.mark.parametrize("name", FAMILIES)


def family(name: str) -> Case:
    model_type, options = FAMILIES[name]
    return case(model_type, 3, **options)


def full_attention(config: Any) -> list[int]:
    """Layers with full attention and keys of their own, as the config has it."""
    layers = range(config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0))
    types = getattr(config, "layer_types", None)
    return [i for i in layers if types is None or types[i] == "full_attention"]


def test_all_that_is_supported_is_tested() -> None:
    assert {model_type for model_type, _ in FAMILIES.values()} == set(TESTED_MODEL_TYPES)


@EVERY
@KINDS
def test_greedy(name: str, max_cache_len: int | None) -> None:
    oracle = family(name)
    with enabled(oracle.model, max_cache_len=max_cache_len) as report:
        assert report.compressed == full_attention(oracle.model.config)
        oracle.check(*generate(oracle.model, oracle.ids, oracle.mask))


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "qwen3_5", "qwen3_5_moe"])
@KINDS
def test_the_decoder_of_a_multimodal_model(name: str, max_cache_len: int | None) -> None:
    """Only that of the text is changed, and put back."""
    model_type, options = FAMILIES[name]
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "depth": 1, "out_hidden_size": 128}
    vision |= {"intermediate_size": 32, "num_attention_heads": 2, "num_heads": 2}
    config = AutoConfig.for_model(
        name, text_config=tiny_config(model_type, **options).to_dict(), vision_config=vision
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()

    def attention() -> list[str]:
        return [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]

    ids, mask = left_padded(rows=3, length=10, pads=(0, 3, 7), seed=1)
    want = generate(model, ids, mask, past_key_values=oracle_cache(config))
    before = attention()
    with enabled(model, max_cache_len=max_cache_len) as report:
        assert report.compressed == full_attention(config.text_config)
        assert "turboquant" in attention()
        assert "sdpa" in attention()
        got = generate(model, ids, mask)
    assert attention() == before
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-4 * float(want[1].std()))
