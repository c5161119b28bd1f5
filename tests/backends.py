"""The implementations that the tests run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import turboquant
from turboquant import ops, reference

ISAS: list[str] = torch.ops.turboquant._cpu_isas().split()
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
ON_GPU = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(not ops.HAS_CUDA, reason="installed without CUDA kernels"),
]


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops: the functions to call, and where its tensors live."""

    name: str
    ops: Any
    device: torch.device
    # Attention in float32 arithmetic, rounded once at the end; else in matrix units.
    exact: bool = True
    # Attention whose bits depend on neither the buffer's length nor the batch. Not plain PyTorch.
    bitwise: bool = True


CPU_BACKENDS = [Backend(isa, turboquant, CPU) for isa in ISAS]
REFERENCE = Backend("reference", reference, CPU, bitwise=False)
# bf16 on matrix units. Many rows go through torch's attention (csrc/cpu/prefill.cpp), on any
# processor; others to kernels for AMX (csrc/cpu/amx.cpp), or to the instruction set in use.
AMX = Backend("amx", turboquant, CPU, exact=False)
CUDA = Backend("cuda", turboquant, GPU, exact=False)


def parameters(*backends: Backend) -> list[Any]:
    return [pytest.param(b, id=b.name, marks=ON_GPU if b.device == GPU else []) for b in backends]


DIMS = [64, 80, 96, 128, 192, 256, 512]  # head dims with CUDA kernels of their own
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
