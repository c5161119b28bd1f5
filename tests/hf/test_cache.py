"""TurboQuantCache and its layers as containers: contents, memory, and every operation."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

import turboquant as tq
from turboquant.hf import TurboQuantCache, UnsupportedError
from turboquant.hf.layers import (
    DynamicPackedLayer,
    PackedLayer,
    PackedStates,
    StaticPackedLayer,
)

from .tiny import codec, tiny_config, tiny_model

B, H, D, LAYERS = 3, 2, 64, 2
KINDS = pytest.mark.parametrize("max_cache_len", [None, 512], ids=["dynamic", "static"])


def states(length: int, seed: int = 0, rows: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, rows, H, length, D, generator=generator)
    return k, 3 * v


def contents(cache: Any, layer: int = 0) -> tuple[Tensor, ...]:
    """The packed tensors up to the fill: k_packed, k_norms, v_packed, v_norms."""
    packed = cache.layers[layer]
    return tuple(t[:, :, : int(packed.get_seq_length())] for t in packed.buffers)


def compressed(k: Tensor, v: Tensor, norm: str = "l2") -> tuple[Tensor, ...]:
    centroids, boundaries, rotation = codec(D)
    options = {"centroids": centroids, "norm": norm}
    k_pair = tq.compress(k, rotation, boundaries, **options)
    return (*k_pair, *tq.compress(v, rotation, boundaries, **options))


def assert_holds(cache: Any, k: Tensor, v: Tensor, norm: str = "l2") -> None:
    for layer in range(LAYERS):
        assert int(cache.get_seq_length(layer)) == k.shape[2]
        for have, want in zip(contents(cache, layer), compressed(k, v, norm), strict=True):
            assert torch.equal(have, want)


def filled(
    max_cache_len: int | None, lengths: tuple[int, ...] = (70, 1, 1, 90, 100), **options: Any
) -> tuple[TurboQuantCache, Tensor, Tensor]:
    """A cache after several updates (and several growths), and all that went in."""
    cache = TurboQuantCache(tiny_config(), max_cache_len, **options)
    k, v = states(sum(lengths))
    start = 0
    for length in lengths:
        for layer in range(LAYERS):
            new = slice(start, start + length)
            cache.update(k[:, :, new], v[:, :, new], layer)
        start += length
    return cache, k, v


# ----------------------------------------------------------------------------- what is stored


@KINDS
def test_updates_append_in_order(max_cache_len: int | None) -> None:
    assert_holds(*filled(max_cache_len))


@KINDS
def test_what_update_returns(max_cache_len: int | None) -> None:
    cache = TurboQuantCache(tiny_config(), max_cache_len)
    k, v = states(9)
    cache.update(k[:, :, :5], v[:, :, :5], 0)
    keys, values = cache.update(k[:, :, 5:], v[:, :, 5:], 0)
    assert type(keys) is PackedStates
    assert type(values) is PackedStates
    filled_slots = keys.packed.shape[2] if keys.kv_len is None else int(keys.kv_len)
    assert filled_slots == 9
    have = [t[:, :, :9] for t in (keys.packed, keys.norms, values.packed, values.norms)]
    assert all(torch.equal(a, b) for a, b in zip(have, compressed(k, v), strict=True))


def test_strided_states_and_norm_policies() -> None:
    """Models pass transposed views; norm="unbiased" must reach both sides."""
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in states(7))
    for norm in ("l2", "preserve", "unbiased"):
        cache = TurboQuantCache(tiny_config(), k_norm=norm, v_norm=norm)
        for layer in range(LAYERS):
            cache.update(k, v, layer)
        assert_holds(cache, k, v, norm)


def test_seed_reaches_the_rotation() -> None:
    keys, _ = TurboQuantCache(tiny_config(), seed=7).update(*states(3), 0)
    assert torch.equal(keys.rotation, tq.rotation(D, 7))
    assert not torch.equal(keys.rotation, tq.rotation(D))


def test_layers_of_a_device_share_the_constants() -> None:
    cache = TurboQuantCache(tiny_config(num_hidden_layers=4))
    for layer, device in enumerate(("cpu", "cpu", "meta", "meta")):
        keys, _ = cache.update(*(x.to(device) for x in states(3)), layer)
        assert keys.packed.device == keys.rotation.device == torch.device(device)
    rotations = [layer.rotation for layer in cache.layers]
    assert rotations[0] is rotations[1]
    assert rotations[2] is rotations[3]


def test_static_state_keeps_its_addresses() -> None:
    cache = TurboQuantCache(tiny_config(), 16)
    cache.early_initialization(B, H, D, torch.float32, torch.device("cpu"))
    layer = cache.layers[0]
    tensors = (*layer.buffers, layer.cumulative_length)
    addresses = [t.data_ptr() for t in tensors]
    cache.update(*states(5), 0)
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    cache.crop(-2)
    cache.reset()
    assert [t.data_ptr() for t in (*layer.buffers, layer.cumulative_length)] == addresses
    assert all(hasattr(t, "_dynamo_static_input_type") for t in tensors)


# -------------------------------------------------------------------------------------- memory


def reachable_tensors(root: Any) -> Iterator[Tensor]:
    seen: set[int] = set()
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list | tuple | set):
            stack += item
        elif hasattr(item, "__dict__"):
            stack += vars(item).values()


@KINDS
def test_holds_packed_bytes_and_nothing_dense(max_cache_len: int | None) -> None:
    tokens = 450
    cache, k, v = filled(max_cache_len, (300,) + 150 * (1,))
    per_token = 2 * B * H * (D // 2 + 2)
    assert per_token * 3.7 < (k.bfloat16().nbytes + v.bfloat16().nbytes) / tokens
    slots = max_cache_len if max_cache_len is not None else cache.layers[0].buffers[0].shape[2]
    if max_cache_len is None:
        assert tokens <= slots <= 1.25 * tokens + 64
    assert cache.nbytes == LAYERS * slots * per_token

    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in reachable_tensors(cache)}  # fmt: skip
    constants = 4 * (D * D + 16 + 15)  # one rotation and codebook for all layers
    lengths = 0 if max_cache_len is None else 8 * LAYERS
    assert sum(storages.values()) == cache.nbytes + constants + lengths


def test_growth_copies_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token at a time costs no more than a constant number of copies of each."""
    layer = DynamicPackedLayer(TurboQuantCache(tiny_config()).layers[0].codec, "l2", "l2")
    copied = 0
    reserve = layer._reserve

    def spy(length: int) -> None:
        nonlocal copied
        before = layer.buffers.k_packed.shape[2]
        reserve(length)
        copied += layer.length if layer.buffers.k_packed.shape[2] != before else 0

    monkeypatch.setattr(layer, "_reserve", spy)
    for seed in range(2000):
        layer.update(*states(1, seed % 7, rows=1))
    assert 0 < copied <= 5 * 2000


