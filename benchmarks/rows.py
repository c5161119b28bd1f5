"""Where measured numbers go: one CSV row per claim, with all that is needed to repeat it."""

from __future__ import annotations

import csv
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
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
    name: str,
    device: str,
    rows: Iterable[dict[str, object]],
    code: str | None = None,
    *,
    complete: bool = True,
) -> Path:
    """Write ``results/<name>.csv``, replacing what earlier runs of the same benchmark left there.

    Each row is extended by the device, the versions, the commit (``code``, or what git says) and
    the command. Rows of other benchmarks in that file stay; a run that is not complete replaces
    only the rows that it measured again.
    """
    program = "python -m benchmarks." + Path(sys.argv[0]).stem
    context = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "turboquant": turboquant.__version__,
        "commit": code or commit(),
        "command": " ".join([program, *sys.argv[1:]]),
    }

    def subject(row: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(str(row.get(key, "")) for key in ("what", "B", "Lq", "L"))

    path = RESULTS / f"{name}.csv"
    new = {subject(row): {**row, **context} for row in rows}
    full: list[Mapping[str, object]] = []
    for row in read(path):
        ours = row["command"].split()[:3] == program.split()
        if ours and subject(row) in new:
            full.append(new.pop(subject(row)))
        elif not (ours and complete):
            full.append(row)
    full += new.values()
    columns = list(dict.fromkeys(k for row in full for k, v in row.items() if v not in (None, "")))
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(full)
    return path


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
