"""The attention and mask functions: every kind of keys, of mask and of argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache
from transformers.masking_utils import bidirectional_mask_function, or_masks
from transformers.modeling_utils import AttentionInterface

import turboquant as tq
from turboquant.hf import TurboQuantCache, UnsupportedError, enabled
from turboquant.hf.attention import attention, mask
from turboquant.hf.layers import PackedStates

from .tiny import codec, generate, left_padded, oracle_cache, round_trip, tiny_model

PADS = (0, 3, 7)


def causal(pads: Tensor, past: int, Lq: int) -> Tensor:
    """Which key each query may see: bool ``[B, 1, Lq, past + Lq]``, written out."""
    key = torch.arange(past + Lq)
    row = past + torch.arange(Lq)[:, None]
    return ((key <= row) & (key >= pads[:, None, None]))[:, None]


# ------------------------------------------------------------------ deep models, layer by layer


@pytest.mark.parametrize("max_cache_len", [None, 64], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_layer_and_step(
    family: str, dtype: torch.dtype, max_cache_len: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attention call against SDPA over what an oracle cache collected from the same inputs.

    In bf16 the error, against float64, may not be above that of SDPA. In float32 it may be 8 times
    that: the rotation adds roundings. The accuracy of the kernels is judged in their own tests.
    """
    factor = 1 if dtype == torch.bfloat16 else 8
    model = tiny_model(family, dtype=dtype, head_dim=128, num_hidden_layers=3)
    ids, padding = left_padded(3, 10, PADS, seed=5)
    pads = torch.tensor(PADS)
    oracle = oracle_cache(model.config)
    calls = []

    class Shadowed(TurboQuantCache):
        def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            self.dense = oracle.update(k.float(), v.float(), layer_idx)
            return super().update(k, v, layer_idx, *args, **kwargs)

    def checked(module: nn.Module, q: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = attention(module, q, *args, **kwargs)
        k, v = (x.repeat_interleave(2, dim=1) for x in cache.dense)
        past = k.shape[2] - q.shape[2]
        visible = causal(pads, past, q.shape[2])

        def sdpa(*qkv: Tensor) -> Tensor:
            result = nn.functional.scaled_dot_product_attention(
                *qkv, attn_mask=visible, scale=kwargs["scaling"]
            )
            return result.transpose(1, 2)

        exact = sdpa(q.double(), k.double(), v.double())
        # Rows of padding see nothing, and nobody sees them.
        real = past + torch.arange(q.shape[2]) >= pads[:, None]
        error = (out - exact)[real].square().mean().sqrt()
        torch_error = (sdpa(q, k.to(dtype), v.to(dtype)) - exact)[real].square().mean().sqrt()
        assert error <= factor * torch_error
        assert out.isfinite().all()
        calls.append(q.shape[2])
        return out, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "turboquant", checked)
    with enabled(model):
        cache = Shadowed(model, max_cache_len)
        generate(model, ids, padding, 8, past_key_values=cache, prefill_chunk_size=6)
    assert calls == 3 * [6] + 3 * [4] + 7 * 3 * [1]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_close_to_the_dense_cache(family: str) -> None:
    """Here the four bits themselves count, not the integration."""
    for seed in range(4):
        model = tiny_model(family, seed=seed, initializer_range=0.02)  # as models start out
        ids, _ = left_padded(2, 96, (0,), seed)
        dense = model(ids, past_key_values=DynamicCache(config=model.config)).logits
        with enabled(model):
            ours = model(ids, past_key_values=TurboQuantCache(model)).logits
        cosine = torch.cosine_similarity(ours, dense, dim=-1)
        assert cosine.mean() >= 0.99
        assert cosine.min() >= 0.96
        assert cosine.mean() < 0.9999  # it is compressed


# ----------------------------------------------------------------------- dense keys and values


