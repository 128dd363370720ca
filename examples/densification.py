"""Which Gaussians go and which come: the decision, which knows no optimizer.

As in 3-D Gaussian splatting (Kerbl et al. 2023, arXiv:2308.04079, section 5): those that hardly show are pruned, and
those whose means the loss pulls at most are densified. Two departures. The number of Gaussians follows a schedule, so
that two fits are compared at equal size. And a Gaussian is always divided in a way that keeps the image as nearly as
two can, so there is nothing to repair afterwards, and what new rows do in their first steps shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NEGLIGIBLE = 5.0 / 255.0  # of a colour, at the centre
APART = 0.5  # how far the halves of one come to lie from its mean, in its larger scale


@dataclass(frozen=True)
class Plan:
    """Keep these rows of every attribute, then append new ones."""

    keep: Tensor
    """bool of shape (n,)."""
    new: dict[str, Tensor]
    """For each attribute its new rows."""
    pruned: int
    """How many go and are not divided."""

    @property
    def added(self) -> int:
        """How many come."""
        return len(next(iter(self.new.values())))


def new_statistics(count: int) -> dict[str, Tensor]:
    """What is known of each Gaussian beside its attributes: sum and number of gradient norms, step of birth."""
    return {"gradient": torch.zeros(count), "count": torch.zeros(count), "born": torch.zeros(count, dtype=torch.int64)}


def observe(statistics: Mapping[str, Tensor], means: Tensor) -> None:
    """Take in the gradient that the means have now."""
    assert means.grad is not None
    statistics["gradient"].add_(means.grad.norm(dim=1))
    statistics["count"].add_(1)


def plan(gaussians: nn.ParameterDict, statistics: Mapping[str, Tensor], target: int) -> Plan:
    """Prune, then divide as many as it takes to have ``target`` of them, or all."""
    values = {name: tensor.detach() for name, tensor in gaussians.items()}
    peak = values["opacities"] * values["colours"].abs().amax(dim=1)
    keep = peak > NEGLIGIBLE
    left = int(keep.sum())
    pull = torch.where(keep, statistics["gradient"] / statistics["count"].clamp(min=1), -1.0)
    parents = pull.topk(min(max(0, target - left), left)).indices  # each goes, and two come in its place
    keep[parents] = False
    return Plan(keep, _halves({name: value[parents] for name, value in values.items()}), len(keep) - left)


def _halves(parents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two for each parent, set apart along its longer axis; their sum has its mass, mean and covariance.

    With the scale s along that axis, halves at a distance of +-d have the variance s^2 - d^2 and half of the mass each.
    """
    longer = parents["log_scales"].argmax(dim=1)
    distance = APART * parents["log_scales"].amax(dim=1).exp()
    angle = parents["rotations"] + longer * (math.pi / 2.0)
    offset = distance[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    narrower = math.sqrt(1.0 - APART**2)
    half = {
        **parents,
        "log_scales": parents["log_scales"] + math.log(narrower) * functional.one_hot(longer, 2),
        "opacities": parents["opacities"] / (2.0 * narrower),
    }
    return {
        name: torch.cat([value + offset, value - offset] if name == "means" else [value, value])
        for name, value in half.items()
    }
