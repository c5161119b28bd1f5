"""The network, in plain PyTorch, and the Hugging Face folder it is kept in.

Modules and parameters have the names and layouts of transformers' `LlamaForCausalLM` (RoPE rotates
the two halves of a head), so a state dict is the checkpoint: nothing is converted on the way.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

END = 256
"""The one token that is no byte: it stands before, between and after documents."""


@dataclass(frozen=True)
class Config:
    """Sizes, under the names that Hugging Face's config.json gives them."""

    vocab_size: int = 257
    hidden_size: int = 256
    intermediate_size: int = 576
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1_000_000.0


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, hidden, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[B, L, hidden] -> [B, L, hidden]; the three projections are one matrix product."""
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        heads = F.linear(x, torch.cat(weights)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([w.shape[0] // self.head_dim for w in weights], dim=1)
        q, k = _rotate(q, rotary), _rotate(k, rotary)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The gated feed-forward network."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, hidden] -> [B, L, hidden]."""
        both = F.linear(x, torch.cat((self.gate_proj.weight, self.up_proj.weight)))
        gate, up = both.chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """Attention, then the feed-forward network, each added to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[B, L, hidden] -> [B, L, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids [B, L] to the normalised residual stream [B, L, hidden] after all layers."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        cos, sin = _rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, hidden]."""
        rotary = (self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, rotary)
        return self.norm(x)


class ByteLlama(nn.Module):
    """Token ids [B, L] to next-token logits [B, L, 257]; the head is the embedding transposed."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # what writes to the residual stream starts smaller
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * config.num_hidden_layers if writes else 1
                nn.init.normal_(weight, std=0.02 / depth**0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the byte after each position."""
        return F.linear(self.model(ids), self.model.embed_tokens.weight)


def save(model: ByteLlama, folder: Path) -> None:
    """Writes an ordinary Hugging Face folder: bf16 weights, configuration, byte tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().bfloat16().cpu() for name, w in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    sizes = asdict(model.config)
    tokens = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")},
        **sizes,
        **tokens,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", tokens)
    _write_json(folder / "tokenizer.json", _byte_tokenizer())
    end = "<|endoftext|>"
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), end),
        },
    )


def load(folder: Path) -> ByteLlama:
    """The model that `save` wrote, its weights as float32."""
    stored = json.loads((folder / "config.json").read_text())
    stored["rope_theta"] = stored["rope_parameters"]["rope_theta"]
    config = Config(**{name: stored[name] for name in asdict(Config())})
    model = ByteLlama(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) of a head [B, H, L, D] by its position's angle."""
    cos, sin = rotary
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def _rotary_table(config: Config) -> tuple[Tensor, Tensor]:
    """Cosine and sine [context, head_dim] of position times frequency, both halves alike."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, config.rope_theta**-exponents).repeat(1, 2)
    return angles.cos(), angles.sin()


def _byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json whose token ids are the bytes of the UTF-8 text; END is the one special id.

    It is a byte-level BPE without merges.  Such a vocabulary spells each byte as one printable
    character: printable Latin-1 as itself, the others, in order, from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    end = {
        "id": END,
        "content": "<|endoftext|>",
        "special": True,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelling[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=True) + "\n")