def test_written_after_inference_mode() -> None:
    cache = TurboQuantCache(tiny_config(), 16)
    with torch.inference_mode():
        cache.update(*states(3), 0)
    with torch.no_grad():
        cache.update(*states(3), 0)
    assert int(cache.get_seq_length()) == 6


# ---------------------------------------------------------------------------------- operations


@pytest.mark.parametrize(
    ("ours", "native"), [(DynamicPackedLayer, DynamicLayer), (StaticPackedLayer, StaticLayer)]
)
def test_all_that_touches_the_state_is_ours(ours: type, native: type) -> None:
    """The base class keeps its state in ``keys`` and ``values``; ours are None."""
    names = set(CacheLayerMixin.__abstractmethods__)
    for cls in (CacheLayerMixin, native):
        names |= {name for name, member in vars(cls).items() if inspect.isfunction(member)}
    # The last is gone since transformers 5.17; it calls get_max_length.
    names -= {"__init__", "__init_subclass__", "__repr__", "get_max_cache_shape"}
    assert {"update", "reset", "reorder_cache", "offload"} <= names
    for name in names:
        owner = next(cls for cls in ours.__mro__ if name in vars(cls))
        assert issubclass(owner, PackedLayer), name


@KINDS
def test_crop(max_cache_len: int | None) -> None:
    cache, k, v = filled(max_cache_len)
    length = k.shape[2]
    for tokens, left in [
        (-1, length - 1),
        (torch.tensor(-20), length - 21),
        (0, length - 21),
        (-0, length - 21),
        (length, length - 21),  # an absolute length beyond the end
        (200, 200),
        (torch.tensor(150), 150),
    ]:
        cache.crop(tokens)
        assert_holds(cache, k[:, :, :left], v[:, :, :left])
    new_k, new_v = states(30, seed=1)
    for layer in range(LAYERS):
        cache.update(new_k, new_v, layer)
    k, v = torch.cat((k[:, :, :150], new_k), 2), torch.cat((v[:, :, :150], new_v), 2)
    assert_holds(cache, k, v)
    cache.crop(-1000)
    assert int(cache.get_seq_length()) == 0


@KINDS
def test_reorder_cache(max_cache_len: int | None) -> None:
    cache, k, v = filled(max_cache_len)
    for beam_idx in (torch.tensor([2, 0, 0]), torch.tensor([1, 0, 2])):
        cache.reorder_cache(beam_idx)
        k, v = k[beam_idx], v[beam_idx]
        assert_holds(cache, k, v)
        new_k, new_v = states(40, seed=int(beam_idx[0]))
        for layer in range(LAYERS):
            cache.update(new_k, new_v, layer)
        k, v = torch.cat((k, new_k), 2), torch.cat((v, new_v), 2)
        assert_holds(cache, k, v)


