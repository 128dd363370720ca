"""The two sides of a comparison: the same parameters and gradients under paramstate and under torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import paramstate
from shapes import Shape

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-2
VALUE_SCALE = 0.02  # GPT-2's own initial spread
GRADIENT_SCALE = 1e-3


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


def make_model(shapes: Sequence[Shape], seed: int = 0, limit: float | None = None) -> nn.ParameterList:
    """Make random parameters; with a limit they start inside it."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator).mul_(VALUE_SCALE) for shape in shapes]
    if limit is not None:
        for value in values:
            value.clamp_(-limit, limit)
    return nn.ParameterList(nn.Parameter(value) for value in values)


def give_gradients(model: nn.Module, seed: int = 1) -> None:
    """Assign random gradients, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).mul_(GRADIENT_SCALE)


def ours(model: nn.ParameterList, *, max_grad_norm: float | None = None, limit: float | None = None) -> Side:
    """Make paramstate's side. It knows the model, so every step also checks that the model holds what is trained."""
    constraints = None if limit is None else paramstate.Box(-limit, limit)
    optimizer = paramstate.AdamW(
        model, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, max_grad_norm=max_grad_norm, constraints=constraints
    )
    return Side(model, optimizer)


def theirs(model: nn.ParameterList, *, fused: bool = True) -> Side:
    """Make torch's side: the fused step, its best on a CPU, or the loop over parameters, its default there."""
    parameters = list(model.parameters())
    return Side(model, torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused))
