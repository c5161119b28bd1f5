"""`turboquant info`: what is installed and in use, and why CUDA is off."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from typing import Any

import torch

import turboquant
from turboquant import _C, ops
from turboquant.cli import terminal

HELP = "versions, loaded libraries, instruction set, and why CUDA is off"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help=HELP, description=f"Prints {HELP}.")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    terminal.facts(facts())


def facts() -> list[tuple[str, str]]:
    """Label and value of every line."""
    native = torch.ops.turboquant
    return [
        ("turboquant", turboquant.__version__),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__} (turboquant was built with {_C.BUILT_WITH_TORCH})"),
        ("NumPy", _version("numpy")),
        ("transformers", _version("transformers")),
        ("CPU library", str(ops.CPU_LIBRARY)),
        ("CPU instructions", f"{native._cpu_isa()} (this host runs: {native._cpu_isas()})"),
        ("CPU threads", str(torch.get_num_threads())),
        ("CUDA library", str(ops.CUDA_LIBRARY) if ops.HAS_CUDA else "not loaded"),
        ("CUDA architectures", _C.CUDA_ARCHS or "none"),
        ("GPU", _gpus()),
        *_cuda(),
    ]


def _version(distribution: str) -> str:
    """Read from the metadata: importing transformers would take seconds."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return 'not installed: pip install "turboquant-tq4[demo]"'


def _gpus() -> str:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "none that torch can use"
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return ", ".join(f"{d.name} (sm_{d.major}{d.minor})" for d in devices)


def _cuda() -> list[tuple[str, str]]:
    """On; or off, for which reason, and what mends it."""
    if not ops.CUDA_LIBRARY.exists():
        why, mend = f"built without it ({_C.CUDA_REASON})", ops.INSTALL_WITH_CUDA
    elif torch.version.cuda is None:
        why, mend = "this torch is a CPU build", "install a CUDA build of torch"
    elif not torch.cuda.is_available():
        why, mend = "torch finds no usable GPU", "check the driver: nvidia-smi must list a GPU"
    else:
        return [("CUDA", "on")]
    return [("CUDA", f"off: {why}"), ("to mend", mend)]
