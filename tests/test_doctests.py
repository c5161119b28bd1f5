"""The examples in the installed package's docstrings."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import turboquant

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(turboquant.__path__, "turboquant.")
    if not name.endswith(("._C", ".__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name.startswith(("turboquant.hf", "turboquant.cli")):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_public_functions_have_examples() -> None:
    for name in turboquant.__all__:
        if not name.startswith("__"):
            assert ">>>" in (getattr(turboquant, name).__doc__ or ""), name
