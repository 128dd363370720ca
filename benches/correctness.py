"""A slow AdamW in float64, run beside both sides before anything is timed: a fast wrong answer is worth nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sides import LEARNING_RATE, WEIGHT_DECAY, Side

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
SAMPLE = 4_096
TOLERANCE = 2e-6  # absolute; values are below 1, so a few units in the last place of float32
STEPS = 3


def sample(tensor: Tensor) -> Tensor:
    """Take the first and the last elements, in float64: whole small tensors, and both ends of large ones."""
    flat = tensor.detach().reshape(-1)
    return torch.cat([flat[:SAMPLE], flat[max(SAMPLE, len(flat) - SAMPLE) :]]).double()


class Reference:
    """AdamW as the paper writes it, on samples of the parameters."""

    def __init__(self, values: Sequence[Tensor], max_grad_norm: float | None, limit: float | None) -> None:
        self.values = [sample(value) for value in values]
        self.exp_avg = [torch.zeros_like(value) for value in self.values]
        self.exp_avg_sq = [torch.zeros_like(value) for value in self.values]
        self.max_grad_norm = max_grad_norm
        self.limit = math.inf if limit is None else limit
        self.steps = 0

    def coefficient(self, gradients: Sequence[Tensor]) -> float:
        """Give what each gradient is multiplied by, so that the global norm does not pass the greatest allowed."""
        if self.max_grad_norm is None:
            return 1.0
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        return min(1.0, self.max_grad_norm / (norm + 1e-6))

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step with the gradients of whole parameters."""
        self.steps += 1
        coefficient = self.coefficient(gradients)
        for index, whole in enumerate(gradients):
            gradient = sample(whole) * coefficient
            exp_avg = self.exp_avg[index].mul_(BETA1).add_(gradient * (1 - BETA1))
            exp_avg_sq = self.exp_avg_sq[index].mul_(BETA2).add_(gradient**2 * (1 - BETA2))
            corrected = exp_avg / (1 - BETA1**self.steps)
            spread = (exp_avg_sq / (1 - BETA2**self.steps)).sqrt() + EPS
            value = self.values[index].mul_(1 - LEARNING_RATE * WEIGHT_DECAY)
            value.sub_(LEARNING_RATE * corrected / spread).clamp_(-self.limit, self.limit)

    def check(self, name: str, values: Sequence[Tensor]) -> None:
        """Raise unless the values agree with these."""
        worst = max(
            float((sample(value) - right).abs().max()) for value, right in zip(values, self.values, strict=True)
        )
        if not worst <= TOLERANCE:
            msg = f"{name} is {worst:.3g} away from the float64 reference after {self.steps} steps: not timed"
            raise AssertionError(msg)


def check_all_elements(left: Side, right: Side) -> None:
    """Raise unless two sides agree in every element, not only in the sampled ones."""
    for index, (one, other) in enumerate(zip(left.parameters, right.parameters, strict=True)):
        worst = float((one.detach() - other.detach()).abs().max())
        if not worst <= TOLERANCE:
            msg = f"parameter {index}: the two sides are {worst:.3g} apart: not timed"
            raise AssertionError(msg)
