"""The ops a user calls, each beside the fake kernel that tells torch.compile its output shapes.

``torch.ops.turboquant.*`` are declared and implemented in ``csrc/`` (start at ``csrc/ops.cpp``);
this module loads the two libraries, registers what Python contributes to the ops (fake kernels,
the fallback for devices without a kernel), and wraps each op in a documented, typed function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turboquant import _C, reference
from turboquant import _checks as checks

# Beside the compiled module, which in an editable install is not where this file is.
_LIBRARIES = Path(_C.__file__).parent / "lib"
CPU_LIBRARY = _LIBRARIES / "libturboquant.so"
CUDA_LIBRARY = _LIBRARIES / "libturboquant_cuda.so"
INSTALL_WITH_CUDA = (
    'TURBOQUANT_CUDA=on pip install --force-reinstall --no-deps "turboquant-tq4"'
    " (needs nvcc and a CUDA build of torch)"
)

torch.ops.load_library(CPU_LIBRARY)
HAS_CUDA = CUDA_LIBRARY.exists() and torch.version.cuda is not None
if HAS_CUDA:
    torch.ops.load_library(CUDA_LIBRARY)

_NAMES = ("compress", "decompress", "update_", "tq4_sdpa", "tq4_attention")
_library = torch.library.Library("turboquant", "IMPL")


def _without_cuda(name: str, *_: Any, **__: Any) -> Any:
    raise RuntimeError(
        f"{name}: this installation has no CUDA kernels; reinstall with {INSTALL_WITH_CUDA}"
    )


for _name in _NAMES:
    # By device name: a composite kernel would also swallow the devices that have a kernel.
    for _device in ("MPS", "XPU", "HPU", "MTIA", "PrivateUse1", "CUDA"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"turboquant::{_name}", _device):
            continue
        _fallback = getattr(reference, _name)
        if _device == "CUDA" and not HAS_CUDA:
            _fallback = functools.partial(_without_cuda, _name)
        _library.impl(_name, _fallback, _device)


class _InferenceOnly(torch.autograd.Function):
    """Runs an op on inputs that require grad; only a backward pass raises.

    Taken by the wrappers only when it is needed: registering autograd for the ops would cost
    5 µs on every call.
    """

    @staticmethod
    def forward(ctx: Any, call: Callable[[], Any], *inputs: Tensor) -> Any:
        return call()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "turboquant is inference only: its ops have no gradient; "
            "detach the inputs or run under torch.no_grad()"
        )


def _inference_only(op: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Call an op on inputs of which some require grad."""
    if torch.compiler.is_compiling():
        # A tracer follows no closure. Of a backward pass through such a graph torch itself warns.
        return op(*args, **kwargs)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    return _InferenceOnly.apply(lambda: op(*args, **kwargs), *tensors)


def _requires_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


_compress = torch.ops.turboquant.compress.default
_decompress = torch.ops.turboquant.decompress.default
_update_ = torch.ops.turboquant.update_.default
_tq4_sdpa = torch.ops.turboquant.tq4_sdpa.default
_tq4_attention = torch.ops.turboquant.tq4_attention.default


# --------------------------------------------------------------------------------- compress