def forward(model: Any, cache: Any, ids: Tensor, padding: Tensor | None, chunks: list[int]) -> Any:
    """Logits ``[B, sum(chunks), V]`` of a prompt given in chunks."""
    logits, end = [], 0
    for chunk in chunks:
        begin, end = end, end + chunk
        out = model(
            ids[:, begin:end],
            attention_mask=None if padding is None else padding[:, :end],
            past_key_values=cache,
        )
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def assert_same(ours: Tensor, other: Tensor, padding: Tensor | None) -> None:
    if padding is not None:
        ours, other = ours[padding.bool()], other[padding.bool()]
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4 * float(other.std()))


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_dense_cache_under_our_name(kind: str, padded: bool) -> None:
    model = tiny_model()
    ids, padding = left_padded(3, 20, PADS, seed=2)

    def cache() -> Any:
        if kind == "dynamic":
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=32)

    chunks = [8, 10, 1, 1]
    want = forward(model, cache(), ids, padding if padded else None, chunks)
    with enabled(model):
        got = forward(model, cache(), ids, padding if padded else None, chunks)
    assert_same(got, want, padding if padded else None)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_no_cache(padded: bool) -> None:
    model = tiny_model()
    ids, padding = left_padded(3, 12, PADS, seed=2)
    options = {"use_cache": False, "attention_mask": padding if padded else None}
    want = model(ids, **options).logits
    with enabled(model):
        assert_same(model(ids, **options).logits, want, options["attention_mask"])


@torch.no_grad()
@pytest.mark.parametrize("max_cache_len", [None, 32], ids=["dynamic", "static"])
def test_skipped_layers_stay_dense(max_cache_len: int | None) -> None:
    model = tiny_model(num_hidden_layers=3)
    ids, padding = left_padded(3, 20, PADS, seed=2)
    chunks = [8, 10, 1, 1]
    want = forward(model, oracle_cache(model.config, {1}), ids, padding, chunks)
    with enabled(model):
        cache = TurboQuantCache(model, max_cache_len, skip_layers=[1])
        got = forward(model, cache, ids, padding, chunks)
        everything = forward(model, TurboQuantCache(model), ids, padding, chunks)
    assert_same(got, want, padding)
    assert not torch.allclose(got, everything, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------- masks


@torch.no_grad()
@pytest.mark.parametrize("max_cache_len", [None, 32], ids=["dynamic", "static"])
@pytest.mark.parametrize("where", ["right", "holes"])
def test_padding_elsewhere(where: str, max_cache_len: int | None) -> None:
    model = tiny_model(num_hidden_layers=1)
    ids, padding = left_padded(3, 12, PADS, seed=2)
    if where == "right":
        padding = padding.flip(1)
    else:
        padding[:, 8] = 0
    want = forward(model, oracle_cache(model.config), ids, padding, [12])
    with enabled(model):
        got = forward(model, TurboQuantCache(model, max_cache_len), ids, padding, [12])
    assert_same(got, want, padding)


@torch.no_grad()
def test_a_mask_of_the_callers() -> None:
    model = tiny_model(num_hidden_layers=1)
    ids, _ = left_padded(2, 8, (0,), seed=2)
    both_ways = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    want = model(ids, attention_mask=both_ways, past_key_values=oracle_cache(model.config)).logits
    with enabled(model):
        cache = TurboQuantCache(model)
        got = model(ids, attention_mask=both_ways, past_key_values=cache).logits
        assert_same(got, want, None)
        with pytest.raises(RuntimeError, match="attn_mask must be bool"):
            model(ids, attention_mask=both_ways.float(), past_key_values=TurboQuantCache(model))


def test_mask_takes_the_smallest_form() -> None:
    sizes: dict[str, Any] = {"batch_size": 2, "q_length": 3, "kv_length": 5, "q_offset": 2}
    ones = torch.ones(2, 5, dtype=torch.bool)
    left = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)

    def made(**changes: Any) -> Tensor:
        result = mask(**(sizes | changes))
        assert result is not None
        return result

    assert mask(**sizes) is None
    assert made(attention_mask=left).tolist() == [[[[3, 5]]], [[[0, 5]]]]
    assert made(attention_mask=left).dtype == torch.int32
    # A cache of capacity 16 that holds 2 tokens, counted in a tensor or not.
    for offset in (2, torch.tensor(2), torch.tensor([2])):
        static: dict[str, Any] = {"kv_length": 16, "q_offset": offset}
        assert made(**static).tolist() == [[[[0, 5]]]]
        assert made(**static, attention_mask=left).tolist() == [[[[3, 5]]], [[[0, 5]]]]

    explicit = made(attention_mask=left.flip(1))
    assert explicit.dtype == torch.bool
    assert torch.equal(explicit, causal(torch.zeros(2), 2, 3) & left.flip(1)[:, None, None])
    # Never None for what is not causal, whatever the caller allows to skip.
    for function in (bidirectional_mask_function, or_masks(bidirectional_mask_function)):
        everything = made(
            mask_function=function,
            attention_mask=ones,
            allow_is_bidirectional_skip=True,
            allow_is_causal_skip=True,
        )
        assert everything.dtype == torch.bool
        assert everything.all()
    assert made(kv_offset=1, kv_length=4).shape == (2, 1, 3, 4)


