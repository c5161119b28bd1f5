"""A drop-in KV cache for hand-written models: 4-bit, fixed capacity, exportable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from turboquant.constants import shared_constants
from turboquant.ops import decompress, tq4_attention, update_


class TurboQuantKVCache(nn.Module):
    """KV cache of fixed capacity that stores keys and values in 4 bits.

    Takes the place of a dense cache module with ``update(input_pos, k_val, v_val)``. All buffers
    are non-persistent and keep their dtype under ``.half()`` and ``.to(dtype)``.

    Args:
        n_heads: number of KV heads H.
        head_dim: D; even, 16 to 512.
        max_seq_len: capacity S in tokens.
        bits: 4; nothing else is implemented.
        seed: of the rotation.
        batch_size: B.
        k_norm, v_norm: norm policies of keys and values; see :func:`turboquant.compress`.

    Attributes:
        k_packed, v_packed: uint8 ``[B, H, S, D/2]``.
        k_norms, v_norms: bf16 ``[B, H, S, 1]``. Unwritten slots are 0.
        centroids, boundaries, rotation, rotation_T: the codec's constants, f32.

    Raises:
        ValueError: a constructor argument is out of range.

    >>> cache = TurboQuantKVCache(n_heads=2, head_dim=64, max_seq_len=128)
    >>> pos = torch.arange(5)
    >>> _ = cache.update(pos, torch.randn(1, 2, 5, 64), torch.randn(1, 2, 5, 64))
    >>> cache.attend(torch.randn(1, 8, 5, 64), pos).shape
    torch.Size([1, 8, 5, 64])
    """

    k_packed: Tensor
    k_norms: Tensor
    v_packed: Tensor
    v_norms: Tensor
    centroids: Tensor
    boundaries: Tensor
    rotation: Tensor
    rotation_T: Tensor

    def __init__(
        self,
        n_heads: int,
        head_dim: int,
        max_seq_len: int,
        bits: int = 4,
        seed: int = 42,
        *,
        batch_size: int = 1,
        k_norm: str = "l2",
        v_norm: str = "l2",
    ) -> None:
        super().__init__()
        if bits != 4:
            raise ValueError(f"TurboQuantKVCache: bits must be 4, got {bits}")
        for name, value in {
            "n_heads": n_heads,
            "max_seq_len": max_seq_len,
            "batch_size": batch_size,
        }.items():
            if value < 1:
                raise ValueError(f"TurboQuantKVCache: {name} must be at least 1, got {value}")
        for name, policy in {"k_norm": k_norm, "v_norm": v_norm}.items():
            if policy not in ("l2", "preserve", "unbiased"):
                raise ValueError(
                    f"TurboQuantKVCache: {name} must be 'l2', 'preserve' or 'unbiased', "
                    f"got {policy!r}"
                )
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.batch_size = batch_size
        self.k_norm = k_norm
        self.v_norm = v_norm
        # By value, so that a pickled cache carries its rotation.
        self._constants = shared_constants(head_dim, seed)
        device = torch.get_default_device()  # that of torch.device("meta"), for example
        for name, constant in self._constants.items():
            self.register_buffer(name, constant.clone().to(device), persistent=False)
        for side in "kv":
            packed = torch.zeros(batch_size, n_heads, max_seq_len, head_dim // 2, dtype=torch.uint8)
            norms = torch.zeros(batch_size, n_heads, max_seq_len, 1, dtype=torch.bfloat16)
            self.register_buffer(f"{side}_packed", packed, persistent=False)
            self.register_buffer(f"{side}_norms", norms, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TurboQuantKVCache:
        """Follow the module to another device, but never to another dtype."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def reset(self) -> None:
        """Empty the cache and restore its constants (after ``to_empty``, for example)."""
        for name, constant in self._constants.items():
            getattr(self, name).copy_(constant)
        for state in (self.k_packed, self.k_norms, self.v_packed, self.v_norms):
            state.zero_()

    def update(
        self, input_pos: Tensor, k_val: Tensor, v_val: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compress new tokens into the slots ``input_pos``.

        Args:
            input_pos: int32 or int64 ``[T]`` or ``[B, T]``; see :func:`turboquant.update_`.
            k_val, v_val: ``[B, H, T, D]``.

        Returns:
            ``(k_packed, k_norms, v_packed, v_norms)``: the whole buffers.
        """
        update_(
            k_val, v_val, input_pos, self.rotation, self.boundaries,
            self.k_packed, self.k_norms, self.v_packed, self.v_norms,
            centroids=self.centroids, k_norm=self.k_norm, v_norm=self.v_norm,
        )  # fmt: skip
        return self.k_packed, self.k_norms, self.v_packed, self.v_norms

    forward = update

    def attend(
        self,
        query: Tensor,
        input_pos: Tensor,
        attn_mask: Tensor | None = None,
        *,
        scale: float | None = None,
        mask_is_causal: bool = True,
        kv_start: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of the tokens at ``input_pos`` over everything up to the last of them.

        Args:
            query: ``[B, Hq, T, D]``.
            input_pos: ``[T]`` or ``[B, T]``, ascending: where the queries' own keys lie. The
                context ends with the last one, read on the device.
            mask_is_causal: False lets every query see the whole context.
            attn_mask, scale, kv_start, softcap, sinks: see :func:`turboquant.tq4_attention`;
                the mask has the capacity S as its last dimension.

        Returns:
            ``[B, Hq, T, D]``, the query's dtype and layout.
        """
        kv_len = input_pos[..., -1] + 1
        return tq4_attention(
            query, self.k_packed, self.k_norms, self.v_packed, self.v_norms, self.centroids,
            self.rotation, attn_mask, False, scale, kv_len, mask_is_causal,
            kv_start=kv_start, softcap=softcap, sinks=sinks,
        )[0]  # fmt: skip

    def decompress(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        """The stored keys and values, ``[B, H, S, D]`` each; unwritten slots are 0."""
        k = decompress(self.k_packed, self.k_norms, self.centroids, self.rotation, dtype=dtype)
        v = decompress(self.v_packed, self.v_norms, self.centroids, self.rotation, dtype=dtype)
        return k, v

    def extra_repr(self) -> str:
        return (
            f"n_heads={self.n_heads}, head_dim={self.head_dim}, max_seq_len={self.max_seq_len}, "
            f"batch_size={self.batch_size}"
        )


def replace_kv_cache(
    model: nn.Module,
    cls_or_predicate: type[nn.Module] | Callable[[nn.Module], bool],
    **cache_options: Any,
) -> int:
    """Swap the dense KV caches of a hand-written model for :class:`TurboQuantKVCache`.

    Args:
        model: changed in place.
        cls_or_predicate: the class of the caches, or a function that recognises one. Each must
            have ``update(input_pos, k_val, v_val)`` and a buffer ``k_cache`` of shape
            ``[B, H, S, D]`` (the convention of gpt-fast and executorch).
        cache_options: passed on to :class:`TurboQuantKVCache`.

    Returns:
        How many caches were swapped. ``update`` of the new ones returns four packed tensors; the
        model's attention takes them to :meth:`TurboQuantKVCache.attend`.

    Raises:
        ValueError: a module was recognised but is not such a cache; the model is left as it was.

    >>> class Dense(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.register_buffer("k_cache", torch.zeros(1, 2, 128, 64))
    ...     def update(self, input_pos, k_val, v_val): ...
    >>> model = nn.ModuleDict({"cache": Dense()})
    >>> replace_kv_cache(model, Dense)
    1
    >>> type(model["cache"]).__name__
    'TurboQuantKVCache'
    """

    def recognised(module: nn.Module) -> bool:
        if isinstance(cls_or_predicate, type):
            return isinstance(module, cls_or_predicate)
        return cls_or_predicate(module)

    swaps: list[tuple[nn.Module, str, TurboQuantKVCache]] = []
    made: dict[nn.Module, TurboQuantKVCache] = {}  # a cache that layers share stays shared
    for path, parent in model.named_modules():
        for name, child in parent.named_children():
            if not recognised(child):
                continue
            where = f"{path}.{name}" if path else name
            dense = getattr(child, "k_cache", None)
            if not (callable(getattr(child, "update", None)) and isinstance(dense, Tensor)):
                raise ValueError(
                    f"replace_kv_cache: {where} ({type(child).__name__}) must have "
                    "update(input_pos, k_val, v_val) and a buffer k_cache"
                )
            if dense.dim() != 4:
                raise ValueError(
                    f"replace_kv_cache: {where}.k_cache must be [B, H, S, D], "
                    f"got {list(dense.shape)}"
                )
            if child not in made:
                B, H, S, D = dense.shape
                cache = TurboQuantKVCache(H, D, S, batch_size=B, **cache_options)
                made[child] = cache.to(dense.device)
            swaps.append((parent, name, made[child]))
    for parent, name, cache in swaps:
        setattr(parent, name, cache)
    return len(swaps)
