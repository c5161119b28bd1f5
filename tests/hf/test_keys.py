"""Keys with a part in common: offsets are exact under the softmax and follow the cache; and which
layers get one, or stay dense, by default."""

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
from turboquant.hf.keys import measure_keys
from turboquant.hf.layers import Codec, DynamicPackedLayer, PackedLayer, StaticPackedLayer

from .tiny import codec, generate, tiny_model

B, H, D = 3, 2, 64
KINDS = pytest.mark.parametrize("max_cache_len", [None, 256], ids=["dynamic", "static"])

COMMON = 10 * torch.randn(1, H, 1, D, generator=torch.Generator().manual_seed(8))


def states(length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys with a large part in common, another one in each head; and values."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, B, H, length, D, generator=generator)
    return k + COMMON, v


def new_layer(max_cache_len: int | None, offset: Tensor | None = COMMON) -> PackedLayer:
    options = (Codec(D, 42), "l2", "l2", offset)
    if max_cache_len is None:
        return DynamicPackedLayer(*options)
    return StaticPackedLayer(*options, max_cache_len)


def stored(layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """The keys and values that the layer stands for, ``[B, H, T, D]``."""
    centroids, _, rotation = codec(D)
    b = layer.buffers.map(lambda t: t[:, :, : int(layer.get_seq_length())])
    constants, exact = (centroids, rotation), {"dtype": torch.float32}
    keys = tq.decompress(b.k_packed, b.k_norms, *constants, offset=layer.k_offset, **exact)
    return keys, tq.decompress(b.v_packed, b.v_norms, *constants, **exact)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


# ---------------------------------------------------------------------------------- exactness


@KINDS
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, 30.0, -40.0, 3.0])])
def test_attention_is_that_over_the_whole_keys(
    sinks: Tensor | None, max_cache_len: int | None
) -> None:
    k, v = states(60)
    layer = new_layer(max_cache_len)
    layer.update(k[:, :, :40], v[:, :, :40])
    handles = layer.update(k[:, :, 40:], v[:, :, 40:])
    q = torch.randn(B, 2 * H, 20, D, generator=torch.Generator().manual_seed(1))
    out, _ = attention(nn.Module(), q, *handles, None, scaling=0.2, s_aux=sinks)
    keys, values = (x.repeat_interleave(2, dim=1) for x in stored(layer))
    scores = (q @ keys.mT * 0.2).masked_fill(torch.ones(20, 60).tril(40) == 0, -torch.inf)
    column = torch.full((4,), -torch.inf) if sinks is None else sinks
    scores = torch.cat((scores, column.view(1, 4, 1, 1).expand(B, 4, 20, 1)), -1)
    want = scores.softmax(-1)[..., :-1] @ values
    assert error(out.transpose(1, 2), want) < 2e-3


def test_the_error_is_that_of_what_is_left() -> None:
    k, v = states(200)
    content = (k - COMMON).norm()
    with_offset, without = new_layer(None), new_layer(None, offset=None)
    for layer in (with_offset, without):
        layer.update(k, v)
    assert (stored(with_offset)[0] - k).norm() / content < 0.11
    assert (stored(without)[0] - k).norm() / content > 0.8


def test_a_logit_cap_is_refused() -> None:
    handles = new_layer(None).update(*states(9))
    with pytest.raises(UnsupportedError, match="softcap over keys with an offset"):
        attention(nn.Module(), torch.randn(B, 2 * H, 9, D), *handles, None, softcap=2.0)
    options = {"attention_bias": True, "layer_types": ["full_attention"] * 2}
    model = tiny_model("gemma2", attn_logit_softcapping=4.0, **options)
    model.model.layers[0].self_attn.k_proj.bias.data.fill_(100.0)
    report = diagnose(model)
    assert report.layers[0].key_noise.plain > 2
    assert report.compressed == [1]
    assert not any(layer.k_offset for layer in report.layers)
    with pytest.raises(UnsupportedError, match="under its logit cap"):
        enable(model, k_offset=True)


@KINDS
def test_operations_keep_the_offset(max_cache_len: int | None) -> None:
    k, v = states(50)
    layer = new_layer(max_cache_len)
    layer.update(k, v)
    before, _ = stored(layer)
    twin = copy.deepcopy(layer)
    twin.crop(-10)
    assert torch.equal(stored(twin)[0], before[:, :, :40])
    order = torch.tensor([2, 0, 2])
    layer.reorder_cache(order)
    layer.update(k[order, :, :5], v[order, :, :5])
    assert torch.equal(stored(layer)[0][:, :, :50], before[order])
    assert error(stored(layer)[0][:, :, 50:], k[order, :, :5]) < 0.05
    layer.reset()
    layer.update(k, v)
    assert torch.equal(stored(layer)[0], before)


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
    sample = torch.cat((torch.arange(128), torch.linspace(128, CONTEXT - 1, 128).long()))
    offset = biased[:, :, sample].mean(2, keepdim=True)
    usual = logit_error(plain, None)
    assert logit_error(biased, offset) <= 2 * usual
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
    with pytest.raises(ValueError, match="k_offset takes the model with its weights"):
        TurboQuantCache(model.config, k_offset=True)
    with pytest.raises(ValueError, match="skip_layers must name layers, got 1"):
        enable(model, skip_layers=1)
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


def test_measuring_leaves_the_model_alone() -> None:
    model = tiny_model("qwen2").train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    found = measure_keys(model)
    assert before == {name: module.training for name, module in model.named_modules()}
    assert [noise.mean.shape for noise in found.values()] == 2 * [(1, 2, 1, 64)]


def test_a_cache_is_made_without_measuring_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen2(BIASED)
    ids = torch.ones(1, 3, dtype=torch.long)
    with enabled(model):
        monkeypatch.setattr("turboquant.hf.keys.measure_keys", None)
        out = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    offsets = [getattr(layer, "k_offset", None) for layer in out.past_key_values.layers]
    assert [offset is not None for offset in offsets] == [True, True, False, False]
    enable(model)  # from what was found before
    assert generate(model, ids, torch.ones_like(ids), 2)[0].shape == (1, 2)
