"""What the compiled libraries ask of torch, and how the ops are registered.

Also a script, for libraries that cannot be loaded here: python tests/test_binaries.py LIBRARY...
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

OLDEST = (2, 10, 0)  # the torch whose stable ABI the libraries may use
HEADERS = [
    "torch/csrc/inductor/aoti_torch/c/shim.h",
    "torch/csrc/stable/c/shim.h",
    "torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h",
]
# Versioned by the system's own libraries.
SYSTEM = re.compile(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_")
UNSTABLE = re.compile(r"^(_?Py[A-Z_]|_Z\w*(2at|3c10|5torch|8pybind11)|THP|THC)")


def undefined(library: Path) -> dict[str, str]:
    """The symbols that a library takes from others, and nm's letter for each."""
    lines = subprocess.run(
        ["nm", "-D", "-u", str(library)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    symbols = dict(reversed(line.split()[-2:]) for line in lines)
    assert symbols, f"nm finds no undefined symbols in {library}"
    return symbols


def demangled(text: str) -> str:
    """C++ names made readable, where the tool for it is installed."""
    if shutil.which("c++filt") is None:
        return text
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout.rstrip()


def stable_functions() -> dict[str, tuple[int, int, int]]:
    """The C functions that torch's headers declare, and since which version."""
    include = Path(torch.__file__).parent / "include"
    since: dict[str, tuple[int, int, int]] = {}
    for header in HEADERS:
        versions: list[tuple[int, int, int] | None] = []  # of the #if's around a line
        for line in (include / header).read_text().splitlines():
            if re.match(r"\s*#\s*if", line):
                guard = re.search(
                    r"TORCH_FEATURE_VERSION\s*>=\s*TORCH_VERSION_(\d+)_(\d+)_(\d+)", line
                )
                versions.append(tuple(map(int, guard.groups())) if guard else None)  # type: ignore
            elif re.match(r"\s*#\s*endif", line):
                versions.pop()
            for name in re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", line):
                needed = max((v for v in versions if v), default=(0, 0, 0))
                since[name] = min(needed, since.get(name, needed))
    return since


def check_library(library: Path) -> None:
    """Only C functions that torch 2.10 has, and the system's libraries."""
    known, wrong = stable_functions(), []
    for symbol, kind in undefined(library).items():
        name = symbol.split("@")[0]
        if UNSTABLE.match(name):
            wrong.append(f"{name}: not in the stable ABI")
        elif name in known and known[name] > OLDEST:
            wrong.append(f"{name}: only since torch {'.'.join(map(str, known[name]))}")
        elif name.startswith(("aoti_", "torch_")) and name not in known:
            wrong.append(f"{name}: not in torch's headers")
        elif name not in known and not SYSTEM.search(symbol) and kind not in "wv":
            wrong.append(f"{name}: from an unknown library")
    assert not wrong, f"{library.name}:\n" + demangled("\n".join(wrong))


def needed_libraries(library: Path) -> list[str]:
    text = subprocess.run(
        ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", text)


def tool(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")


# ------------------------------------------------------------------------------------- libraries


@tool("nm")
def test_the_guard_guards() -> None:
    """It knows what it looks for: torch's own libraries are full of it."""
    known = stable_functions()
    assert len(known) > 100
    assert known["aoti_torch_get_sizes"] == (0, 0, 0)
    assert known["torch_call_dispatcher"] == OLDEST
    assert any(version > OLDEST for version in known.values()) or torch.__version__ < "2.11"
    with pytest.raises(AssertionError, match="not in the stable ABI"):
        check_library(Path(torch.__file__).parent / "lib" / "libtorch_python.so")


@tool("nm")
def test_op_libraries_use_only_the_stable_abi() -> None:
    from turboquant import ops

    check_library(ops.CPU_LIBRARY)
    if ops.CUDA_LIBRARY.exists():
        check_library(ops.CUDA_LIBRARY)


@tool("nm")
def test_the_python_module_knows_no_torch() -> None:
    from turboquant import _C

    symbols = undefined(Path(_C.__file__))
    assert any(name.startswith("Py") for name in symbols)
    strangers = [n for n in symbols if re.search(r"torch|3c10|2at|cuda", n)]
    assert not strangers


@tool("readelf")
def test_linked_libraries() -> None:
    from turboquant import _C, ops

    system = re.compile(r"lib(stdc\+\+|m|c|gcc_s|pthread|dl|rt)\.so|ld-linux")
    linked = {
        ops.CPU_LIBRARY: ["libtorch_cpu.so"],
        Path(_C.__file__): [],
    }
    if ops.CUDA_LIBRARY.exists():
        linked[ops.CUDA_LIBRARY] = ["libtorch_cpu.so", "libtorch_cuda.so"]
    for library, allowed in linked.items():
        foreign = [n for n in needed_libraries(library) if not system.match(n)]
        assert set(foreign) <= set(allowed), library.name


# ------------------------------------------------------------------------------------ registration

# As published; a model exported against them must load for ever.
SCHEMAS = {
    "compress": (
        "(Tensor x, Tensor rotation, Tensor boundaries, *, Tensor? centroids=None, "
        'str norm="l2", Tensor? offset=None) -> (Tensor packed, Tensor norms)'
    ),
    "decompress": (
        "(Tensor packed, Tensor norms, Tensor centroids, Tensor rotation, *, "
        "Tensor? offset=None, ScalarType? dtype=None) -> Tensor"
    ),
    "update_": (
        "(Tensor k, Tensor v, Tensor input_pos, Tensor rotation, Tensor boundaries, "
        "Tensor(a!) k_packed, Tensor(b!) k_norms, Tensor(c!) v_packed, Tensor(d!) v_norms, *, "
        'Tensor? centroids=None, str k_norm="l2", str v_norm="l2", Tensor? k_offset=None) -> ()'
    ),
    "tq4_sdpa": (
        "(Tensor query, Tensor k_packed, Tensor k_norms, Tensor v_packed, Tensor v_norms, "
        "Tensor centroids, Tensor rotation, Tensor? attn_mask=None, bool is_causal=False, "
        "float? scale=None, Tensor? kv_len=None, bool mask_is_causal=False) -> Tensor"
    ),
    "tq4_attention": (
        "(Tensor query, Tensor k_packed, Tensor k_norms, Tensor v_packed, Tensor v_norms, "
        "Tensor centroids, Tensor rotation, Tensor? attn_mask=None, bool is_causal=False, "
        "float? scale=None, Tensor? kv_len=None, bool mask_is_causal=False, *, "
        "Tensor? kv_start=None, float? softcap=None, Tensor? sinks=None) "
        "-> (Tensor out, Tensor lse)"
    ),
}


@pytest.mark.parametrize("op", SCHEMAS)
def test_schemas_are_frozen(op: str) -> None:
    import turboquant  # noqa: F401

    packet = getattr(torch.ops.turboquant, op)
    assert packet.overloads() == ["default"]
    assert str(packet.default._schema) == f"turboquant::{op}{SCHEMAS[op]}"


@pytest.mark.parametrize("op", SCHEMAS)
def test_kernels_are_registered_by_device(op: str) -> None:
    """A composite kernel would swallow the devices that have one of their own."""
    import turboquant  # noqa: F401

    def has(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"turboquant::{op}", key)

    assert all(has(key) for key in ("CPU", "CUDA", "Meta", "MPS", "XPU"))
    composite = [
        "CompositeImplicitAutograd", "CompositeExplicitAutograd",
        "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutogradNestedTensor",
    ]  # fmt: skip
    assert not any(has(key) for key in [*composite, "Autograd", "AutogradCPU", "AutogradCUDA"])
    dump = torch._C._dispatch_dump(f"turboquant::{op}").splitlines()
    [cpu] = [line for line in dump if line.startswith("CPU:")]
    assert ".cpp:" in cpu


def test_importing_changes_nothing_elsewhere() -> None:
    """In a fresh process: no transformers, no other ops, defaults and random state as before."""
    program = """
import sys, torch
torch.manual_seed(5)
before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
sdpa = torch.nn.functional.scaled_dot_product_attention
import turboquant
assert torch.equal(torch.get_rng_state(), before[0])
assert (torch.get_num_threads(), torch.get_default_dtype()) == before[1:]
assert torch.nn.functional.scaled_dot_product_attention is sdpa
assert "transformers" not in sys.modules
assert "triton" not in sys.modules
assert not torch.cuda.is_initialized()
print(turboquant.__version__)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"\d+\.\d+\.\S+\n", run.stdout)


@pytest.mark.parametrize("isa", ["sse9", "", "AVX2"])
def test_an_unknown_instruction_set_is_refused(isa: str) -> None:
    import turboquant  # noqa: F401

    before = torch.ops.turboquant._cpu_isa()
    with pytest.raises(RuntimeError, match="this processor does not run"):
        torch.ops.turboquant._cpu_isa(isa)
    assert torch.ops.turboquant._cpu_isa() == before


def test_the_best_instruction_set_is_used_by_default() -> None:
    program = (
        "import torch, turboquant; o = torch.ops.turboquant; print(o._cpu_isa(), o._cpu_isas())"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert out[1] == "scalar"
    assert out[0] == out[-1]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        check_library(Path(argument))
        print(f"{argument}: only the stable ABI of torch {'.'.join(map(str, OLDEST))}")
