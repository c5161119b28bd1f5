"""The attention function and the mask function that transformers calls under ``"turboquant"``.

What a mask can be between the two, where ``i`` counts the Lq queries of a batch row:

=============================  ===================================================================
None                           row i sees all keys up to ``Lkv - Lq + i``
integer tensor [B or 1,1,1,2]  ``(start, end)``: row i sees keys ``start`` to ``end - Lq + i``
bool tensor [B, 1, Lq, Lkv]    anything else; True = attend
=============================  ===================================================================

The second form serves left padding and caches with more slots than tokens in a few bytes, where
the third would need ``Lq · Lkv``. It has four dimensions because transformers takes a tensor with
four for a finished mask and passes it through, untouched, wherever masks travel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from turboquant.hf.layers import PackedStates
from turboquant.hf.support import UnsupportedError
from turboquant.ops import tq4_attention

# No "flash", "sdpa", "flex" or "/" in it: transformers reads meaning into such names.
NAME = "turboquant"

# What a model passes along without asking the attention to act on it.
HARMLESS_KWARGS = frozenset(
    {
        "cache_position",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "use_cache",
    }
)


def register() -> None:
    """Add both functions to the registries of transformers, under :data:`NAME`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


# ------------------------------------------------------------------------------------- mask


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one forward pass, in the smallest of the forms above.

    Args:
        batch_size, q_length, kv_length: B, Lq, Lkv.
        q_offset: tokens before the queries; a tensor of one element with a static cache.
        kv_offset: position of the first key; not 0 only with a sliding window.
        mask_function: which query may see which key.
        attention_mask: bool ``[B, tokens so far]``; False is padding.
        device: of the mask.
        kwargs: for :func:`transformers.masking_utils.sdpa_mask`.
    """
    # Any other pattern is wrapped in a function of its own, so identity tells them apart.
    if mask_function is causal_mask_function and kv_offset == 0:
        end = q_offset + q_length
        start: Tensor | int | None = 0
        # Padding can only be looked at on the host, which a traced graph cannot do.
        if attention_mask is not None:
            start = None if torch.compiler.is_compiling() else _left_padding(attention_mask, end)
        # Tensors are not compared, which would stall the stream; `end` is one with a static cache.
        if isinstance(start, int):
            if isinstance(end, int) and end == kv_length:
                return None
            start = torch.zeros(1, dtype=torch.int32, device=device)
        if start is not None:
            return _bounds(start, end)

    # Neither may be skipped: under our name, None always means causal.
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )


def _bounds(start: Tensor, end: int | Tensor) -> Tensor:
    """``(start, end)`` as int32 ``[B or 1, 1, 1, 2]``."""
    bounds = torch.stack((start, torch.zeros_like(start) + end), dim=-1)
    return bounds.to(torch.int32).view(-1, 1, 1, 2)


def _left_padding(attention_mask: Tensor, end: int | Tensor) -> Tensor | int | None:
    """Where each row's tokens start, int32 ``[B]``; 0 if all start there; None if there is padding
    elsewhere. Looks at the device once."""
    if attention_mask.dim() != 2:
        return None
    length = attention_mask.shape[1]
    position = torch.arange(length, device=attention_mask.device)
    filled = position < end
    seen = attention_mask.bool() & filled
    start = end - seen.sum(-1, dtype=torch.int32)
    expected = filled & (position >= start[:, None])
    left = (seen == expected).all() & (torch.zeros_like(start) + end <= length).all()
    is_left, padded = torch.stack((left, start.any())).tolist()
    if not is_left:
        return None
    return start if padded else 0


def _is_bounds(attention_mask: Tensor | None) -> bool:
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return False
    return attention_mask.shape[1:] == (1, 1, 2)


# -------------------------------------------------------------------------------- attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedStates,
    value: Tensor | PackedStates,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over packed keys and values, or over dense ones where there is no other choice.

    Dense keys and values come from sliding windows, from layers in ``skip_layers``, from a dense
    cache of the caller's, and from calls without a cache; they get transformers' SDPA with the mask
    spelled out, or where that lacks a feature, :func:`_eager`.

    Args:
        module: the attention layer.
        query: ``[B, Hq, Lq, D]``.
        key, value: what the cache layer returned.
        attention_mask: as made by :func:`mask`, or a bool ``[B or 1, 1, Lq, Lkv]``.
        scaling: of the scores; None is ``1/sqrt(D)``.
        softcap, s_aux: logit cap and attention sinks ``[Hq]``.
        sliding_window: of this layer; the mask must already apply it.
        kwargs: names in :data:`HARMLESS_KWARGS`, or None.

    Returns:
        ``[B, Lq, Hq, D]`` and no attention weights.

    Raises:
        UnsupportedError: an argument asks for something that would be ignored.
    """
    if kwargs.pop("output_attentions", False):
        _refuse("output_attentions", "the weights are never formed; use 'eager'")
    for name, argument in kwargs.items():
        if argument is not None and name not in HARMLESS_KWARGS:
            _refuse(name)
    if dropout:
        _refuse("dropout", "call model.eval()")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal and (attention_mask is None or _is_bounds(attention_mask)):
        _refuse("is_causal=False without a bool mask")

    if isinstance(key, PackedStates):
        assert isinstance(value, PackedStates)
        if sliding_window is not None:
            _refuse("sliding_window over a compressed layer", "name it in skip_layers")
        out = _packed(query, key, value, attention_mask, scaling, softcap, s_aux)
        # The op keeps the query's memory layout, so this is a view for every model we know.
        return out.transpose(1, 2).contiguous(), None

    if sliding_window is not None and (attention_mask is None or _is_bounds(attention_mask)):
        _refuse("sliding_window without a bool mask")
    assert isinstance(value, Tensor)
    Lq, Lkv = query.shape[2], key.shape[2]
    if softcap is not None or s_aux is not None:
        visible = _explicit(attention_mask, Lq, Lkv, query.device)
        return _eager(query, key, value, visible, scaling, softcap, s_aux), None
    # SDPA's own causal rule is top-left, which is ours if Lq = Lkv.
    implied = attention_mask is None and Lq in (1, Lkv)
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        None if implied else _explicit(attention_mask, Lq, Lkv, query.device),
        scaling=scaling,
        is_causal=is_causal,
    )


