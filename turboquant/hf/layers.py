"""The layers of a :class:`turboquant.hf.TurboQuantCache`: one that grows, one of fixed size.

Keys and values are compressed in ``update``, during prefill too: no dense copy outlives the call.
``update`` returns :class:`PackedStates`, which models pass on to the attention function; see
``turboquant/hf/attention.py`` for the other end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from turboquant.constants import codebook, rotation
from turboquant.hf.support import UnsupportedError
from turboquant.ops import update_

# A full buffer of n tokens grows to 1.25·n, in whole blocks: at most a quarter as much as is used
# lies empty (plus a block), and growing costs at most five copies a token, however long the
# context becomes.
GROWTH = 1.25
BLOCK = 64


def overflow(tokens: int, max_cache_len: int) -> str:
    """What to tell a caller whose tokens do not fit a static cache."""
    return (
        f"{tokens} tokens do not fit a TurboQuantCache of max_cache_len={max_cache_len}; "
        "shorten the prompt or the generation, or make the cache longer"
    )


class PackedStates:
    """Keys or values of one layer, as ``update`` hands them to the attention function.

    It is no tensor on purpose: a model or an attention function that would compute on it is told
    so, instead of finding a dense tensor and losing the compression without a word.

    Attributes:
        packed: uint8 ``[B, H, S, D/2]``.
        norms: bf16 ``[B, H, S, 1]``.
        centroids, rotation: ``[16]`` and ``[D, D]``.
        kv_len: 0-d int64 on the device: how many of the S slots are filled; None is all.
        offset: f32 ``[1, H, 1, D]``, taken out of the keys before; None if nothing was.
    """

    def __init__(
        self,
        packed: Tensor,
        norms: Tensor,
        centroids: Tensor,
        rotation: Tensor,
        kv_len: Tensor | None,
        offset: Tensor | None = None,
    ) -> None:
        self.packed = packed
        self.norms = norms
        self.centroids = centroids
        self.rotation = rotation
        self.kv_len = kv_len
        self.offset = offset

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedStates:
        """On another device, as models ask for that share keys between layers."""
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device, non_blocking=non_blocking)
            for name, tensor in vars(self).items()
        }
        return PackedStates(**moved)

    _MESSAGE = (
        "these keys and values are compressed and only the attention function 'turboquant' can "
        "read them (asked for {}); use turboquant.hf.enable(model), or "
        "model.set_attn_implementation('turboquant')"
    )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(self._MESSAGE.format(name))

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError(self._MESSAGE.format("an element"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError(cls._MESSAGE.format(getattr(func, "__name__", "a torch function")))


class Codec:
    """Codebook and rotation of one head dim, once per device, shared by the layers of a cache."""

    def __init__(self, head_dim: int, seed: int) -> None:
        centroids, boundaries = codebook(head_dim)
        self._constants = (centroids, boundaries, rotation(head_dim, seed))
        self._by_device = {centroids.device: self._constants}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``(centroids, boundaries, rotation)``."""
        if device not in self._by_device:
            c, b, r = self._constants
            self._by_device[device] = (c.to(device), b.to(device), r.to(device))
        return self._by_device[device]


class Buffers(NamedTuple):
    """uint8 ``[B, H, S, D/2]`` and bf16 ``[B, H, S, 1]``, of keys and of values."""

    k_packed: Tensor
    k_norms: Tensor
    v_packed: Tensor
    v_norms: Tensor

    def map(self, fn: Callable[[Tensor], Tensor]) -> Buffers:
        return Buffers(*(fn(t) for t in self))


