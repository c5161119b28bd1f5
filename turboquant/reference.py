"""TurboQuant in plain PyTorch: the readable definition of every op.

Read this file to learn what the kernels compute; they are tested against it. It is also what runs
on devices for which there is no kernel (MPS, XPU, ...). It favours clarity over memory: the
attention materialises all scores.

The format, for one head vector ``x`` of ``D`` numbers::

    norm  = |x|                                    stored as bf16
    y     = rotation · x / norm                    each y[i] is close to N(0, 1/D)
    index = how many of 15 boundaries are < y[i]   0..15, so 4 bits
    byte j = index[2j] << 4 | index[2j+1]          D/2 bytes

and back: ``x ≈ norm · rotationᵀ · centroids[index]``. Attention never needs that last step for
each key: ``⟨q, rotationᵀ·c⟩ = ⟨rotation·q, c⟩``, so the query is rotated instead, once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from turboquant import _checks as checks


def pack(index: Tensor) -> Tensor:
    """Indices 0..15 ``[..., D]`` to bytes ``[..., D/2]``: even elements in the high nibble."""
    index = index.to(torch.uint8)
    return (index[..., 0::2] << 4) | index[..., 1::2]


def unpack(packed: Tensor) -> Tensor:
    """Bytes ``[..., D/2]`` to int64 indices ``[..., D]``; the inverse of :func:`pack`."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2).long()


