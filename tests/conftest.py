"""What every test may rely on: settings and the implementations under test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from backends import AMX, CPU_BACKENDS, CUDA, DEVICES, ISAS, REFERENCE, Backend, parameters
from hypothesis import HealthCheck, settings

# Programs that tests start shall import the installed package, not the checkout they start in.
os.environ["PYTHONSAFEPATH"] = "1"

# The same examples on every machine and every day; a slow machine is no failure.
settings.register_profile(
    "turboquant",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    max_examples=40,
    # A backend is set up once for all examples of a test.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("turboquant")


def _using(backend: Backend) -> Iterator[Backend]:
    isa = torch.ops.turboquant._cpu_isa()
    amx = torch.ops.turboquant._cpu_amx()
    torch.ops.turboquant._cpu_amx(backend is AMX)
    if backend.name in ISAS:
        assert torch.ops.turboquant._cpu_isa(backend.name) == backend.name
    yield backend
    torch.ops.turboquant._cpu_isa(isa)
    torch.ops.turboquant._cpu_amx(amx)


@pytest.fixture(params=parameters(*CPU_BACKENDS, REFERENCE, CUDA))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each instruction set of this processor, the reference, and the GPU if there is one."""
    yield from _using(request.param)


@pytest.fixture(params=parameters(*CPU_BACKENDS, CUDA))
def kernels(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Only what is compiled: the backends behind torch.ops.turboquant."""
    yield from _using(request.param)


@pytest.fixture(params=parameters(CPU_BACKENDS[-1], CUDA))
def best(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The best of this machine's CPU, and the GPU: for what instruction sets do not change."""
    yield from _using(request.param)


@pytest.fixture(params=parameters(*CPU_BACKENDS, AMX, REFERENCE, CUDA))
def attention_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """All of these, and the CPU's matrix units."""
    yield from _using(request.param)


@pytest.fixture
def amx() -> Iterator[Backend]:
    """The CPU's matrix units; their share of torch's is forced on any processor."""
    yield from _using(AMX)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The problems are so small that a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads(one_thread: None) -> Iterator[None]:
    """Even where the machine offers one."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=[0, 3000])
def impatient(request: pytest.FixtureRequest) -> Iterator[None]:
    """Blocks that wait for others no longer than this many clocks, then leave it to others."""
    before = torch.ops.turboquant._cuda_patience()
    torch.ops.turboquant._cuda_patience(request.param)
    yield
    torch.ops.turboquant._cuda_patience(before)