# ---------------------------------------------------------------------------------- arguments


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def packed(x: Tensor) -> PackedStates:
    centroids, boundaries, rotation = codec(x.shape[-1])
    return PackedStates(*tq.compress(x, rotation, boundaries), centroids, rotation, None)


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 64, generator=generator)
    return (q, *torch.randn(2, 2, 2, 7, 64, generator=generator))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"output_attentions": True}, "output_attentions; .* use 'eager'"),
        ({"dropout": 0.1}, r"dropout; call model.eval\(\)"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"cu_seq_lens_q": torch.zeros(2)}, "cu_seq_lens_q"),
        ({"cache": object()}, "cache"),
        ({"head_mask": torch.zeros(1)}, "head_mask"),
        ({"is_causal": False}, "is_causal=False without a bool mask"),
        ({"sliding_window": 4}, "sliding_window"),
    ],
)
@pytest.mark.parametrize("compressed", [True, False], ids=["packed", "dense"])
def test_refused_arguments(
    qkv: tuple[Tensor, Tensor, Tensor], compressed: bool, kwargs: dict[str, Any], message: str
) -> None:
    q, k, v = qkv
    states = (packed(k), packed(v)) if compressed else (k, v)
    with pytest.raises(UnsupportedError, match=f"turboquant attention does not support {message}"):
        attention(Layer(), q, *states, None, **kwargs)
    harmless = {"position_ids": torch.arange(5), "use_cache": True, "cu_seq_lens_q": None}
    attention(Layer(), q, *states, None, output_attentions=False, sliding_window=None, **harmless)


@pytest.mark.parametrize("sink_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dense", [False, True])
def test_scaling_softcap_and_sinks(
    qkv: tuple[Tensor, Tensor, Tensor],
    dense: bool,
    softcap: float | None,
    sink_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("turboquant.hf.attention._SCORES", 200)  # dense: in parts of few rows
    q, k, v = qkv
    (Lq, Lkv), start = (q.shape[2], k.shape[2]), torch.tensor([0, 2])
    lower_right = causal(torch.zeros(2), 2, Lq)
    padded = torch.arange(Lkv) >= start.view(2, 1, 1, 1)
    some = torch.rand(2, 1, Lq, Lkv, generator=torch.Generator().manual_seed(5)) < 0.5
    some[1, :, 1] = False  # zeros, not the mean of all values
    bounds = torch.stack((start, torch.full((2,), Lkv)), -1).int().view(2, 1, 1, 2)
    states = (k, v) if dense else (packed(k), packed(v))
    if not dense:
        k, v = round_trip(k), round_trip(v)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    for sinks in (None, torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=sink_dtype)):
        if dense and softcap is None and sinks is None:
            continue  # SDPA
        options = {"scaling": 0.3, "softcap": softcap, "s_aux": sinks}
        for given, visible in [(None, lower_right), (bounds, lower_right & padded), (some, some)]:
            out, weights = attention(Layer(), q, *states, given, **options)
            scores = q @ k.mT * 0.3
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~visible, -torch.inf)
            column = torch.full((4,), -torch.inf) if sinks is None else sinks.float()
            with_sink = torch.cat((scores, column.view(1, 4, 1, 1).expand(2, 4, Lq, 1)), -1)
            want = with_sink.softmax(-1)[..., :-1].nan_to_num() @ v
            torch.testing.assert_close(out, want.transpose(1, 2), rtol=1e-4, atol=1e-5)
            assert weights is None
    assert out.is_contiguous()


def test_only_our_attention_reads_packed_states(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    states = packed(qkv[1])
    message = "only the attention function 'turboquant' can read them"
    with pytest.raises(AttributeError, match=message):
        states.shape  # noqa: B018
    with pytest.raises(TypeError, match=message):
        states[:, :1]
    with pytest.raises(TypeError, match=message):
        torch.matmul(qkv[0], states)  # type: ignore[arg-type]
    for implementation in ("eager", "sdpa"):
        model = tiny_model()
        model.set_attn_implementation(implementation)
        with pytest.raises((AttributeError, TypeError), match=message):
            model(torch.ones(1, 4, dtype=torch.long), past_key_values=TurboQuantCache(model))
