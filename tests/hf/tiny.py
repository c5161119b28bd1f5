"""Small random models, and the oracle they are judged by.

The oracle is a dense cache that stores ``decompress(compress(x))``. A model that runs on it with
transformers' own attention must give what ours gives on packed data; whatever differs is a fault
of the integration, not of the four bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

import turboquant as tq

VOCAB = 64

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {
    "num_hidden_layers": 4,  # the last of which has full attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_SLIDING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 6,
}
_PER_LAYER_INPUT = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16}
_GEMMA4 = {**_SLIDING, **_PER_LAYER_INPUT, "global_head_dim": 128}

# What a small model of each family needs beside the common options: name -> model type, options.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", _SLIDING),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {**_SLIDING, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 4.0}),
    "gemma3": ("gemma3_text", {**_SLIDING, "query_pre_attn_scalar": 64}),
    "gemma3n, shared layers": (
        "gemma3n_text",
        {
            **_SLIDING,
            **_PER_LAYER_INPUT,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": None,
            "altup_num_inputs": 2,
            "intermediate_size": [128] * 6,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gemma4, shared layers": ("gemma4_text", {**_GEMMA4, "num_kv_shared_layers": 2}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": (
        "glm4_moe",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
         "n_group": 1, "topk_group": 1},
    ),
    "gpt_oss": ("gpt_oss", {**_SLIDING, **_LOCAL_EXPERTS}),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", _LOCAL_EXPERTS),
    "llama": ("llama", {}),
    "ministral": ("ministral", _SLIDING),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {**_LOCAL_EXPERTS, "sliding_window": None}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _SLIDING),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3": ("qwen3", {}),
    "qwen3_5": ("qwen3_5_text", _LINEAR),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "qwen3_next": (
        "qwen3_next",
        {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    "smollm3": ("smollm3", {}),
}  # fmt: skip


def cached_by_repr(function: Any) -> Any:
    """functools.cache for arguments that have no hash."""
    results: dict[str, Any] = {}

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        key = repr((args, sorted(kwargs.items())))
        if key not in results:
            results[key] = function(*args, **kwargs)
        return results[key]

    return wrapper


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    options = {
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        # Large weights: with the usual 0.02, attention hardly matters and one token repeats.
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return AutoConfig.for_model(family, **{**options, **overrides})


def tiny_model(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Any:
    torch.manual_seed(seed)
    config = tiny_config(family, **overrides)
    # SDPA of older versions leaves the logit cap out.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


@functools.cache
def codec(head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return (*tq.codebook(head_dim), tq.rotation(head_dim))


def round_trip(x: Tensor) -> Tensor:
    """``decompress(compress(x))``."""
    centroids, boundaries, rotation = codec(x.shape[-1])
    packed, norms = tq.compress(x, rotation, boundaries)
    return tq.decompress(packed, norms, centroids, rotation, dtype=x.dtype)


def boundary_distance(x: Tensor) -> Tensor:
    """``[B]``: how close any coordinate comes to the edge of its level, in standard deviations."""
    _, boundaries, rotation = codec(x.shape[-1])
    y = torch.nn.functional.normalize(x.float(), dim=-1) @ rotation.T
    above = torch.bucketize(y, boundaries).clamp(max=14)
    nearest = torch.minimum(
        (y - boundaries[above]).abs(), (y - boundaries[(above - 1).clamp(min=0)]).abs()
    )
    return nearest.flatten(1).amin(1) * x.shape[-1] ** 0.5


class OracleLayer(DynamicLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(round_trip(key_states), round_trip(value_states))


class WatchfulOracleLayer(OracleLayer):
    """Remembers the smallest :func:`boundary_distance` of each row, as ``closest``."""

    closest: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        for x in (key_states, value_states):
            distance = boundary_distance(x)
            self.closest = distance if self.closest is None else self.closest.minimum(distance)
        return super().update(key_states, value_states)


def oracle_cache(config: Any, skip_layers: Any = ()) -> Cache:
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and i not in skip_layers:
            # The first layer's input is the embedding: equal bits on both sides.
            cache.layers[i] = OracleLayer() if i == 0 else WatchfulOracleLayer()
    return cache


@torch.no_grad()
def generate(
    model: Any, ids: Tensor, attention_mask: Tensor, new: int = 12, **options: Any
) -> tuple[Tensor, Tensor]:
    """The new tokens ``[B, new]`` and their logits ``[B, new, V]``."""
    out = model.generate(
        ids,
        attention_mask=attention_mask,
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **options},
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def left_padded(rows: int, length: int, pads: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Random prompts ``[rows, length]``; row i starts with ``pads[i % len(pads)]`` of padding.

    Padding holds random tokens too: whoever attends to it shall get something else.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (rows, length), generator=generator)
    pad = torch.tensor([pads[i % len(pads)] for i in range(rows)])
    mask = (torch.arange(length) >= pad[:, None]).long()
    return ids, mask


@dataclass
class Case:
    """A model, prompts for it, and what the oracle makes of them."""

    model: Any
    ids: Tensor
    mask: Tensor
    tokens: Tensor
    logits: Tensor
    atol: float

    def check(self, tokens: Tensor, logits: Tensor) -> None:
        assert torch.equal(tokens, self.tokens)
        error = (logits.float() - self.logits.float()).abs().max()
        assert error <= self.atol, f"logits differ by {error:.2e}, allowed {self.atol:.2e}"


# In standard deviations of the logits: the largest error allowed, and the smallest lead of the
# chosen token over the next that lets the error not change the choice. In bf16, one unit in the
# last place of the largest logits is 0.015 of a standard deviation.
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 0.06)}
# A float32 rounding upstream may lift a coordinate over the edge of its level; then the two sides
# store different keys, rightly. Prompts whose coordinates come closer than this are not used.
SAFE_DISTANCE = 4e-6


@cached_by_repr
def case(family: str, rows: int, dtype: torch.dtype = torch.float32, **overrides: Any) -> Case:
    """Prompts that can tell right from wrong, picked from a pool by what the *oracle* does.

    Random models like to repeat one token, and to be undecided between two. Every prompt here
    yields at least 8 distinct tokens, each with a clear lead, and no two yield the same.
    """
    model = tiny_model(family, dtype=dtype, **overrides)
    atol, lead = TOLERANCE[dtype]
    pads = (0, 3, 7)[:rows]
    # Half of all prompts will do in f32, few in bf16, where a unit in the last place is large.
    pool = 16 if dtype == torch.float32 else 128
    ids, mask = left_padded(rows=pool * rows, length=10, pads=pads, seed=1)

    def run(ids: Tensor, mask: Tensor, strict: float) -> tuple[Tensor, Tensor, Tensor]:
        cache = oracle_cache(model.config)
        tokens, logits = generate(model, ids, mask, past_key_values=cache)
        top = logits.float().topk(2).values
        good = (top[..., 0] - top[..., 1] > strict * lead * logits.float().std()).all(1)
        good &= torch.tensor([len(set(row)) >= 8 for row in tokens.tolist()])
        for layer in cache.layers:
            if isinstance(layer, WatchfulOracleLayer):
                good &= layer.closest > strict * SAFE_DISTANCE
        return tokens, logits, good

    # A product of matrices rounds differently for another batch size: pick with room to spare.
    tokens, _, good = run(ids, mask, strict=1.5)
    assert len({tuple(row) for row in tokens.tolist()}) > 0.9 * len(ids), "prompts do not matter"
    picked = [next(i for i in range(p, len(ids), rows) if good[i]) for p in range(rows)]
    ids, mask = ids[picked], mask[picked]
    tokens, logits, good = run(ids, mask, strict=1.0)
    assert good.all()
    assert len({tuple(row) for row in tokens.tolist()}) == rows
    return Case(model, ids, mask, tokens, logits, atol * float(logits.float().std()))
