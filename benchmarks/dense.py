"""What a torch user has in bf16, and the published Triton kernel: the others in decode.py."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of query, keys and values

KERNEL = "backends/cuda/triton/kernels/tq4_sdpa.py"  # in an executorch checkout


def causal_bias(Lq: int, L: int, rows: int) -> Tensor:
    """bf16 ``[1, 1, rows, L]``: 0 where row ``i mod Lq`` sees the key by the bottom-right rule."""
    row = torch.arange(rows, device="cuda") % Lq
    seen = torch.arange(L, device="cuda") <= (L - Lq + row).unsqueeze(-1)
    bias = torch.zeros(1, 1, rows, L, dtype=torch.bfloat16, device="cuda")
    return bias.masked_fill_(~seen, -torch.inf)


def sdpa(backend: SDPBackend, Lq: int, L: int) -> Attention:
    """torch's attention by one of its kernels, the queries being the last Lq tokens."""
    mask: Any = None
    if Lq > 1 and backend is SDPBackend.FLASH_ATTENTION:
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(Lq, L)
    elif Lq > 1:
        mask = causal_bias(Lq, L, Lq)

    def run(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=True)

    return run


def packed_sdpa(backend: SDPBackend, Lq: int, L: int, group: int) -> Attention:
    """The same with the heads of a group as rows of one head, for kernels that know no groups.

    Its output stays ``[B, Hkv, group · Lq, D]``.
    """
    mask = causal_bias(Lq, L, group * Lq) if Lq > 1 else None

    def run(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, _, _, D = query.shape
        rows = query.view(B, k.shape[1], group * Lq, D)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)

    return run


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


def alternatives(Lq: int, L: int, group: int, with_flex: bool) -> dict[str, Attention]:
    """By name; that a kernel cannot do a shape shows when it is called."""
    found = {
        "flash": sdpa(SDPBackend.FLASH_ATTENTION, Lq, L),
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, Lq, L),
        "efficient": packed_sdpa(SDPBackend.EFFICIENT_ATTENTION, Lq, L, group),
    }
    if with_flex:
        found["flex"] = flex(Lq, L)
    return found


def published(checkout: Path) -> Callable[..., Tensor]:
    """``triton::tq4_sdpa`` from a checkout of executorch: the arguments of ``tq.tq4_sdpa``."""
    path = checkout / KERNEL
    if not path.exists():
        raise SystemExit(f"benchmarks.decode: --executorch {checkout} has no {KERNEL}")
    spec = importlib.util.spec_from_file_location("executorch_tq4_sdpa", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return torch.ops.triton.tq4_sdpa.default
