"""Maps that only move elements: what may carry moments from one layout of a value to another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import StateShapeError

TensorMap = Callable[[Tensor], Tensor]


def require_relayout(name: str, carry: TensorMap, shape: torch.Size, target: torch.Size) -> None:
    """Check that ``carry`` is a pure re-layout from ``shape`` to ``target``, by pushing numbered elements through it.

    Moments of moved elements are the moved moments; of mixed, dropped or repeated ones they are not.

    Args:
        name: the parameter, for the message.
        carry: the map to check.
        shape: the shape that it takes.
        target: the shape that it must give.

    Raises:
        StateShapeError: it gives another shape, or drops, repeats or mixes elements; the message says which.
    """
    probe = torch.arange(shape.numel(), dtype=torch.float64).reshape(shape)
    moved = carry(probe.clone())
    if moved.shape != target:
        raise StateShapeError(
            f"parameter {name!r}: the map for its state gives shape {list(moved.shape)}, the new value has "
            f"{list(target)}; give the same map that carried the value, or state='reset'"
        )
    found = moved.detach().to(torch.float64).flatten()
    fault = _fault(found, probe.flatten())
    if fault is not None:
        raise StateShapeError(
            f"parameter {name!r}: the map for its state is no pure re-layout, it {fault}; moments cannot follow, "
            "use state='reset', or a map that only moves elements"
        )


def _fault(found: Tensor, expected: Tensor) -> str | None:
    if not bool(torch.isin(found, expected).all()):
        return "mixes or changes elements"
    if found.unique().numel() < found.numel():
        return "repeats elements"
    if found.numel() < expected.numel():
        return "drops elements"
    return None
