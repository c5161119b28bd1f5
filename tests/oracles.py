"""What the library should compute, written a second time: float64, loops and closed forms.

Nothing here uses the library's arithmetic; the constants (codebook, rotation) are arguments.
Everything runs on the CPU, whatever device the tested tensors are on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import turboquant as tq

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
QUERY_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORM_DTYPES = [torch.bfloat16, torch.float32]

# Half a unit in the last place of a number's own binade is at most this part of it.
HALF_ULP = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# ... and below the smallest normal number, this much.
HALF_SUBNORMAL = {
    torch.float64: 0.0,
    torch.float32: 2.0**-150,
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
}


# ------------------------------------------------------------------------------ random numbers


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*sizes, generator=generator(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal type, shape and bits; NaNs too."""

    def raw(t: Tensor) -> Tensor:
        return t.detach().cpu().reshape(-1).clone().view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


# ------------------------------------------------------------------------------------- layouts

LAYOUTS = ["contiguous", "reversed", "sliced", "gaps"]


def relayout(t: Tensor, layout: str) -> Tensor:
    """The same numbers at other places in memory, with poison around them."""
    poison = {torch.uint8: 0xA5, torch.bool: True}.get(t.dtype, 77)
    fill = math.nan if t.is_floating_point() else poison
    if layout == "contiguous":
        return t.clone(memory_format=torch.contiguous_format)
    if layout == "reversed":  # the first dimension is the fastest
        dims = list(range(t.dim()))[::-1]
        return t.permute(dims).contiguous().permute(dims)
    if layout == "sliced":  # every dimension is part of a longer one
        buffer = t.new_full([n + 3 for n in t.shape], fill)
        view = buffer[tuple(slice(1, n + 1) for n in t.shape)]
    else:  # "gaps": every second element of the last dimension
        buffer = t.new_full([*t.shape[:-1], 2 * t.shape[-1] + 1], fill)
        view = buffer[..., 1::2]
    view.copy_(t)
    return view


# ------------------------------------------------------------------- the Lloyd-Max quantiser


def normal_density(x: float) -> float:
    return 0.0 if math.isinf(x) else math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def normal_mean(a: float, b: float) -> float:
    """E[X | a < X < b] of a standard normal X."""
    if a < 0 and b <= 0:
        return -normal_mean(-b, -a)
    if a >= 0:  # upper tails: their difference keeps its digits
        probability = math.erfc(a / math.sqrt(2)) / 2 - math.erfc(b / math.sqrt(2)) / 2
    else:
        probability = (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) / 2
    return (normal_density(a) - normal_density(b)) / probability


def bisect(f: Callable[[float], float], low: float, high: float) -> float:
    """Where the increasing function f changes its sign."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if f(middle) > 0 else (middle, high)
    return (low + high) / 2


@functools.cache
def max_levels() -> list[float]:
    """The 8 positive levels for N(0, 1), by Max's shooting: no fixed-point iteration.

    The first level determines the boundary above it (it must be the mean of its cell), that the
    next level (the boundary is the midpoint), and so on; the last must be the mean of its tail.
    """

    def shoot(first: float) -> tuple[list[float], float]:
        levels, lower = [first], 0.0
        for _ in range(7):
            level = levels[-1]
            if normal_mean(lower, math.inf) <= level:
                return levels, 1.0  # no boundary gives this cell such a mean
            upper = bisect(
                lambda u, lower=lower, level=level: normal_mean(lower, u) - level,
                lower + 1e-9,
                12.0,
            )
            levels.append(2 * upper - level)
            lower = upper
        return levels, levels[-1] - normal_mean(lower, math.inf)

    return shoot(bisect(lambda first: shoot(first)[1], 0.05, 0.3))[0]


def expected_squared_error(dim: int, centroids: Sequence[float]) -> float:
    """Of a uniformly random unit vector in `dim` dimensions, by integrating over a coordinate.

    One coordinate has the density (1 - y²)^((dim-3)/2) / Beta(1/2, (dim-1)/2).
    """
    steps = 20_000
    step = 1.0 / steps
    y = (torch.arange(steps, dtype=torch.float64) + 0.5) * step
    beta = math.lgamma(0.5) + math.lgamma((dim - 1) / 2) - math.lgamma(dim / 2)
    density = torch.exp(torch.log1p(-y * y) * (dim - 3) / 2 - beta)
    levels = torch.tensor(centroids, dtype=torch.float64)
    nearest = (y.unsqueeze(-1) - levels).abs().amin(-1)
    return 2 * dim * float((nearest.square() * density).sum() * step)


# --------------------------------------------------------------------------------------- codec


def unpack(packed: Tensor) -> Tensor:
    """Indices 0..15: the even coordinate is the byte's sixteens, the odd one its units."""
    byte = packed.cpu().to(torch.int64)
    index = torch.empty(*byte.shape[:-1], 2 * byte.shape[-1], dtype=torch.int64)
    index[..., 0::2] = torch.div(byte, 16, rounding_mode="floor")
    index[..., 1::2] = torch.remainder(byte, 16)
    return index


