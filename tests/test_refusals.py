"""Every rule of the contract, broken: the op, the argument, what it expected and what it found.

One table serves the compiled kernels, the fake kernels and reference.py: all three must refuse with
the same words, and nothing may have been written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from backends import GPU, ON_GPU
from oracles import same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import turboquant as tq
from turboquant import ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")

B, HQ, H, LQ, S, T, D = 2, 6, 3, 4, 7, 5, 16
F, BYTE, BF16 = torch.float32, torch.uint8, torch.bfloat16

Arguments = dict[str, Any]


def valid(op: str) -> Arguments:
    """A call that is right in every respect, with every optional argument given."""
    centroids, boundaries, rotation = torch.zeros(16), torch.zeros(15), torch.zeros(D, D)

    def packed(heads: int, length: int) -> Tensor:
        return torch.zeros(B, heads, length, D // 2, dtype=BYTE)

    def norms(heads: int, length: int) -> Tensor:
        return torch.zeros(B, heads, length, 1, dtype=BF16)

    if op == "compress":
        return {
            "x": torch.zeros(B, H, T, D), "rotation": rotation, "boundaries": boundaries,
            "centroids": centroids, "norm": "preserve", "offset": torch.zeros(H, 1, D),
        }  # fmt: skip
    if op == "decompress":
        return {
            "packed": packed(H, S), "norms": norms(H, S), "centroids": centroids,
            "rotation": rotation, "offset": torch.zeros(H, 1, D), "dtype": F,
        }  # fmt: skip
    if op == "update_":
        return {
            "k": torch.zeros(B, H, T, D), "v": torch.zeros(B, H, T, D),
            "input_pos": torch.arange(T), "rotation": rotation, "boundaries": boundaries,
            "k_packed": packed(H, S), "k_norms": norms(H, S), "v_packed": packed(H, S),
            "v_norms": norms(H, S), "centroids": centroids, "k_norm": "preserve",
            "v_norm": "unbiased", "k_offset": torch.zeros(H, 1, D),
        }  # fmt: skip
    call: Arguments = {
        "query": torch.zeros(B, HQ, LQ, D), "k_packed": packed(H, S), "k_norms": norms(H, S),
        "v_packed": packed(H, S), "v_norms": norms(H, S), "centroids": centroids,
        "rotation": rotation, "attn_mask": torch.ones(B, 1, LQ, S, dtype=torch.bool),
        "is_causal": False, "scale": 1.0, "kv_len": torch.ones(B, dtype=torch.int64),
        "mask_is_causal": False,
    }  # fmt: skip
    if op == "tq4_attention":
        call |= {"kv_start": torch.ones((), dtype=torch.int32), "softcap": 1.0,
                 "sinks": torch.zeros(HQ)}  # fmt: skip
    return call


OPS = ["compress", "decompress", "update_", "tq4_sdpa", "tq4_attention"]
ATTENTION = ["tq4_sdpa", "tq4_attention"]


@dataclass(frozen=True)
class Refusal:
    """A valid call with some arguments changed, and the whole message it must meet."""

    op: str
    name: str
    changes: Callable[[], Arguments]  # built when the test runs
    message: str


TABLE: list[Refusal] = []


def refuse(op: str, name: str, changes: Callable[[], Arguments], message: str) -> None:
    entry = Refusal(op, name, changes, f"{op}: {message}")
    if not any(entry.name == e.name and entry.message == e.message for e in TABLE):
        TABLE.append(entry)


def zeros(shape: list[int], dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape, dtype=dtype)


def found(shape: list[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {shape}"


def replaced(arg: str, shape: list[int], dtype: torch.dtype) -> Callable[[], Arguments]:
    return lambda: {arg: torch.zeros(shape, dtype=dtype)}


FLOAT_NAMES = "float32, float16, bfloat16 or float64"
QUERY_NAMES = "float32, float16 or bfloat16"
NORM_NAMES = "bfloat16 or float32"
SINK_NAMES = "float32 or bfloat16"
INT_NAMES = "int32 or int64"


def wrong_shapes(shape: list[int], free: int = 0) -> dict[str, list[int]]:
    """Every rank but the right one, and every size but the right one; the first `free` may vary."""
    shapes = {f"rank {n}": [2] * n for n in range(6) if n != len(shape)}
    for i in range(free, len(shape)):
        for delta in (-1, 1):
            changed = [*shape]
            changed[i] += delta
            shapes[f"size {i} {delta:+}"] = changed
    return shapes


def tensor_rules(
    op: str, arg: str, shape: list[int], good: torch.dtype, bad: list[torch.dtype],
    rank_text: str, size_text: str, *, own_sizes: int = 0,
) -> None:  # fmt: skip
    """A tensor of fixed shape: wrong types, ranks and sizes.

    A first argument's own sizes define the call: then only its rank is wrong by itself.
    """
    for dtype in bad:
        text = rank_text or size_text
        refuse(op, f"{arg} {found(shape, dtype)}", replaced(arg, shape, dtype),
               f"{text}, got {found(shape, dtype)}")  # fmt: skip
    for name, wrong in wrong_shapes(shape, own_sizes).items():
        text = rank_text if rank_text and len(wrong) != len(shape) else size_text
        if not text:
            continue
        refuse(op, f"{arg} {name}", replaced(arg, wrong, good), f"{text}, got {found(wrong, good)}")


# fmt: off
NOT_FLOAT = [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
NOT_BYTE = [torch.int8, torch.int32, torch.float32, torch.bool, torch.uint16]
NOT_NORM = [torch.float16, torch.float64, torch.int32, torch.uint8]
NOT_INT = [torch.int16, torch.uint8, torch.float32, torch.bool, torch.uint32, torch.uint64]


def constants_rules(op: str) -> None:
    for arg, size in (("rotation", 0), ("boundaries", 15), ("centroids", 16)):
        if arg not in valid(op):
            continue
        shape, dims = ([size], f"[{size}]") if size else ([D, D], "[D, D]")
        text = f"{arg} must be {FLOAT_NAMES} {dims} = {shape}"
        tensor_rules(op, arg, shape, F, NOT_FLOAT, "", text)


def head_dim_rules(op: str, arg: str, shape_of: Callable[[int], list[int]], dtype: torch.dtype,
                   bad: list[int]) -> None:
    for dim in bad:
        shape = shape_of(dim)
        refuse(op, f"{arg} head dim {shape}", replaced(arg, shape, dtype),
               f"{arg} must have an even head dim D from 16 to 512, got {found(shape, dtype)}")


def offset_rules(op: str, arg: str) -> None:
    target = [B, H, 1, D]
    text = f"{arg} must be {FLOAT_NAMES} broadcastable to [..., 1, D] = {target}"
    for dtype in NOT_FLOAT:
        refuse(op, f"{arg} {dtype}", replaced(arg, [H, 1, D], dtype),
               f"{text}, got {found([H, 1, D], dtype)}")
    for shape in ([], [1], [D - 1], [D + 1], [T, D], [H, T, D], [2, 1, D], [B, 1, T, D],
                  [H, B, 1, D], [B, 2, 1, D], [1, B, H, 1, D], [1, 1, 1, 1, 1, D], [H, 1, 1],
                  [0, 1, D]):
        refuse(op, f"{arg} {shape}", replaced(arg, shape, F), f"{text}, got {found(shape, F)}")


def policy_rules(op: str, arg: str) -> None:
    for policy in ("L2", "", "none", "l2 "):
        refuse(op, f"{arg} '{policy}'", lambda policy=policy: {arg: policy},
               f"{arg} must be 'l2', 'preserve' or 'unbiased', got '{policy}'")
    for policy in ("preserve", "unbiased"):
        others = {n: "l2" for n in ("norm", "k_norm", "v_norm") if n in valid(op)}
        changes = {**others, arg: policy, "centroids": None}
        refuse(op, f"{arg} {policy} without centroids", lambda changes=changes: changes,
               f"{arg}='{policy}' needs centroids, got None")


# compress
for dtype in NOT_FLOAT:
    refuse("compress", f"x {dtype}", replaced("x", [B, H, T, D], dtype),
           f"x must be {FLOAT_NAMES} [..., D], got {found([B, H, T, D], dtype)}")
refuse(
    "compress",
    "x rank 0",
    replaced("x", [], F),
    f"x must be {FLOAT_NAMES} [..., D], got float32 []",
)
head_dim_rules("compress", "x", lambda dim: [B, H, T, dim], F, [0, 1, 2, 14, 15, 17, 511, 513, 514])
head_dim_rules("compress", "x", lambda dim: [dim], F, [15, 514])
constants_rules("compress")
policy_rules("compress", "norm")
offset_rules("compress", "offset")
refuse("compress", "offset for a vector",
       lambda: {"x": torch.zeros(D), "offset": torch.zeros(1, D)},
       f"offset must be {FLOAT_NAMES} broadcastable to [..., 1, D] = [{D}], "
       f"got float32 [1, {D}]")
refuse("compress", "offset for a row",
       lambda: {"x": torch.zeros(T, D), "offset": torch.zeros(T, D)},
       f"offset must be {FLOAT_NAMES} broadcastable to [..., 1, D] = [1, {D}], "
       f"got float32 [{T}, {D}]")

# decompress
for dtype in NOT_BYTE:
    refuse("decompress", f"packed {dtype}", replaced("packed", [B, H, S, D // 2], dtype),
           f"packed must be uint8 [..., D/2], got {found([B, H, S, D // 2], dtype)}")
refuse("decompress", "packed rank 0", replaced("packed", [], BYTE),
       "packed must be uint8 [..., D/2], got uint8 []")
head_dim_rules("decompress", "packed", lambda dim: [B, H, S, dim // 2], BYTE, [0, 2, 14, 514])
tensor_rules("decompress", "norms", [B, H, S, 1], BF16, NOT_NORM, "",
             f"norms must be {NORM_NAMES} [..., 1] = {[B, H, S, 1]}")
constants_rules("decompress")
for shape in ([H, S, D], [B, 1, S, D], [1, B, H, 1, D], [D - 2], []):
    refuse("decompress", f"offset {shape}", replaced("offset", shape, F),
           f"offset must be {FLOAT_NAMES} broadcastable to [..., 1, D] = {[B, H, 1, D]}, "
           f"got {found(shape, F)}")
for dtype in NOT_FLOAT:
    refuse("decompress", f"dtype {dtype}", lambda dtype=dtype: {"dtype": dtype},
           f"dtype must be {FLOAT_NAMES}, got {str(dtype).removeprefix('torch.')}")

# update_
tensor_rules("update_", "k", [B, H, T, D], F, NOT_FLOAT,
             f"k must be {FLOAT_NAMES} [B, H, T, D]", "", own_sizes=4)
head_dim_rules("update_", "k", lambda dim: [B, H, T, dim], F, [0, 14, 17, 514])
tensor_rules("update_", "v", [B, H, T, D], F, [torch.float16, torch.float64, torch.int32], "",
             f"v must be float32 [B, H, T, D] = {[B, H, T, D]}")
tensor_rules("update_", "k_packed", [B, H, S, D // 2], BYTE, NOT_BYTE,
             "k_packed must be uint8 [B, H, S, D/2]", "", own_sizes=4)
for shape in ([1, H, S, D // 2], [B, H + 1, S, D // 2], [B, 1, S, D // 2], [B, H, S, D]):
    want = [B, H, S, D // 2]
    refuse("update_", f"k_packed {shape}", replaced("k_packed", shape, BYTE),
           f"k_packed must be uint8 [B, H, S, D/2] = {want}, got {found(shape, BYTE)}")
tensor_rules("update_", "v_packed", [B, H, S, D // 2], BYTE, NOT_BYTE, "",
             f"v_packed must be uint8 [B, H, S, D/2] = {[B, H, S, D // 2]}")
for arg in ("k_norms", "v_norms"):
    tensor_rules("update_", arg, [B, H, S, 1], BF16, NOT_NORM, "",
                 f"{arg} must be {NORM_NAMES} [B, H, S, 1] = {[B, H, S, 1]}")
for dtype in NOT_INT:
    refuse("update_", f"input_pos {dtype}", replaced("input_pos", [T], dtype),
           f"input_pos must be {INT_NAMES} [T] or [B, T] = [{T}] or [{B}, {T}], "
           f"got {found([T], dtype)}")
for shape in ([], [1], [T - 1], [T + 1], [S], [1, T], [B, T - 1], [B + 1, T], [B, 1], [1, B, T],
              [B, H, T]):
    refuse("update_", f"input_pos {shape}", replaced("input_pos", shape, torch.int64),
           f"input_pos must be {INT_NAMES} [T] or [B, T] = [{T}] or [{B}, {T}], "
           f"got {found(shape, torch.int64)}")
refuse("update_", "more tokens than slots",
       lambda: {"k": torch.zeros(B, H, S + 1, D), "v": torch.zeros(B, H, S + 1, D),
                "input_pos": torch.zeros(S + 1, dtype=torch.int64)},
       f"k must have at most as many tokens as the cache, got T = {S + 1}, S = {S}")
constants_rules("update_")
policy_rules("update_", "k_norm")
policy_rules("update_", "v_norm")
offset_rules("update_", "k_offset")

# tq4_sdpa, tq4_attention
for op in ATTENTION:
    tensor_rules(op, "query", [B, HQ, LQ, D], F, [*NOT_FLOAT, torch.float64],
                 f"query must be {QUERY_NAMES} [B, Hq, Lq, D]", "", own_sizes=4)
    head_dim_rules(op, "query", lambda dim: [B, HQ, LQ, dim], F, [0, 14, 17, 511, 514])
    tensor_rules(op, "k_packed", [B, H, S, D // 2], BYTE, NOT_BYTE,
                 "k_packed must be uint8 [B, Hkv, Lkv, D/2]", "", own_sizes=4)
    for heads in (0, 4, 5, 7, 12):
        shape = [B, heads, S, D // 2]
        refuse(op, f"{heads} KV heads", replaced("k_packed", shape, BYTE),
               f"k_packed must have Hkv >= 1 heads that divide Hq = {HQ}, got Hkv = {heads}")
    want = [B, H, S, D // 2]
    for shape in ([1, H, S, D // 2], [B + 1, H, S, D // 2], [B, H, S, D], [B, H, S, D // 2 - 1]):
        refuse(op, f"k_packed {shape}", replaced("k_packed", shape, BYTE),
               f"k_packed must be uint8 [B, Hkv, Lkv, D/2] = {want}, got {found(shape, BYTE)}")
    tensor_rules(op, "v_packed", want, BYTE, NOT_BYTE, "",
                 f"v_packed must be uint8 [B, Hkv, Lkv, D/2] = {want}")
    for arg in ("k_norms", "v_norms"):
        tensor_rules(op, arg, [B, H, S, 1], BF16, NOT_NORM, "",
                     f"{arg} must be {NORM_NAMES} [B, Hkv, Lkv, 1] = {[B, H, S, 1]}")
    constants_rules(op)
    mask = f"attn_mask must be bool [B or 1, 1, Lq, Lkv] = [{B} or 1, 1, {LQ}, {S}]"
    tensor_rules(op, "attn_mask", [B, 1, LQ, S], torch.bool,
                 [torch.float32, torch.bfloat16, torch.uint8, torch.int64], "", mask, own_sizes=1)
    for shape in ([0, 1, LQ, S], [B + 1, 1, LQ, S], [B, HQ, LQ, S], [1, H, LQ, S], [B, 1, 1, S],
                  [B, 1, LQ, 1]):
        refuse(op, f"attn_mask {shape}", replaced("attn_mask", shape, torch.bool),
               f"{mask}, got {found(shape, torch.bool)}")
    refuse(op, "float mask per head", replaced("attn_mask", [B, HQ, LQ, S], F),
           f"{mask}, got {found([B, HQ, LQ, S], F)}")
    refuse(op, "both causal flags", lambda: {"is_causal": True, "mask_is_causal": True},
           "is_causal and mask_is_causal exclude each other, got both True")
    refuse(op, "is_causal of a rectangle", lambda: {"is_causal": True},
           "is_causal must come with Lq == Lkv (mask_is_causal is the rule for queries at the end "
           f"of a longer context), got Lq = {LQ}, Lkv = {S}")
    for arg in ("kv_len", "kv_start"):
        if arg == "kv_start" and op == "tq4_sdpa":
            continue
        text = f"{arg} must be {INT_NAMES} with one element or [B] = [{B}]"
        for dtype in NOT_INT:
            refuse(
                op, f"{arg} {dtype}", replaced(arg, [B], dtype), f"{text}, got {found([B], dtype)}"
            )
            refuse(
                op,
                f"{arg} {dtype} 0-d",
                replaced(arg, [], dtype),
                f"{text}, got {found([], dtype)}",
            )
        for shape in ([0], [B + 1], [B, 1], [1, B], [B, B], [B, LQ], [3]):
            refuse(op, f"{arg} {shape}", replaced(arg, shape, torch.int32),
                   f"{text}, got {found(shape, torch.int32)}")
    for scale, text in ((math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan")):
        refuse(op, f"scale {text}", lambda scale=scale: {"scale": scale},
               f"scale must be finite, got {text}")
for softcap, text in ((math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"), (0.0, "0"),
                      (-0.0, "-0"), (-1.0, "-1"), (-2.5e-7, "-2.5e-07"), (-1e20, "-1e+20")):
    refuse("tq4_attention", f"softcap {text}", lambda softcap=softcap: {"softcap": softcap},
           f"softcap must be finite and above 0, got {text}")
tensor_rules("tq4_attention", "sinks", [HQ], F,
             [torch.float16, torch.float64, torch.int64], "",
             f"sinks must be {SINK_NAMES} [Hq] = [{HQ}]")

# Two things wrong at once: the argument that comes first is named, and rank before size.
refuse("compress", "x before rotation",
       lambda: {"x": torch.zeros(3, 14), "rotation": torch.zeros(())},
       "x must have an even head dim D from 16 to 512, got float32 [3, 14]")
refuse("tq4_sdpa", "query before all others",
       lambda: {k: torch.zeros(()) for k, v in valid("tq4_sdpa").items() if torch.is_tensor(v)},
       f"query must be {QUERY_NAMES} [B, Hq, Lq, D], got float32 []")
refuse("tq4_sdpa", "the published example",
       lambda: {"query": torch.zeros(2, 32, 1, 128),
                **{n: torch.zeros(2, 8, 1024, 128, dtype=BYTE) for n in ("k_packed", "v_packed")}},
       "k_packed must be uint8 [B, Hkv, Lkv, D/2] = [2, 8, 1024, 64], "
       "got uint8 [2, 8, 1024, 128]")
# fmt: on


def arguments(r: Refusal) -> Arguments:
    return {**valid(r.op), **r.changes()}


def message_of(call: Callable[..., Any], args: Arguments) -> str:
    with pytest.raises(RuntimeError) as error:
        call(**args)
    return str(error.value)


BY_NAME = pytest.mark.parametrize("refusal", TABLE, ids=lambda r: f"{r.op}-{r.name}")


def test_every_op_accepts_its_valid_call() -> None:
    """Else the table would prove nothing."""
    for op in OPS:
        kernel = getattr(torch.ops.turboquant, op).default
        kernel(**valid(op))
        getattr(tq, op)(**valid(op))
        getattr(reference, op)(**valid(op))
        with FakeTensorMode() as mode:
            kernel(
                **{
                    k: mode.from_tensor(v) if torch.is_tensor(v) else v
                    for k, v in valid(op).items()
                }
            )


def test_the_table_has_every_argument() -> None:
    for op in OPS:
        named = " ".join(r.message for r in TABLE if r.op == op)
        for arg in valid(op):
            assert f" {arg} " in named or f" {arg}=" in named, (op, arg)
    assert len({(r.op, r.name) for r in TABLE}) == len(TABLE)


@BY_NAME
def test_kernel(refusal: Refusal) -> None:
    args = arguments(refusal)
    before = {k: v.clone() for k, v in args.items() if torch.is_tensor(v)}
    kernel = getattr(torch.ops.turboquant, refusal.op).default
    assert message_of(kernel, args) == refusal.message
    assert message_of(getattr(tq, refusal.op), args) == refusal.message
    for name, old in before.items():
        assert same_bits(args[name], old), name


@BY_NAME
def test_fake_kernel(refusal: Refusal) -> None:
    with FakeTensorMode():
        args = arguments(refusal)
        kernel = getattr(torch.ops.turboquant, refusal.op).default
        assert message_of(kernel, args) == refusal.message


@BY_NAME
def test_reference(refusal: Refusal) -> None:
    args = arguments(refusal)
    before = {k: v.clone() for k, v in args.items() if torch.is_tensor(v)}
    assert message_of(getattr(reference, refusal.op), args) == refusal.message
    for name, old in before.items():
        assert same_bits(args[name], old), name


@pytest.mark.parametrize("refusal", TABLE, ids=lambda r: f"{r.op}-{r.name}")
@pytest.mark.parametrize("gpu", [pytest.param(GPU, marks=ON_GPU)], ids=["cuda"])
def test_kernel_on_the_gpu(refusal: Refusal, gpu: torch.device) -> None:
    args = {k: v.to(gpu) if torch.is_tensor(v) else v for k, v in arguments(refusal).items()}
    assert message_of(getattr(tq, refusal.op), args) == refusal.message


# --------------------------------------------------------------------------------------- devices


def tensor_arguments(op: str) -> list[str]:
    return [name for name, value in valid(op).items() if torch.is_tensor(value)]


ELSEWHERE = [(op, arg) for op in OPS for arg in tensor_arguments(op)[1:]]


@pytest.mark.parametrize(("op", "arg"), ELSEWHERE)
def test_tensors_on_different_devices(op: str, arg: str) -> None:
    """A meta tensor among CPU tensors: in the kernel, the fake kernel and the reference."""
    args = valid(op)
    args[arg] = args[arg].to("meta")
    first = tensor_arguments(op)[0]
    message = f"{op}: {arg} must be on {first}'s device cpu, got meta"
    kernel = getattr(torch.ops.turboquant, op).default
    cpu_only = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    assert message_of(lambda **kw: kernel.redispatch(cpu_only, **kw), args) == message
    assert message_of(kernel, args) == message  # dispatched to the fake kernel
    assert message_of(getattr(reference, op), args) == message


@pytest.mark.parametrize("op", OPS)
def test_all_tensors_elsewhere(op: str) -> None:
    """Meta tensors throughout are no error: that is what a fake kernel is for."""
    args = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in valid(op).items()}
    result = getattr(tq, op)(**args)
    for t in result if isinstance(result, tuple) else [result]:
        assert t is None or t.device.type == "meta"


@pytest.mark.parametrize(("op", "arg"), ELSEWHERE)
@pytest.mark.parametrize("gpu", [pytest.param(GPU, marks=ON_GPU)], ids=["cuda"])
def test_cpu_and_gpu(op: str, arg: str, gpu: torch.device) -> None:
    args = {k: v.to(gpu) if torch.is_tensor(v) else v for k, v in valid(op).items()}
    args[arg] = args[arg].cpu()
    first = tensor_arguments(op)[0]
    assert message_of(getattr(tq, op), args) == (
        f"{op}: {arg} must be on {first}'s device cuda:0, got cpu"
    )


# ------------------------------------------------------------------------------ without the library


@pytest.mark.skipif(ops.HAS_CUDA, reason="installed with CUDA kernels")
@pytest.mark.parametrize("op", OPS)
def test_a_gpu_tensor_without_the_cuda_library(op: str) -> None:
    """The stub behind the CUDA key names the op and the command that mends it."""
    kernel = getattr(torch.ops.turboquant, op).default
    cuda_only = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    message = message_of(lambda **kw: kernel.redispatch(cuda_only, **kw), valid(op))
    assert message.startswith(f"{op}: this installation has no CUDA kernels; ")
    assert "TURBOQUANT_CUDA=on pip install" in message


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("key", ["MPS", "XPU"])
def test_devices_without_kernels_run_the_reference(op: str, key: str) -> None:
    kernel = getattr(torch.ops.turboquant, op).default
    only = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    args = valid(op)
    for name in ("x", "k", "v", "query", "k_norms", "norms", "rotation"):
        if name in args:
            args[name] = torch.ones_like(args[name])
    again = {k: v.clone() if torch.is_tensor(v) else v for k, v in args.items()}
    got = kernel.redispatch(only, **args)
    want = getattr(reference, op)(**again)
    for a, b in zip(got if isinstance(got, tuple) else [got],
                    want if isinstance(want, tuple) else [want]):  # fmt: skip
        assert (a is None and b is None) or same_bits(a, b)
    for name, value in again.items():
        if torch.is_tensor(value):
            assert same_bits(args[name], value)