def _allocate(B: int, H: int, S: int, D: int, device: torch.device) -> Buffers:
    packed, norms = (B, H, S, D // 2), (B, H, S, 1)
    # Outside inference mode, or a cache made inside it could never be written outside again.
    with torch.inference_mode(False):
        return Buffers(
            *(
                torch.zeros(shape, dtype=dtype, device=device)
                for _ in "kv"
                for shape, dtype in ((packed, torch.uint8), (norms, torch.bfloat16))
            )
        )


class PackedLayer(CacheLayerMixin):
    """What the dynamic and the static layer share. ``keys`` and ``values`` stay None."""

    is_sliding = False
    is_croppable = True

    buffers: Buffers

    def __init__(
        self, codec: Codec, k_norm: str, v_norm: str, k_offset: Tensor | None = None
    ) -> None:
        super().__init__()
        self.codec = codec
        self.k_norm = k_norm
        self.v_norm = v_norm
        self.k_offset = k_offset  # f32 [1, H, 1, D], taken out of the keys

    def _initialize(self, key_states: Tensor, capacity: int) -> None:
        B, H, _, D = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = B
        self.centroids, self.boundaries, self.rotation = self.codec.on(self.device)
        self.buffers = _allocate(B, H, capacity, D, self.device)
        if self.k_offset is not None:
            self.k_offset = self.k_offset.to(self.device)
        self.is_initialized = True

    def _write(self, key_states: Tensor, value_states: Tensor, positions: Tensor) -> None:
        update_(
            key_states, value_states, positions, self.rotation, self.boundaries, *self.buffers,
            centroids=self.centroids, k_norm=self.k_norm, v_norm=self.v_norm,
            k_offset=self.k_offset,
        )  # fmt: skip

    def _handles(self, buffers: Buffers, kv_len: Tensor | None) -> tuple[Any, Any]:
        # Any, because transformers declares tensors here.
        constants = (self.centroids, self.rotation, kv_len)
        keys = PackedStates(buffers.k_packed, buffers.k_norms, *constants, self.k_offset)
        return keys, PackedStates(buffers.v_packed, buffers.v_norms, *constants)

    def offload(self) -> None:
        """To host memory. Handles that ``update`` gave out keep what is on the device."""
        if self.is_initialized:
            self.buffers = self.buffers.map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Back to the device of the layer."""
        if self.is_initialized and self.buffers.k_packed.device != self.device:
            self.buffers = self.buffers.map(lambda t: t.to(self.device, non_blocking=True))


class DynamicPackedLayer(PackedLayer):
    """Grows with the context."""

    is_compileable = False
    length = 0  # tokens stored

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._initialize(key_states, capacity=0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Compress and append ``[B, H, T, D]`` each.

        Returns:
            handles of all keys and of all values so far, :class:`PackedStates` both.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        length = self.length + key_states.shape[2]
        self._reserve(length)
        self._write(key_states, value_states, torch.arange(self.length, length, device=self.device))
        self.length = length
        return self._handles(self.buffers.map(lambda t: t[:, :, :length]), kv_len=None)

    def _reserve(self, length: int) -> None:
        B, H, capacity, half = self.buffers.k_packed.shape
        if length <= capacity:
            return
        capacity = max(length, int(GROWTH * capacity))
        grown = _allocate(B, H, -(-capacity // BLOCK) * BLOCK, 2 * half, self.device)
        for new, old in zip(grown, self.buffers, strict=True):
            new[:, :, : self.length] = old[:, :, : self.length]
        self.buffers = grown

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget the tokens and free the buffers."""
        if self.is_initialized:
            del self.buffers
        self.is_initialized = False
        self.length = 0

    def crop(self, tokens: int | Tensor) -> None:
        """Drop the last tokens.

        Args:
            tokens: minus the number to drop; or, before transformers 5.18, the length to keep
                if it is above 0. A tensor is read, which waits for the device.
        """
        tokens = int(tokens)
        self.length = min(self.length, tokens) if tokens > 0 else max(self.length + tokens, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep these rows of the batch, in this order."""
        if self.is_initialized:
            # They may be in host memory.
            chosen = torch.as_tensor(indices, device=self.buffers.k_packed.device)
            self.buffers = self.buffers.map(lambda t: t[chosen])
            self.batch_size = self.buffers.k_packed.shape[0]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        if self.is_initialized:
            self.buffers = self.buffers.map(lambda t: t.repeat_interleave(repeats, dim=0))
            self.batch_size *= repeats


class StaticPackedLayer(PackedLayer):
    """Fixed capacity and addresses: for compiled decoding.

    All state lives in tensors that are mutated in place, the length too: a Python number that
    changes would recompile the model at every step.
    """

    is_compileable = True
    cumulative_length: Tensor  # type: ignore[assignment]

    def __init__(
        self,
        codec: Codec,
        k_norm: str,
        v_norm: str,
        k_offset: Tensor | None,
        max_cache_len: int,
    ) -> None:
        super().__init__(codec, k_norm, v_norm, k_offset)
        self.max_cache_len = max_cache_len

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._initialize(key_states, self.max_cache_len)
        with torch.inference_mode(False):
            self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
        if not torch.compiler.is_compiling():
            for tensor in (*self.buffers, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Compress ``[B, H, T, D]`` each into the next T slots.

        Returns:
            handles of the keys and of the values, :class:`PackedStates` both: whole buffers, and
            the fill on the device.

        Raises:
            UnsupportedError: T alone is more than the capacity.
            RuntimeError: the tokens no longer fit; nothing is written. On CUDA it surfaces later,
                as a device-side assertion, because looking would stall the stream.
        """
        T = key_states.shape[2]
        if self.max_cache_len < T:
            raise UnsupportedError(overflow(T, self.max_cache_len))
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        positions = self.cumulative_length + torch.arange(T, device=self.device)
        torch._assert_async(
            positions[-1] < self.max_cache_len,
            f"the context outgrew this TurboQuantCache: max_cache_len is {self.max_cache_len}",
        )
        self._write(key_states, value_states, positions)
        self.cumulative_length.add_(T)
        return self._handles(self.buffers, kv_len=self.cumulative_length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        """A 0-d tensor, as with transformers' own static layers; 0 before the first update."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        """Forget the tokens, in place. Slots past the length are never read: nothing to clear."""
        if self.is_initialized:
            self.cumulative_length.zero_()

    def crop(self, tokens: int | Tensor) -> None:
        """See :meth:`DynamicPackedLayer.crop`."""
        if self.is_initialized:
            tokens = int(tokens)
            if tokens > 0:
                self.cumulative_length.clamp_(max=tokens)
            else:
                self.cumulative_length.add_(tokens).clamp_(min=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            beam_idx = beam_idx.to(self.buffers.k_packed.device)  # which may be the host
            for tensor in self.buffers:  # in place: the addresses are promised to the graph
                tensor.copy_(tensor[beam_idx])

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        raise UnsupportedError(
            "a static TurboQuantCache has a fixed batch; make a dynamic one (no max_cache_len)"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(())