@dataclass
class Encoding:
    """What compress should find, in float64."""

    y: Tensor  # rotation · x / |x|
    length: Tensor  # |x|
    index: Tensor  # of y's levels
    disputable: Tensor  # so near a boundary that y may be seen on its other side
    error: float  # how far off y may be


def in_matrix_units(t: Tensor) -> bool:
    """Whether t is rotated by an fp16 rotation: CUDA may do so for 16-bit numbers."""
    return t.is_cuda and t.dtype in (torch.float16, torch.bfloat16)


def half_error(dim: int) -> float:
    """What an fp16 rotation does to a coordinate of a rotated unit vector.

    2.1e-4 of 1/√dim root mean square, for any dim; nine times that, which no test meets by chance.
    """
    return 2.0**-9 / math.sqrt(dim)


def assert_rare(differs: Tensor) -> None:
    """One in a thousand at most, as far as so few can tell."""
    limit = 0.001 * differs.numel()
    assert int(differs.sum()) <= max(1, limit + 3 * math.sqrt(limit))


def encode(
    x: Tensor, rotation: Tensor, boundaries: Tensor, offset: Tensor | None = None
) -> Encoding:
    x64 = x.detach().cpu().double()
    if offset is not None:
        x64 = x64 - offset.detach().cpu().double()
    length = x64.square().sum(-1, keepdim=True).sqrt()
    y = (x64 / torch.where(length > 0, length, 1.0)) @ rotation.cpu().double().T
    index = torch.zeros(y.shape, dtype=torch.int64)
    distance = torch.full(y.shape, math.inf, dtype=torch.float64)
    for b in boundaries.cpu().double().tolist():
        index += y > b
        distance = torch.minimum(distance, (y - b).abs())
    # A float32 sum of D products of two unit vectors; the partial sums stay well below 1.
    error = 2.0**-24 * (4 + math.sqrt(x.shape[-1]) / 2)
    if in_matrix_units(x):
        error = half_error(x.shape[-1])
    return Encoding(y, length, index, distance <= error, error)


def assert_codes(packed: Tensor, expected: Encoding) -> None:
    """Every index is the float64 one, but for values within rounding of a boundary."""
    index = unpack(packed)
    assert index.shape == expected.index.shape
    differs = index != expected.index
    wrong = differs & ~expected.disputable
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} indices differ, the first at "
        f"{wrong.nonzero()[0].tolist()}"
    )
    assert not ((index - expected.index).abs() > 1).any()
    assert_rare(differs)


def assert_rounded(
    got: Tensor, exact: Tensor, slack: float | Tensor = 1e-6, absolute: float | Tensor = 0.0
) -> None:
    """`got` is `exact` rounded once to got's type: half a unit, and `slack` of that in float32."""
    assert got.shape == exact.shape
    got64, exact = got.detach().cpu().double(), exact.double()
    bound = exact.abs() * (HALF_ULP[got.dtype] * (1 + 2.0**-7) + slack)
    bound = bound + HALF_SUBNORMAL[got.dtype] + absolute
    excess = (got64 - exact).abs() - bound
    assert not got64.isnan().any()
    assert not (excess > 0).any(), (
        f"off by {float((got64 - exact).abs().max()):.3g}, "
        f"{float(excess.max()):.3g} more than allowed"
    )


def decode(
    packed: Tensor,
    norms: Tensor,
    centroids: Tensor,
    rotation: Tensor,
    offset: Tensor | None = None,
) -> Tensor:
    """float64: norm · rotationᵀ · centroids[index] + offset."""
    levels = centroids.cpu().double()[unpack(packed)]
    x = norms.detach().cpu().double() * (levels @ rotation.cpu().double())
    return x if offset is None else x + offset.cpu().double()


# ----------------------------------------------------------------------------------- attention


