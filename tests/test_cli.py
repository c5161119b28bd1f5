"""The command line: what it prints, what it measures, and one line for every bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf.tiny import tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import turboquant
import turboquant.demo
from turboquant import hf, ops
from turboquant.cli import demo, info, main, measure, models, report, terminal
from turboquant.cli.diagnose import size
from turboquant.cli.errors import UserError
from turboquant.hf import TurboQuantCache, enabled
from turboquant.hf.support import weight_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

END = 256
PROMPT = "def main(argv):\n    return"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU: the default device is then the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with the demo's tokenizer: a token is a byte."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return folder


def save_tiny(folder: Path, **overrides: Any) -> None:
    options = {
        "vocab_size": 257,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "bos_token_id": END,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    config = tiny_config(**{**options, **overrides})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(turboquant.demo.MODEL_FOLDER / name, folder)


@pytest.fixture(scope="module")
def tiny_model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([list(text.encode())])


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a bad command line comes to."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"turboquant: error: [^\n]+\n", err), err
    return err


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "turboquant.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


# ------------------------------------------------------------------------------------- info


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    facts = dict(re.findall(r"^(\S.*?)  +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert facts["turboquant"] == turboquant.__version__
    assert torch.__version__ in facts["torch"]
    assert Path(facts["CPU library"]).is_file()
    isa = torch.ops.turboquant._cpu_isa()
    assert re.fullmatch(rf"{isa} \(this host runs: .*\b{isa}\b.*\)", facts["CPU instructions"])
    assert facts["CPU threads"] == "1"
    assert facts["CUDA"] == "on" or facts["to mend"]


def test_info_needs_neither_transformers_nor_rich() -> None:
    code = """
import sys
from turboquant.cli import main
assert main(["info"]) == 0
found = {"transformers", "rich", "huggingface_hub"} & set(sys.modules)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "transformers" in done.stdout


def test_info_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise info.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(info.metadata, "version", missing)
    assert dict(info.facts())["transformers"].endswith('pip install "turboquant-tq4[demo]"')


def test_info_says_why_cuda_is_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(ops, "CUDA_LIBRARY", tmp_path / "absent.so")
    facts = dict(info.facts())
    assert facts["CUDA"].startswith("off: built without it")
    assert facts["to mend"] == ops.INSTALL_WITH_CUDA

    (tmp_path / "there.so").touch()
    monkeypatch.setattr(ops, "CUDA_LIBRARY", tmp_path / "there.so")
    assert dict(info.facts())["CUDA"] == "off: this torch is a CPU build"

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dict(info.facts())["CUDA"] == "off: torch finds no usable GPU"


# --------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("cache", ["tq4", "dense"])
def test_generate_prints_what_transformers_generates(
    cache: str, tiny: Path, tiny_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ids_of(PROMPT)
    attention = enabled(tiny_model) if cache == "tq4" else contextlib.nullcontext()
    with attention:
        tokens = tiny_model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=END)
    new = tokens[0, prompt.shape[1] :].tolist()
    assert len(set(new)) >= 5

    arguments = ["--model", str(tiny), "--prompt", PROMPT, "--cache", cache]
    assert main(["generate", *arguments, "--max-new-tokens", "20"]) == 0
    out, err = capsys.readouterr()
    expected = bytes(token for token in new if token < END).decode(errors="replace")
    assert out == expected + "\n"

    tokens_cached = len(PROMPT) + 19
    bytes_a_token = 2 * 2 * 2 * (34 if cache == "tq4" else 4 * 64)
    figures = {
        "prompt": rf"{len(PROMPT)} tokens, [\d,.]+ tokens/s",
        "first token": r"after \d+\.\d\d s",
        "generated": r"20 tokens, [\d,.]+ tokens/s",
        "4-bit cache" if cache == "tq4" else "dense cache": re.escape(
            f"{bytes_a_token * tokens_cached / 1e3:.2f} kB for {tokens_cached} tokens"
        )
        + ("; a dense one: .* kB" if cache == "tq4" else ""),
    }
    for label, figure in figures.items():
        assert re.search(rf"^{label} +{figure}$", err, re.MULTILINE), (label, figure, err)


