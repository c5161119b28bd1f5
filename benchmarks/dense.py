"""What a torch user has in bf16, and the published Triton kernel: what ours is measured beside."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Any]  # of query, keys and values; see whole()

FLASH, CUDNN, EFFICIENT = (
    SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
)  # fmt: skip

KERNEL = "backends/cuda/triton/kernels/tq4_sdpa.py"  # in an executorch checkout


def causal_bias(Lq: int, L: int, rows: int) -> Tensor:
    """bf16 ``[1, 1, rows, L]``: 0 where row ``i mod Lq`` sees the key by the bottom-right rule."""
    row = torch.arange(rows, device="cuda") % Lq
    seen = torch.arange(L, device="cuda") <= (L - Lq + row).unsqueeze(-1)
    bias = torch.zeros(1, 1, rows, L, dtype=torch.bfloat16, device="cuda")
    return bias.masked_fill_(~seen, -torch.inf)


def lower_right(backend: SDPBackend, Lq: int, L: int) -> Any:
    """The bottom-right rule, in the form by which this kernel skips most; None for one row."""
    if Lq == 1:
        return None
    if Lq < L and backend is CUDNN:  # it has no such flag
        return causal_bias(Lq, L, Lq)
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(Lq, L)


def sdpa(backend: SDPBackend, mask: Any) -> Attention:
    """torch's attention by one of its kernels."""

    def run(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=True)

    return run


def packed_sdpa(backend: SDPBackend, mask: Tensor | None, group: int) -> Attention:
    """The same with the heads of a group as rows of one head, for kernels that know no groups.

    The mask has a row for each of them. The output stays ``[B, Hkv, group · Lq, D]``.
    """

    def run(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, Hkv, _, D = k.shape
        rows = query.view(B, Hkv, group * query.shape[2], D)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)

    return run


def expanded_sdpa(backend: SDPBackend, mask: Any, group: int) -> Attention:
    """The same with each group as a sequence of its own, whose heads share keys by a stride of 0.

    A kernel that knows no groups so gets to know that the mask is causal, and skips what it hides.
    The output stays ``[B · Hkv, group, Lq, D]``.
    """

    def run(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = query.view(-1, group, *query.shape[2:])
        k, v = (t.flatten(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for t in (k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(heads, k, v, attn_mask=mask)

    return run


Part = tuple[Tensor, Tensor]  # output and lse over some of the keys


def two_cudnn_calls(Lq: int) -> Attention:
    """One over the context, of which every row sees all, and one over the causal square after it.

    It returns both parts: to merge them is not in its time, as a fused kernel does it in passing.
    """
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention

    def run(query: Tensor, k: Tensor, v: Tensor) -> tuple[Part, Part]:
        def part(keys: slice, causal: bool) -> Part:
            cut = k[:, :, keys], v[:, :, keys]
            out, lse, *_ = attention(query, *cut, None, True, is_causal=causal)
            return out, lse

        return part(slice(-Lq), False), part(slice(-Lq, None), True)

    return run


def merged(first: Part, second: Part) -> Tensor:
    """Attention over the keys of both parts."""
    (out, lse), (other, other_lse) = first, second
    share = torch.sigmoid(other_lse - lse).reshape(*out.shape[:3], 1)  # of the second
    return torch.lerp(out.float(), other.float(), share).to(out.dtype)


def whole(result: Any, query: Tensor) -> Tensor:
    """``[B, Hq, Lq, D]`` from what any of these returns."""
    out = result if isinstance(result, Tensor) else merged(*result)
    return out.reshape(query.shape)


def flex(Lq: int, L: int) -> Attention:
    """FlexAttention, compiled for these lengths alone; for few rows it has a decoding kernel."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()
        attention = torch.compile(flex_attention, dynamic=False)
        if Lq == 1:
            return functools.partial(attention, enable_gqa=True)

        def seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            return key <= L - Lq + row

        block_mask = create_block_mask(seen, None, None, Lq, L, device="cuda")
        return functools.partial(attention, block_mask=block_mask, enable_gqa=True)

    return lambda query, k, v: compiled()(query, k, v)


def for_few_rows(Lq: int, L: int, group: int, with_flex: bool) -> dict[str, Attention]:
    """By name; that a kernel cannot do a shape shows when it is called."""
    mask = causal_bias(Lq, L, group * Lq) if Lq > 1 else None
    found = {
        "flash": sdpa(FLASH, lower_right(FLASH, Lq, L)),
        "cudnn": sdpa(CUDNN, lower_right(CUDNN, Lq, L)),
        "efficient": packed_sdpa(EFFICIENT, mask, group),
    }
    if with_flex:
        found["flex"] = flex(Lq, L)
    return found


def for_prompts(Lq: int, L: int, D: int, group: int, with_flex: bool) -> dict[str, Attention]:
    """The same for many rows."""
    found = {
        "flash": sdpa(FLASH, lower_right(FLASH, Lq, L)),
        "cudnn": sdpa(CUDNN, lower_right(CUDNN, Lq, L)),
        "efficient": expanded_sdpa(EFFICIENT, lower_right(EFFICIENT, Lq, L), group),
    }
    if Lq < L:
        found["two cudnn calls"] = two_cudnn_calls(Lq)
    if D > 256:  # which of these only EFFICIENT does
        mask = causal_bias(Lq, L, group * Lq)
        found["packed efficient"] = packed_sdpa(EFFICIENT, mask, group)
    if with_flex:
        found["flex"] = flex(Lq, L)
    return found


def for_padding(mask: Tensor, group: int) -> dict[str, Attention]:
    """The kernels that take a bool mask ``[B, 1, Lq, L]``."""
    return {
        "cudnn": sdpa(CUDNN, mask),
        "efficient": packed_sdpa(EFFICIENT, mask.repeat(1, 1, group, 1), group),
    }


def best_of(row: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Columns for which of these is the fastest, and how much slower than ours."""
    known = {name: row[f"{name} µs"] for name in names if row.get(f"{name} µs")}
    if not known:
        return {}
    name = min(known, key=known.__getitem__)
    best = {"best bf16": name, "best bf16 µs": known[name]}
    return best | {"against": "best bf16", "against µs": known[name],
                   "ratio": known[name] / row["ours µs"]}  # fmt: skip


def published(checkout: Path) -> Callable[..., Tensor]:
    """``triton::tq4_sdpa`` from a checkout of executorch: the arguments of ``tq.tq4_sdpa``."""
    path = checkout / KERNEL
    if not path.exists():
        raise SystemExit(f"--executorch {checkout} has no {KERNEL}")
    spec = importlib.util.spec_from_file_location("executorch_tq4_sdpa", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return torch.ops.triton.tq4_sdpa.default
