"""A pytest plugin under which transformers' own tests run on a cache of 4 bits; see ``run``.

With ``--cache=turboquant``, whoever makes a DynamicCache or a StaticCache gets a TurboQuantCache of
the same kind, and every model has the attention function that goes with it. A config that cannot be
served raises: no test runs on a dense cache unnoticed.

With ``--cache=oracle``, the cache is dense and stores what 4 bits leave of keys and values, and the
attention is transformers' own. A test that fails here too fails because of the 4 bits.

What the tests see of a packed cache beside its methods: ``keys`` and ``values`` of its layers are
what is stored, decompressed.
"""

from __future__ import annotations

import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.tiny import OracleLayer, round_trip
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, StaticCache, testing_utils
from transformers.cache_utils import DynamicLayer, StaticLayer

import turboquant as tq
from turboquant.hf import TurboQuantCache
from turboquant.hf.attention import NAME
from turboquant.hf.layers import Codec, DynamicPackedLayer, PackedLayer

EXPECTED = Path(__file__).with_name("expected_failures.txt")

# Modules that make caches, and the tests that look at them.
REDIRECTED = (
    "transformers.generation.",
    "transformers.models.",
    "tests.generation.test_utils",
    "tests.utils.test_cache_utils",
)
# Marks the report of a test that made a packed layer.
PACKED = ("packed", True)
# The norm policies under which compressing what was decompressed changes no bit.
NORMS = ("preserve", "preserve")
# With upstream's options, no layer of these has full attention.
FULL_ATTENTION: dict[str, dict[str, Any]] = {
    "MistralModelTester": {"sliding_window": None},
    "Gemma3TextModelTester": {"layer_types": ["sliding_attention", "full_attention"]},
}

# ------------------------------------------------------------------------------------ caches


class PackedDynamic(TurboQuantCache):
    def __init__(self, *, config: Any, offloading: bool = False) -> None:
        super().__init__(config, offloading=offloading)


class PackedStatic(TurboQuantCache):
    def __init__(self, config: Any, max_cache_len: int, offloading: bool = False) -> None:
        super().__init__(config, max_cache_len, offloading=offloading)


class OracleDynamic(DynamicCache):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.layers = [OracleLayer() if type(x) is DynamicLayer else x for x in self.layers]


class OracleStaticLayer(StaticLayer):
    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        return super().update(round_trip(key_states), round_trip(value_states), *args, **kwargs)


class OracleStatic(StaticCache):
    def __init__(self, config: Any, max_cache_len: int, **options: Any) -> None:
        super().__init__(config, max_cache_len, **options)
        self.layers = [
            OracleStaticLayer(max_cache_len) if type(x) is StaticLayer else x for x in self.layers
        ]


CACHES = {"turboquant": (PackedDynamic, PackedStatic), "oracle": (OracleDynamic, OracleStatic)}


def _stored(which: str) -> property:
    """Keys or values of a packed layer: ``[B, H, tokens or capacity, D]``."""

    def read(layer: Any) -> Any:
        if not layer.is_initialized:
            return None
        length = getattr(layer, "length", None)  # of a layer that grows
        packed, norms = (
            getattr(layer.buffers, f"{which}_{part}")[:, :, :length] for part in ("packed", "norms")
        )
        states = tq.decompress(packed, norms, layer.centroids, layer.rotation, dtype=layer.dtype)
        return states if which == "v" or layer.k_offset is None else states + layer.k_offset

    # transformers' own constructor sets them to None.
    return property(read, lambda layer, value: None)


# -------------------------------------------------------------------------------- the redirect


