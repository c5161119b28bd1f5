"""torch.compile and torch.export: whole graphs, dynamic and unknown sizes, state over calls."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_checks import on_device
from backends import CUDA, Backend
from oracles import randn, random_cache, same_bits
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import turboquant as tq
from turboquant.ops import HAS_CUDA

pytestmark = pytest.mark.usefixtures("one_thread")

HQ, HKV, D, WIDTH = 4, 2, 32, 64


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


class Attention(nn.Module):
    """A layer of a hand-written model: projections, cache, attention."""

    def __init__(self, capacity: int = 40, batch_size: int = 1) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HQ * D)
        self.kv = nn.Linear(WIDTH, 2 * HKV * D)
        self.cache = tq.TurboQuantKVCache(HKV, D, capacity, batch_size=batch_size)

    def forward(self, x: Tensor, input_pos: Tensor) -> Tensor:
        B, T, _ = x.shape
        query = self.q(x).view(B, T, HQ, D).transpose(1, 2)
        k, v = self.kv(x).view(B, T, 2, HKV, D).unbind(2)
        self.cache.update(input_pos, k.transpose(1, 2), v.transpose(1, 2))
        return self.cache.attend(query, input_pos).transpose(1, 2).reshape(B, T, HQ * D)


def layer(**options: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(**options).eval()


# The lengths of successive calls, and where each begins.
CALLS = [(5, 0), (3, 5), (1, 8), (1, 9), (7, 10), (1, 17)]


def calls(B: int = 1) -> list[tuple[Tensor, Tensor]]:
    return [
        (randn(B, T, WIDTH, seed=i), torch.arange(at, at + T)) for i, (T, at) in enumerate(CALLS)
    ]


def state(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a cache accumulates in, by their last name."""
    names = ("k_packed", "k_norms", "v_packed", "v_norms")
    buffers = dict(module.named_buffers())
    return {n: t for name, t in buffers.items() for n in names if name.endswith(n)}


# --------------------------------------------------------------------------------------- compile


