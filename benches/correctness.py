"""A slow AdamW in float64, run beside all sides before anything is timed: a fast wrong answer is worth nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sides import LEARNING_RATE, WEIGHT_DECAY, Side

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
SAMPLE = 4_096
STEPS = 3
PATH = STEPS * LEARNING_RATE  # how far a value goes at most, nearly


@dataclass(frozen=True)
class Tolerance:
    """How far a side may be from the reference after some steps."""

    absolute: float
    relative: float = 0.0
    mean_square: float = math.inf  # root of the mean of the squared distances

    def excess(self, value: Tensor, right: Tensor) -> float:
        """How many times the greatest distance allowed the worst element is away; more than 1 is too much."""
        distance = (value.double() - right.double()).abs()
        worst = float((distance / (self.absolute + self.relative * right.double().abs())).max())
        return max(worst, float(distance.square().mean().sqrt()) / self.mean_square)


FP32 = Tolerance(2e-6)  # values are below 1: a few units in the last place
BF16_MOMENTS = Tolerance(0.03 * PATH)  # a moment is rounded to 8 bits in each step
# A value is rounded to 8 bits in each step: by half a unit in the last place, at random by up to a whole one.
BF16 = Tolerance(0.03 * PATH, STEPS * 2**-8)
BF16_STOCHASTIC = Tolerance(0.03 * PATH, STEPS * 2**-7)
# Moments of 256 levels in a block: an element far below the others of its block is kept coarsely, most are not.
EIGHT_BITS = Tolerance(2 * PATH, mean_square=0.05 * PATH)


def sample(tensor: Tensor) -> Tensor:
    """Take the first and the last elements, in float64: whole small tensors, and both ends of large ones."""
    flat = tensor.detach().reshape(-1)
    return torch.cat([flat[:SAMPLE], flat[max(SAMPLE, len(flat) - SAMPLE) :]]).double()


class Reference:
    """AdamW as the paper writes it, on samples of the parameters."""

    def __init__(
        self, values: Sequence[Tensor], max_grad_norm: float | None = None, limit: float | None = None
    ) -> None:
        self.values = [sample(value) for value in values]
        self.exp_avg = [torch.zeros_like(value) for value in self.values]
        self.exp_avg_sq = [torch.zeros_like(value) for value in self.values]
        self.steps = [torch.zeros_like(value) for value in self.values]
        self.max_grad_norm = max_grad_norm
        self.limit = math.inf if limit is None else limit

    def restart(self, index: int, elements: Tensor) -> None:
        """Make the state of these elements of a parameter, a bool mask of its shape, as if never stepped."""
        chosen = sample(elements).bool()
        for state in (self.exp_avg, self.exp_avg_sq, self.steps):
            state[index][chosen] = 0.0

    def coefficient(self, gradients: Sequence[Tensor]) -> float:
        """Give what each gradient is multiplied by, so that the global norm does not pass the greatest allowed."""
        if self.max_grad_norm is None:
            return 1.0
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        return min(1.0, self.max_grad_norm / (norm + 1e-6))

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step with the gradients of whole parameters."""
        coefficient = self.coefficient(gradients)
        for index, whole in enumerate(gradients):
            gradient = sample(whole) * coefficient
            steps = self.steps[index].add_(1)
            exp_avg = self.exp_avg[index].mul_(BETA1).add_(gradient * (1 - BETA1))
            exp_avg_sq = self.exp_avg_sq[index].mul_(BETA2).add_(gradient**2 * (1 - BETA2))
            corrected = exp_avg / (1 - BETA1**steps)
            spread = (exp_avg_sq / (1 - BETA2**steps)).sqrt() + EPS
            value = self.values[index].mul_(1 - LEARNING_RATE * WEIGHT_DECAY)
            value.sub_(LEARNING_RATE * corrected / spread).clamp_(-self.limit, self.limit)

    def complaint(self, values: Sequence[Tensor], tolerance: Tolerance) -> str:
        """What is wrong with values that ought to be these; nothing if nothing is."""
        excess = max(tolerance.excess(sample(value), right) for value, right in zip(values, self.values, strict=True))
        return "" if excess <= 1.0 else f"{excess:.3g} times as far from the float64 reference as is allowed: not timed"


def require(name: str, complaint: str) -> None:
    """Raise where there is something wrong."""
    if complaint:
        raise AssertionError(f"{name}: {complaint}")


def check(
    reference: Reference,
    runs: Mapping[str, tuple[Side, Callable[[], object]]],
    tolerance: Tolerance,
    before: Callable[[Side], object] = lambda _: None,
) -> dict[str, str]:
    """Run the reference and all sides for some steps; returns what is wrong with whom."""
    first = next(iter(runs.values()))[0]
    for _ in range(STEPS):
        for side, _ in runs.values():
            before(side)
        reference.step(first.gradients)
        for _, run in runs.values():
            run()
    complaints = {name: reference.complaint(side.parameters, tolerance) for name, (side, _) in runs.items()}
    for name, (side, _) in runs.items():
        complaints[name] = complaints[name] or apart(first, side, tolerance)
    return {name: complaint for name, complaint in complaints.items() if complaint}


def apart(left: Side, right: Side, tolerance: Tolerance) -> str:
    """What is wrong between two sides in any element, not only in samples; each may be off by the tolerance."""
    for index, (one, other) in enumerate(zip(left.parameters, right.parameters, strict=True)):
        excess = excess_of_all(one.detach(), other.detach(), tolerance)
        if not excess <= 2.0:
            return f"parameter {index} differs by {excess:.3g} times what is allowed: not timed"
    return ""


def excess_of_all(one: Tensor, other: Tensor, tolerance: Tolerance) -> float:
    """The excess over a whole parameter, a part at a time."""
    parts = zip(one.reshape(-1).split(1 << 22), other.reshape(-1).split(1 << 22), strict=True)
    return max(tolerance.excess(*part) for part in parts)