@pytest.fixture(autouse=True)
def _redirect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = request.config.getoption("--cache")
    for module in list(sys.modules.values()):
        if module.__name__.startswith(REDIRECTED):
            for original, ours in zip((DynamicCache, StaticCache), CACHES[kind]):
                if vars(module).get(original.__name__) is original:
                    monkeypatch.setattr(module, original.__name__, ours)

    tester = getattr(request.cls, "model_tester_class", None)
    for name, value in FULL_ATTENTION.get(getattr(tester, "__name__", ""), {}).items():
        monkeypatch.setattr(tester, name, value, raising=False)
    if kind == "turboquant":
        for name in ("keys", "values"):
            monkeypatch.setattr(PackedLayer, name, _stored(name[0]), raising=False)
        setter = PretrainedConfig._attn_implementation.fset
        named = property(lambda config: NAME, setter)  # whatever a test asks for
        monkeypatch.setattr(PretrainedConfig, "_attn_implementation", named)
        if tester is not None:
            _without_weights(request.cls, monkeypatch)
        if request.cls.__name__ == "CacheCroppingTests":
            _crop_ours(request.module, monkeypatch)
        init = PackedLayer.__init__

        def note(layer: Any, *args: Any) -> None:
            request.node.user_properties[:] = [PACKED]
            init(layer, *args)

        monkeypatch.setattr(PackedLayer, "__init__", note)


def _without_weights(tests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention weights are never formed: nobody asks for them, nobody looks at them."""
    generate = GenerationMixin.generate

    def without(self: Any, *args: Any, **options: Any) -> Any:
        return generate(self, *args, **{**options, "output_attentions": False})

    monkeypatch.setattr(GenerationMixin, "generate", without)
    monkeypatch.setattr(tests, "_check_attentions_for_generate", lambda *args, **kwargs: None)


def _crop_ours(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's list of layers to crop becomes ours, and its random numbers storable."""
    rand = torch.rand

    def layer(**options: Any) -> DynamicPackedLayer:
        return DynamicPackedLayer(Codec(module.CacheCroppingTests.attention_shape[-1], 42), *NORMS)

    def storable(*shape: int) -> torch.Tensor:
        x = rand(*shape)
        if len(shape) != 4:
            return x
        filled = layer()
        filled.update(x, x)
        return filled.keys

    monkeypatch.setattr(module, "ALL_DYNAMIC_LAYERS", (layer,))
    monkeypatch.setattr(module, "DynamicLayer", layer)
    monkeypatch.setattr(torch, "rand", storable)


# ------------------------------------------------------------------- which tests, what to expect

_is_flaky = testing_utils.is_flaky


def _may_be_bare(*args: Any, **options: Any) -> Any:
    """Upstream also writes ``@is_flaky`` without parentheses, which then runs no test."""
    return _is_flaky()(args[0]) if args and callable(args[0]) else _is_flaky(*args, **options)


testing_utils.is_flaky = _may_be_bare


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cache", choices=list(CACHES), default="turboquant")


def expected_failures(kind: str) -> dict[str, str]:
    """Pattern of test names -> reason, of those that hold for this kind of cache."""
    reasons = {}
    reason = ""
    for line in EXPECTED.read_text().splitlines():
        if line.startswith("["):
            kinds, reason = line[1:].split("] ", 1)
        elif line.strip() and not line.startswith("#") and kind in kinds.split():
            reasons[line.strip()] = reason
    return reasons


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a model's tests keep those of generation, and mark what is expected to fail."""
    mixin = vars(sys.modules["tests.generation.test_utils"].GenerationTesterMixin)
    models = [item for item in items if hasattr(item.cls, "model_tester_class")]
    dropped = {item for item in models if item.originalname not in mixin}
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]

    for pattern, reason in expected_failures(config.getoption("--cache")).items():
        matching = [item for item in items if fnmatch(f"{item.cls.__name__}.{item.name}", pattern)]
        if not matching:
            raise pytest.UsageError(f"{EXPECTED.name} names a test that does not exist: {pattern}")
        for item in matching:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was tested on packed layers, and the expected failures by reason."""
    stats = terminalreporter.stats
    passed = stats.get("passed", [])
    packed = sum(PACKED in report.user_properties for report in passed)
    terminalreporter.section("summary")
    terminalreporter.write_line(f"{len(passed):4} passed, {packed} of them with packed layers")
    terminalreporter.write_line(f"{len(stats.get('skipped', [])):4} skipped by upstream")
    for reason, count in Counter(report.wasxfail for report in stats.get("xfailed", [])).items():
        terminalreporter.write_line(f"{count:4} failed as expected: {reason}")
