"""The two constants: the Lloyd-Max codebook and the random rotation."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import turboquant as tq
from turboquant import _C, constants

pytestmark = pytest.mark.usefixtures("one_thread")

DIMS = [16, 18, 64, 80, 96, 128, 192, 256, 510, 512]


@pytest.fixture
def cold() -> Iterator[None]:
    """Nothing computed yet, and nothing left behind for others."""

    def forget() -> None:
        for value in vars(constants).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()

    forget()
    yield
    forget()


# ------------------------------------------------------------------------------------ codebook


@pytest.mark.parametrize("dim", DIMS)
def test_codebook_is_the_optimum(dim: int) -> None:
    """To a float32 unit: against a float64 solution by another method."""
    centroids, boundaries = tq.codebook(dim)
    assert centroids.shape == (16,)
    assert boundaries.shape == (15,)
    assert centroids.dtype == boundaries.dtype == torch.float32
    exact = np.array(oracles.max_levels()) / math.sqrt(dim)
    np.testing.assert_allclose(centroids[8:].double().numpy(), exact, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("dim", DIMS)
def test_levels_are_the_means_of_their_cells(dim: int) -> None:
    centroids, boundaries = (t.double().tolist() for t in tq.codebook(dim))
    edges = [-math.inf, *(b * math.sqrt(dim) for b in boundaries), math.inf]
    for i, centroid in enumerate(centroids):
        mean = oracles.normal_mean(edges[i], edges[i + 1]) / math.sqrt(dim)
        assert centroid == pytest.approx(mean, rel=2.0**-22)


@pytest.mark.parametrize("dim", range(16, 513, 2))
def test_codebook_is_sorted_symmetric_and_halved_by_midpoints(dim: int) -> None:
    centroids, boundaries = tq.codebook(dim)
    assert (centroids[1:] > centroids[:-1]).all()
    assert oracles.same_bits(centroids, -centroids.flip(0))
    assert torch.equal(boundaries, -boundaries.flip(0))
    assert boundaries[7] == 0
    midpoints = (centroids[:-1].double() + centroids[1:].double()) / 2
    oracles.assert_rounded(boundaries, midpoints, slack=0)


@pytest.mark.parametrize("bad", [-2, 0, 14, 15, 17, 127, 511, 513, 514, 2**31, 2**40 + 64])
@pytest.mark.parametrize("function", [tq.codebook, tq.rotation, _C.codebook, _C.check_dim])
def test_dims_that_are_refused(function: Callable[[int], object], bad: int) -> None:
    with pytest.raises(ValueError, match=f"^head dim must be even, from 16 to 512, got {bad}$"):
        function(bad)


SQUARED_ERROR = {64: 0.00913, 128: 0.00931, 256: 0.00941, 512: 0.00945}  # the published table


@pytest.mark.parametrize(("dim", "error"), SQUARED_ERROR.items())
def test_expected_squared_error(dim: int, error: float) -> None:
    """By integration over the exact distribution of a coordinate, no sampling."""
    centroids = tq.codebook(dim)[0].tolist()
    assert oracles.expected_squared_error(dim, centroids) == pytest.approx(error, rel=0.01)


# ------------------------------------------------------------------------------------ rotation


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("seed", [42, 0, 7])
def test_rotation_is_orthogonal(dim: int, seed: int) -> None:
    pi = tq.rotation(dim, seed)
    assert pi.dtype == torch.float32
    assert pi.shape == (dim, dim)
    assert pi.is_contiguous()
    error = pi.double() @ pi.double().T - torch.eye(dim, dtype=torch.float64)
    assert error.abs().max() < 2e-6


@pytest.mark.parametrize("dim", [16, 64, 98])
def test_rotation_is_the_signed_qr_of_the_seeded_gaussian(dim: int) -> None:
    """Q·R of a Gaussian with R's diagonal positive: exactly that makes Q Haar distributed."""
    gaussian = torch.randn(dim, dim, generator=oracles.generator(5)).double()
    pi = tq.rotation(dim, 5).double()
    r = pi.T @ gaussian
    assert (r.diagonal() > 0).all()
    assert r.tril(-1).abs().max() < 1e-5


