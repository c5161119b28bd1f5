"""The packaged model has learned: it is a better compressor than xz, and uses its context."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from turboquant.demo import MODEL_FOLDER, evaluate  # noqa: E402


def test_bits_per_byte_of_held_out_files() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    files = ("stdlib/graphlib.py", "stdlib/py_compile.py")
    documents = [d for d in evaluate.held_out() if d.name in files]
    assert len(documents) == len(files)
    with torch.no_grad():
        bits = evaluate.report(lambda ids: model(ids, use_cache=False).logits, documents)
    assert bits["model, context 8192"] < bits["xz -9, concatenated"]
    assert bits["model, context 8192"] < 0.95 * bits["model, context 512"]


def test_weights_are_small() -> None:
    assert (MODEL_FOLDER / "model.safetensors").stat().st_size <= 8_000_000
