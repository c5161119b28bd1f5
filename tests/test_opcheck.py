"""torch.library.opcheck: schema, fake kernel and dispatch of every op, as torch sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_checks import on_device
from backends import Backend
from oracles import (
    FLOATS,
    LAYOUTS,
    NORM_DTYPES,
    QUERY_DTYPES,
    randn,
    random_cache,
    relayout,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import turboquant as tq

pytestmark = pytest.mark.usefixtures("one_thread")

compress = torch.ops.turboquant.compress.default
decompress = torch.ops.turboquant.decompress.default
update_ = torch.ops.turboquant.update_.default
tq4_sdpa = torch.ops.turboquant.tq4_sdpa.default
tq4_attention = torch.ops.turboquant.tq4_attention.default

DTYPE_IDS = {"ids": lambda d: str(d).removeprefix("torch.")}


def check(backend: Backend, op: Any, args: tuple[Any, ...], **kwargs: Any) -> None:
    args = tuple(on_device(backend, *args))
    kwargs = dict(zip(kwargs, on_device(backend, *kwargs.values())))
    torch.library.opcheck(op, args, kwargs)


def constants(dim: int) -> tuple[Tensor, Tensor, Tensor]:
    centroids, boundaries = tq.codebook(dim)
    return centroids, boundaries, tq.rotation(dim)


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    list(zip([(30,), (2, 3, 64), (1, 2, 3, 5, 18), (2, 1, 4, 48)], LAYOUTS, FLOATS)),
)
def test_codec(best: Backend, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    centroids, boundaries, pi = constants(shape[-1])
    x = relayout(randn(*shape, dtype=dtype), layout)
    check(best, compress, (x, pi, boundaries))
    offset = randn(shape[-1])
    check(best, compress, (x, pi, boundaries), centroids=centroids, norm="unbiased",
          offset=offset)  # fmt: skip
    stored = tuple(relayout(t, layout) for t in tq.compress(x, pi, boundaries))
    check(best, decompress, (*stored, centroids, pi))
    check(best, decompress, (*stored, centroids, pi), offset=offset, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "layout", "batched"), list(zip(FLOATS, LAYOUTS, [False, True] * 2))
)
def test_update(best: Backend, dtype: torch.dtype, layout: str, batched: bool) -> None:
    centroids, boundaries, pi = constants(30)
    k, v = randn(2, 2, 3, 4, 30, dtype=dtype)
    pos = torch.tensor([3, 0, -1, 5], dtype=torch.int32)
    cache = random_cache(2, 3, 6, 30, norm_dtype=NORM_DTYPES[batched])
    state = tuple(relayout(t, layout) for t in cache.args[:4])
    check(best, update_, (k, v, pos.repeat(2, 1) if batched else pos, pi, boundaries, *state))
    check(best, update_, (k, v, pos.long(), pi, boundaries, *state), centroids=centroids,
          k_norm="preserve", v_norm="unbiased", k_offset=randn(3, 1, 30))  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "layout"), list(zip(QUERY_DTYPES, ["contiguous", "reversed", "gaps"]))
)
def test_attention(best: Backend, dtype: torch.dtype, layout: str) -> None:
    query = relayout(randn(2, 6, 3, 30, dtype=dtype), layout)
    cache = random_cache(2, 3, 7, 30).map(lambda t: relayout(t, layout))
    mask = relayout(torch.ones(2, 1, 3, 7, dtype=torch.bool), layout)
    kv_len = torch.tensor([7, 2])
    rest = (mask, False, 0.3, kv_len, True)
    extra = {"kv_start": torch.tensor(1), "softcap": 5.0, "sinks": randn(6)}
    check(best, tq4_sdpa, (query, *cache.args))
    check(best, tq4_sdpa, (query, *cache.args, *rest))
    check(best, tq4_attention, (query, *cache.args))
    check(best, tq4_attention, (query, *cache.args, *rest), **extra)


def test_empty_shapes(best: Backend) -> None:
    centroids, boundaries, pi = constants(16)
    check(best, compress, (torch.zeros(2, 0, 16), pi, boundaries))
    check(best, decompress, (torch.zeros(0, 8, dtype=torch.uint8), torch.zeros(0, 1),
                                centroids, pi))  # fmt: skip
    check(best, update_, (torch.zeros(1, 1, 0, 16), torch.zeros(1, 1, 0, 16),
                             torch.zeros(0, dtype=torch.int64), pi, boundaries,
                             *random_cache(1, 1, 4, 16).args[:4]))  # fmt: skip
    for B, Lq, Lkv in [(0, 1, 1), (1, 0, 1), (1, 2, 0)]:
        check(best, tq4_attention, (torch.zeros(B, 2, Lq, 16), *random_cache(B, 1, Lkv, 16).args))


# ----------------------------------------------------- the fake best' shapes, types and strides


def layouts() -> dict[str, Tensor]:
    plain = randn(2, 6, 5, 32)
    return {
        "contiguous": plain,
        "transposed": randn(2, 5, 6, 32).transpose(1, 2),
        "fused": randn(2, 5, 18, 32).transpose(1, 2)[:, 6:12],
        "last stride": randn(2, 6, 5, 64)[..., ::2],
        "expanded": plain[:1].expand(2, 6, 5, 32),
        "expanded tokens": plain[:, :, :1].expand(2, 6, 5, 32),
        "permuted": randn(32, 2, 6, 5).permute(1, 2, 3, 0),
        "channels last": plain.contiguous(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("dtype", QUERY_DTYPES, **DTYPE_IDS)
def test_fake_and_real_strides_agree(best: Backend, layout: str, dtype: torch.dtype) -> None:
    # A conversion keeps neither gaps nor zero strides, so the layout is made in the type.
    source = layouts()[layout]
    query = torch.as_strided(
        torch.zeros(source.untyped_storage().nbytes() // 4, dtype=dtype), source.size(),
        source.stride(), source.storage_offset(),
    )  # fmt: skip
    cache = random_cache(2, 3, 7, 32)
    query, cache = on_device(best, query, cache)
    real = tq.tq4_attention(query, *cache.args)
    assert real[0].stride() == torch.empty_like(query).stride()
    with FakeTensorMode() as mode:
        fake_query = mode.from_tensor(query)
        assert fake_query.stride() == query.stride()
        arguments = [mode.from_tensor(t) for t in cache.args]
        fake = tq.tq4_attention(fake_query, *arguments)
        fake_sdpa = tq.tq4_sdpa(fake_query, *arguments)
    for a, b in zip(real, fake):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
    assert fake_sdpa.stride() == real[0].stride()


@pytest.mark.parametrize("layout", ["contiguous", "reversed", "sliced", "gaps"])
@pytest.mark.parametrize("dtype", [None, *FLOATS])
def test_fake_and_real_codec_agree(best: Backend, layout: str, dtype: torch.dtype | None) -> None:
    centroids, boundaries, pi = on_device(best, *constants(32))
    [x] = on_device(best, relayout(randn(2, 3, 4, 32, dtype=dtype or torch.float32), layout))
    real = (*tq.compress(x, pi, boundaries),)
    stored = [relayout(t, layout) for t in real]
    real += (tq.decompress(*stored, centroids, pi, dtype=dtype),)
    with FakeTensorMode() as mode:
        constant = [mode.from_tensor(t) for t in (pi, boundaries, centroids)]
        fake = (*tq.compress(mode.from_tensor(x), *constant[:2]),)
        fake += (tq.decompress(*(mode.from_tensor(t) for t in stored), constant[2], constant[0],
                               dtype=dtype),)  # fmt: skip
    for a, b in zip(real, fake):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_meta_tensors(best: Backend) -> None:
    query, cache = randn(2, 6, 3, 32).to("meta"), random_cache(2, 3, 7, 32)
    meta = [t.to("meta") for t in cache.args]
    kv_len = torch.zeros(2, dtype=torch.int32, device="meta")
    out, lse = tq.tq4_attention(query, *meta, kv_len=kv_len)
    assert (out.shape, out.dtype, out.device.type) == (query.shape, query.dtype, "meta")
    assert (lse.shape, lse.dtype) == ((2, 6, 3), torch.float32)
