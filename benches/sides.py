"""The sides of a comparison: the same parameters and gradients under paramstate and under others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

import paramstate
from outcome import NotMeasuredError
from shapes import Shape

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-2
VALUE_SCALE = 0.02  # GPT-2's own initial spread
GRADIENT_SCALE = 1e-3

Setting = Literal["for-loop", "foreach", "fused"]
SETTINGS: tuple[Setting, ...] = ("for-loop", "foreach", "fused")  # torch's three; the first is its default on a CPU


@dataclass(frozen=True)
class Side:
    """A model, which is only a list of parameters, and its optimizer."""

    model: nn.ParameterList
    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters in order."""
        return list(self.model.parameters())

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients in order; all of them must be there."""
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]


@cache
def random_numbers(shape: Shape, seed: int) -> Tensor:
    """Standard normal numbers, made once for all sides."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_model(
    shapes: Sequence[Shape], limit: float | None = None, dtype: torch.dtype = torch.float32
) -> nn.ParameterList:
    """Make random parameters, each with numbers of its own; with a limit they start inside it."""
    values = [random_numbers(shape, index).mul(VALUE_SCALE) for index, shape in enumerate(shapes)]
    if limit is not None:
        for value in values:
            value.clamp_(-limit, limit)
    return nn.ParameterList(nn.Parameter(value.to(dtype)) for value in values)


def give_gradients(model: nn.Module) -> None:
    """Assign random gradients, the same to each model, other numbers than the values."""
    for index, parameter in enumerate(model.parameters()):
        numbers = random_numbers(tuple(parameter.shape), 100_000 + index)
        parameter.grad = numbers.mul(GRADIENT_SCALE).to(parameter.dtype)


def require_options(options: Mapping[str, Any]) -> None:
    """Say so where AdamW does not take these yet."""
    accepted = inspect.signature(paramstate.AdamW).parameters
    unknown = [name for name in options if name not in accepted]
    if unknown:
        raise NotMeasuredError(f"not available: AdamW takes no {' and no '.join(unknown)}")


def ours(model: nn.ParameterList, *, limit: float | None = None, **options: Any) -> Side:
    """Make paramstate's side. It knows the model, so every step also checks that the model holds what is trained."""
    if limit is not None:
        options["constraints"] = paramstate.Box(-limit, limit)
    require_options(options)
    return Side(model, paramstate.AdamW(model, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **options))


def torchs(model: nn.ParameterList, setting: Setting) -> Side:
    """Make torch's side in one of its settings."""
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    options = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[setting]
    return Side(model, make(list(model.parameters()), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **options))
