"""compress and decompress, on every backend, against float64."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from backends import Backend
from hypothesis import given
from hypothesis import strategies as st
from oracles import FLOATS, LAYOUTS, NORM_DTYPES, randn, relayout, same_bits
from torch import Tensor

import turboquant as tq

pytestmark = pytest.mark.usefixtures("one_thread")

EVEN_DIMS = range(16, 513, 2)
POLICIES = ["l2", "preserve", "unbiased"]
DTYPE_IDS = {"ids": lambda d: str(d).removeprefix("torch.")}


def constants(dim: int, backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
    """centroids, boundaries, rotation on the backend's device."""
    centroids, boundaries = tq.codebook(dim)
    d = backend.device
    return centroids.to(d), boundaries.to(d), tq.rotation(dim).to(d)


def check_compress(
    backend: Backend, x: Tensor, *, norm: str = "l2", offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compress x and compare with float64; returns packed and norms."""
    centroids, boundaries, rotation = constants(x.shape[-1], backend)
    packed, norms = backend.ops.compress(
        x, rotation, boundaries, centroids=centroids, norm=norm, offset=offset
    )
    assert packed.dtype == torch.uint8
    assert norms.dtype == torch.bfloat16
    assert packed.shape == (*x.shape[:-1], x.shape[-1] // 2)
    assert norms.shape == (*x.shape[:-1], 1)
    assert packed.device == norms.device == x.device
    assert packed.is_contiguous()
    assert norms.is_contiguous()
    expected = oracles.encode(x, rotation, boundaries, offset)
    oracles.assert_codes(packed, expected)
    # The norm belongs to the codes that were stored, so it is judged by them.
    y_hat = centroids.cpu().double()[oracles.unpack(packed)]
    length = {
        "l2": expected.length,
        "preserve": expected.length / y_hat.square().sum(-1, keepdim=True).sqrt(),
        "unbiased": expected.length / (expected.y * y_hat).sum(-1, keepdim=True),
    }[norm]
    # A zero vector has a zero length, whatever its direction.
    length = torch.where(expected.length == 0, 0.0, length)
    slack = 1e-6 + (expected.error if norm == "unbiased" else 0.0)
    oracles.assert_rounded(norms, length, slack=slack)
    return packed, norms


def check_decompress(
    backend: Backend,
    packed: Tensor,
    norms: Tensor,
    *,
    offset: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    centroids, _, rotation = constants(2 * packed.shape[-1], backend)
    x = backend.ops.decompress(packed, norms, centroids, rotation, offset=offset, dtype=dtype)
    assert x.dtype == (dtype or norms.dtype)
    assert x.shape == (*packed.shape[:-1], 2 * packed.shape[-1])
    assert x.is_contiguous()
    exact = oracles.decode(packed, norms, centroids, rotation, offset)
    size = norms.detach().cpu().double().abs()
    if offset is not None:
        size = size + offset.cpu().double().abs()
    # Both the rotation and the levels may be fp16, and random bytes are longer than unit vectors.
    error = 2 * oracles.half_error(x.shape[-1]) if oracles.in_matrix_units(x) else 1e-6
    oracles.assert_rounded(x, exact, slack=3e-7, absolute=error * size)
    return x


# --------------------------------------------------------------------------- the whole range of D


def test_every_even_head_dim(backend: Backend) -> None:
    for i, dim in enumerate(EVEN_DIMS):
        x = randn(1, 2, 4, dim, seed=dim, dtype=FLOATS[i % 4]).to(backend.device)
        packed, norms = check_compress(backend, x, norm=POLICIES[i % 3])
        check_decompress(backend, packed, norms, dtype=FLOATS[(i + 1) % 4])


@pytest.mark.parametrize("numbers", [2**13, 2**19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], **DTYPE_IDS)
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 98, 128, 192, 256, 512])
def test_byte_for_byte_beside_the_reference(
    kernels: Backend, dim: int, dtype: torch.dtype, numbers: int
) -> None:
    """Whatever differs lies within rounding of a boundary, and there is little of it."""
    x = randn(numbers // dim, dim, seed=dim, dtype=dtype)
    centroids, boundaries, rotation = constants(dim, kernels)
    packed, norms = kernels.ops.compress(x.to(kernels.device), rotation, boundaries)
    from turboquant import reference

    want, want_norms = reference.compress(x, rotation.cpu(), boundaries.cpu())
    differs = oracles.unpack(packed) != oracles.unpack(want)
    disputable = oracles.encode(x.to(kernels.device), rotation, boundaries).disputable
    assert not (differs & ~disputable).any()
    oracles.assert_rare(differs)
    # Half a bfloat16 unit decides between two neighbours.
    apart = norms.cpu().view(torch.int16).long() - want_norms.view(torch.int16).long()
    assert apart.abs().max() <= 1
    oracles.assert_rare(apart != 0)


@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(16, torch.float32), (50, torch.float32), (128, torch.float32), (128, torch.bfloat16),
     (80, torch.bfloat16), (512, torch.bfloat16)],
)  # fmt: skip
def test_norm_policies(backend: Backend, norm: str, dim: int, dtype: torch.dtype) -> None:
    """Their definitions, up to the rounding of the stored norm to bfloat16."""
    x = randn(1000, dim, seed=1) * torch.logspace(-3, 3, 1000).unsqueeze(-1)
    x = x.to(backend.device, dtype)
    centroids, _, rotation = constants(dim, backend)
    packed, norms = check_compress(backend, x, norm=norm)
    x64 = x.cpu().double()
    x_hat = oracles.decode(packed, norms, centroids, rotation)
    length = x64.square().sum(-1)
    ratio = {
        "l2": norms.cpu().double().squeeze(-1) / length.sqrt(),
        "preserve": (x_hat.square().sum(-1) / length).sqrt(),
        "unbiased": (x_hat * x64).sum(-1) / length,
    }[norm]
    assert (ratio - 1).abs().max() < 2.0**-8 * 1.001
    assert (ratio - 1).mean().abs() < 2.0**-10  # rounded, not truncated


# ------------------------------------------------------------------------------- exact arithmetic


def permutation(dim: int) -> Tensor:
    """A matrix that only moves coordinates: x[i] goes to place i · 3 + 1 modulo dim."""
    pi = torch.zeros(dim, dim)
    pi[(3 * torch.arange(dim) + 1) % dim, torch.arange(dim)] = 1
    return pi


def test_rotation_is_applied_and_not_its_transpose(backend: Backend) -> None:
    dim = 16  # 3 has an inverse modulo 16
    pi = permutation(dim).to(backend.device)
    boundaries = torch.arange(-7.0, 8.0, device=backend.device) / 10
    levels = torch.arange(16.0, device=backend.device)
    x = torch.zeros(dim, dim)
    x.fill_diagonal_(2.0)  # vector i has its whole length in coordinate i
    packed, norms = backend.ops.compress(x.to(backend.device), pi, boundaries)
    assert (norms == 2).all()
    index = oracles.unpack(packed)
    for i in range(dim):
        row = torch.full((dim,), 7)  # seven boundaries are below 0, the eighth is 0
        row[(3 * i + 1) % dim] = 15
        assert torch.equal(index[i], row), i
    back = backend.ops.decompress(packed, norms, levels, pi, dtype=torch.float32).cpu()
    assert torch.equal(back, 2 * torch.where(torch.eye(dim) > 0, 15.0, 7.0))


def test_a_value_on_a_boundary_belongs_below_it(backend: Backend) -> None:
    """index counts the boundaries *below* y: exact numbers, no rounding anywhere."""
    boundaries = torch.tensor([-0.75, -0.5, -0.25, -0.125, *[0.0] * 7, 0.125, 0.25, 0.5, 0.75])
    pi = torch.eye(16, device=backend.device)
    x = torch.tensor([[0.25, -0.25] * 8, [0.5, -0.5, 0.5, -0.5] + [0.0] * 12])
    x[1, 4] = -0.0
    packed, norms = backend.ops.compress(x.to(backend.device), pi, boundaries.to(backend.device))
    assert (norms == 1).all()
    assert oracles.unpack(packed)[0].tolist() == [12, 2] * 8
    assert oracles.unpack(packed)[1].tolist() == [13, 1, 13, 1] + [4] * 12


@pytest.mark.parametrize(
    "boundaries",
    [
        [-2.0, -1.5, -1.0, -0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0],
        [-2.0, -1.5, -1.0, -0.8, -0.6, -0.4, -0.001, 0.0, 0.001, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0],
        [0.05 * i for i in range(15)],
        [0.3 + 0.004 * i for i in range(8)] + [0.7 + 0.004 * i for i in range(7)],
        [0.3 + 1e-9 * i for i in range(15)],
        [-math.inf] * 2 + [0.1 * i for i in range(11)] + [math.inf] * 2,
    ],
    ids=["even", "three close together", "on one side", "two crowds", "one value", "infinite"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **DTYPE_IDS)
def test_any_ascending_boundaries(
    backend: Backend, boundaries: list[float], dtype: torch.dtype
) -> None:
    dim = 128
    x = randn(1000, dim, seed=3, dtype=dtype).to(backend.device)
    pi = tq.rotation(dim).to(backend.device)
    at = (torch.tensor(boundaries) / math.sqrt(dim)).to(backend.device)
    packed, _ = backend.ops.compress(x, pi, at)
    expected = oracles.encode(x, pi, at)
    differs = oracles.unpack(packed) != expected.index  # by more than one, where they crowd
    assert not (differs & ~expected.disputable).any()
    oracles.assert_rare(differs)


def test_high_nibble_is_the_even_coordinate(backend: Backend) -> None:
    levels = torch.arange(16.0, device=backend.device)
    pi = torch.eye(512, device=backend.device)
    packed = torch.arange(256, dtype=torch.uint8, device=backend.device)
    norms = torch.ones(1, device=backend.device)
    x = backend.ops.decompress(packed, norms, levels, pi).cpu()
    assert torch.equal(x[0::2], torch.arange(16.0).repeat_interleave(16))
    assert torch.equal(x[1::2], torch.arange(16.0).repeat(16))


def test_any_orthogonal_matrix_will_do(backend: Backend) -> None:
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 64:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1),
                              torch.cat([hadamard, -hadamard], 1)])  # fmt: skip
    pi = (hadamard / 8).to(backend.device)
    centroids, boundaries, _ = constants(64, backend)
    x = randn(100, 64, seed=3).to(backend.device)
    packed, norms = backend.ops.compress(x, pi, boundaries)
    oracles.assert_codes(packed, oracles.encode(x, pi, boundaries))
    x_hat = backend.ops.decompress(packed, norms, centroids, pi, dtype=torch.float32)
    error = (x_hat - x).square().sum() / x.square().sum()
    assert error.item() < 0.012


@pytest.mark.parametrize("dtype", FLOATS, **DTYPE_IDS)
def test_constants_of_any_float_type_and_layout(backend: Backend, dtype: torch.dtype) -> None:
    """They are taken as float32, whatever they come as."""
    dim, x = 32, randn(7, 32, seed=4).to(backend.device)
    given_constants = [
        relayout(t.to(dtype), layout)
        for t, layout in zip(constants(dim, backend), ["gaps", "sliced", "reversed"])
    ]
    centroids, boundaries, rotation = given_constants
    packed, norms = backend.ops.compress(
        x, rotation, boundaries, centroids=centroids, norm="preserve"
    )
    plain = [t.float().contiguous() for t in given_constants]
    want = backend.ops.compress(x, plain[2], plain[1], centroids=plain[0], norm="preserve")
    assert same_bits(packed, want[0])
    assert same_bits(norms, want[1])
    back = backend.ops.decompress(packed, norms, centroids, rotation)
    assert same_bits(back, backend.ops.decompress(packed, norms, plain[0], plain[2]))


# ------------------------------------------------------------------------------- shapes, strides

shapes = st.lists(st.integers(1, 4), min_size=0, max_size=5)
dims = st.sampled_from([16, 18, 30, 34, 48, 64, 98, 130])


@given(
    shape=shapes, dim=dims, dtype=st.sampled_from(FLOATS), layout=st.sampled_from(LAYOUTS),
    norm=st.sampled_from(POLICIES), seed=st.integers(0, 5),
)  # fmt: skip
def test_compress_any_shape_and_stride(
    backend: Backend, shape: list[int], dim: int, dtype: torch.dtype, layout: str, norm: str,
    seed: int,
) -> None:  # fmt: skip
    x = randn(*shape, dim, seed=seed, dtype=dtype).to(backend.device)
    check_compress(backend, relayout(x, layout), norm=norm)


@given(
    shape=shapes, dim=dims, layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    norm_dtype=st.sampled_from(NORM_DTYPES), dtype=st.sampled_from([None, *FLOATS]),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_decompress_any_shape_and_stride(
    backend: Backend, shape: list[int], dim: int, layouts: tuple[str, str],
    norm_dtype: torch.dtype, dtype: torch.dtype | None, seed: int,
) -> None:  # fmt: skip
    g = oracles.generator(seed)
    packed = torch.randint(0, 256, (*shape, dim // 2), dtype=torch.uint8, generator=g)
    norms = torch.randn(*shape, 1, generator=g).to(norm_dtype)
    check_decompress(
        backend, relayout(packed.to(backend.device), layouts[0]),
        relayout(norms.to(backend.device), layouts[1]), dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, **DTYPE_IDS)
def test_expanded_and_fused_inputs(backend: Backend, dtype: torch.dtype) -> None:
    one = randn(1, 3, 1, 64, seed=5, dtype=dtype).to(backend.device)
    want, want_norms = check_compress(backend, one)
    _, boundaries, rotation = constants(64, backend)
    packed, norms = backend.ops.compress(one.expand(2, 3, 4, 64), rotation, boundaries)
    assert same_bits(packed, want.expand(2, 3, 4, 32))
    assert same_bits(norms, want_norms.expand(2, 3, 4, 1))
    check_decompress(
        backend, packed[:, :, :1].expand(2, 3, 6, 32), norms[:, :, 1:2].expand(2, 3, 6, 1)
    )
    qkv = randn(2, 5, 3, 4, 32, seed=6, dtype=dtype).to(backend.device)  # [B, T, 3, H, D]
    for part in range(3):
        check_compress(backend, qkv[:, :, part].transpose(1, 2))


@pytest.mark.parametrize(
    "shape", [(0,), (2, 0), (0, 3, 5), (2, 3, 0), (2, 0, 4, 1), (1, 2, 0, 4, 3)]
)
def test_empty_tensors(backend: Backend, shape: tuple[int, ...]) -> None:
    centroids, boundaries, rotation = constants(32, backend)
    x = torch.zeros(*shape, 32, device=backend.device)
    offset = torch.zeros(32, device=backend.device)
    packed, norms = backend.ops.compress(x, rotation, boundaries, offset=offset)
    assert packed.shape == (*shape, 16)
    assert norms.shape == (*shape, 1)
    back = backend.ops.decompress(packed, norms, centroids, rotation, offset=offset)
    assert back.shape == x.shape


@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(64, torch.float32)] + [(d, torch.bfloat16) for d in (64, 80, 96, 128, 192, 256, 512)],
)
def test_many_vectors_take_all_threads(
    backend: Backend, two_threads: None, dim: int, dtype: torch.dtype, norm: str
) -> None:
    """More than one block of rows, and a last one that is not full."""
    x = randn(2, 3, 217, dim, seed=8, dtype=dtype).to(backend.device)
    offset = randn(3, 1, dim, seed=9).to(backend.device)
    packed, norms = check_compress(backend, x, norm=norm)
    check_decompress(backend, packed, norms, dtype=dtype)
    check_decompress(backend, packed, norms, dtype=dtype, offset=offset)


# --------------------------------------------------------------------------------------- offset


@given(
    rank=st.integers(1, 6), offset_rank=st.integers(1, 6), dim=st.sampled_from([16, 30, 64]),
    ones=st.lists(st.booleans(), min_size=6, max_size=6), dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 3),
)  # fmt: skip
def test_offsets_of_all_broadcastable_shapes(
    backend: Backend, rank: int, offset_rank: int, dim: int, ones: list[bool],
    dtype: torch.dtype, layout: str, seed: int,
) -> None:  # fmt: skip
    shape = [2, 3, 2, 3, 4, dim][-rank:]
    target = [*shape[:-2], 1, dim][-rank:]
    offset_shape = [1 if one else n for one, n in zip(ones, target[:-1])] + [dim]
    offset_shape = offset_shape[-offset_rank:]
    x = randn(*shape, seed=seed).to(backend.device)
    offset = relayout(randn(*offset_shape, seed=seed + 50, dtype=dtype).to(backend.device), layout)
    packed, norms = check_compress(backend, x, offset=offset)
    check_decompress(backend, packed, norms, offset=offset, dtype=torch.float32)


def test_offset_is_subtracted_and_added_back(backend: Backend) -> None:
    """A large common part costs nothing when it is the offset."""
    centroids, boundaries, rotation = constants(128, backend)
    offset = (50 * randn(1, 2, 1, 128, seed=9)).to(backend.device)
    x = randn(3, 2, 40, 128, seed=10).to(backend.device) + offset
    stored = backend.ops.compress(x, rotation, boundaries, offset=offset)
    x_hat = backend.ops.decompress(*stored, centroids, rotation, offset=offset, dtype=torch.float32)
    assert float((x_hat - x).square().sum() / (x - offset).square().sum()) < 0.01


# ------------------------------------------------------------------------------- unusual numbers


@pytest.mark.parametrize(
    ("dim", "dtype"), [(48, torch.float32), (64, torch.bfloat16), (64, torch.float16)]
)
def test_zero_vectors_come_back_as_exact_zeros(
    backend: Backend, dim: int, dtype: torch.dtype
) -> None:
    centroids, boundaries, rotation = constants(dim, backend)
    x = randn(6, dim, seed=11, dtype=dtype).to(backend.device)
    x[2] = 0
    x[4] = -0.0
    for norm in POLICIES:
        packed, norms = backend.ops.compress(
            x, rotation, boundaries, centroids=centroids, norm=norm
        )
        assert norms.flatten()[[2, 4]].tolist() == [0, 0]
        assert (packed[[2, 4]] == 0x77).all()  # seven boundaries are below a coordinate of 0
        back = backend.ops.decompress(packed, norms, centroids, rotation, dtype=torch.float32)
        assert (back[[2, 4]] == 0).all()
        assert (back[[0, 1, 3, 5]] != 0).any(1).all()


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e-4, 1e4, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **DTYPE_IDS)
def test_no_underflow_or_overflow(
    backend: Backend, size: float, norm: str, dtype: torch.dtype
) -> None:
    """The squares of such numbers leave float32's range; their directions are as good as any."""
    x = randn(50, 64, seed=12)
    x = (x / x.abs().max() * size).to(dtype).to(backend.device)
    packed, norms = check_compress(backend, x, norm=norm)
    centroids, _, rotation = constants(64, backend)
    back = backend.ops.decompress(packed, norms, centroids, rotation, dtype=torch.float32)
    error = (
        back.cpu().double() - x.cpu().double()
    ).square().sum() / x.cpu().double().square().sum()
    assert float(error) < 0.0105


def test_mixed_sizes_within_a_vector(backend: Backend) -> None:
    x = randn(40, 64, seed=13) * torch.logspace(-30, 30, 64)
    check_compress(backend, x.to(backend.device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], **DTYPE_IDS)
def test_subnormal_input(backend: Backend, dtype: torch.dtype) -> None:
    """The smallest numbers of a type are no zeros (float32's may not fit a bfloat16 norm)."""
    tiny = torch.finfo(dtype).tiny
    x = (randn(20, 32, seed=14).double() * tiny / 8).to(dtype).to(backend.device)
    assert (x != 0).any(1).all()
    centroids, boundaries, rotation = constants(32, backend)
    packed, norms = backend.ops.compress(x, rotation, boundaries)
    oracles.assert_rounded(norms, oracles.encode(x, rotation, boundaries).length, slack=1e-5)
    if dtype == torch.float16:  # normal numbers in float32
        check_compress(backend, x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize(
    ("tokens", "dim", "dtype"),
    [(40, 48, torch.float32), (40, 64, torch.bfloat16), (1100, 64, torch.bfloat16),
     (1100, 64, torch.float16)],
)  # fmt: skip
def test_a_bad_vector_is_known_by_its_norm_and_leaves_others_alone(
    backend: Backend, value: float, norm: str, tokens: int, dim: int, dtype: torch.dtype
) -> None:
    centroids, boundaries, rotation = constants(dim, backend)
    clean = randn(2, tokens, dim, seed=15, dtype=dtype).to(backend.device)
    dirty = clean.clone()
    dirty[0, 3, 17] = value
    dirty[1, 39, 0] = value
    dirty[1, 38] = value
    good = torch.ones(2, tokens, dtype=torch.bool, device=backend.device)
    good[0, 3] = good[1, 38] = good[1, 39] = False

    def stored(x: Tensor) -> tuple[Tensor, Tensor]:
        return backend.ops.compress(x, rotation, boundaries, centroids=centroids, norm=norm)

    packed, norms = stored(dirty)
    want, want_norms = stored(clean)
    assert same_bits(packed[good], want[good])
    assert same_bits(norms[good], want_norms[good])
    bad = norms[~good].float().cpu()
    assert bad.isnan().all() if math.isnan(value) else (bad == math.inf).all()
    assert (packed[~good] == 0x77).all()  # without a direction the bytes are those of zeros
    back = backend.ops.decompress(packed, norms, centroids, rotation, dtype=torch.float32)
    assert back[good].isfinite().all()
    assert not back[~good].isfinite().any()


def test_infinity_and_nan_together_are_nan(backend: Backend) -> None:
    _, boundaries, rotation = constants(32, backend)
    x = randn(1, 32, seed=16).to(backend.device)
    for places in [(3, 20), (20, 3)]:
        x[0, places[0]], x[0, places[1]] = math.inf, math.nan
        assert backend.ops.compress(x, rotation, boundaries)[1].isnan().all()


def test_too_long_for_float32_is_infinite(backend: Backend) -> None:
    _, boundaries, rotation = constants(512, backend)
    x = torch.full((2, 512), 1e38, device=backend.device)
    x[1] = 1
    norms = backend.ops.compress(x, rotation, boundaries)[1].flatten().tolist()
    assert norms[0] == math.inf
    assert norms[1] == pytest.approx(math.sqrt(512), rel=2.0**-8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_decompress_a_bad_norm(backend: Backend, value: float) -> None:
    centroids, _, rotation = constants(32, backend)
    packed = torch.randint(0, 256, (5, 16), dtype=torch.uint8, generator=oracles.generator(2))
    norms = torch.tensor([[1.0], [value], [0.0], [-2.0], [3.0]])
    back = backend.ops.decompress(
        packed.to(backend.device), norms.to(backend.device), centroids, rotation
    ).cpu()
    assert not back[1].isfinite().any()
    exact = oracles.decode(packed, norms, centroids, rotation)
    keep = [0, 2, 3, 4]
    oracles.assert_rounded(back[keep], exact[keep], slack=3e-7, absolute=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, **DTYPE_IDS)
def test_decompress_rounds_once_and_saturates(backend: Backend, dtype: torch.dtype) -> None:
    """Large, tiny and tied values in every output type."""
    pi = torch.eye(16, device=backend.device)
    levels = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11,
                           -1 - 2.0**-8, 0.0, -0.5, 1.5, *[2.0**-k for k in range(8)]])  # fmt: skip
    packed = (torch.arange(0, 16, 2) * 16 + torch.arange(1, 16, 2)).to(torch.uint8).expand(9, 8)
    norms = torch.tensor([1.0, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-126, 2.0**-133, 65504.0, 65519.0,
                          65536.0]).unsqueeze(-1)  # fmt: skip
    got = backend.ops.decompress(
        packed.to(backend.device), norms.to(backend.device), levels.to(backend.device), pi,
        dtype=dtype,
    ).cpu()  # fmt: skip
    # These products are exact in float32; torch's conversion rounds to nearest, ties to even.
    want = (norms * levels).to(dtype)
    assert same_bits(got + 0.0, want + 0.0)  # the sign of a zero is nobody's business


# --------------------------------------------------------------------------------- the bars


@pytest.mark.parametrize(
    ("dim", "error"), [(64, 0.00913), (128, 0.00931), (256, 0.00941), (512, 0.00945)]
)
def test_squared_error_and_cosine_on_the_unit_sphere(
    kernels: Backend, dim: int, error: float
) -> None:
    x = torch.nn.functional.normalize(randn(2**20 // dim, dim, seed=17), dim=-1).to(kernels.device)
    centroids, boundaries, rotation = constants(dim, kernels)
    stored = kernels.ops.compress(x, rotation, boundaries)
    x_hat = kernels.ops.decompress(*stored, centroids, rotation, dtype=torch.float32)
    assert float((x_hat - x).square().sum(-1).mean()) == pytest.approx(error, rel=0.01)
    cosine = torch.nn.functional.cosine_similarity(x, x_hat, dim=-1).mean()
    # 1 - |x - x̂|² / 2 for unit vectors; the table has .9954 for 128.
    assert float(cosine) == pytest.approx(1 - error / 2, abs=0.00015)
