"""Carrying out a plan with torch.optim.Adam: the surgery on optimizer state that Gaussian splatting made well known.

The first implementations have it as `_prune_optimizer` and `cat_tensors_to_optimizer`. Each takes the moments out from
under the old parameter, cuts or lengthens them, and puts them under the new one. `step` is one number for the whole
parameter, so it stays what it is: new rows begin with moments of zero and the step of the old ones.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn

from densification import Plan


def densify(
    plan: Plan, optimizer: torch.optim.Optimizer, gaussians: nn.ParameterDict, side: MutableMapping[str, Tensor]
) -> None:
    """Keep and append rows of every attribute, of its moments, and of the tensors beside them."""
    prune(plan.keep, optimizer, gaussians)
    append(plan.new, optimizer, gaussians)
    for name, values in side.items():
        side[name] = torch.cat([values[plan.keep], values.new_zeros(plan.added)])


def prune(keep: Tensor, optimizer: torch.optim.Optimizer, gaussians: nn.ParameterDict) -> None:
    """Keep the rows of the mask."""
    for group in optimizer.param_groups:
        (old,) = group["params"]
        new = nn.Parameter(old.detach()[keep])
        state = optimizer.state.pop(old, None)
        if state is not None:
            state["exp_avg"] = state["exp_avg"][keep]
            state["exp_avg_sq"] = state["exp_avg_sq"][keep]
            optimizer.state[new] = state
        group["params"] = [new]
        gaussians[group["name"]] = new


def append(rows: dict[str, Tensor], optimizer: torch.optim.Optimizer, gaussians: nn.ParameterDict) -> None:
    """Put new rows behind the others."""
    for group in optimizer.param_groups:
        (old,) = group["params"]
        added = rows[group["name"]]
        new = nn.Parameter(torch.cat([old.detach(), added]))
        state = optimizer.state.pop(old, None)
        if state is not None:
            state["exp_avg"] = torch.cat([state["exp_avg"], torch.zeros_like(added)])
            state["exp_avg_sq"] = torch.cat([state["exp_avg_sq"], torch.zeros_like(added)])
            optimizer.state[new] = state
        group["params"] = [new]
        gaussians[group["name"]] = new