def op_calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Each op as a closure over fresh arguments, all of them given."""
    cache = random_cache(2, 2, 9, D).to(device)
    (centroids, boundaries), pi = tq.codebook(D), tq.rotation(D)
    centroids, boundaries, pi = centroids.to(device), boundaries.to(device), pi.to(device)
    x, query = randn(2, 2, 5, D).to(device), randn(2, HQ, 3, D).to(device)
    mask = (torch.rand(1, 1, 3, 9, generator=torch.Generator().manual_seed(1)) < 0.7).to(device)
    kv_len, kv_start = torch.tensor([9, 4]).to(device), torch.tensor(2).to(device)
    pos, offset, sinks = torch.arange(5).to(device), x[:, :, :1].clone(), randn(HQ).to(device)
    attention = (query, *cache.args, mask, False, 0.3, kv_len, False)

    def update() -> tuple[Tensor, ...]:
        written = tuple(t.clone() for t in cache.args[:4])
        tq.update_(x, -x, pos, pi, boundaries, *written, centroids=centroids, k_norm="preserve",
                   v_norm="unbiased", k_offset=offset)  # fmt: skip
        return written

    return {
        "compress": lambda: tq.compress(x, pi, boundaries, centroids=centroids, norm="unbiased",
                                        offset=offset),
        "decompress": lambda: tq.decompress(cache.k_packed, cache.k_norms, centroids, pi,
                                            offset=offset, dtype=torch.float16),
        "update_": update,
        "tq4_sdpa": lambda: tq.tq4_sdpa(*attention),
        "tq4_attention": lambda: tq.tq4_attention(*attention, kv_start=kv_start, softcap=4.0,
                                                  sinks=sinks),
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("op", ["compress", "decompress", "update_", "tq4_sdpa", "tq4_attention"])
def test_ops_compile_to_one_graph(best: Backend, op: str, backend: str) -> None:
    call = op_calls(best.device)[op]
    want, got = call(), torch.compile(call, fullgraph=True, backend=backend)()
    for a, b in zip(got, want):
        assert same_bits(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_model_compiles_to_one_graph(best: Backend, dynamic: bool, grad: bool) -> None:
    """Also in grad mode, torch's default, where the projections' outputs require grad."""
    eager = layer().to(best.device)
    compiled = torch.compile(
        copy.deepcopy(eager), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    with torch.set_grad_enabled(grad):
        for x, pos in calls()[: 3 if dynamic else 2]:
            x, pos = x.to(best.device), pos.to(best.device)
            got, want = compiled(x, pos), eager(x, pos)
            assert torch.allclose(got, want, atol=1e-5)


def test_dynamic_lengths_do_not_recompile(best: Backend) -> None:
    graphs = 0

    def count(gm: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return gm.forward

    module = layer().to(best.device)
    compiled = torch.compile(module, fullgraph=True, backend=count, dynamic=True)
    with torch.no_grad():
        for length in (5, 6, 9, 13):
            compiled(randn(1, length, WIDTH).to(best.device),
                     torch.arange(length, device=best.device))  # fmt: skip
    assert graphs == 1


def test_inductor_neither_breaks_nor_copies_the_cache(best: Backend) -> None:
    """The real compiler: same results, and no copy of a buffer of the cache."""
    from torch._inductor.utils import run_and_get_code

    capacity = 37  # seen in the code of a copy, and nowhere else
    eager = layer(capacity=capacity).to(best.device)
    module = copy.deepcopy(eager)

    def step(query: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> Tensor:
        module.cache.update(pos, k, v)
        return module.cache.attend(query, pos)

    query = randn(1, HQ, 3, D).to(best.device)
    k, v = randn(2, 1, HKV, 3, D, seed=1).to(best.device)
    pos = torch.arange(3, device=best.device)
    with torch.no_grad():
        out, [code] = run_and_get_code(torch.compile(step, fullgraph=True), query, k, v, pos)
        eager.cache.update(pos, k, v)
        want = eager.cache.attend(query, pos)
    assert torch.allclose(out, want, atol=1e-5)
    for name, t in state(module).items():
        assert same_bits(t, state(eager)[name])
    body = code.split("def call(")[1].split("runner =")[0]
    assert body.count("torch.ops.turboquant.update_.default(") == 1
    assert body.count("torch.ops.turboquant.tq4_attention.default(") == 1
    allocated = [line for line in body.splitlines() if "= empty_strided" in line]
    assert not [line for line in allocated if f"{capacity}" in line]
    assert "clone" not in body


# ---------------------------------------------------------------------------------------- export


def exported(module: nn.Module, B: int = 1, *, strict: bool = True) -> ExportedProgram:
    T = Dim("T", min=1, max=40)
    return torch.export.export(
        module, (randn(B, 6, WIDTH), torch.arange(6)), dynamic_shapes=({1: T}, {0: T}),
        strict=strict,
    )  # fmt: skip


def check_accumulates(program: nn.Module, B: int = 1) -> None:
    """Calls of varying length, each compared with a module that runs them eagerly."""
    eager = layer(batch_size=B)
    outputs = []
    with torch.no_grad():
        for x, pos in calls(B):
            got, want = program(x, pos), eager(x, pos)
            assert torch.allclose(got, want, atol=1e-6)
            outputs.append(want)
            for name, t in state(program).items():
                assert same_bits(t, state(eager)[name]), name
    assert len(state(program)) == 4
    # Later tokens did see the earlier ones.
    alone = layer(batch_size=B)
    x, pos = calls(B)[1]
    with torch.no_grad():
        assert not torch.allclose(alone(x, pos), outputs[1], atol=1e-3)


@pytest.mark.parametrize("B", [1, 3])
def test_exported_program_accumulates_state(B: int) -> None:
    with torch.no_grad():
        program = exported(layer(batch_size=B), B)
    check_accumulates(program.module(), B)


def saved_and_loaded(program: ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def test_export_without_no_grad() -> None:
    """Torch's default is grad mode; a model with parameters must export and be saved there too."""
    check_accumulates(exported(layer()).module())
    check_accumulates(exported(layer()).run_decompositions().module())
    check_accumulates(saved_and_loaded(exported(layer())))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_backward_pass_of_a_compiled_model_warns(best: Backend, backend: str) -> None:
    """No graph may silently lose the gradient of what attention read."""
    module = layer().to(best.device)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x, pos = randn(1, 3, WIDTH).to(best.device), torch.arange(3, device=best.device)

    def train_step() -> None:  # with a residual, which has a gradient
        (compiled(x, pos) + module.q(x)).sum().backward()

    with pytest.warns(UserWarning, match="turboquant::tq4_attention.*not registered"):
        train_step()