def test_rotation_is_haar_distributed() -> None:
    """Moments over many seeds; without the signs the diagonal alone gives it away."""
    many = torch.stack([tq.rotation(16, seed) for seed in range(400)]).double()
    error = 1 / math.sqrt(16 * len(many))  # of the mean of `many` entries
    assert many.mean(0).abs().max() < 5 * error
    assert many.diagonal(dim1=1, dim2=2).mean().abs() < 4 * error / 4
    assert (many.square().mean(0) - 1 / 16).abs().max() < 5 * error * math.sqrt(2) / 4
    assert many.pow(4).mean() == pytest.approx(3 / (16 * 18), rel=0.03)


def test_rotation_depends_on_dim_and_seed() -> None:
    assert oracles.same_bits(tq.rotation(32), tq.rotation(32, 42))
    assert oracles.same_bits(tq.rotation(32, seed=3), tq.rotation(32, 3))
    assert not torch.equal(tq.rotation(32, 1), tq.rotation(32, 2))


def test_global_random_state_is_left_alone(cold: None) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tq.rotation(48, 11)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    constants._rotation.cache_clear()
    assert oracles.same_bits(first, tq.rotation(48, 11))


# --------------------------------------------------------------------- whoever calls, and whence


def both(dim: int = 34, seed: int = 77) -> list[Tensor]:
    return [*tq.codebook(dim), tq.rotation(dim, seed)]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "plain": nullcontext,
    "meta device": lambda: torch.device("meta"),
    "fake mode": FakeTensorMode,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_real_values_wherever_they_are_first_asked_for(cold: None, surroundings: str) -> None:
    with SURROUNDINGS[surroundings]():
        inside = both()
    after = both()
    constants_later = [*(torch.from_numpy(a) for a in _C.codebook(34))]
    assert oracles.same_bits(inside[0], constants_later[0])
    assert oracles.same_bits(inside[1], constants_later[1])
    for first, later in zip(inside, after):
        for t in (first, later):
            assert type(t) is Tensor
            assert not isinstance(t, FakeTensor)
            assert t.device.type == "cpu"
            assert t.dtype == torch.float32
            assert not t.requires_grad
            assert not t.is_inference()
        assert oracles.same_bits(first, later)


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_usable_in_autograd_and_in_place_afterwards(cold: None, surroundings: str) -> None:
    with SURROUNDINGS[surroundings]():
        values = both()
    weight = torch.ones(34, requires_grad=True)
    (values[2] @ weight).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, values[2].sum(0), atol=1e-5)
    for t in values:
        t.mul_(2).requires_grad_()
        t.sum().backward()
        assert t.grad is not None


def test_results_are_fresh_copies(cold: None) -> None:
    before = [t.clone() for t in both()]
    for t in both():
        t.fill_(123)
    for array in _C.codebook(34):
        array[:] = 123
    for t, expected in zip(both(), before):
        assert oracles.same_bits(t, expected)


def test_threads_get_equal_bits(cold: None) -> None:
    barrier = threading.Barrier(12)
    results: list[list[Tensor]] = []

    def work(i: int) -> None:
        barrier.wait()
        mine = [t for dim in (66, 130, 34)[i % 3 :] for t in both(dim)]
        results.append([*(t.clone() for t in mine[-3:])])
        for t in mine:
            t.zero_()  # spoils nobody's

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 12
    expected = both(34)
    for values in results:
        for value, want in zip(values, expected):
            assert oracles.same_bits(value, want)


# ------------------------------------------------------------------------------------- nibbles


def test_all_nibble_pairs_round_trip() -> None:
    even, odd = (a.ravel() for a in np.meshgrid(np.arange(16), np.arange(16), indexing="ij"))
    byte = _C.pack(even, odd)
    assert byte.dtype == np.uint8
    np.testing.assert_array_equal(byte, 16 * even + odd)
    np.testing.assert_array_equal(_C.even_index(byte), even)
    np.testing.assert_array_equal(_C.odd_index(byte), odd)
    assert len(np.unique(byte)) == 256


def test_reference_packs_as_the_format_says() -> None:
    from turboquant import reference

    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16))  # [256, 2]
    packed = reference.pack(pairs)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed.flatten().long(), torch.arange(256))
    assert torch.equal(reference.unpack(packed), pairs)
    index = torch.randint(0, 16, (3, 5, 64), generator=oracles.generator(1))
    assert torch.equal(reference.unpack(reference.pack(index)), index)
    assert torch.equal(oracles.unpack(reference.pack(index)), index)
