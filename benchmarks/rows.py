"""Where measured numbers go: one CSV row per claim, with all that is needed to repeat it."""

from __future__ import annotations

import csv
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

import turboquant

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The checkout's commit, with ``+`` if something in it is changed."""

    def git(*args: str) -> str:
        result = subprocess.run(
            ["git", *args], cwd=RESULTS.parent, capture_output=True, text=True, check=False
        )
        return result.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def cpu_name() -> str:
    """The processor's name and what of it is in use, for example ``Xeon 8481C, avx512, amx``."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    amx = ", amx" if torch.ops.turboquant._cpu_amx() else ""
    return f"{name}, {torch.ops.turboquant._cpu_isa()}{amx}"


def write(
    name: str, device: str, rows: Iterable[dict[str, object]], code: str | None = None
) -> Path:
    """Write ``results/<name>.csv``, replacing what an earlier run left there.

    Each row is extended by the device, the versions, the commit (``code``, or what git says) and
    the command.
    """
    command = ["python -m benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]
    context = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "turboquant": turboquant.__version__,
        "commit": code or commit(),
        "command": " ".join(command),
    }
    full = [{**row, **context} for row in rows]
    columns = list(dict.fromkeys(key for row in full for key in row))
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(full)
    return path
