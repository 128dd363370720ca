"""A real spaced-repetition trainer: two of its Adam steps with the expected values, and the bounds that it clips to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

FSRS = json.loads((Path(__file__).parent / "data" / "fsrs_adam.json").read_text(encoding="utf-8"))


def ceiling(w: torch.Tensor, relearning_steps: int) -> float:
    """The bound of two of the trainer's values, which depends on three others."""
    if relearning_steps <= 1:
        return 2.0
    total = math.log(float(w[11])) + math.log(2 ** float(w[13]) - 1) + 0.3 * float(w[14])
    return min(2.0, math.sqrt(max(0.01, -total / relearning_steps)))


def fsrs_bounds(relearning_steps: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The trainer's clipper: each value to its range, then the two that depend on values already clipped."""

    def clip(w: torch.Tensor) -> torch.Tensor:
        w = w.clone()
        ranges = list(enumerate(FSRS["bounds"]["range"]))
        for index, (low, high) in sorted(ranges, key=lambda item: item[1][1] == "ceiling"):
            w[index] = w[index].clamp(low, ceiling(w, relearning_steps) if high == "ceiling" else high)
        return w

    return clip


def fsrs_adam(cls: type[torch.optim.Adam], parameter: nn.Parameter) -> torch.optim.Adam:
    options = FSRS["optimizer"]
    return cls([parameter], options["lr"], tuple(options["betas"]), options["eps"], options["weight_decay"])


def largest_error(parameter: torch.Tensor, expected: list[float]) -> float:
    return float((parameter.detach() - torch.tensor(expected)).abs().max())