def compress(
    x: Tensor,
    rotation: Tensor,
    boundaries: Tensor,
    *,
    centroids: Tensor | None = None,
    norm: str = "l2",
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`turboquant.compress`."""
    checks.compress("compress", x, rotation, boundaries, centroids, norm, offset)
    packed, length = _compress(x, rotation, boundaries, centroids, norm, offset)
    return packed, length.bfloat16()


def _compress(
    x: Tensor,
    rotation: Tensor,
    boundaries: Tensor,
    centroids: Tensor | None,
    norm: str,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x = x.float()
    if offset is not None:
        x = x - offset.float()
    # The squares of 1e-30 or 1e30 leave f32's range, so the largest coordinate is divided out.
    largest = x.abs().amax(-1, keepdim=True)
    length = torch.linalg.vector_norm(x / largest, dim=-1, keepdim=True) * largest
    length = torch.where((largest > 0) & largest.isfinite(), length, largest)
    # A zero or non-finite vector has no direction: its coordinates count as 0.
    direction = torch.where((length > 0) & length.isfinite(), x / length, 0.0)
    y = direction @ rotation.float().T
    index = torch.bucketize(y, boundaries.float(), right=False)

    if norm != "l2":
        assert centroids is not None
        y_hat = centroids.float()[index]
        if norm == "preserve":  # x̂ gets the length of x
            length = length / torch.linalg.vector_norm(y_hat, dim=-1, keepdim=True)
        else:  # "unbiased": ⟨x, x̂⟩ = |x|², so inner products do not shrink
            shrink = (y * y_hat).sum(-1, keepdim=True)
            length = torch.where(shrink > 0, length / shrink, length)
    return pack(index).contiguous(), length.contiguous()


def decompress(
    packed: Tensor,
    norms: Tensor,
    centroids: Tensor,
    rotation: Tensor,
    *,
    offset: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`turboquant.decompress`."""
    dtype = checks.decompress("decompress", packed, norms, centroids, rotation, offset, dtype)
    x = norms.float() * (centroids.float()[unpack(packed)] @ rotation.float())
    # 0 · c is exactly 0 and NaN · c is NaN: zero and non-finite vectors need no special case.
    if offset is not None:
        x = x + offset.float()
    return x.to(dtype).contiguous()


def update_(
    k: Tensor,
    v: Tensor,
    input_pos: Tensor,
    rotation: Tensor,
    boundaries: Tensor,
    k_packed: Tensor,
    k_norms: Tensor,
    v_packed: Tensor,
    v_norms: Tensor,
    *,
    centroids: Tensor | None = None,
    k_norm: str = "l2",
    v_norm: str = "l2",
    k_offset: Tensor | None = None,
) -> None:
    """See :func:`turboquant.update_`."""
    checks.update_(
        k, v, input_pos, rotation, boundaries, k_packed, k_norms, v_packed, v_norms,
        centroids, k_norm, v_norm, k_offset,
    )  # fmt: skip
    capacity = k_packed.shape[2]
    if input_pos.numel() and int(input_pos.max()) >= capacity:
        raise RuntimeError(
            f"update_: input_pos must be below the capacity {capacity}, "
            f"got {int(input_pos.max())}; nothing was written"
        )
    new_k = _compress(k, rotation, boundaries, centroids, k_norm, k_offset)
    new_v = _compress(v, rotation, boundaries, centroids, v_norm, None)
    positions = input_pos.expand(k.shape[0], k.shape[2]).tolist()
    for b, row in enumerate(positions):
        for t, position in enumerate(row):
            if position < 0:
                continue
            for cache, new in zip((k_packed, k_norms, v_packed, v_norms), new_k + new_v):
                cache[b, :, position] = new[b, :, t].to(cache.dtype)


def tq4_attention(
    query: Tensor,
    k_packed: Tensor,
    k_norms: Tensor,
    v_packed: Tensor,
    v_norms: Tensor,
    centroids: Tensor,
    rotation: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    mask_is_causal: bool = False,
    *,
    kv_start: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    _op: str = "tq4_attention",
) -> tuple[Tensor, Tensor]:
    """See :func:`turboquant.tq4_attention`."""
    checks.attention(
        _op, query, k_packed, k_norms, v_packed, v_norms, centroids, rotation, attn_mask,
        is_causal, scale, kv_len, mask_is_causal, kv_start, softcap, sinks,
    )  # fmt: skip
    B, Hq, Lq, D = query.shape
    Hkv, Lkv = k_packed.shape[1:3]
    rotation, centroids = rotation.float(), centroids.float()
    scale = 1 / math.sqrt(D) if scale is None else scale

    # Query heads that share a KV head become one group axis: [B, Hkv, G, Lq, D].
    q = (query.float() @ rotation.T).reshape(B, Hkv, Hq // Hkv, Lq, D)
    k = centroids[unpack(k_packed)].unsqueeze(2)
    v = centroids[unpack(v_packed)].unsqueeze(2)
    k_norm = k_norms.float().mT.unsqueeze(2)  # [B, Hkv, 1, 1, Lkv]
    v_norm = v_norms.float().mT.unsqueeze(2)

    scores = (q @ k.mT) * k_norm * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    visible = visibility(B, Lq, Lkv, query.device, attn_mask, is_causal or mask_is_causal,
                         kv_len, kv_start).unsqueeze(2)  # fmt: skip
    # Selected, not multiplied: an unseen slot may hold NaN.
    scores = torch.where(visible, scores, -math.inf)
    # The sink is one more logit in the denominator, without a value; none is a sink of -inf.
    sink = torch.full((Hq,), -math.inf) if sinks is None else sinks.float()
    sink = sink.to(scores.device).view(1, Hkv, -1, 1, 1).expand(B, -1, -1, Lq, -1)
    lse = torch.cat((scores, sink), dim=-1).logsumexp(-1, keepdim=True)
    weights = torch.where(visible, torch.exp(scores - lse) * v_norm, 0.0)

    out = torch.empty_like(query)
    out.copy_(((weights @ v) @ rotation).reshape(B, Hq, Lq, D))
    return out, lse.reshape(B, Hq, Lq)


def visibility(
    B: int,
    Lq: int,
    Lkv: int,
    device: torch.device,
    attn_mask: Tensor | None,
    causal: bool,
    kv_len: Tensor | None,
    kv_start: Tensor | None,
) -> Tensor:
    """Which key each query row may see: bool ``[B, 1, Lq, Lkv]``."""
    key = torch.arange(Lkv, device=device)
    row = torch.arange(Lq, device=device).unsqueeze(-1)
    length = torch.full((1,), Lkv, device=device) if kv_len is None else kv_len.clamp(0, Lkv)
    length = length.view(-1, 1, 1, 1)
    visible = (key < length).expand(B, 1, Lq, Lkv)
    if causal:  # bottom-right: the last row sees the last key
        visible = visible & (key <= length - Lq + row)
    if kv_start is not None:
        visible = visible & (key >= kv_start.view(-1, 1, 1, 1))
    if attn_mask is not None:
        visible = visible & attn_mask
    return visible


def tq4_sdpa(
    query: Tensor,
    k_packed: Tensor,
    k_norms: Tensor,
    v_packed: Tensor,
    v_norms: Tensor,
    centroids: Tensor,
    rotation: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    mask_is_causal: bool = False,
) -> Tensor:
    """See :func:`turboquant.tq4_sdpa`."""
    return tq4_attention(
        query, k_packed, k_norms, v_packed, v_norms, centroids, rotation, attn_mask,
        is_causal, scale, kv_len, mask_is_causal, _op="tq4_sdpa",
    )[0]  # fmt: skip
