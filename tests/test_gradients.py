"""Inputs may require grad: forward works as ever, only a backward pass raises."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import randn, random_cache, same_bits
from torch import Tensor

import turboquant as tq

pytestmark = pytest.mark.usefixtures("one_thread")

D = 32


def call(op: str, device: torch.device) -> dict[str, Any]:
    cache = random_cache(1, 2, 9, D, norm_dtype=torch.float32).to(device)
    query, sinks = randn(1, 4, 3, D).to(device), randn(4).to(device)
    boundaries, x = tq.codebook(D)[1].to(device), randn(1, 2, 5, D).to(device)
    centroids, rotation = cache.centroids, cache.rotation
    if op == "compress":
        return {"x": x, "rotation": rotation, "boundaries": boundaries, "centroids": centroids,
                "norm": "preserve", "offset": x[:, :, :1].clone()}  # fmt: skip
    if op == "decompress":
        return {"packed": cache.k_packed, "norms": cache.k_norms, "centroids": centroids,
                "rotation": rotation, "offset": x[:, :, :1].clone()}  # fmt: skip
    names = ("k_packed", "k_norms", "v_packed", "v_norms", "centroids", "rotation")
    arguments = {"query": query, **dict(zip(names, cache.args))}
    return arguments if op == "tq4_sdpa" else {**arguments, "sinks": sinks}


FLOATING = [
    (op, name)
    for op in ("compress", "decompress", "tq4_sdpa", "tq4_attention")
    for name, t in call(op, torch.device("cpu")).items()
    if torch.is_tensor(t) and t.is_floating_point()
]


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(("op", "name"), FLOATING)
def test_forward_works_and_backward_raises(device: torch.device, op: str, name: str) -> None:
    arguments = call(op, device)
    want = outputs(getattr(tq, op)(**arguments))
    arguments[name] = arguments[name].clone().requires_grad_()
    got = outputs(getattr(tq, op)(**arguments))
    for a, b in zip(got, want):
        assert same_bits(a, b)
    differentiable = [t for t in got if t.is_floating_point()]
    for t in differentiable:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning is not a refusal
            with pytest.raises(RuntimeError, match="inference only"):
                t.float().sum().backward(retain_graph=True)
    assert arguments[name].grad is None


@pytest.mark.parametrize(("op", "name"), FLOATING)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_nothing_is_recorded(
    device: torch.device, op: str, name: str, mode: Callable[[], Any]
) -> None:
    arguments = call(op, device)
    want = outputs(getattr(tq, op)(**arguments))
    arguments[name] = arguments[name].clone().requires_grad_()
    with mode():
        got = outputs(getattr(tq, op)(**arguments))
        for a, b in zip(got, want):
            assert same_bits(a, b)
            assert not a.requires_grad


def test_output_without_grad_inputs_does_not_require_grad(device: torch.device) -> None:
    for op in ("compress", "decompress", "tq4_sdpa", "tq4_attention"):
        assert not any(t.requires_grad for t in outputs(getattr(tq, op)(**call(op, device))))


@pytest.mark.parametrize("name", ["k", "v", "rotation", "boundaries", "centroids", "k_offset"])
def test_update_takes_inputs_that_require_grad(device: torch.device, name: str) -> None:
    """Nothing is returned, so there is nothing to differentiate."""

    def written(require: bool) -> list[Tensor]:
        compress = call("compress", device)
        cache = random_cache(1, 2, 9, D, seed=3).to(device)
        arguments = {
            "k": compress["x"], "v": -compress["x"], "rotation": compress["rotation"],
            "boundaries": compress["boundaries"], "centroids": compress["centroids"],
            "k_offset": compress["offset"],
        }  # fmt: skip
        if require:
            arguments[name] = arguments[name].clone().requires_grad_()
        state = dict(zip(("k_packed", "k_norms", "v_packed", "v_norms"), cache.args))
        tq.update_(input_pos=torch.arange(5, device=device), **arguments, **state)
        return list(cache.args[:4])

    for with_grad, without in zip(written(True), written(False)):
        assert same_bits(with_grad, without)
        assert not with_grad.requires_grad


def test_a_model_around_it_can_be_trained_elsewhere(device: torch.device) -> None:
    """A graph that only touches detached results is differentiable."""
    arguments = call("tq4_sdpa", device)
    weight = torch.ones(D, requires_grad=True, device=device)
    arguments["query"] = arguments["query"] * weight
    out = tq.tq4_sdpa(**arguments).detach()
    (out * weight).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, out.sum((0, 1, 2)))
