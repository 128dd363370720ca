"""Carrying out a plan with paramstate: one transaction, after which new rows step as fresh parameters do."""

from __future__ import annotations

from collections.abc import MutableMapping

from torch import Tensor, nn

import paramstate
from densification import Plan


def densify(
    plan: Plan, optimizer: paramstate.Adam, gaussians: nn.ParameterDict, side: MutableMapping[str, Tensor]
) -> None:
    """Keep and append rows of every attribute, of its moments, and of the tensors beside them."""
    with optimizer.edit_rows(side) as rows:
        rows.keep([*gaussians, *side], plan.keep)
        rows.append(side, plan.added)
        for name, values in plan.new.items():
            rows.append(name, values)
