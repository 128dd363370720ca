"""The constraint of a parameter whose elements come from elsewhere: what held for an element holds for it there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from paramstate.declared.bounds import Bound
from paramstate.declared.constraints import Box, Constraint
from paramstate.declared.norm_constraints import MaxNorm, UnitNorm
from paramstate.errors import ConstraintError

from .relayout import Sources

_ADVICE = "take it off with opt.constrain(..., None) before, and declare it anew after"


def carried_constraint(declared: Sequence[Constraint | None], sources: Sources, called: str) -> Constraint | None:
    """The constraint behind a re-layout.

    Bounds move with their elements. A norm is taken over the dimensions in which the elements of each old norm lie now.

    Args:
        declared: the constraint of each parameter that the elements come from.
        sources: where each element comes from.
        called: how a message names the parameter.

    Raises:
        ConstraintError: it cannot be said of the new layout: a function of all values, norms that would be cut or
            joined, or constraints of different kinds.
    """
    first = declared[0]
    if all(constraint is None or isinstance(constraint, Box) for constraint in declared):
        return _carried_box([box if isinstance(box, Box) else None for box in declared], sources, called)
    if any(constraint != first for constraint in declared):
        raise ConstraintError(f"{called}: the parameters that it comes from have different constraints; {_ADVICE}")
    if isinstance(first, (MaxNorm, UnitNorm)):
        return replace(first, dim=_carried_dims(first, sources, called))
    if not sources.is_identity:
        raise ConstraintError(f"{called}: its constraint is a function of the values in their old layout; {_ADVICE}")
    return first


def _carried_box(boxes: list[Box | None], sources: Sources, called: str) -> Box | None:
    present = [box for box in boxes if box is not None]
    if not present:
        return None
    if len({box.zero_exp_avg for box in present}) > 1:
        raise ConstraintError(f"{called}: the bounds of its sources differ in zero_exp_avg; {_ADVICE}")
    low = _carried_bound([None if box is None else box.min for box in boxes], -torch.inf, sources)
    high = _carried_bound([None if box is None else box.max for box in boxes], torch.inf, sources)
    return Box(low, high, present[0].zero_exp_avg)


def _carried_bound(bounds: list[Bound], absent: float, sources: Sources) -> Bound:
    """Bounds of several sources as one; where all have one number there is nothing to move."""
    first = bounds[0]
    if not isinstance(first, Tensor) and all(not isinstance(bound, Tensor) and bound == first for bound in bounds):
        return first
    if len(bounds) == 1 and isinstance(first, Tensor) and first.dim() == 0:
        return first
    tensors = [torch.as_tensor(absent if bound is None else bound) for bound in bounds]
    shaped = [tensor.broadcast_to(shape) for tensor, shape in zip(tensors, sources.shapes, strict=True)]
    return sources.of(shaped)


def _carried_dims(norm: MaxNorm | UnitNorm, sources: Sources, called: str) -> int | tuple[int, ...] | None:
    """The dimensions over which the same elements as before make up each norm; where there is none, nothing tells."""
    if sources.is_identity:
        return norm.dim
    groups, count = [], 0
    for shape in sources.shapes:
        groups.append(_numbered_groups(norm, shape) + count)
        count += int(groups[-1].max()) + 1 if shape.numel() else 0
    moved = sources.of(groups)
    before = torch.bincount(torch.cat([group.flatten() for group in groups]), minlength=count)
    whole = torch.equal(torch.bincount(moved.flatten(), minlength=count)[moved.flatten()], before[moved.flatten()])
    everything = tuple(range(moved.dim()))
    if norm.dim is None and whole and len(sources.shapes) == 1:
        return None
    for number in range(1, moved.dim() + 1) if whole and moved.numel() else ():
        for dims in itertools.combinations(everything, number):
            least, most = moved.amin(dims, keepdim=True), moved.amax(dims, keepdim=True)
            if torch.equal(least, most) and len(least.unique()) == least.numel():
                return dims[0] if len(dims) == 1 else dims
    raise ConstraintError(
        f"{called}: {norm} is declared where its elements come from, and no dimensions of the new layout hold the "
        f"elements of each norm; {_ADVICE}"
    )


def _numbered_groups(norm: MaxNorm | UnitNorm, shape: torch.Size) -> Tensor:
    """For each element the number of the norm that it belongs to."""
    dims = range(len(shape)) if norm.dim is None else [norm.dim] if isinstance(norm.dim, int) else norm.dim
    taken = {dim % len(shape) for dim in dims} if shape else set()
    kept = [1 if dim in taken else size for dim, size in enumerate(shape)]
    return torch.arange(torch.Size(kept).numel()).reshape(kept).expand(shape)
