"""The two constants of the codec: the scalar codebook and the rotation.

Both are pure functions of their arguments, computed once per process and handed out as fresh
copies, so that nobody's in-place write reaches anybody else.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from turboquant import _C

_lock = threading.Lock()


@contextmanager
def _real_cpu_tensors() -> Iterator[None]:
    """Build ordinary CPU tensors whatever mode the caller is in.

    A model may be constructed under ``torch.device("meta")``, FakeTensorMode or inference mode;
    the constants must still have values, and must not become inference tensors for good.
    """
    with _lock, unset_fake_temporarily(), torch.inference_mode(False), torch.device("cpu"):
        yield


@functools.cache
def _codebook(dim: int) -> tuple[Tensor, Tensor]:
    centroids, boundaries = _C.codebook(dim)
    return torch.from_numpy(centroids), torch.from_numpy(boundaries)


@functools.cache
def _rotation(dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float32)
    q, r = torch.linalg.qr(gaussian)
    # QR is unique up to the signs of R's diagonal; fixing them makes Q Haar distributed.
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0).float()).contiguous()


@functools.cache
def _all(dim: int, seed: int) -> dict[str, Tensor]:
    centroids, boundaries = _codebook(dim)
    pi = _rotation(dim, seed)
    return {
        "centroids": centroids,
        "boundaries": boundaries,
        "rotation": pi,
        "rotation_T": pi.T.contiguous(),
    }


def shared_constants(dim: int, seed: int) -> dict[str, Tensor]:
    """What a cache module holds, by buffer name. Shared by all of a process: read only."""
    _C.check_dim(dim)
    with _real_cpu_tensors():
        return _all(dim, seed)


def codebook(dim: int) -> tuple[Tensor, Tensor]:
    """The 16 levels that minimise the squared error of one coordinate of a random unit vector.

    A coordinate of a randomly rotated unit vector in ``dim`` dimensions is close to
    N(0, 1/dim); these are the levels of the Lloyd-Max quantiser of that distribution.

    Args:
        dim: head dimension D; even, 16 to 512.

    Returns:
        ``(centroids, boundaries)``, f32 CPU tensors of shape ``[16]`` and ``[15]``, ascending
        and symmetric about zero to the last bit. ``boundaries`` are the midpoints of
        neighbouring ``centroids``. Fresh copies.

    Raises:
        ValueError: ``dim`` is odd or out of range.

    Source: Lloyd (1982) and Max (1960); TurboQuant, arXiv 2504.19874, section 3.

    >>> centroids, boundaries = codebook(128)
    >>> centroids.shape, boundaries.shape
    (torch.Size([16]), torch.Size([15]))
    >>> bool((centroids == -centroids.flip(0)).all())
    True
    """
    with _real_cpu_tensors():
        centroids, boundaries = _codebook(dim)
        return centroids.clone(), boundaries.clone()


def rotation(dim: int, seed: int = 42) -> Tensor:
    """A Haar-distributed random orthogonal matrix: the Π of ``y = Π·x``.

    QR of a seeded Gaussian matrix, with the columns' signs fixed. Equal for equal arguments
    within one process; its last bits depend on the LAPACK and the processor, so whatever is
    saved or exported must carry the matrix by value.

    Args:
        dim: head dimension D; even, 16 to 512.
        seed: seed of the CPU generator.

    Returns:
        f32 CPU tensor ``[dim, dim]``. A fresh copy.

    Raises:
        ValueError: ``dim`` is odd or out of range.

    Source: Mezzadri, "How to generate random matrices from the classical compact groups" (2007).

    >>> pi = rotation(64)
    >>> bool((pi @ pi.T - torch.eye(64)).abs().max() < 1e-5)
    True
    """
    _C.check_dim(dim)
    with _real_cpu_tensors():
        return _rotation(dim, seed).clone()
