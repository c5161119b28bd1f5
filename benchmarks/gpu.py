"""How GPU benchmarks measure: CUDA graphs over buffers that do not fit into the L2 cache."""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable

import torch
from tqdm import tqdm

from turboquant import ops

L2_SEVERAL_TIMES = 415_000_000  # bytes to read before a buffer is read again; the L2 holds 60 MB
MOST_SETS = 2048  # of the smallest caches, 67 KB, still twice the L2
ROUNDS = 9

Call = Callable[[int], object]  # runs on the i-th set of buffers


def require(program: str) -> None:
    """End with the reason if there is nothing to measure here."""
    if not torch.cuda.is_available():
        raise SystemExit(f"{program}: needs an NVIDIA GPU, and torch finds none")
    if not ops.HAS_CUDA:
        raise SystemExit(
            f"{program}: this installation has no CUDA kernels; "
            f"reinstall with {ops.INSTALL_WITH_CUDA}"
        )


def name() -> str:
    """For example ``NVIDIA H200, sm_90, triton 3.6.0``."""
    import triton

    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, triton {triton.__version__}"


def sets_for(nbytes: int) -> int:
    """How many buffers of this size to take in turn, so that none is still in the L2."""
    return min(max(-(-L2_SEVERAL_TIMES // max(nbytes, 1)), 2), MOST_SETS)


def graph_time(call: Call, sets: int, rounds: int = ROUNDS) -> float:
    """Median microseconds of ``call(i)``, i going round ``sets``, in replays of one CUDA graph.

    What a call returns lives until its set comes round again, so that outputs are not written to
    one place in the L2 over and over.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def replay_time(replay: Callable[[], object]) -> float:
        """Microseconds; what is queued first keeps the GPU busy until all of it is queued."""
        replay()
        events[0].record()
        replay()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) * 1e3

    for i in range(min(sets, 3)):  # compiles, tunes, builds plans
        call(i)
    torch.cuda.synchronize()
    roughly = replay_time(lambda: call(0))
    # Long enough that what surrounds the graph does not count, short where a call is long.
    turns = max(1, min(round(24 / sets), round(2000 / roughly / sets)))

    graph = torch.cuda.CUDAGraph()
    results: list[object] = [None] * sets
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for i in range(sets):
                results[i] = call(i)
    graph.replay()
    times = [replay_time(graph.replay) for _ in range(rounds)]
    graph.reset()
    return statistics.median(times) / (turns * sets)


def optional_time(name: str, call: Call, sets: int, rounds: int = ROUNDS) -> float | None:
    """The time of somebody else's kernel, or nothing if it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a refusal explains itself in several
            return graph_time(call, sets, rounds)
    except Exception as refusal:  # whatever it raises, it cannot do this shape
        reason = str(refusal).strip().partition("\n")[0]
        tqdm.write(f"    {name}: {type(refusal).__name__}: {reason}", file=sys.stderr)
        return None


def stream_time(nbytes: int) -> float:
    """Microseconds to read so many bytes and do nothing with them: the best of some kernels."""
    from benchmarks import stream  # needs Triton

    sets, words = sets_for(nbytes), -(-nbytes // 64) * 16
    data = torch.randint(2**31 - 1, (sets, words), dtype=torch.int32, device="cuda")

    def run(config: stream.Config) -> Call:
        return lambda i: stream.read(data[i], config)

    first = {config: graph_time(run(config), sets, rounds=3) for config in stream.CONFIGS}
    best = sorted(first, key=first.__getitem__)[:2]
    return min(graph_time(run(config), sets) for config in best)
