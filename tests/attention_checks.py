"""Calls attention on a backend and judges the result: shared by the attention tests."""

from __future__ import annotations

from typing import Any

import oracles
import torch
from backends import Backend
from oracles import Cache, rms
from torch import Tensor


def on_device(backend: Backend, *args: Any) -> list[Any]:
    """Arguments on the backend's device with their strides kept."""
    moved = []
    for a in args:
        if isinstance(a, Cache):
            a = Cache(*on_device(backend, *a.args))
        elif isinstance(a, Tensor) and a.device != backend.device:
            # .to() keeps the order of strides, but neither gaps nor zero strides.
            if a._is_view() and a.numel():
                storage = torch.empty(0, dtype=a.dtype).set_(a.untyped_storage())
                storage = storage.to(backend.device)
                a = torch.as_strided(storage, a.size(), a.stride(), a.storage_offset())
            else:
                a = a.to(backend.device)
        moved.append(a)
    return moved


def call(backend: Backend, query: Tensor, cache: Cache, **options: Any) -> tuple[Tensor, Tensor]:
    """tq4_attention; and tq4_sdpa, which must give the same bits where it can express the call."""
    query, cache = on_device(backend, query, cache)
    names = list(options)
    options = dict(zip(names, on_device(backend, *options.values())))
    out, lse = backend.ops.tq4_attention(query, *cache.args, **options)
    if not {"kv_start", "softcap", "sinks"} & set(options):
        assert oracles.same_bits(backend.ops.tq4_sdpa(query, *cache.args, **options), out)
    assert out.dtype == query.dtype
    assert out.shape == query.shape
    assert out.device == lse.device == query.device
    assert lse.dtype == torch.float32
    assert lse.shape == query.shape[:3]
    assert lse.is_contiguous()
    assert out.stride() == torch.empty_like(query).stride()
    return out, lse


def compare(
    backend: Backend,
    out: Tensor,
    lse: Tensor,
    want: Tensor,
    want_lse: Tensor,
    size: float,
    spread: float = 1.0,
    many_rows: bool = False,
) -> None:
    """`size`: of the largest value. `spread`: of the scores, whose errors in bf16 grow with it.
    `many_rows`: so many for a KV head that prefill kernels may have taken them.

    Rows that see nothing must be exactly zero.
    """
    nothing = want_lse == -torch.inf
    assert torch.equal(lse.cpu() == -torch.inf, nothing)
    assert (out.cpu()[nothing] == 0).all()
    seen = ~nothing
    got_lse, want_lse = lse.cpu().double()[seen], want_lse[seen]
    # Prefill kernels round rotated queries, keys, their norms and the rotation to float16.
    halves = 4 if many_rows else 1
    coarse = {torch.float32: 0.0, torch.float16: halves / 2**11, torch.bfloat16: 3 / 2**8}
    slack = 0.0 if backend.exact else coarse[out.dtype] * max(1.0, spread)
    lse_bound = 2e-5 + 2e-6 * want_lse.abs() + 2 * slack
    assert not ((got_lse - want_lse).abs() > lse_bound).any()
    assert not got_lse.isnan().any()
    oracles.assert_rounded(out, want, slack=1e-6, absolute=(2e-5 + slack) * size)


def check(
    backend: Backend,
    query: Tensor,
    cache: Cache,
    *,
    dense: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run and compare with float64. `dense`: keys and values, if they are known already."""
    out, lse = call(backend, query, cache, **options)
    k, v = dense or (cache.k(), cache.v())
    visible = oracles.visible_keys(
        query.shape[0], query.shape[2], k.shape[2],
        attn_mask=options.get("attn_mask"),
        causal=options.get("is_causal", False) or options.get("mask_is_causal", False),
        kv_len=options.get("kv_len"), kv_start=options.get("kv_start"),
    )  # fmt: skip
    want, want_lse = oracles.attention(
        query, k, v, visible, scale=options.get("scale"), softcap=options.get("softcap"),
        sinks=options.get("sinks"),
    )  # fmt: skip
    used = visible.any(1)[:, None, :, None].expand_as(v)
    size = float(v[used].abs().max()) if used.any() else 0.0
    dim = query.shape[-1]
    scale = options.get("scale") or dim**-0.5
    spread = abs(scale) * dim**0.5 * rms(query) * rms(k[used]) if used.any() else 0.0
    rows = query.shape[1] // max(k.shape[1], 1) * query.shape[2]
    compare(backend, out, lse, want, want_lse, size, spread, many_rows=rows > 16)
    return out, lse