def test_batch_operations() -> None:
    cache, k, v = filled(None)
    cache.batch_repeat_interleave(2)
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    assert_holds(cache, k, v)
    cache.batch_select_indices(torch.tensor([5, 0, 3, 1]))
    k, v = k[[5, 0, 3, 1]], v[[5, 0, 3, 1]]
    assert_holds(cache, k, v)
    cache.batch_select_indices((0, 2))
    cache.batch_repeat_interleave(2)
    k, v = k[[0, 0, 2, 2]], v[[0, 0, 2, 2]]
    assert_holds(cache, k, v)
    assert cache.layers[0].batch_size == 4
    new_k, new_v = states(60, seed=1, rows=4)
    for layer in range(LAYERS):
        cache.update(new_k, new_v, layer)
    assert_holds(cache, torch.cat((k, new_k), 2), torch.cat((v, new_v), 2))


@KINDS
def test_reset_and_reuse(max_cache_len: int | None) -> None:
    cache, *_ = filled(max_cache_len)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    k, v = states(11, seed=1)
    for layer in range(LAYERS):
        cache.update(k, v, layer)
    assert_holds(cache, k, v)


@KINDS
def test_deepcopy_shares_nothing(max_cache_len: int | None) -> None:
    cache, k, v = filled(max_cache_len)
    twin = copy.deepcopy(cache)
    new_k, new_v = states(20, seed=1)
    for layer in range(LAYERS):
        twin.update(new_k, new_v, layer)
    assert_holds(cache, k, v)
    assert_holds(twin, torch.cat((k, new_k), 2), torch.cat((v, new_v), 2))
    assert_holds(copy.deepcopy(twin), torch.cat((k, new_k), 2), torch.cat((v, new_v), 2))


@pytest.mark.parametrize(
    "operation",
    [
        lambda cache: cache.crop(-1),
        lambda cache: cache.reset(),
        lambda cache: cache.reorder_cache(torch.arange(B)),
    ],
    ids=["crop", "reset", "reorder"],
)
@KINDS
def test_operations_on_an_empty_cache(
    max_cache_len: int | None, operation: Callable[[Any], None]
) -> None:
    cache = TurboQuantCache(tiny_config(), max_cache_len)
    operation(cache)
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0


def test_sizes() -> None:
    dynamic, *_ = filled(None, (9,))
    static, *_ = filled(16, (9,))
    assert dynamic.get_mask_sizes(3, 0) == (12, 0)
    assert static.get_mask_sizes(3, 0) == (16, 0)
    assert isinstance(dynamic.get_seq_length(), int)
    assert isinstance(static.get_seq_length(), Tensor)
    assert (dynamic.is_compileable, static.is_compileable) == (False, True)
    assert (dynamic.capacity, static.capacity) == (None, 16)
    assert (dynamic.get_max_length(), static.get_max_length()) == (-1, 16)


# ------------------------------------------------------------------------------------ refusals


def test_overflow_writes_nothing() -> None:
    cache, k, v = filled(16, (14,))
    with pytest.raises(RuntimeError, match="outgrew this TurboQuantCache: max_cache_len is 16"):
        cache.update(*states(3, seed=1), 0)
    assert_holds(cache, k, v)
    cache.update(*states(2, seed=1), 0)
    assert int(cache.get_seq_length()) == 16

    cache = TurboQuantCache(tiny_config(), 16)
    with pytest.raises(UnsupportedError, match="17 tokens do not fit .* max_cache_len=16"):
        cache.update(*states(17), 0)
    assert cache.nbytes == 0


def test_constructor_refusals() -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match="max_cache_len must be an int from 1 on, got 0"):
        TurboQuantCache(config, 0)
    with pytest.raises(ValueError, match="v_norm must be 'l2', 'preserve' or 'unbiased', got 'l1'"):
        TurboQuantCache(config, v_norm="l1")
    with pytest.raises(
        ValueError, match=r"skip_layers must name layers from 0 to 1, got \[-1, 2\]"
    ):
        TurboQuantCache(config, skip_layers=(-1, 0, 2))
    with pytest.raises(UnsupportedError, match="all layers stay dense, in skip_layers"):
        TurboQuantCache(config, skip_layers=(0, 1))
    with pytest.raises(TypeError, match="expected a transformers model or config, got Linear"):
        TurboQuantCache(nn.Linear(1, 1))
    assert TurboQuantCache(tiny_model()).get_seq_length() == 0


def test_a_fixed_batch() -> None:
    static, *_ = filled(512)
    with pytest.raises(UnsupportedError, match="fixed batch; make a dynamic one"):
        static.batch_repeat_interleave(2)
    with pytest.raises(UnsupportedError, match="fixed batch; make a dynamic one"):
        static.batch_select_indices(torch.tensor([0]))


def test_another_batch_size_is_refused() -> None:
    cache, k, v = filled(None)
    with pytest.raises(RuntimeError, match="k_packed must be uint8"):
        cache.update(*states(1, rows=2), 0)
    assert_holds(cache, k, v)
