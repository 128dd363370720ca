"""Parameters by where they stand in the groups, as the compiled walk names them."""

from __future__ import annotations

from torch import Tensor

from paramstate.identity.membership import Membership

GroupPlace = tuple[int, int]
"""The number of a group, and the position in it."""


def param_at(optimizer: Membership, place: GroupPlace) -> Tensor:
    """The parameter at a place."""
    param: Tensor = optimizer.param_groups[place[0]]["params"][place[1]]
    return param


def grad_at(optimizer: Membership, place: GroupPlace) -> Tensor:
    """The gradient of the parameter at a place, which has one."""
    grad = param_at(optimizer, place).grad
    assert grad is not None
    return grad


def called_at(optimizer: Membership, place: GroupPlace) -> str:
    """How a message names the parameter at a place."""
    return repr(optimizer._table.name(optimizer._find(param_at(optimizer, place))))