def test_generate_reads_a_file_and_standard_input(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "déjà vu, says the prompt\n"
    file = tmp_path / "prompt.txt"
    file.write_text(text, encoding="utf-8")
    given = (["--prompt", text], ["--prompt-file", str(file)], ["--prompt", "-"],
             ["--prompt-file", "-"])  # fmt: skip
    outputs = []
    for prompt in given:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert main(["generate", "--model", str(tiny), "--max-new-tokens", "9", *prompt]) == 0
        outputs.append(capsys.readouterr().out)
    assert len(outputs[0]) > 1
    assert outputs == outputs[:1] * 4


def test_generate_samples_by_the_seed(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(seed: str, *more: str) -> str:
        arguments = ["--model", str(tiny), "--prompt", PROMPT, "--seed", seed, *more]
        assert main(["generate", *arguments, "--max-new-tokens", "12"]) == 0
        return capsys.readouterr().out

    hot = ("--temperature", "3")
    assert run("1", *hot) == run("1", *hot) != run("2", *hot)
    assert run("1", *hot, "--top-p", "1e-9") == run("1", "--temperature", "1e-40") == run("1")


def test_generate_stops_at_the_end_of_the_context(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--model", str(tiny), "--prompt", "x" * 120]
    assert main(arguments) == 0
    assert "generated    8 tokens" in capsys.readouterr().err
    assert main([*arguments, "--max-new-tokens", "8"]) == 0
    capsys.readouterr()
    line = fails(capsys, *arguments, "--max-new-tokens", "9")
    assert "120 tokens leaves room for 8 more (the model's context is 128)" in line


def test_generate_is_quiet(tiny: Path) -> None:
    """No warnings and no progress bars but our own, where a person would see them."""
    arguments = ("--model", str(tiny), "--prompt", PROMPT, "--max-new-tokens", "3", "--compare")
    done = command("generate", *arguments)
    assert (done.returncode, done.stderr) == (0, "")


def test_compare(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tiny), "--prompt", PROMPT, "--max-new-tokens", "40"]
    assert (
        main(["generate", *arguments, "--compare", "--dtype", "bfloat16", "--device", "cpu"]) == 0
    )
    out = capsys.readouterr().out
    sections = re.findall(r"^(?:-- )?(dense cache|4-bit cache|cost|quality)\b", out, re.MULTILINE)
    assert sections == ["dense cache", "4-bit cache", "cost", "quality"]
    assert "(cpu, 1 thread, bfloat16)" in out
    cached = len(PROMPT) + 39
    sizes = rf"{cached * 2 * 2 * 2 * 128 / 1e3:.2f} kB +{cached * 2 * 2 * 2 * 34 / 1e3:.2f} kB"
    assert re.search(rf"^KV cache, {cached} tokens +{sizes} +3\.76x smaller$", out, re.MULTILINE)
    rates = r"[\d.,]+ tokens/s +[\d.,]+ tokens/s +[\d.]+x (faster|slower)"
    assert re.search(rf"^prefill, {len(PROMPT)} tokens +{rates}$", out, re.MULTILINE)
    assert re.search(rf"^decode +{rates}$", out, re.MULTILINE)
    agreement = re.search(r"^top-1 agreement +([\d.]+)% \((\d+) of 40\)$", out, re.MULTILINE)
    assert agreement
    assert float(agreement[1]) == pytest.approx(100 * int(agreement[2]) / 40)
    assert re.search(r"^mean KL +0\.\d*[1-9]\d* nats", out, re.MULTILINE)
    assert all(len(line) <= 80 for line in out[out.index("cost (") :].splitlines())


def test_both_caches_read_the_dense_continuation(
    tiny: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Any] = []
    compare_caches = measure.compare_caches

    def watched(dense: Any, tq4: Any, ids: torch.Tensor) -> measure.Fidelity:
        compared.extend([dense.kind, dense.length, tq4.kind, tq4.length, ids])
        return compare_caches(dense, tq4, ids)

    monkeypatch.setattr(report, "compare_caches", watched)
    arguments = ["generate", "--model", str(tiny), "--prompt", PROMPT, "--max-new-tokens", "9",
                 "--device", "cpu"]  # fmt: skip
    assert main([*arguments, "--compare"]) == 0
    *caches, read = compared
    before = len(PROMPT) - 1
    assert caches == ["dense", before, "tq4", before]
    tokens = tiny_model.generate(ids_of(PROMPT), max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(read, tokens[:, before:-1])


def test_reports_without_rich(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    test_compare(tiny, capsys)


def test_progress_covers_the_prompt_and_ends_before_the_text(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    @contextlib.contextmanager
    def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
        events.append((label, total))
        yield events.append
        events.append(capsys.readouterr().out)

    monkeypatch.setattr(terminal, "progress", progress)
    monkeypatch.setattr(measure, "STEP", 10)
    assert main(["generate", "--model", str(tiny), "--prompt", "x" * 26]) == 0
    assert events == [("reading the prompt, 4-bit cache", 26), 10, 20, 25, ""]
    assert capsys.readouterr().out


@pytest.mark.parametrize("rich", [True, False])
def test_progress_is_for_people(
    rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw() -> str:
        with terminal.status("loading"), terminal.progress("reading", 300) as done:
            done(200)
            time.sleep(0.15)
        return capsys.readouterr().err

    assert draw() == ""
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    drawn = draw()
    assert "loading" in drawn
    assert re.search(r"reading.*200/300", drawn, re.DOTALL)


# ---------------------------------------------------------------------------------- measure


def cached(model: Any, kind: measure.CacheKind) -> measure.CachedModel:
    return measure.CachedModel(model, kind, 100)


def test_dense_against_dense_is_exactly_the_same(tiny_model: Any) -> None:
    ids = ids_of(PROMPT * 3)
    fidelity = measure.compare_caches(cached(tiny_model, "dense"), cached(tiny_model, "dense"), ids)
    assert fidelity.kl.shape == fidelity.same_top1.shape == (ids.shape[1],)
    assert fidelity.mean_kl == 0.0
    assert fidelity.top1_agreement == 1.0


@pytest.mark.parametrize("vocabulary_room", [1 << 22, 257 * 10])
def test_tq4_against_dense_is_measured_by_its_logits(
    vocabulary_room: int, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece or in pieces, the figures are those of the two sets of logits."""
    ids = ids_of(PROMPT * 3)
    monkeypatch.setattr(measure, "_LOGITS", vocabulary_room)
    fidelity = measure.compare_caches(cached(tiny_model, "dense"), cached(tiny_model, "tq4"), ids)
    assert fidelity.mean_kl > 0
    assert 0 < fidelity.top1_agreement < 1

    with torch.inference_mode():
        dense = tiny_model(ids).logits[0]
        with enabled(tiny_model):
            cache = TurboQuantCache(tiny_model)
            tq4 = tiny_model(ids, past_key_values=cache).logits[0]
    kl = torch.nn.functional.kl_div(
        tq4.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(fidelity.kl.float(), kl, atol=1e-4, rtol=1e-2)
    assert torch.equal(fidelity.same_top1, dense.argmax(-1) == tq4.argmax(-1))


def test_quality_of_the_demo_model() -> None:
    """On text that a trained model has learned to predict, the two caches nearly agree."""
    folder = turboquant.demo.MODEL_FOLDER
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = ids_of(Path(demo.__file__).read_text(encoding="utf-8")[:1000])
    caches = [measure.CachedModel(model, kind, 1000) for kind in report.KINDS]
    fidelity = measure.compare_caches(caches[0], caches[1], ids)
    assert 1e-4 < fidelity.mean_kl < 0.2
    assert 0.85 < fidelity.top1_agreement < 1


def test_compare_logits() -> None:
    """Two outcomes, by hand; and one that both sides rule out."""
    log = torch.tensor([0.25, 0.75, 0.0]).log()
    other = torch.tensor([0.5, 0.5, 0.0]).log() + 7.0  # a shift changes no distribution
    fidelity = measure.compare_logits(log[None], other[None])
    expected = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()
    assert fidelity.mean_kl == pytest.approx(float(expected), abs=1e-6)
    assert fidelity.top1_agreement == 0.0


def test_cache_bytes(tiny_model: Any) -> None:
    """Of all that is allocated, and of every kind of cache."""
    ids = ids_of("x" * 50)
    dense, tq4 = cached(tiny_model, "dense"), cached(tiny_model, "tq4")
    assert measure.cache_bytes(dense.cache) == measure.cache_bytes(tq4.cache) == 0
    for each in (dense, tq4):
        each.prefill(ids)
        assert each.length == each.cache.get_seq_length() == 50
    heads, layers, keys_and_values = 2, 2, 2
    vectors = heads * layers * keys_and_values
    assert measure.cache_bytes(dense.cache) == 50 * vectors * 64 * 4
    assert measure.cache_bytes(tq4.cache) == 100 * vectors * 34 == tq4.cache.nbytes
    # A view of half a buffer still holds the whole of it.
    dense.cache.layers[0].keys = dense.cache.layers[0].keys[:, :, :25]
    assert measure.cache_bytes(dense.cache) == 50 * vectors * 64 * 4


@pytest.mark.parametrize("kind", ["dense", "tq4"])
def test_prefill_in_steps_and_rewind(
    kind: measure.CacheKind, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(PROMPT)
    whole = cached(tiny_model, kind)
    expected = whole.logits(ids)
    assert expected.shape == (len(PROMPT), 257)

    monkeypatch.setattr(measure, "STEP", 7)
    stepped = cached(tiny_model, kind)
    stepped.prefill(ids[:, :-3])
    torch.testing.assert_close(stepped.logits(ids[:, -3:]), expected[-3:], atol=2e-3, rtol=1e-3)
    stepped.rewind(len(PROMPT) - 5)
    assert stepped.length == stepped.cache.get_seq_length() == len(PROMPT) - 5
    torch.testing.assert_close(stepped.logits(ids[:, -5:]), expected[-5:], atol=2e-3, rtol=1e-3)


def test_the_cache_in_use_is_the_packed_one(tiny_model: Any) -> None:
    """What is stored decides what is predicted: nothing dense is kept beside it."""
    before, after = cached(tiny_model, "tq4"), cached(tiny_model, "tq4")
    for each in (before, after):
        each.prefill(ids_of(PROMPT))
    for layer in after.cache.layers:
        layer.buffers.v_packed.fill_(0)
    last = ids_of("x")
    assert not torch.allclose(before.logits(last), after.logits(last), atol=0.1)


def test_the_model_is_as_it_was(tiny_model: Any) -> None:
    attention = tiny_model.config._attn_implementation
    cached(tiny_model, "tq4").generate(ids_of(PROMPT), 3, pick=measure.greedy)
    assert tiny_model.config._attn_implementation == attention != "turboquant"


def test_generation_figures(tiny_model: Any) -> None:
    seen: list[int] = []
    script = iter([5, 6, 7, 8])
    result = cached(tiny_model, "tq4").generate(
        ids_of("abc"), 10, pick=lambda _: next(script), stop={7}, on_token=seen.append
    )
    assert result.tokens == seen == [5, 6, 7]
    assert (result.prompt_tokens, result.cached_tokens) == (3, 5)
    assert result.prefill_rate == pytest.approx(3 / result.first_token_s)
    assert result.decode_rate == pytest.approx(2 / result.decode_s)
    assert dataclasses.replace(result, tokens=[5]).decode_rate is None


def test_generate_from_a_single_token(tiny_model: Any) -> None:
    result = cached(tiny_model, "tq4").generate(ids_of("a"), 2, pick=measure.greedy)
    assert (result.prompt_tokens, result.cached_tokens) == (1, 2)


def test_sampler() -> None:
    """Draws by the probabilities, and nothing beyond top_p."""
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    pick = measure.sampler(1.0, 1.0, seed=0)
    draws = torch.tensor([pick(logits) for _ in range(2000)]).bincount(minlength=3) / 2000
    torch.testing.assert_close(draws, logits.exp(), atol=0.04, rtol=0)
    pick = measure.sampler(1.0, 0.7, seed=0)
    assert {pick(logits) for _ in range(200)} == {1, 2}
    pick = measure.sampler(0.5, 1.0, seed=0)
    sharper = torch.tensor([pick(logits) for _ in range(2000)]).bincount(minlength=3) / 2000
    torch.testing.assert_close(sharper, logits.exp() ** 2 / 0.46, atol=0.04, rtol=0)


def test_pieces_of_text_join_to_the_text() -> None:
    """Also where a tokenizer writes blanks only between tokens."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["▁one", "▁two", "▁three", "s"]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    text = report.Detokenizer(tokenizer, [0])
    assert [text.add(token) for token in (1, 2, 3, 0)] == [" two", " three", "s", " one"]


def test_half_a_character_is_held_back(tiny: Path) -> None:
    tokenizer = models.load_tokenizer(models.Source(str(tiny), local=True))
    text = report.Detokenizer(tokenizer, list(b"x"))
    data = "é€😀!".encode() + b"\xff" + "é".encode()[:1]
    pieces = [text.add(byte) for byte in data]
    assert [piece for piece in pieces if piece] == ["é", "€", "😀", "!"]
    assert text.rest() == "\ufffd\ufffd"


# ------------------------------------------------------------------------------------- demo


def test_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PROMPT_BYTES", 4096)
    threads_seen: list[int] = []
    both = report.both

    def watched(task: report.Task) -> None:
        threads_seen.append(torch.get_num_threads())
        assert task.ids[0] == END
        assert task.model.dtype == torch.bfloat16
        both(task)

    monkeypatch.setattr(report, "both", watched)
    torch.set_num_threads(2)
    try:
        assert main(["demo", "--max-new-tokens", "24"]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert threads_seen == [1]
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"prompt: stdlib/\S+\.py, 3,\d\d\d bytes", out)
    dense = re.search(r"dense cache .*\n((?s:.*?))\n\n(?:-- )?4-bit cache", out)
    assert dense
    assert len(dense[1]) >= 20
    assert "3.76x smaller" in out
    agreement = re.search(r"top-1 agreement +([\d.]+)% \(\d+ of 24\)", out)
    assert agreement
    assert float(agreement[1]) >= 75
    kl = re.search(r"mean KL +([\d.]+) nats", out)
    assert kl
    assert 0 < float(kl[1]) < 0.5
    assert "turboquant generate --model" in out[-400:]


def test_demo_prompt_is_a_held_out_file() -> None:
    log = json.loads((turboquant.demo.MODEL_FOLDER / "training_log.json").read_text())
    name, prompt = demo.beginning(log["held_out"])
    assert name in log["held_out"]
    text = (Path(sysconfig.get_path("stdlib")) / name.removeprefix("stdlib/")).read_text("utf-8")
    assert text.startswith(prompt)
    assert 4000 < len(prompt.encode()) <= demo.PROMPT_BYTES
    assert re.search(r"\n +def [^\n]*:\n$", prompt)


def test_demo_without_the_standard_librarys_sources() -> None:
    with pytest.raises(UserError, match="turboquant generate --model"):
        demo.beginning(["stdlib/nowhere.py"])


def _truncate(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:100_000])


def _rename_a_weight(weights: Path) -> None:
    tensors = load_file(weights)
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors.pop("model.layers.3.mlp.up_proj.weight")
    save_file(tensors, weights, metadata={"format": "pt"})


def _reshape_a_weight(weights: Path) -> None:
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, weights, metadata={"format": "pt"})


def _drop_the_log(weights: Path) -> None:
    (weights.parent / "training_log.json").unlink()


def _garble_the_tokenizer(weights: Path) -> None:
    (weights.parent / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        _truncate,
        lambda weights: weights.write_text("version https://git-lfs.github.com/spec/v1\n"),
        _rename_a_weight,
        _reshape_a_weight,
        _drop_the_log,
        _garble_the_tokenizer,
        lambda weights: shutil.rmtree(weights.parent),
    ],
    ids=["missing", "truncated", "pointer", "renamed", "reshaped", "log", "tokenizer", "folder"],
)
def test_damaged_demo_model(
    damage: Callable[[Path], Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(turboquant.demo.MODEL_FOLDER, folder)
    damage(folder / "model.safetensors")
    monkeypatch.setattr(turboquant.demo, "MODEL_FOLDER", folder)
    line = fails(capsys, "demo")
    assert "the demo model is damaged (" in line
    assert "pip install --force-reinstall" in line


def test_weights_that_are_not_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path)
    capsys.readouterr()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    line = fails(capsys, "generate", "--model", str(tmp_path), "--prompt", "x")
    assert "predictions are NaN" in line


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND; see turboquant --help"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["generate", "--prompt", "x"], "required: --model; see turboquant generate --help"),
        (["generate", "--model", "TINY"], "one of the arguments --prompt --prompt-file"),
        (["generate", "--model", "./nowhere", "--prompt", ""], "the prompt is empty"),
        (["generate", "--model", "TINY", "--prompt-file", "/nowhere"], "cannot read /nowhere: No"),
        (["generate", "--model", "TINY", "--prompt-file", "/"], "cannot read /: Is a directory"),
        (["generate", "--model", "TINY", "--prompt-file", sys.executable], "is not UTF-8 text"),
        (["generate", "--model", "./no\nwhere", "--prompt", "x"], "no folder ./no where"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--device", "nonsense"], "cannot use device 'nonsense' (.*); try --device cpu"),
        (["--device", "meta"], "cannot use device 'meta'"),
        (["--max-new-tokens", "0"], "--max-new-tokens: must be at least 1, got 0"),
        (["--max-new-tokens", "x"], "invalid positive_integer value: 'x'"),
        (["--temperature", "-1"], "--temperature: must be 0 or more, got -1"),
        (["--temperature", "inf"], "--temperature: must be 0 or more, got inf"),
        (["--temperature", "1", "--top-p", "0"], "--top-p: must be above 0 and at most 1, got 0"),
        (["--top-p", "0.5"], "--top-p needs a --temperature above 0"),
        (["--seed", str(1 << 64)], "--seed: must be from 0"),
        (["--prompt", "x" * 128], "the prompt has 128 tokens and the model's context is 128"),
        (["--max-cache-len", "5"], "the prompt has 26 tokens and --max-cache-len is 5"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments and arguments[0].startswith("--"):
        prompt = [] if "--prompt" in arguments else ["--prompt", PROMPT]
        arguments = ["generate", "--model", "TINY", *prompt, *arguments]
    line = fails(capsys, *(str(tiny) if word == "TINY" else word for word in arguments))
    assert message in line or re.search(message, line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "generate", "--model", str(tiny), "--prompt", "x", "--device", "cuda")
    assert "cannot use device 'cuda'" in line


def test_no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without our kernels runs the dense cache only."""
    monkeypatch.setattr(ops, "HAS_CUDA", False)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))
    assert models.pick_device("cuda", needs_kernels=False).type == "cuda"
    with pytest.raises(UserError, match="no CUDA kernels; reinstall with .* --device cpu"):
        models.pick_device("cuda", needs_kernels=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert models.pick_device(None, needs_kernels=True).type == "cpu"
    monkeypatch.setattr(ops, "HAS_CUDA", True)
    assert models.pick_device(None, needs_kernels=True).type == "cuda"


def _config(**fields: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(fields))

    return write


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is not a model folder: it holds no config.json"),
        (lambda folder: folder.rmdir(), "there is no folder "),
        (lambda folder: (folder.rmdir(), folder.touch()), "is a file; name the folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not a valid JSON file"),
        (_config(), "`model_type`"),
        (_config(model_type="nonsense"), "does not recognize this architecture"),
        (
            _config(model_type="mistral", sliding_window=64),
            "no 4-bit cache for a mistral model: nothing to compress: .*; try --cache dense",
        ),
        (_config(model_type="t5"), "no 4-bit cache for a t5 model: encoder-decoder"),
        (_config(model_type="llama", head_dim=8), "head dim 8"),
        (_config(model_type="llama"), "holds no tokenizer"),
    ],
    ids=["empty", "gone", "file", "json", "type", "unknown", "sliding", "t5", "D8", "tokenizer"],
)
def test_not_a_model(
    make: Callable[[Path], Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    line = fails(capsys, "generate", "--model", str(folder), "--prompt", "x")
    assert re.search(message, line)


def test_unknown_model_without_a_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # refuses connections
    started = time.monotonic()
    line = fails(capsys, "generate", "--model", "nobody/nothing", "--prompt", "x")
    assert time.monotonic() - started < 10  # the hub's client alone would take 23 s
    assert "no such folder, the hub cannot be reached" in line


def test_unknown_model_with_a_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if self.path in ("", "/") else 404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: Any) -> None:
            pass

    from huggingface_hub import constants

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        line = fails(capsys, "generate", "--model", "nobody/nothing", "--prompt", "x")
        server.shutdown()
    assert "nobody/nothing is not a local folder and is not a valid model identifier" in line


def test_missing_transformers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for arguments in (["demo"], ["generate", "--model", "m", "--prompt", "x"]):
        assert 'pip install "turboquant-tq4[demo]"' in fails(capsys, *arguments)


def test_verbosity_is_put_back() -> None:
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    with models.quiet():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()


@pytest.mark.parametrize("name", ["demo", "generate", "diagnose", "info"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([name, "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: turboquant {name}")
    assert name == "info" or f"turboquant {name} --m" in out  # an example


def test_diagnose(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> None:
    assert main(["diagnose", "--model", str(tiny)]) == 0
    assert capsys.readouterr().out.startswith("llama: 2 of 2 layers in 4 bits")
    options = ["--context", "100", "--batch-size", "2", "--memory", "1GiB", "--weights"]
    assert main(["diagnose", "--model", str(tiny), *options]) == 0
    out = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tiny)
    plan, room = hf.diagnose(model), 2**30 - weight_bytes(model)
    capsys.readouterr()  # transformers shows its progress
    assert f"{plan.longest_context(room, 2):,} tokens; dense" in out
    assert f"cache of 100 tokens, 2 sequences  {size(plan.cache_bytes(100, 2))}; dense" in out
    assert re.search(r"^0-1 .* 1\.\dx +1\.\dx   full attention, 4-bit$", out, re.M)
    for option, message in {
        ("--memory", "much"): "'much' is not a size such as 32GiB",
        ("--context", "0"): "must be at least 1, got 0",
    }.items():
        assert message in fails(capsys, "diagnose", "--model", str(tiny), *option)
    _config(model_type="t5")(tmp_path)
    assert main(["diagnose", "--model", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("t5: not supported: encoder-decoder")


# ------------------------------------------------------------------------------ as a process


def test_exit_code_of_bad_input() -> None:
    done = command("generate", "--model", "./nowhere", "--prompt", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "turboquant: error: there is no folder ./nowhere\n"


def test_ctrl_c_is_quiet(tmp_path: Path) -> None:
    save_tiny(tmp_path, max_position_embeddings=1_000_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "turboquant.cli", "generate", "--model", str(tmp_path)]
        + ["--prompt", PROMPT, "--max-new-tokens", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.read(1)  # it generates
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "turboquant.cli", "info"], stdout=pipe, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (1, b"")
