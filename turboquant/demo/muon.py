"""Muon: momentum whose steps are orthogonalised, for the weight matrices of a network.

Plain momentum moves a matrix mostly along the few directions its gradients share.  Muon replaces
the momentum by its nearest orthogonal matrix, so every direction moves alike.  The nearest
orthogonal matrix U Vᵀ of M = U S Vᵀ comes from an odd polynomial iterated on M, which acts on the
singular values S alone and drives each of them to about one (Newton-Schulz; products only, so it
is fast in bf16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_ITERATIONS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315  # s -> A s + B s^3 + C s^5: steep at 0, within 1 ± 0.3 after 5


class Muon(torch.optim.Optimizer):
    """One parameter group per matrix shape, so that each group is one batch of products.

    A step has the root mean square `0.2 * lr` per element, about that of AdamW, so both take
    learning rates of one scale.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": same} for same in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Moves every matrix against its orthogonalised Nesterov momentum."""
        for group in self.param_groups:
            weights, beta = group["params"], group["momentum"]
            gradient = torch.stack([weight.grad for weight in weights])
            momentum = self.state[weights[0]].setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 1 - beta)
            update = orthogonalise(gradient.lerp(momentum, beta))
            scale = 0.2 * max(update.shape[-2:]) ** 0.5
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, list(update.unbind()), alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """[N, rows, columns] -> the same with every singular value near one, as float32."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.mT if tall else x).float()
