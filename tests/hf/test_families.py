"""Every model family: which layers are compressed, and that ``generate()`` gives what it should."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

from transformers import AutoConfig

from turboquant.hf import enabled
from turboquant.hf.support import TESTED_MODEL_TYPES

from .tiny import FAMILIES, Case, case, generate

KINDS = pytest.mark.parametrize("max_cache_len", [None, 64], ids=["dynamic", "static"])
EVERY = pytest.mark.parametrize("name", FAMILIES)


def family(name: str) -> Case:
    model_type, options = FAMILIES[name]
    try:
        AutoConfig.for_model(model_type)
    except ValueError:
        pytest.skip(f"this version of transformers has no {model_type}")
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
