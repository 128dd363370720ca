"""Running two models on the same inputs, and comparing what they return."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .relation import magnitude
from .report import OutputRow

_ALONE = "output"
_MAIN = ("logits", "last_hidden_state")
"""What a model that returns several things calls the one that another returns alone."""


def compare_outputs(a: Any, b: Any, inputs: Any) -> list[OutputRow]:
    """The differences of all outputs that both models give.

    Raises:
        TypeError: one of them is no model.
    """
    for side in (a, b):
        if not isinstance(side, nn.Module):
            raise TypeError(f"inputs= needs two models to call, and {type(side).__name__} is none; leave inputs= out")
    return [_row(name, one, other) for name, one, other in _paired(_run(a, inputs), _run(b, inputs))]


def _run(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    args, kwargs = (), {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    else:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    with torch.no_grad(), _evaluating(model):
        return _tensors(model(*args, **kwargs))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and every module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _tensors(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by name; nested ones under dotted names."""
    if isinstance(output, Tensor):
        return {_ALONE: output}
    if isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, (tuple, list)):
        items = list(enumerate(output))
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, value in items:
        for name, tensor in _tensors(value).items():
            found[str(key) if name == _ALONE else f"{key}.{name}"] = tensor
    return found


def _paired(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    shared = [(name, a[name], b[name]) for name in a if name in b]
    if shared or not a or not b:
        return shared
    one, other = _main(a), _main(b)
    return [(one if one != _ALONE else other, a[one], b[other])]


def _main(outputs: dict[str, Tensor]) -> str:
    return next((name for name in _MAIN if name in outputs), next(iter(outputs)))


def _row(name: str, a: Tensor, b: Tensor) -> OutputRow:
    if a.shape != b.shape:
        return OutputRow(name, math.nan, math.nan, None, f"shape {list(a.shape)} -> {list(b.shape)}")
    largest, relative = magnitude(a, b)
    return OutputRow(name, largest, relative, _log_softmax_difference(a, b))


def _log_softmax_difference(a: Tensor, b: Tensor) -> float | None:
    """Only for what may be logits: several numbers for each of several rows."""
    if not (a.is_floating_point() and b.is_floating_point()) or a.ndim < 2 or a.shape[-1] < 2:
        return None
    ours, theirs = (torch.log_softmax(tensor.to(b.device, torch.float64), dim=-1) for tensor in (a, b))
    return magnitude(ours, theirs)[0]
