"""The same bits for any number of threads: every dtype, state and rounding, with all that a step may do besides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramstate
from paramstate.bits import same_bits
from precision_models import FLOATS, KINDS

ROUNDINGS = ("nearest", "stochastic", "kahan")
THREADS = (1, 2, 7)
SHAPES = {
    "shared by threads": (300_001,),
    "held by a norm": (70_000,),
    "one chunk": (65_536,),
    "rows": (700, 130),
    "columns": (130, 700),
    "bounded": (257, 300),
    "small": (17,),
    "single": (),
}
"""A thread's work is at most 65,536 elements at a time; what is smaller shares a task with its neighbours."""


def model(dtype: torch.dtype) -> nn.ParameterDict:
    draw = torch.Generator().manual_seed(1)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for name, shape in SHAPES.items()}
    parameters["columns"] = nn.Parameter(parameters["columns"].detach().t().contiguous().t())
    return nn.ParameterDict(parameters)


def trained(dtype: torch.dtype, kind: Any, rounding: Any) -> Iterator[tuple[str, Tensor]]:
    """All that three steps of one training left behind, by name."""
    parameters = model(dtype)
    opt = paramstate.AdamW(
        parameters,
        lr=1e-2,
        amsgrad=True,
        max_grad_norm=0.5,
        state_dtype=kind,
        rounding=rounding,
        rounding_seed=5,
        constraints={"held by a norm": paramstate.MaxNorm(100.0), "columns": paramstate.UnitNorm(0)},
    )
    opt.constrain("bounded", paramstate.Box(torch.linspace(-1.0, 0.0, 300), 0.5, zero_exp_avg=True))
    draw = torch.Generator().manual_seed(2)
    for turn in range(3):
        for name, parameter in parameters.items():
            grad = torch.randn(parameter.shape, generator=draw).to(dtype)
            parameter.grad = grad.t().contiguous().t() if name == "columns" else grad
        opt.step(rows={"rows": slice(0, 400)} if turn == 1 else None)
        if turn == 0:
            opt.freeze_rows("rows", [3, 5, 699])
    assert opt.grad_norm is not None
    yield "norm", opt.grad_norm
    for name, parameter in parameters.items():
        yield name, parameter.detach()
        yield from ((f"{name}, {key}", value) for key, value in opt.state_of(name).items())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_bits_are_the_same_for_any_number_of_threads(dtype: torch.dtype, kind: Any, rounding: Any) -> None:
    found: list[dict[str, Tensor]] = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append(dict(trained(dtype, kind, rounding)))
    assert {*SHAPES} <= found[0].keys()
    assert any(not same_bits(found[0][name], value.detach()) for name, value in model(dtype).items())
    for threads, other in zip(THREADS[1:], found[1:], strict=True):
        assert other.keys() == found[0].keys()
        for name, value in other.items():
            assert same_bits(value, found[0][name]), f"{name} on {threads} threads"
