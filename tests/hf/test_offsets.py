"""Key offsets: exact under the softmax, learned from tokens alone, carried by every operation; and
which layers get one, or stay dense, by default."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import turboquant as tq
from turboquant.hf import TurboQuantCache, UnsupportedError, diagnose, enable, enabled
from turboquant.hf.attention import attention
from turboquant.hf.offsets import KeyOffset

from .tiny import codec, generate, left_padded, tiny_config, tiny_model

B, H, D = 3, 2, 64
KINDS = pytest.mark.parametrize("max_cache_len", [None, 256], ids=["dynamic", "static"])


def biased_states(length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys with a large part in common, another one in each row and head."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, B, H, length, D, generator=generator)
    return k + 10 * torch.randn(B, H, 1, D, generator=generator), v


def filled(
    max_cache_len: int | None, k: Tensor, v: Tensor, lengths: tuple[int, ...]
) -> tuple[TurboQuantCache, Any]:
    """A cache of one layer with offsets, and what its last update returned."""
    cache = TurboQuantCache(tiny_config(num_hidden_layers=1), max_cache_len, k_offset=True)
    handles, start = None, 0
    for length in lengths:
        new = slice(start, start + length)
        handles, start = cache.update(k[:, :, new], v[:, :, new], 0), start + length
    return cache, handles


def stored(cache: TurboQuantCache) -> Tensor:
    """The keys that the cache stands for, ``[B, H, T, D]``."""
    layer, (centroids, _, rotation) = cache.layers[0], codec(D)
    length = int(cache.get_seq_length())
    pair = (t[:, :, :length] for t in (layer.buffers.k_packed, layer.buffers.k_norms))
    return tq.decompress(
        *pair, centroids, rotation, offset=layer.offset.vector, dtype=torch.float32
    )


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


# ---------------------------------------------------------------------------------- exactness


@KINDS
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, 30.0, -40.0, 3.0])])
def test_attention_is_that_over_the_whole_keys(
    sinks: Tensor | None, max_cache_len: int | None
) -> None:
    k, v = biased_states(60)
    cache, handles = filled(max_cache_len, k, v, (40, 20))
    q = torch.randn(B, 2 * H, 20, D, generator=torch.Generator().manual_seed(1))
    out, _ = attention(nn.Module(), q, *handles, None, scaling=0.2, s_aux=sinks)
    layer, (centroids, _, rotation) = cache.layers[0], codec(D)
    pair = (t[:, :, :60] for t in (layer.buffers.v_packed, layer.buffers.v_norms))
    values = tq.decompress(*pair, centroids, rotation, dtype=torch.float32)
    keys, values = (x.repeat_interleave(2, dim=1) for x in (stored(cache), values))
    scores = (q @ keys.mT * 0.2).masked_fill(torch.ones(20, 60).tril(40) == 0, -torch.inf)
    column = torch.full((4,), -torch.inf) if sinks is None else sinks
    scores = torch.cat((scores, column.view(1, 4, 1, 1).expand(B, 4, 20, 1)), -1)
    want = scores.softmax(-1)[..., :-1] @ values
    assert error(out.transpose(1, 2), want) < 2e-3


def test_offsets_make_the_error_that_of_centred_keys() -> None:
    k, v = biased_states(200)
    cache, _ = filled(None, k, v, (150, 50))
    content = k - k.mean(2, keepdim=True)
    assert (stored(cache) - k).norm() / content.norm() < 0.11
    plain = TurboQuantCache(tiny_config(num_hidden_layers=1))
    plain.update(k, v, 0)
    layer, (centroids, _, rotation) = plain.layers[0], codec(D)
    pair = (t[:, :, :200] for t in (layer.buffers.k_packed, layer.buffers.k_norms))
    bad = tq.decompress(*pair, centroids, rotation, dtype=torch.float32)
    assert (bad - k).norm() / content.norm() > 0.8


def test_a_logit_cap_is_refused() -> None:
    _, handles = filled(None, *biased_states(9), (9,))
    with pytest.raises(UnsupportedError, match="softcap over keys with an offset"):
        attention(nn.Module(), torch.randn(B, 2 * H, 9, D), *handles, None, softcap=2.0)
    options = {"attention_bias": True, "layer_types": ["full_attention"] * 2}
    for cap in (4.0, None):
        report = diagnose(tiny_config("gemma2", attn_logit_softcapping=cap, **options))
        assert [layer.k_offset for layer in report.layers] == 2 * [cap is None]


# -------------------------------------------------------------------------------- what is learned


@KINDS
def test_padding_is_left_out(max_cache_len: int | None) -> None:
    """Also where a whole chunk is padding, and the other rows know theirs."""
    k, v = biased_states(40)
    pads = torch.tensor([0, 3, 25])
    real = torch.arange(40) >= pads[:, None]
    dirty = torch.where(real[:, None, :, None], k, 1e4)
    cache = TurboQuantCache(tiny_config(num_hidden_layers=1), max_cache_len, k_offset=True)
    cache.note_padding(real.long())
    for first in range(0, 40, 20):
        cache.update(dirty[:, :, first : first + 20], v[:, :, first : first + 20], 0)
    offset = cache.layers[0].offset
    for row, (first, last) in enumerate([(0, 20), (3, 20), (25, 40)]):
        want = k[row, :, first:last].mean(1)
        torch.testing.assert_close(offset.vector[row, :, 0], want, rtol=1e-4, atol=1e-4)
    assert offset.known.all()


@KINDS
def test_what_is_learned_stays(max_cache_len: int | None) -> None:
    """From the prompt, or the first token: else keys of several offsets would lie side by side."""
    k, v = biased_states(30)
    cache = TurboQuantCache(tiny_config(num_hidden_layers=1), max_cache_len, k_offset=True)
    cache.note_padding(torch.tensor([[1] * 10, [1] * 10, [0] * 10]))
    for first, last in [(0, 10), (10, 11), (11, 30)]:
        cache.update(k[:, :, first:last], v[:, :, first:last], 0)
    vector = cache.layers[0].offset.vector
    torch.testing.assert_close(vector[:2, :, 0], k[:2, :, :10].mean(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vector[2, :, 0], k[2, :, 10])
    assert not cache.layers[0].learning  # no work at each step


def test_generate_tells_of_padding() -> None:
    model = tiny_model()
    ids, mask = left_padded(rows=3, length=10, pads=(0, 3, 7), seed=1)
    with enabled(model, k_offset=True):
        for options in ({}, {"num_beams": 2}, {"prefill_chunk_size": 4}):
            cache = TurboQuantCache(model, k_offset=True)
            generate(model, ids, mask, 3, past_key_values=cache, **options)
            for row, pad in enumerate((0, 3, 7)):
                alone = TurboQuantCache(model, k_offset=True)
                generate(model, ids[row : row + 1, pad:], mask[row : row + 1, pad:], 3,
                         past_key_values=alone, **options)  # fmt: skip
                beams = options.get("num_beams", 1)
                got = cache.layers[0].offset.vector[row * beams]
                if "prefill_chunk_size" not in options:  # else the chunks begin elsewhere
                    torch.testing.assert_close(got, alone.layers[0].offset.vector[0])
                assert cache.layers[0].offset.known.all()


# ------------------------------------------------------------------------------------ operations


@KINDS
def test_operations_carry_the_offset(max_cache_len: int | None) -> None:
    k, v = biased_states(50)
    cache, _ = filled(max_cache_len, k, v, (30, 20))
    before = stored(cache)

    twin = copy.deepcopy(cache)
    twin.crop(-10)
    assert torch.equal(stored(twin), before[:, :, :40])

    order = torch.tensor([2, 0, 2])
    twin = copy.deepcopy(cache)
    twin.reorder_cache(order)
    assert torch.equal(stored(twin), before[order])
    twin.update(k[order, :, :5], v[order, :, :5], 0)
    assert error(stored(twin)[:, :, 50:], k[order, :, :5]) < 0.05

    if max_cache_len is None:
        twin.batch_select_indices(torch.tensor([1]))
        twin.batch_repeat_interleave(4)
        assert torch.equal(stored(twin)[3, :, :50], before[0])

    addresses = [t.data_ptr() for t in cache.layers[0].offset.tensors]
    cache.reset()
    other, v = biased_states(50, seed=9)
    cache.update(other, v, 0)
    assert error(stored(cache), other) < 0.05
    if max_cache_len is not None:
        assert addresses == [t.data_ptr() for t in cache.layers[0].offset.tensors]


# -------------------------------------------------------------------------- what is done by default

CONTEXT = 4096


def rope(x: Tensor, positions: Tensor, theta: float = 1e6) -> Tensor:
    """Rotary embedding as in Llama, ``[..., T, D]``."""
    D = x.shape[-1]
    angle = positions[:, None] * theta ** (-torch.arange(0, D, 2) / D)
    cos, sin = (f(angle).repeat(1, 2) for f in (torch.cos, torch.sin))
    half = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)
    return x * cos + half * sin


def bias(size: float, pairs: str, D: int, seed: int) -> Tensor:
    """[D] of this norm, on all pairs, or on those that turn by less than 0.1 over the context."""
    b = torch.randn(D, generator=torch.Generator().manual_seed(seed))
    if pairs == "slow":
        slow = 1e6 ** (-torch.arange(0, D, 2) / D) * CONTEXT < 0.1
        b = b * slow.repeat(2)
    return size * b / b.norm()


@pytest.mark.parametrize(
    ("size", "collapse"), [(20.0, 1.5), (100.0, 6.0), (300.0, 12.0), (900.0, 25.0)]
)
def test_logits_of_keys_with_a_bias_that_stays_in_place(size: float, collapse: float) -> None:
    """The error of logits is at most twice that without a bias; and without an offset far more."""
    D = 128
    generator = torch.Generator().manual_seed(3)
    content = torch.randn(1, 1, CONTEXT, D, generator=generator)
    q = torch.randn(64, D, generator=generator)
    positions = torch.arange(CONTEXT)
    centroids, boundaries, rotation = codec(D)

    def logit_error(k: Tensor, offset: Tensor | None) -> float:
        packed = tq.compress(k, rotation, boundaries, offset=offset)
        got = tq.decompress(*packed, centroids, rotation, offset=offset, dtype=torch.float32)
        wrong = (got - k)[0, 0] @ q.T
        return float((wrong - wrong.mean(0)).std())

    plain = rope(content, positions)
    biased = rope(content + bias(size, "slow", D, seed=4), positions)
    learned = KeyOffset.zeros(biased)
    learned.learn(biased[:, :, :512], None)
    usual = logit_error(plain, None)
    assert logit_error(biased, learned.vector) <= 2 * usual
    assert logit_error(biased, None) >= collapse * usual


def qwen2(biases: dict[int, tuple[float, str]]) -> Any:
    """Four layers of head dim 128, some with a bias of the keys."""
    model = tiny_model(
        "qwen2", num_hidden_layers=4, head_dim=128, hidden_size=256,
        max_position_embeddings=CONTEXT, initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    for i, (size, pairs) in biases.items():
        of_heads = torch.cat([bias(size, pairs, 128, seed=10 * i + h) for h in range(2)])
        model.model.layers[i].self_attn.k_proj.bias.data = of_heads
    return model


BIASED = {0: (200.0, "slow"), 1: (200.0, "slow"), 3: (200.0, "all")}


def test_the_diagnosis() -> None:
    fine, sick = diagnose(qwen2({})), diagnose(qwen2(BIASED))
    assert fine.compressed == [0, 1, 2, 3]
    assert not any(layer.k_offset for layer in fine.layers)
    assert sick.compressed == [0, 1, 2]
    assert [layer.k_offset for layer in sick.layers] == [True, True, False, False]
    noise = [layer.key_noise for layer in sick.layers]
    assert min(noise[0].plain, noise[1].plain) > 5
    assert max(noise[0].offset, noise[1].offset) < 2
    assert noise[3].offset > 5
    assert "layer 3: full attention, dense, its keys are so much alike that 4 bits" in str(sick)
    assert "layers 0-1: full attention, 4-bit with a key offset" in str(sick)
    unbiased = diagnose(tiny_model("llama"))
    assert all(layer.key_noise.plain < 1.5 for layer in unbiased.layers)


def test_enabling_obeys_the_diagnosis_or_the_caller() -> None:
    model = qwen2(BIASED)
    report = enable(model)
    assert report == diagnose(model)
    assert enable(model, skip_layers=()).compressed == [0, 1, 2, 3]
    report = enable(model, skip_layers=[0], k_offset=[3])
    assert report.compressed == [1, 2, 3]
    assert [layer.k_offset for layer in report.layers] == [False, False, False, True]
    assert not any(layer.k_offset for layer in enable(model, k_offset=False).layers)
    with pytest.raises(ValueError, match=r"k_offset must name layers from 0 to 3, got \[7\]"):
        enable(model, k_offset=[7])


@torch.no_grad()
def test_the_defaults_keep_a_biased_model_whole() -> None:
    model = qwen2(BIASED)
    ids = torch.randint(2, 64, (2, 300), generator=torch.Generator().manual_seed(7))
    want = model(ids).logits

    def fidelity(**options: Any) -> tuple[float, float]:
        """Cosine of the logits, and the KL divergence of the distributions."""
        with enabled(model, **options):
            got = model(ids, past_key_values=TurboQuantCache(model, **options)).logits
        kl = nn.functional.kl_div(
            got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="none"
        )
        cosine = nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)
        return float(cosine), float(kl.sum(-1).mean())

    cosine, kl = fidelity()
    worse, collapse = fidelity(skip_layers=(), k_offset=False)
    assert cosine >= 0.99
    assert worse < 0.9
    assert collapse > 10 * kl
