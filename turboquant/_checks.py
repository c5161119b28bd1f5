"""What the ops refuse, for the fake kernels and for ``reference.py``.

The compiled kernels have the same checks with the same texts in ``csrc/problem.cpp``; a test feeds
every violation to both and compares the messages. ``torch._check`` raises RuntimeError, and turns
a condition on sizes that are unknown while exporting into an assertion at run time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
QUERY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORM_DTYPES = (torch.bfloat16, torch.float32)
INTS = (torch.int32, torch.int64)
NORM_POLICIES = ("l2", "preserve", "unbiased")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(sizes: Sequence[int]) -> str:
    return "[" + ", ".join(str(s) for s in sizes) + "]"


def _found(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {_sizes(tensor.shape)}"


def _dtypes(dtypes: Sequence[torch.dtype]) -> str:
    names = [_name(d) for d in dtypes]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def _rank(op: str, arg: str, t: Tensor, dtypes: Sequence[torch.dtype], dims: str) -> None:
    """Type and rank, before any size is unpacked. ``dims`` is a picture: ``[B, H, T, D]``."""
    torch._check(
        t.dtype in dtypes and t.dim() == dims.count(",") + 1,
        lambda: f"{op}: {arg} must be {_dtypes(dtypes)} {dims}, got {_found(t)}",
    )


def _shape(
    op: str, arg: str, t: Tensor, dtypes: Sequence[torch.dtype], dims: str, sizes: Sequence[int]
) -> None:
    def message() -> str:
        return f"{op}: {arg} must be {_dtypes(dtypes)} {dims} = {_sizes(sizes)}, got {_found(t)}"

    torch._check(t.dtype in dtypes and t.dim() == len(sizes), message)
    for have, want in zip(t.shape, sizes):
        torch._check(have == want, message)


def _device(op: str, first: str, device: torch.device, others: dict[str, Tensor | None]) -> None:
    for arg, t in others.items():
        if t is not None and t.device != device:
            raise RuntimeError(f"{op}: {arg} must be on {first}'s device {device}, got {t.device}")


def _head_dim(op: str, arg: str, t: Tensor, D: int) -> None:
    torch._check(
        D % 2 == 0 and 16 <= D <= 512,
        lambda: f"{op}: {arg} must have an even head dim D from 16 to 512, got {_found(t)}",
    )


def _constants(op: str, D: int, **tensors: tuple[Tensor | None, int]) -> None:
    for arg, (t, size) in tensors.items():
        if t is not None:
            sizes = [D, D] if arg == "rotation" else [size]
            dims = "[D, D]" if arg == "rotation" else f"[{size}]"
            _shape(op, arg, t, FLOATS, dims, sizes)


def _norm_policy(op: str, arg: str, policy: str, centroids: Tensor | None) -> None:
    torch._check(
        policy in NORM_POLICIES,
        lambda: f"{op}: {arg} must be 'l2', 'preserve' or 'unbiased', got '{policy}'",
    )
    torch._check(
        policy == "l2" or centroids is not None,
        lambda: f"{op}: {arg}='{policy}' needs centroids, got None",
    )


def _offset(op: str, arg: str, offset: Tensor, sizes: Sequence[int]) -> None:
    """One vector per head: broadcastable to ``[..., 1, D]``, with D spelled out."""

    def message() -> str:
        target = [*sizes[:-2], 1, sizes[-1]][-len(sizes) :]
        return (
            f"{op}: {arg} must be {_dtypes(FLOATS)} broadcastable to [..., 1, D] = "
            f"{_sizes(target)}, got {_found(offset)}"
        )

    torch._check(offset.dtype in FLOATS and 1 <= offset.dim() <= len(sizes), message)
    torch._check(offset.shape[-1] == sizes[-1], message)
    for i in range(2, offset.dim() + 1):
        have, want = offset.shape[-i], sizes[-i]
        if i == 2:
            torch._check(have == 1, message)
        elif have != 1:
            torch._check(have == want, message)


def compress(
    op: str,
    x: Tensor,
    rotation: Tensor,
    boundaries: Tensor,
    centroids: Tensor | None,
    norm: str,
    offset: Tensor | None,
) -> None:
    torch._check(
        x.dtype in FLOATS and x.dim() >= 1,
        lambda: f"{op}: x must be {_dtypes(FLOATS)} [..., D], got {_found(x)}",
    )
    D = x.shape[-1]
    _head_dim(op, "x", x, D)
    _constants(op, D, rotation=(rotation, 0), boundaries=(boundaries, 15),
               centroids=(centroids, 16))  # fmt: skip
    _norm_policy(op, "norm", norm, centroids)
    if offset is not None:
        _offset(op, "offset", offset, x.shape)
    _device(op, "x", x.device, {"rotation": rotation, "boundaries": boundaries,
                                "centroids": centroids, "offset": offset})  # fmt: skip


def decompress(
    op: str,
    packed: Tensor,
    norms: Tensor,
    centroids: Tensor,
    rotation: Tensor,
    offset: Tensor | None,
    dtype: torch.dtype | None,
) -> torch.dtype:
    """Returns the dtype of the result: as asked, or that of ``norms``."""
    torch._check(
        packed.dtype == torch.uint8 and packed.dim() >= 1,
        lambda: f"{op}: packed must be uint8 [..., D/2], got {_found(packed)}",
    )
    D = 2 * packed.shape[-1]
    _head_dim(op, "packed", packed, D)
    _shape(op, "norms", norms, NORM_DTYPES, "[..., 1]", [*packed.shape[:-1], 1])
    _constants(op, D, centroids=(centroids, 16), rotation=(rotation, 0))
    if offset is not None:
        _offset(op, "offset", offset, [*packed.shape[:-1], D])
    torch._check(
        dtype is None or dtype in FLOATS,
        lambda: f"{op}: dtype must be {_dtypes(FLOATS)}, got {_name(dtype)}",  # type: ignore
    )
    _device(op, "packed", packed.device, {"norms": norms, "centroids": centroids,
                                          "rotation": rotation, "offset": offset})  # fmt: skip
    return norms.dtype if dtype is None else dtype


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
    centroids: Tensor | None,
    k_norm: str,
    v_norm: str,
    k_offset: Tensor | None,
) -> None:
    op = "update_"
    _rank(op, "k", k, FLOATS, "[B, H, T, D]")
    B, H, T, D = k.shape
    _head_dim(op, "k", k, D)
    _shape(op, "v", v, (k.dtype,), "[B, H, T, D]", [B, H, T, D])
    _rank(op, "k_packed", k_packed, (torch.uint8,), "[B, H, S, D/2]")
    S = k_packed.shape[2]
    _shape(op, "k_packed", k_packed, (torch.uint8,), "[B, H, S, D/2]", [B, H, S, D // 2])
    _shape(op, "k_norms", k_norms, NORM_DTYPES, "[B, H, S, 1]", [B, H, S, 1])
    _shape(op, "v_packed", v_packed, (torch.uint8,), "[B, H, S, D/2]", [B, H, S, D // 2])
    _shape(op, "v_norms", v_norms, NORM_DTYPES, "[B, H, S, 1]", [B, H, S, 1])

    def positions() -> str:
        return (
            f"{op}: input_pos must be {_dtypes(INTS)} [T] or [B, T] = {_sizes([T])} or "
            f"{_sizes([B, T])}, got {_found(input_pos)}"
        )

    torch._check(input_pos.dtype in INTS and input_pos.dim() in (1, 2), positions)
    torch._check(input_pos.shape[-1] == T, positions)
    if input_pos.dim() == 2:
        torch._check(input_pos.shape[0] == B, positions)
    torch._check(
        T <= S,
        lambda: f"{op}: k must have at most as many tokens as the cache, got T = {T}, S = {S}",
    )
    _constants(op, D, rotation=(rotation, 0), boundaries=(boundaries, 15),
               centroids=(centroids, 16))  # fmt: skip
    _norm_policy(op, "k_norm", k_norm, centroids)
    _norm_policy(op, "v_norm", v_norm, centroids)
    if k_offset is not None:
        _offset(op, "k_offset", k_offset, k.shape)
    _device(op, "k", k.device, {
        "v": v, "input_pos": input_pos, "rotation": rotation, "boundaries": boundaries,
        "k_packed": k_packed, "k_norms": k_norms, "v_packed": v_packed, "v_norms": v_norms,
        "centroids": centroids, "k_offset": k_offset,
    })  # fmt: skip


def attention(
    op: str,
    query: Tensor,
    k_packed: Tensor,
    k_norms: Tensor,
    v_packed: Tensor,
    v_norms: Tensor,
    centroids: Tensor,
    rotation: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    kv_len: Tensor | None,
    mask_is_causal: bool,
    kv_start: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    _rank(op, "query", query, QUERY_DTYPES, "[B, Hq, Lq, D]")
    B, Hq, Lq, D = query.shape
    _head_dim(op, "query", query, D)
    _rank(op, "k_packed", k_packed, (torch.uint8,), "[B, Hkv, Lkv, D/2]")
    Hkv, Lkv = k_packed.shape[1:3]
    torch._check(
        Hkv >= 1 and Hq % Hkv == 0,
        lambda: f"{op}: k_packed must have Hkv >= 1 heads that divide Hq = {Hq}, got Hkv = {Hkv}",
    )
    packed, norms = [B, Hkv, Lkv, D // 2], [B, Hkv, Lkv, 1]
    _shape(op, "k_packed", k_packed, (torch.uint8,), "[B, Hkv, Lkv, D/2]", packed)
    _shape(op, "k_norms", k_norms, NORM_DTYPES, "[B, Hkv, Lkv, 1]", norms)
    _shape(op, "v_packed", v_packed, (torch.uint8,), "[B, Hkv, Lkv, D/2]", packed)
    _shape(op, "v_norms", v_norms, NORM_DTYPES, "[B, Hkv, Lkv, 1]", norms)
    _constants(op, D, centroids=(centroids, 16), rotation=(rotation, 0))

    if attn_mask is not None:

        def mask() -> str:
            return (
                f"{op}: attn_mask must be bool [B or 1, 1, Lq, Lkv] = [{B} or 1, 1, {Lq}, {Lkv}], "
                f"got {_found(attn_mask)}"
            )

        torch._check(attn_mask.dtype == torch.bool and attn_mask.dim() == 4, mask)
        if attn_mask.shape[0] != 1:
            torch._check(attn_mask.shape[0] == B, mask)
        for have, want in zip(attn_mask.shape[1:], (1, Lq, Lkv)):
            torch._check(have == want, mask)

    torch._check(
        not (is_causal and mask_is_causal),
        lambda: f"{op}: is_causal and mask_is_causal exclude each other, got both True",
    )
    if is_causal:
        torch._check(
            Lq == Lkv,
            lambda: (
                f"{op}: is_causal must come with Lq == Lkv (mask_is_causal is the rule for "
                f"queries at the end of a longer context), got Lq = {Lq}, Lkv = {Lkv}"
            ),
        )
    for arg, t in {"kv_len": kv_len, "kv_start": kv_start}.items():
        if t is not None:

            def lengths(arg: str = arg, t: Tensor = t) -> str:
                return (
                    f"{op}: {arg} must be {_dtypes(INTS)} with one element or [B] = [{B}], "
                    f"got {_found(t)}"
                )

            torch._check(t.dtype in INTS, lengths)
            if t.numel() != 1:
                torch._check(t.dim() == 1 and t.numel() == B, lengths)
    if sinks is not None:
        _shape(op, "sinks", sinks, (torch.float32, torch.bfloat16), "[Hq]", [Hq])
    torch._check(
        scale is None or math.isfinite(scale),
        lambda: f"{op}: scale must be finite, got {scale:g}",
    )
    torch._check(
        softcap is None or (math.isfinite(softcap) and softcap > 0),
        lambda: f"{op}: softcap must be finite and above 0, got {softcap:g}",
    )
    _device(op, "query", query.device, {
        "k_packed": k_packed, "k_norms": k_norms, "v_packed": v_packed, "v_norms": v_norms,
        "centroids": centroids, "rotation": rotation, "attn_mask": attn_mask, "kv_len": kv_len,
        "kv_start": kv_start, "sinks": sinks,
    })  # fmt: skip
