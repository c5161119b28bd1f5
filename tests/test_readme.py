"""README's Python examples run, one after the other, as a reader would paste them."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_examples() -> None:
    pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    out, k, again = scope["out"], scope["k"], scope["k_again"]
    assert isinstance(out, torch.Tensor)
    assert isinstance(k, torch.Tensor)
    assert isinstance(again, torch.Tensor)
    assert out.shape == (1, 32, 100, 128)
    assert torch.nn.functional.cosine_similarity(k, again, dim=-1).mean() > 0.995