@dataclass(repr=False)
class Cache:
    """The state and constants that attention reads; `random_cache` makes one of random bytes."""

    k_packed: Tensor
    k_norms: Tensor
    v_packed: Tensor
    v_norms: Tensor
    centroids: Tensor
    rotation: Tensor

    def __repr__(self) -> str:  # what a failing example prints
        parts = (f"{list(t.shape)}/{list(t.stride())}" for t in (self.k_packed, self.k_norms))
        return f"Cache({' '.join(parts)} {self.k_norms.dtype})"

    @property
    def args(self) -> tuple[Tensor, ...]:
        return (self.k_packed, self.k_norms, self.v_packed, self.v_norms, self.centroids,
                self.rotation)  # fmt: skip

    def k(self) -> Tensor:
        return decode(self.k_packed, self.k_norms, self.centroids, self.rotation)

    def v(self) -> Tensor:
        return decode(self.v_packed, self.v_norms, self.centroids, self.rotation)

    def map(self, f: Callable[[Tensor], Tensor]) -> Cache:
        """f applied to the four state tensors."""
        return replace(
            self, k_packed=f(self.k_packed), k_norms=f(self.k_norms), v_packed=f(self.v_packed),
            v_norms=f(self.v_norms),
        )  # fmt: skip

    def to(self, device: torch.device) -> Cache:
        return Cache(*(t.to(device) for t in self.args))

    def poisoned(self, unseen: Tensor, value: float = math.nan) -> Cache:
        """Random bytes, and norms of `value`, where `unseen` (bool [B, Lkv]) holds."""
        where = unseen[:, None, :, None]
        noise = generator(99)

        def poison(t: Tensor) -> Tensor:
            if t.dtype != torch.uint8:
                return torch.where(where, torch.tensor(value, dtype=t.dtype), t)
            junk = torch.randint(0, 256, t.shape, dtype=torch.uint8, generator=noise)
            return torch.where(where, junk, t)

        return self.map(poison)


def random_cache(
    B: int,
    H: int,
    L: int,
    D: int,
    *,
    seed: int = 0,
    norm_dtype: torch.dtype = torch.bfloat16,
    sharpness: float = 1.0,
) -> Cache:
    """Random bytes are vectors about 1.5 norms long; `sharpness` scales the scores."""
    g = generator(seed)

    def packed() -> Tensor:
        return torch.randint(0, 256, (B, H, L, D // 2), dtype=torch.uint8, generator=g)

    def norms(scale: float) -> Tensor:
        return (scale * (0.5 + torch.rand(B, H, L, 1, generator=g))).to(norm_dtype)

    return Cache(
        packed(), norms(sharpness * math.sqrt(D)), packed(), norms(math.sqrt(D)),
        tq.codebook(D)[0], tq.rotation(D),
    )  # fmt: skip


def visible_keys(
    B: int,
    Lq: int,
    Lkv: int,
    *,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    kv_len: Tensor | None = None,
    kv_start: Tensor | None = None,
) -> Tensor:
    """bool [B, Lq, Lkv], by the rules as a user reads them, one row at a time."""

    def one(t: Tensor | None, b: int, default: int) -> int:
        if t is None:
            return default
        values = t.cpu().flatten().tolist()
        return int(values[0] if len(values) == 1 else values[b])

    visible = torch.zeros(B, Lq, Lkv, dtype=torch.bool)
    for b in range(B):
        length = min(max(one(kv_len, b, Lkv), 0), Lkv)
        start = max(one(kv_start, b, 0), 0)
        for i in range(Lq):
            last = length - Lq + i if causal else length - 1  # the last key that row i sees
            last = min(last, length - 1)
            if start <= last:
                visible[b, i, start : last + 1] = True
        if attn_mask is not None:
            visible[b] &= attn_mask.cpu()[b if attn_mask.shape[0] > 1 else 0, 0]
    return visible


def attention(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """float64 attention over dense keys and values, one head at a time: (out, lse)."""
    query = query.detach().cpu().double()
    B, Hq, Lq, D = query.shape
    group = Hq // k.shape[1]
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros(B, Hq, Lq, D, dtype=torch.float64)
    lse = torch.full((B, Hq, Lq), -math.inf, dtype=torch.float64)
    for b in range(B):
        seen = visible[b]
        used = seen.any(0)  # what nobody sees must not even be multiplied by zero
        for h in range(Hq):
            keys = torch.where(used[:, None], k[b, h // group], 0.0)
            values = torch.where(used[:, None], v[b, h // group], 0.0)
            scores = query[b, h] @ keys.T * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = torch.where(seen, scores, -math.inf)
            if sinks is not None:
                sink = sinks.detach().cpu().double()[h].expand(Lq, 1)
                scores = torch.cat([scores, sink], dim=1)
            if scores.shape[1] == 0:
                continue
            largest = scores.amax(1, keepdim=True)
            largest = torch.where(largest.isinf(), 0.0, largest)
            weights = torch.exp(scores - largest)
            total = weights.sum(1, keepdim=True)
            lse[b, h] = (largest + total.log()).squeeze(1)
            weights = weights[:, : values.shape[0]] / torch.where(total > 0, total, 1.0)
            out[b, h] = weights @ values
    return out, lse


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
