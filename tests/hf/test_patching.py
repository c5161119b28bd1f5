"""enable, disable and enabled: what they change, and that nothing is left of it."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache

import turboquant
from turboquant.hf import (
    TurboQuantCache,
    UnsupportedError,
    disable,
    enable,
    enabled,
)

from .tiny import case, generate, left_padded, tiny_model

METHODS = ("_prepare_cache_for_generation", "init_continuous_batching")


def fingerprint(model: Any) -> Any:
    """All that enable() may touch, and what it must not."""
    return (
        type(model),
        {name: id(value) for name, value in vars(model).items()},
        [getattr(model, name).__func__ for name in METHODS],
        [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        {name: p.data_ptr() for name, p in model.state_dict().items()},
        model.config.to_json_string(),
        model.generation_config.to_json_string(),
    )


def cache_used(model: Any, **options: Any) -> Any:
    ids, mask = left_padded(1, 6, (0,), 0)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=2, return_dict_in_generate=True, **options
    )
    return out.past_key_values


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_disable_undoes_enable(implementation: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(implementation)
    prompt = left_padded(2, 8, (0, 3), 0)
    before, want = fingerprint(model), generate(model, *prompt)
    state = {name: t.clone() for name, t in model.state_dict().items()}

    report = enable(model)
    assert report.compressed == [0, 1]
    assert type(cache_used(model)) is TurboQuantCache
    assert model.config._attn_implementation == "turboquant"
    assert list(model.state_dict()) == list(state)
    assert model.config.to_json_string() == before[-2]
    enable(model)  # a second time is no other thing to undo
    disable(model)

    assert fingerprint(model) == before
    assert all(torch.equal(a, b) for a, b in zip(generate(model, *prompt), want, strict=True))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert type(cache_used(model)) is DynamicCache
    disable(model)
    assert fingerprint(model) == before


def test_an_enabled_model_in_a_file() -> None:
    model = tiny_model()
    enable(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert type(cache_used(twin)) is TurboQuantCache
    disable(twin)
    assert type(cache_used(twin)) is DynamicCache
    assert type(cache_used(model)) is TurboQuantCache


def test_another_attention_chosen_meanwhile_stays() -> None:
    model = tiny_model()
    enable(model)
    model.set_attn_implementation("eager")
    disable(model)
    assert model.config._attn_implementation == "eager"


def test_settings_that_are_refused_at_once() -> None:
    model = tiny_model(attention_dropout=0.1).train()
    with pytest.raises(UnsupportedError, match=r"dropout .* call model.eval\(\)"):
        enable(model)
    enable(model.eval())
    disable(model)
    model.generation_config.output_attentions = True
    with pytest.raises(UnsupportedError, match="output_attentions is set"):
        enable(model)
    assert model.config._attn_implementation == "sdpa"


def test_what_is_saved_does_not_change(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "before")
    with enabled(model, k_offset=True):
        generate(model, *left_padded(1, 6, (0,), 0), new=2)
        model.save_pretrained(tmp_path / "enabled")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert "model.safetensors" in names
    assert names == sorted(path.name for path in (tmp_path / "enabled").iterdir())
    for name in names:
        saved = [(tmp_path / folder / name).read_bytes() for folder in ("before", "enabled")]
        assert saved[0] == saved[1], name


def test_methods_of_the_instance_come_back() -> None:
    model = tiny_model()
    calls = []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return type(model)._prepare_cache_for_generation(model, *args, **kwargs)

    model._prepare_cache_for_generation = theirs
    with enabled(model):
        assert type(cache_used(model)) is TurboQuantCache
        assert not calls
        assert type(cache_used(model, past_key_values=DynamicCache())) is DynamicCache
        assert len(calls) == 1
    assert vars(model)["_prepare_cache_for_generation"] is theirs


def test_every_call_gets_a_fresh_cache() -> None:
    oracle = case("llama", 3)
    with enabled(oracle.model):
        for _ in range(2):
            oracle.check(*generate(oracle.model, oracle.ids, oracle.mask))
        assert cache_used(oracle.model) is not cache_used(oracle.model)


def test_nested() -> None:
    model = tiny_model()
    before = fingerprint(model)
    with enabled(model, max_cache_len=64):
        assert cache_used(model).capacity == 64
        with enabled(model, skip_layers=[1]) as report:
            assert report.compressed == [0]
            assert cache_used(model).capacity is None
        assert cache_used(model).capacity == 64
        disable(model)
        assert fingerprint(model) == before
    assert fingerprint(model) == before

    enable(model, seed=7)
    with enabled(model):
        pass
    other_seed = cache_used(model).layers[0].rotation
    assert torch.equal(other_seed, turboquant.rotation(64, 7))
    disable(model)
    assert fingerprint(model) == before


def test_exceptions_do_not_leak() -> None:
    model = tiny_model()
    before = fingerprint(model)
    with pytest.raises(KeyError), enabled(model):
        raise KeyError
    assert fingerprint(model) == before
    # Wrong options leave an enabled model as it was.
    enable(model, max_cache_len=64)
    options: list[dict[str, Any]] = [{"max_cache_len": 0}, {"skip_layers": [9]}, {"k_norm": "l1"}]
    for wrong in options:
        with pytest.raises(ValueError, match="must"):
            enable(model, **wrong)
    assert cache_used(model).capacity == 64
    disable(model)
    assert fingerprint(model) == before


def test_two_models_at_once() -> None:
    first, second = tiny_model(seed=0), tiny_model("qwen3", seed=1)
    bystander = tiny_model(seed=2)
    before = [fingerprint(m) for m in (first, second, bystander)]
    enable(first, max_cache_len=64)
    enable(second, skip_layers=[0])
    assert cache_used(first).capacity == 64
    assert cache_used(second).capacity is None
    assert type(cache_used(bystander)) is DynamicCache
    disable(first)
    assert type(cache_used(first)) is DynamicCache
    assert type(cache_used(second)) is TurboQuantCache
    disable(second)
    assert [fingerprint(m) for m in (first, second, bystander)] == before


def test_a_model_that_shares_the_config_object() -> None:
    model = tiny_model(seed=0)
    other = type(model)(model.config).eval()
    prompt = left_padded(3, 8, (0, 3, 5), 0)
    want = generate(other, *prompt)
    with enabled(model):
        assert other.config._attn_implementation == "turboquant"
        tokens, logits = generate(other, *prompt)
        assert type(cache_used(other)) is DynamicCache
    assert torch.equal(tokens, want[0])
    torch.testing.assert_close(logits, want[1], rtol=1e-4, atol=1e-4)


def test_a_copied_model_is_enabled_on_its_own() -> None:
    model = tiny_model()
    enable(model, max_cache_len=64)
    twin = copy.deepcopy(model)
    disable(model)
    assert twin._prepare_cache_for_generation.model is twin
    assert cache_used(twin).capacity == 64
    disable(twin)
    assert type(cache_used(twin)) is DynamicCache


def test_the_callers_choice_of_cache_is_kept() -> None:
    model = tiny_model()
    prompt = left_padded(2, 8, (0, 3), 0)
    want = generate(model, *prompt)
    with enabled(model):
        for make in (
            lambda: DynamicCache(config=model.config),
            lambda: StaticCache(config=model.config, max_cache_len=32),
        ):
            cache = make()
            assert torch.equal(generate(model, *prompt, past_key_values=cache)[0], want[0])
            assert type(cache_used(model, past_key_values=make())) is type(cache)
        for options in ({"cache_implementation": "static"}, {"use_cache": False}):
            assert torch.equal(generate(model, *prompt, **options)[0], want[0])
        assert type(cache_used(model, cache_implementation="static")) is StaticCache
        ours = TurboQuantCache(model, 32)
        assert cache_used(model, past_key_values=ours) is ours


def test_a_generation_that_cannot_fit_is_refused_before_it_starts() -> None:
    model = tiny_model()
    ids, mask = left_padded(1, 10, (0,), 0)
    message = "20 tokens do not fit a TurboQuantCache of max_cache_len=19"
    with enabled(model, max_cache_len=19):
        with pytest.raises(UnsupportedError, match=message):
            generate(model, ids, mask, 11)
        cache = TurboQuantCache(model, 19)
        with pytest.raises(UnsupportedError, match=message):
            generate(model, ids, mask, 11, past_key_values=cache)
        assert cache.nbytes == 0
        # The last token is returned but never stored.
        tokens, _ = generate(model, ids, mask, 10, past_key_values=cache)
        assert tokens.shape == (1, 10)
        assert int(cache.get_seq_length()) == 19


def test_refused_at_generation_time() -> None:
    model = tiny_model()
    ids, mask = left_padded(1, 6, (0,), 0)
    with enabled(model):
        with pytest.raises(UnsupportedError, match="continuous batching has a paged cache"):
            model.init_continuous_batching()
        with pytest.raises(UnsupportedError, match="continuous batching has a paged cache"):
            model.generate_batch([[1, 2, 3]], max_new_tokens=2)
        with pytest.raises(UnsupportedError, match="output_attentions; .* use 'eager'"):
            model(ids, output_attentions=True)
        with pytest.raises(UnsupportedError, match="output_attentions"):
            generate(model, ids, mask, output_attentions=True)
        mode = type("Mode", (), {"value": "contrastive_search"})
        with pytest.raises(UnsupportedError, match="contrastive_search is not supported yet"):
            model._prepare_cache_for_generation(model.generation_config, {}, mode, 1, 8)
        model.set_attn_implementation("sdpa")
        with pytest.raises(UnsupportedError, match="changed to 'sdpa' after turboquant.hf.enable"):
            generate(model, ids, mask)
    assert model.config._attn_implementation == "sdpa"


def test_training_with_dropout_is_refused() -> None:
    model = tiny_model(attention_dropout=0.1)
    with enabled(model):
        model.train()
        with pytest.raises(UnsupportedError, match=r"dropout; call model.eval\(\)"):
            model(torch.ones(1, 4, dtype=torch.long))
        model.eval()


def test_models_that_cannot_be_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with pytest.raises(UnsupportedError, match=r"LlamaModel has no generate\(\); call model"):
        enable(model.model)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    before = fingerprint(model)
    with pytest.raises(UnsupportedError, match="does not take its attention function from"):
        enable(model)
    assert fingerprint(model) == before


def run_python(script: str, elsewhere: Path) -> str:
    """In a fresh interpreter, away from the checkout, whose sources are not what is installed."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=elsewhere, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def test_import_changes_no_existing_entry(tmp_path: Path) -> None:
    script = """
from transformers.masking_utils import AttentionMaskInterface as M
from transformers.modeling_utils import AttentionInterface as A
before = dict(A._global_mapping), dict(M._global_mapping)
import turboquant
assert (A._global_mapping, M._global_mapping) == before
import turboquant.hf
for new, old in zip((A._global_mapping, M._global_mapping), before):
    assert new.pop("turboquant") is not None and new == old
"""
    run_python(script, tmp_path)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"turboquant.hf needs transformers: pip install 'turboquant-tq4\[hf\]'"),
        ("5.15.1", "needs transformers 5.16 or newer, found 5.15.1: pip install -U"),
    ],
)
def test_without_a_suitable_transformers(version: str | None, message: str, tmp_path: Path) -> None:
    script = f"""
import sys, types
version = {version!r}
sys.modules["transformers"] = version and types.SimpleNamespace(__version__=version)
import turboquant
try:
    import turboquant.hf
except ImportError as error:
    print(error)
"""
    assert re.search(message, run_python(script, tmp_path))
