"""What README says of the committed measurements."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

ROWS = Path(__file__).parent.parent / "benchmarks" / "results" / "h200.csv"


def test_more_new_tokens_take_no_less_time() -> None:
    """Between the decode kernels, fused and expanded prefill there is no gap: to within 10 %."""
    with ROWS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["what"].startswith("sweep ")]
    times = defaultdict(dict)
    for row in rows:
        times[row["what"], int(row["L"])][int(row["Lq"])] = float(row["ours µs"])
    assert {L for _, L in times} == {2048, 32768, 131072}
    for (what, L), by_rows in times.items():
        assert set(by_rows) >= {2**k for k in range(15) if 2**k <= L}
        slowest = 0.0
        for Lq, time in sorted(by_rows.items()):
            assert time > 0.9 * slowest, f"{what}, {Lq} x {L}: {time} µs after {slowest} µs"
            slowest = max(slowest, time)