def test_export_is_strict_or_not() -> None:
    with torch.no_grad():
        check_accumulates(exported(layer(), strict=False).module())


def test_after_run_decompositions() -> None:
    with torch.no_grad():
        program = exported(layer()).run_decompositions()
    check_accumulates(program.module())


def test_after_save_and_load() -> None:
    """The constants travel by value."""
    with torch.no_grad():
        program = exported(layer())
    loaded = saved_and_loaded(program)
    for name in ("rotation", "centroids", "boundaries"):
        [value] = [t for n, t in loaded.named_buffers() if n.endswith(name)]
        assert same_bits(value, getattr(layer().cache, name))
    check_accumulates(loaded)


def test_after_decompositions_saving_and_loading() -> None:
    with torch.no_grad():
        program = exported(layer()).run_decompositions()
    check_accumulates(saved_and_loaded(program))


def test_exported_program_is_one_with_any_length() -> None:
    """Lengths beyond the range are refused, as torch does it; those inside all work."""
    with torch.no_grad():
        program = exported(layer()).module()
        for length in (1, 2, 39, 40):
            x, pos = randn(1, length, WIDTH), torch.arange(length)
            assert torch.allclose(program(x, pos), layer()(x, pos), atol=1e-6)


class Ops(nn.Module):
    """All five ops with every dimension that can vary."""

    def forward(
        self, x: Tensor, query: Tensor, pos: Tensor, state: tuple[Tensor, ...], kv_len: Tensor,
        mask: Tensor, pi: Tensor, boundaries: Tensor, centroids: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tq.update_(x, x, pos, pi, boundaries, *state)
        packed, norms = tq.compress(x, pi, boundaries)
        back = tq.decompress(packed, norms, centroids, pi)
        out, lse = tq.tq4_attention(query, *state, centroids, pi, mask, kv_len=kv_len)
        return out, lse, back, tq.tq4_sdpa(query, *state, centroids, pi, kv_len=kv_len)


def ops_inputs(B: int, T: int, L: int, S: int) -> tuple[Any, ...]:
    cache = random_cache(B, HKV, S, D)
    return (
        randn(B, HKV, T, D), randn(B, HQ, L, D), torch.arange(T), cache.args[:4],
        torch.full((B,), S - 1), torch.ones(B, 1, L, S, dtype=torch.bool), cache.rotation,
        tq.codebook(D)[1], cache.centroids,
    )  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
def test_every_dimension_may_be_dynamic(strict: bool) -> None:
    B, L = Dim("B", min=2, max=9), Dim("L", min=2, max=50)
    S, T = Dim("S", min=8, max=64), Dim("T", min=2, max=8)
    shapes = (
        {0: B, 2: T}, {0: B, 2: L}, {0: T}, tuple({0: B, 2: S} for _ in range(4)), {0: B},
        {0: B, 2: L, 3: S}, None, None, None,
    )  # fmt: skip
    with torch.no_grad():
        program = torch.export.export(
            Ops(), ops_inputs(3, 4, 5, 12), dynamic_shapes=shapes, strict=strict
        ).module()
        for sizes in [(3, 4, 5, 12), (2, 7, 9, 33), (8, 2, 2, 64)]:
            inputs, again = ops_inputs(*sizes), ops_inputs(*sizes)
            for a, b in zip(program(*inputs), Ops()(*again)):
                assert same_bits(a, b)
            for a, b in zip(inputs[3], again[3]):
                assert same_bits(a, b)


class Slice(nn.Module):
    """Attention over the filled part of a cache, whose length only the data knows."""

    def forward(self, query: Tensor, state: tuple[Tensor, ...], centroids: Tensor, pi: Tensor,
                length: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        n = length.item()
        torch._check(n >= 1)
        torch._check(n <= state[0].shape[2])
        part = [t[:, :, :n] for t in state]
        mask = torch.ones(1, 1, query.shape[2], n, dtype=torch.bool)
        out = tq.tq4_sdpa(query, *part, centroids, pi, mask)
        lse = tq.tq4_attention(query, *part, centroids, pi, mask_is_causal=True)[1]
        return out, lse, tq.decompress(part[0], part[1], centroids, pi)


@pytest.mark.parametrize("strict", [True, False])
def test_a_length_from_the_data(strict: bool) -> None:
    query, cache = randn(1, HQ, 3, D), random_cache(1, HKV, 20, D)

    def inputs(n: int) -> tuple[Any, ...]:
        return query, cache.args[:4], cache.centroids, cache.rotation, torch.tensor(n)

    with torch.no_grad():
        program = torch.export.export(Slice(), inputs(12), strict=strict).module()
        for n in (12, 1, 2, 20):
            for a, b in zip(program(*inputs(n)), Slice()(*inputs(n))):
                assert same_bits(a, b)


class Tokens(nn.Module):
    """As many new tokens as the data says, compressed and written."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = tq.TurboQuantKVCache(HKV, D, 16)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        n = length.item()
        torch._check(n >= 1)
        torch._check(n <= 8)
        new = x[:, :, :n]
        self.cache.update(torch.arange(n), new, new)
        packed, _ = tq.compress(new, self.cache.rotation, self.cache.boundaries)
        return packed


def test_new_tokens_counted_by_the_data() -> None:
    x = randn(1, HKV, 8, D)
    with torch.no_grad():
        program = torch.export.export(Tokens(), (x, torch.tensor(5)), strict=True).module()
        for n in (5, 1, 8):
            eager = Tokens()
            program.get_buffer("cache.k_packed").zero_()
            assert same_bits(program(x, torch.tensor(n)), eager(x, torch.tensor(n)))
            assert same_bits(program.get_buffer("cache.k_packed"), eager.cache.k_packed)


class Halves(nn.Module):
    """Keys cut to a length from the data, values whole: right for one length only."""

    def forward(self, query: Tensor, state: tuple[Tensor, ...], centroids: Tensor, pi: Tensor,
                length: Tensor) -> Tensor:  # fmt: skip
        n = length.item()
        torch._check(n >= 1)
        torch._check(n <= 20)
        k_packed, k_norms, v_packed, v_norms = state
        return tq.tq4_sdpa(
            query, k_packed[:, :, :n], k_norms[:, :, :n], v_packed, v_norms, centroids, pi
        )


def test_what_only_the_run_can_know_is_checked_then() -> None:
    query, cache = randn(1, HQ, 3, D), random_cache(1, HKV, 20, D)
    inputs = (query, cache.args[:4], cache.centroids, cache.rotation)
    with torch.no_grad():
        program = torch.export.export(Halves(), (*inputs, torch.tensor(20)), strict=True).module()
        assert same_bits(program(*inputs, torch.tensor(20)), tq.tq4_sdpa(query, *cache.args))
        with pytest.raises(RuntimeError):
            program(*inputs, torch.tensor(7))


def test_graph_holds_the_ops_and_nothing_of_ours_around_them() -> None:
    with torch.no_grad():
        program = exported(layer())
    targets = [str(n.target) for n in program.graph.nodes if "turboquant" in str(n.target)]
    assert targets == ["turboquant.update_.default", "turboquant.tq4_attention.default"]


# ----------------------------------------------------------------------------------- CUDA graphs


def test_cuda_graph_replays_at_any_fill() -> None:
    if not (torch.cuda.is_available() and HAS_CUDA):
        pytest.skip("no GPU")
    query, cache = on_device(CUDA, randn(1, HQ, 1, D), random_cache(1, HKV, 40, D))
    kv_len = torch.tensor(40, device=CUDA.device)
    tq.tq4_sdpa(query, *cache.args, kv_len=kv_len)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tq.tq4_sdpa(query, *cache.args, kv_len=kv_len)
    for length in (40, 1, 17, 0):
        kv_len.fill_(length)
        graph.replay()
        assert same_bits(out, tq.tq4_sdpa(query, *cache.args, kv_len=kv_len))


def test_cuda_graph_of_an_update() -> None:
    """What is captured writes at positions that only the replay knows."""
    if not (torch.cuda.is_available() and HAS_CUDA):
        pytest.skip("no GPU")
    cache = tq.TurboQuantKVCache(HKV, D, 20).to("cuda")
    eager = tq.TurboQuantKVCache(HKV, D, 20).to("cuda")
    k, v = randn(2, 1, HKV, 2, D, seed=1).to("cuda")
    pos = torch.tensor([0, 1], device="cuda")
    cache.update(pos, k, v)
    cache.reset()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.update(pos, k, v)
    for first in (0, 7, 18):
        pos.copy_(torch.tensor([first, first + 1]))
        graph.replay()
        eager.update(pos, k, v)
        for name, t in state(cache).items():
            assert same_bits(t, state(eager)[name])