def compress(
    x: Tensor,
    rotation: Tensor,
    boundaries: Tensor,
    *,
    centroids: Tensor | None = None,
    norm: str = "l2",
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compress vectors to 4 bits a coordinate and a norm: D/2 + 2 bytes instead of 2·D.

    Args:
        x: ``[..., D]``, float, any strides; D even, 16 to 512.
        rotation: orthogonal ``[D, D]``, float; see :func:`turboquant.rotation`.
        boundaries: ``[15]``, ascending, float; see :func:`turboquant.codebook`.
        centroids: ``[16]``; needed by the norm policies other than ``"l2"``.
        norm: what the stored norm means. ``"l2"``: the length of ``x``. ``"preserve"``: chosen
            so that the decompressed vector has the length of ``x``. ``"unbiased"``: chosen so
            that its inner product with ``x`` is ``|x|²``, so that scores do not shrink.
        offset: broadcastable to ``[..., 1, D]``; subtracted before compression.

    Returns:
        ``(packed, norms)``: uint8 ``[..., D/2]`` and bf16 ``[..., 1]``. A zero vector has norm 0;
        a vector with a NaN or an infinity carries it in its norm.

    Raises:
        RuntimeError: an argument breaks a rule above; the message names it.

    Source: TurboQuant, arXiv 2504.19874, algorithm 1.

    >>> import turboquant as tq
    >>> centroids, boundaries = tq.codebook(64)
    >>> packed, norms = tq.compress(torch.randn(2, 8, 5, 64), tq.rotation(64), boundaries)
    >>> packed.shape, norms.shape
    (torch.Size([2, 8, 5, 32]), torch.Size([2, 8, 5, 1]))
    """
    args = (x, rotation, boundaries)
    options = {"centroids": centroids, "norm": norm, "offset": offset}
    if _requires_grad(*args, centroids, offset):
        return _inference_only(_compress, args, options)
    return _compress(*args, **options)


@torch.library.register_fake("turboquant::compress")
def _(
    x: Tensor,
    rotation: Tensor,
    boundaries: Tensor,
    *,
    centroids: Tensor | None = None,
    norm: str = "l2",
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    checks.compress("compress", x, rotation, boundaries, centroids, norm, offset)
    packed = x.new_empty([*x.shape[:-1], x.shape[-1] // 2], dtype=torch.uint8)
    return packed, x.new_empty([*x.shape[:-1], 1], dtype=torch.bfloat16)


# ------------------------------------------------------------------------------- decompress


def decompress(
    packed: Tensor,
    norms: Tensor,
    centroids: Tensor,
    rotation: Tensor,
    *,
    offset: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The vectors that :func:`compress` stored: ``norm · rotationᵀ · centroids[index] + offset``.

    Args:
        packed: uint8 ``[..., D/2]``, any strides.
        norms: bf16 or f32 ``[..., 1]``.
        centroids: ``[16]``, float.
        rotation: the ``[D, D]`` matrix used to compress.
        offset: the offset used to compress.
        dtype: of the result; None takes that of ``norms``.

    Returns:
        ``[..., D]``, contiguous. The squared error against the original is 0.0093 of its squared
        length at D = 128.

    Raises:
        RuntimeError: an argument breaks a rule above; the message names it.

    Source: TurboQuant, arXiv 2504.19874, algorithm 1.

    >>> import turboquant as tq
    >>> x, pi = torch.randn(1000, 128), tq.rotation(128)
    >>> centroids, boundaries = tq.codebook(128)
    >>> x_hat = tq.decompress(*tq.compress(x, pi, boundaries), centroids, pi, dtype=x.dtype)
    >>> error = (x_hat - x).square().sum() / x.square().sum()
    >>> bool(0.0090 < error < 0.0096)
    True
    """
    args = (packed, norms, centroids, rotation)
    options = {"offset": offset, "dtype": dtype}
    if _requires_grad(*args, offset):
        return _inference_only(_decompress, args, options)
    return _decompress(*args, **options)


@torch.library.register_fake("turboquant::decompress")
def _(
    packed: Tensor,
    norms: Tensor,
    centroids: Tensor,
    rotation: Tensor,
    *,
    offset: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = checks.decompress("decompress", packed, norms, centroids, rotation, offset, dtype)
    return packed.new_empty([*packed.shape[:-1], 2 * packed.shape[-1]], dtype=dtype)


# ---------------------------------------------------------------------------------- update_


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
    """Compress new keys and values and write them into a cache, in place.

    Args:
        k, v: ``[B, H, T, D]``, float, any strides, T at most the capacity S.
        input_pos: int32 or int64 ``[T]`` or ``[B, T]``: the slots to write. A negative one is
            skipped. One that is S or more raises on the CPU before anything is written, and is
            dropped on CUDA, where looking would stall the stream. If two tokens name one slot,
            one of them is stored there whole.
        rotation, boundaries, centroids: as for :func:`compress`.
        k_packed, v_packed: uint8 ``[B, H, S, D/2]``; mutated.
        k_norms, v_norms: bf16 or f32 ``[B, H, S, 1]``; mutated.
        k_norm, v_norm: norm policies; see :func:`compress`.
        k_offset: broadcastable to ``[B, H, 1, D]``; subtracted from ``k``.

    Raises:
        RuntimeError: an argument breaks a rule above; the message names it.

    >>> import turboquant as tq
    >>> pi, (centroids, boundaries) = tq.rotation(64), tq.codebook(64)
    >>> packed = [torch.zeros(1, 2, 16, 32, dtype=torch.uint8) for _ in "kv"]
    >>> norms = [torch.zeros(1, 2, 16, 1, dtype=torch.bfloat16) for _ in "kv"]
    >>> k, v = torch.randn(2, 1, 2, 3, 64)
    >>> tq.update_(k, v, torch.arange(3), pi, boundaries, packed[0], norms[0], packed[1], norms[1])
    >>> int((norms[0] != 0).sum())
    6
    """
    if _requires_grad(k, v, rotation, boundaries, centroids, k_offset):
        # Nothing is returned that a gradient could flow from.
        k, v, rotation, boundaries = (t.detach() for t in (k, v, rotation, boundaries))
        centroids = None if centroids is None else centroids.detach()
        k_offset = None if k_offset is None else k_offset.detach()
    _update_(
        k, v, input_pos, rotation, boundaries, k_packed, k_norms, v_packed, v_norms,
        centroids=centroids, k_norm=k_norm, v_norm=v_norm, k_offset=k_offset,
    )  # fmt: skip


@torch.library.register_fake("turboquant::update_")
def _(
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
    checks.update_(
        k, v, input_pos, rotation, boundaries, k_packed, k_norms, v_packed, v_norms,
        centroids, k_norm, v_norm, k_offset,
    )  # fmt: skip


# -------------------------------------------------------------------------------- attention


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
    """Scaled dot product attention over a compressed cache.

    With neither a mask nor a causal flag every query row attends to all of ``[0, kv_len)``, also
    when Lq > 1.

    Args:
        query: ``[B, Hq, Lq, D]``, bf16, fp16 or f32, any strides.
        k_packed, v_packed: uint8 ``[B, Hkv, Lkv, D/2]``; Hq is a multiple of Hkv (GQA, MQA).
            Slices of a larger buffer are read in place.
        k_norms, v_norms: bf16 or f32 ``[B, Hkv, Lkv, 1]``.
        centroids: ``[16]``, float.
        rotation: the ``[D, D]`` matrix used to compress.
        attn_mask: bool ``[B or 1, 1, Lq, Lkv]``, True = attend.
        is_causal: row i sees keys up to ``kv_len - Lq + i``; requires Lq == Lkv. Beside an
            ``attn_mask``, both apply.
        scale: of the scores; None is ``1/sqrt(D)``.
        kv_len: int32 or int64, one element or ``[B]``, on the query's device: how many slots
            are filled, clamped to ``[0, Lkv]``; None is Lkv. What lies beyond is never used, and
            may be NaN. It is read on the device, so a captured CUDA graph replays at any fill.
        mask_is_causal: row i sees keys up to ``kv_len - Lq + i`` (the queries are the last Lq
            tokens of the context). Beside an ``attn_mask`` it promises that the mask allows
            nothing more; without one it is the mask.

    Returns:
        ``[B, Hq, Lq, D]`` in the query's dtype and memory layout. A row that sees nothing is 0.

    Raises:
        RuntimeError: an argument breaks a rule above; the message names it.

    Source: TurboQuant, arXiv 2504.19874; the signature is that of executorch's
    ``triton::tq4_sdpa``.

    >>> import turboquant as tq
    >>> cache = tq.TurboQuantKVCache(n_heads=2, head_dim=64, max_seq_len=32)
    >>> pos = torch.arange(10)
    >>> k_packed, k_norms, v_packed, v_norms = cache.update(pos, *torch.randn(2, 1, 2, 10, 64))
    >>> query = torch.randn(1, 8, 10, 64)
    >>> out = tq.tq4_sdpa(query, k_packed, k_norms, v_packed, v_norms, cache.centroids,
    ...                   cache.rotation, kv_len=torch.tensor(10), mask_is_causal=True)
    >>> out.shape
    torch.Size([1, 8, 10, 64])
    """
    args = (query, k_packed, k_norms, v_packed, v_norms, centroids, rotation, attn_mask,
            is_causal, scale, kv_len, mask_is_causal)  # fmt: skip
    if _requires_grad(query, k_norms, v_norms, centroids, rotation):
        return _inference_only(_tq4_sdpa, args, {})
    return _tq4_sdpa(*args)


@torch.library.register_fake("turboquant::tq4_sdpa")
def _(
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
    checks.attention(
        "tq4_sdpa", query, k_packed, k_norms, v_packed, v_norms, centroids, rotation, attn_mask,
        is_causal, scale, kv_len, mask_is_causal, None, None, None,
    )  # fmt: skip
    return torch.empty_like(query)


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
) -> tuple[Tensor, Tensor]:
    """:func:`tq4_sdpa` with what newer models need, and the log-sum-exp.

    Args:
        query, k_packed, k_norms, v_packed, v_norms, centroids, rotation, attn_mask, is_causal,
            scale, kv_len, mask_is_causal: as for :func:`tq4_sdpa`.
        kv_start: int32 or int64, one element or ``[B]``: keys below it are unseen (left padding
            without a mask).
        softcap: scores become ``softcap · tanh(score / softcap)``, after ``scale``.
        sinks: f32 or bf16 ``[Hq]``: one more logit a head in the denominator, without a value.

    Returns:
        ``(out, lse)``: as :func:`tq4_sdpa`, and f32 ``[B, Hq, Lq]``: the natural logarithm of
        the sum of the exponentials of the row's scores, sink included. A row that sees nothing
        has lse -inf (or its sink).

    Raises:
        RuntimeError: an argument breaks a rule above; the message names it.

    >>> import turboquant as tq
    >>> cache = tq.TurboQuantKVCache(n_heads=2, head_dim=64, max_seq_len=32)
    >>> kv = cache.update(torch.arange(10), *torch.randn(2, 1, 2, 10, 64))
    >>> out, lse = tq.tq4_attention(torch.randn(1, 8, 1, 64), *kv, cache.centroids,
    ...                             cache.rotation, kv_len=torch.tensor(10), sinks=torch.zeros(8))
    >>> lse.shape
    torch.Size([1, 8, 1])
    """
    args = (query, k_packed, k_norms, v_packed, v_norms, centroids, rotation, attn_mask,
            is_causal, scale, kv_len, mask_is_causal)  # fmt: skip
    options = {"kv_start": kv_start, "softcap": softcap, "sinks": sinks}
    if _requires_grad(query, k_norms, v_norms, centroids, rotation, sinks):
        return _inference_only(_tq4_attention, args, options)
    return _tq4_attention(*args, **options)


@torch.library.register_fake("turboquant::tq4_attention")
def _(
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
) -> tuple[Tensor, Tensor]:
    checks.attention(
        "tq4_attention", query, k_packed, k_norms, v_packed, v_norms, centroids, rotation,
        attn_mask, is_causal, scale, kv_len, mask_is_causal, kv_start, softcap, sinks,
    )  # fmt: skip
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
