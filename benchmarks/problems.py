"""The attention problems that GPU benchmarks time: random queries and caches, packed or bf16."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import turboquant as tq
from benchmarks import gpu


@dataclass(frozen=True)
class Shape:
    B: int
    Hq: int
    Hkv: int
    D: int
    L: int
    Lq: int = 1

    @property
    def heads(self) -> str:
        return f"{self.Hq}:{self.Hkv} D{self.D}"

    @property
    def group(self) -> int:
        return self.Hq // self.Hkv

    @property
    def packed_bytes(self) -> int:
        return 2 * self.B * self.Hkv * self.L * (self.D // 2 + 2)

    @property
    def dense_bytes(self) -> int:
        return 4 * self.B * self.Hkv * self.L * self.D

    @property
    def query_bytes(self) -> int:
        """Of the queries and the output."""
        return 4 * self.B * self.Hq * self.Lq * self.D


@dataclass
class Sets:
    """Equal problems in different places of memory, to be taken in turn."""

    queries: list[Tensor]
    states: list[tuple[Tensor, ...]]  # k_packed, k_norms, v_packed, v_norms; or k, v
    constants: tuple[Tensor, ...] = ()  # centroids, rotation

    def __len__(self) -> int:
        return len(self.states)

    def args(self, i: int) -> tuple[Any, ...]:
        return self.queries[i], *self.states[i], *self.constants


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.bfloat16, device="cuda")


def queries(shape: Shape, n: int) -> list[Tensor]:
    return list(random(n, shape.B, shape.Hq, shape.Lq, shape.D))


def packed_sets(shape: Shape, n: int | None = None) -> Sets:
    """Compressed Gaussian vectors."""
    n = n or gpu.sets_for(shape.packed_bytes + shape.query_bytes)
    centroids, boundaries = (t.cuda() for t in tq.codebook(shape.D))
    pi = tq.rotation(shape.D).cuda()
    size = (n, shape.B, shape.Hkv, shape.L, shape.D)
    sides = [tq.compress(random(*size), pi, boundaries) for _ in "kv"]
    states = list(zip(*(t for side in sides for t in side)))
    return Sets(queries(shape, n), states, (centroids, pi))


def in_long_buffers(sets: Sets, shape: Shape, capacity: int) -> Sets:
    """The same queries over buffers filled to ``shape.L``.

    The filled parts lie side by side in one long buffer; each set sees it from its own on.
    """
    n = len(sets)
    whole = packed_sets(replace(shape, L=capacity + n * shape.L), 1).states[0]
    cuts = [slice(i * shape.L, i * shape.L + capacity) for i in range(n)]
    return replace(sets, states=[tuple(t[:, :, cut] for t in whole) for cut in cuts])


def dense_sets(shape: Shape) -> Sets:
    """Gaussian vectors in bf16."""
    n = gpu.sets_for(shape.dense_bytes + shape.query_bytes)
    size = (n, shape.B, shape.Hkv, shape.L, shape.D)
    return Sets(queries(shape, n), list(zip(random(*size), random(*size))))


def relative(got: Tensor, want: Tensor) -> float:
    """RMS of the difference, over the RMS of `want`."""
    return float((got.float() - want.float()).norm() / want.float().norm())
