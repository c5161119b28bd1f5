"""PEP 517 backend: scikit-build-core, told where the installed torch is.

torch is not a build requirement: pip would then build against the newest CUDA torch in its
isolated environment, whatever the user has. The torch of the *target* environment is found as
files instead; only if there is none is it asked for, and then it is also installed as the
dependency that it is.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from scikit_build_core import build as _backend
from scikit_build_core.build import (  # noqa: F401
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def _torch() -> Path | None:
    # Inside pip's isolated build the interpreter is the target's: its site-packages are not on
    # sys.path, but sysconfig still names them. torch is found, never imported.
    for key in ("purelib", "platlib"):
        package = Path(sysconfig.get_path(key)) / "torch"
        if (package / "version.py").exists():
            return package
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def _with_torch(settings: dict[str, Any] | None) -> dict[str, Any]:
    return {"cmake.define.TURBOQUANT_TORCH": str(_torch() or ""), **(settings or {})}


def get_requires_for_build_wheel(settings: dict[str, Any] | None = None) -> list[str]:
    requires = _backend.get_requires_for_build_wheel(settings)
    return requires if _torch() else [*requires, "torch>=2.10"]


def get_requires_for_build_editable(settings: dict[str, Any] | None = None) -> list[str]:
    return get_requires_for_build_wheel(settings)


def build_wheel(
    wheel_directory: str,
    settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    return _backend.build_wheel(wheel_directory, _with_torch(settings), metadata_directory)


def build_editable(
    wheel_directory: str,
    settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    return _backend.build_editable(wheel_directory, _with_torch(settings), metadata_directory)