def _packed(
    query: Tensor,
    key: PackedStates,
    value: PackedStates,
    attention_mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    kv_start = None
    if _is_bounds(attention_mask):
        assert attention_mask is not None
        kv_start = attention_mask[:, 0, 0, 0]
        attention_mask = None
    sinks = s_aux.float() if s_aux is not None and s_aux.dtype == torch.float16 else s_aux
    if key.offset is not None and softcap is not None:
        _refuse("softcap over keys with an offset", "use k_offset=False")

    def attend(sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return tq4_attention(
            query, key.packed, key.norms, value.packed, value.norms, key.centroids, key.rotation,
            attention_mask, False, scaling, key.kv_len, attention_mask is None,
            kv_start=kv_start, softcap=softcap, sinks=sinks,
        )  # fmt: skip

    if key.offset is None or sinks is None:
        return attend(sinks)[0]
    # The offset has been taken out of all scores, but a sink is to be compared with the whole.
    out, lse = attend(None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    offset = key.offset.to(query.dtype).unsqueeze(2)
    common = query.unflatten(1, (offset.shape[1], -1)) @ offset.mT
    lse = lse + scale * common.flatten(1, 2).squeeze(-1).float()
    return out * torch.sigmoid(lse - sinks.view(1, -1, 1)).to(out.dtype).unsqueeze(-1)


def _explicit(attention_mask: Tensor | None, Lq: int, Lkv: int, device: torch.device) -> Tensor:
    """Any of the forms as a bool ``[B or 1, 1, Lq, Lkv]``."""
    start: int | Tensor
    end: int | Tensor
    if attention_mask is None:
        start, end = 0, Lkv
    elif _is_bounds(attention_mask):
        start, end = attention_mask[..., :1], attention_mask[..., 1:]
    else:
        return attention_mask
    position = torch.arange(Lkv, device=device)
    row = torch.arange(Lq, device=device)[:, None]
    visible = (position >= start) & (position <= end - Lq + row)
    return visible.expand(-1 if visible.dim() == 4 else 1, 1, Lq, Lkv)


# Scores that are formed at a time: 256 MB in float32.
_SCORES = 1 << 26


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Dense attention with a logit cap or sinks, ``[B, Lq, Hq, D]``: some rows after the other.

    Rows that see nothing are zeros.
    """
    B, Hq, Lq, D = query.shape
    Hkv, Lkv = key.shape[1:3]
    scale = D**-0.5 if scaling is None else scaling
    rows = max(_SCORES // (B * Hq * Lkv), 1)
    out = []
    for first in range(0, Lq, rows):
        q = query[:, :, first : first + rows]
        seen = visible[:, :, first : first + rows].unsqueeze(2)
        scores = (q.unflatten(1, (Hkv, -1)) @ key.mT.unsqueeze(2)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
        if s_aux is not None:
            sinks = s_aux.float().view(1, Hkv, -1, 1, 1)
            top = torch.maximum(top, sinks)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        if s_aux is not None:
            total = total + (sinks - top).exp()
        weights = weights / torch.where(total > 0, total, 1.0)
        out.append((weights.to(value.dtype) @ value.unsqueeze(2)).flatten(1, 2))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous()


def _refuse(what: str, instead: str | None = None) -> NoReturn:
    advice = "" if instead is None else f"; {instead}"
    raise UnsupportedError(f"turboquant attention does not support {what}{advice}")
