"""The slow twin of several parameters that become one: each element keeps the age and the bounds that it had."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

import paramstate
from reference_limits import Bound, Limit, RefusedError
from reference_model import Entry, RowAges


def joined(parts: Sequence[Entry]) -> Entry:
    """The parameter that has the rows of these, one after another.

    Raises:
        RefusedError: they are in different groups or of different kinds, or what differs lies along no dimension.
    """
    first = parts[0]
    if len({(part.group, part.frozen, part.trained) for part in parts}) > 1:
        raise RefusedError(paramstate.StateShapeError)
    limit = _limit(parts)
    rows = _rows(parts)
    steps = [part.step for part in parts if part.step is not None]
    names = dict.fromkeys(name for part in parts for name in part.moments)
    grads = [part.grad for part in parts if part.grad is not None]
    made = Entry(
        0, "", torch.cat([part.value for part in parts]), first.group, max(steps, default=None),
        {name: _moment(parts, name) for name in names},
        torch.cat(grads) if len(grads) == len(parts) else None,
        first.trains, first.frozen, first.trained, rows, limit, first.kind,
    )  # fmt: skip
    made.finish_rows(made.kind, values_moved=False)
    return made


def _moment(parts: Sequence[Entry], name: str) -> torch.Tensor:
    dtype = next(part.moments[name].dtype for part in parts if name in part.moments)
    return torch.cat([part.moments.get(name, torch.zeros_like(part.value, dtype=dtype)) for part in parts])


def _rows(parts: Sequence[Entry]) -> RowAges | None:
    """What rows have of their own, along the one dimension that tells all elements' ages."""
    if all(part.rows is None for part in parts) and len({part.steps for part in parts}) == 1:
        return None
    ages = torch.cat([_of_elements(part, [*_own(part).ages]) for part in parts])
    frozen = torch.cat([_of_elements(part, [int(held) for held in _own(part).frozen]) for part in parts])
    for dim in range(ages.dim()):
        found = [ages.select(dim, row).unique().tolist() for row in range(ages.shape[dim])]
        held = [frozen.select(dim, row).unique().tolist() for row in range(ages.shape[dim])]
        if all(len(one) == 1 for one in [*found, *held]):
            return RowAges(dim, [one for (one,) in found], [bool(one) for (one,) in held])
    raise RefusedError(paramstate.UnsupportedError)


def _own(part: Entry) -> RowAges:
    return part.rows or RowAges.alike(part.value.shape[0], 0, part.steps)


def _of_elements(part: Entry, numbers: Sequence[int]) -> torch.Tensor:
    shape = [1] * part.value.dim()
    shape[_own(part).dim] = -1
    return torch.tensor(numbers).reshape(shape).expand(part.value.shape)


def _limit(parts: Sequence[Entry]) -> Limit | None:
    present = [part.limit for part in parts if part.limit is not None]
    if not present:
        return None
    if any(limit.function is not None for limit in present) or len({limit.zero_exp_avg for limit in present}) > 1:
        raise RefusedError(paramstate.ConstraintError)
    limits = [part.limit or Limit() for part in parts]
    low = _bound(parts, [limit.low for limit in limits], -math.inf)
    high = _bound(parts, [limit.high for limit in limits], math.inf)
    return Limit(low, high, present[0].zero_exp_avg)


def _bound(parts: Sequence[Entry], bounds: Sequence[Bound], absent: float) -> Bound:
    first = bounds[0]
    if not isinstance(first, torch.Tensor) and all(isinstance(b, type(first)) and b == first for b in bounds):
        return first
    spread = [
        torch.as_tensor(absent if bound is None else bound).broadcast_to(part.value.shape)
        for bound, part in zip(bounds, parts, strict=True)
    ]
    return torch.cat(spread)
