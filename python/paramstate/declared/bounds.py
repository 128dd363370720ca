"""Bounds of elements: numbers or tensors, checked against the parameter that they are for."""

from __future__ import annotations

import torch
from torch import Tensor

from paramstate.errors import ConstraintError, UnsupportedError

Bound = float | Tensor | None


def broadcast_bound(param: Tensor, called: object, label: str, bound: Bound) -> Tensor | None:
    """A bound as a tensor of the parameter's dtype and device that broadcasts to it.

    Args:
        param: what it is for.
        called: how a message names the parameter.
        label: how a message names the bound.
        bound: a number, a tensor, or ``None``.

    Returns:
        Tensor: on the parameter's device; on the host where the parameter is on the meta device.

    Raises:
        ConstraintError: the parameter is complex, or the bound is no real number or tensor, does not broadcast, or is
            NaN somewhere.
    """
    if bound is None:
        return None
    if param.is_complex():
        raise ConstraintError(f"{called} is complex, and complex numbers have no order; leave it out")
    tensor = _as_tensor(called, label, bound).to(param.dtype)
    try:
        shape = torch.broadcast_shapes(tensor.shape, param.shape)
    except RuntimeError:
        shape = None
    if shape != param.shape:
        raise ConstraintError(
            f"{called}: {label} has shape {list(tensor.shape)}, which does not broadcast to {list(param.shape)}"
        )
    invalid = tensor.isnan()
    if not tensor.is_meta and bool(invalid.any()):
        raise ConstraintError(f"{called}: {label} is nan{at(invalid)}")
    return tensor if param.is_meta else tensor.to(param.device)


def _as_tensor(called: object, label: str, bound: float | Tensor) -> Tensor:
    # A number is as exact as float64: torch's default dtype, through which it would go otherwise, may be less.
    dtype = torch.float64 if isinstance(bound, (int, float)) else None
    try:
        tensor = torch.as_tensor(bound, dtype=dtype).detach()
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or tensor.is_complex():
        got = type(bound).__name__ if tensor is None else "a complex one"
        raise ConstraintError(f"{called}: {label} must be a real number or a tensor of such, got {got}")
    return tensor


def require_values(called: object, param: Tensor) -> None:
    """Check that a parameter has values.

    Raises:
        UnsupportedError: it is on the meta device, where tensors have a shape and no memory.
    """
    if param.is_meta:
        raise UnsupportedError(
            f"{called} is on the meta device and has no values yet; materialize the model first (model.to_empty(...) "
            "and its initialization, or a load)"
        )


def require_ordered(called: object, low: Tensor, high: Tensor) -> None:
    """Check that no lower bound is above the upper one.

    Raises:
        ConstraintError: one is; the message names the index and both values.
    """
    reversed_ = low > high
    if not reversed_.is_meta and bool(reversed_.any()):
        first = _first(reversed_)
        below, above = torch.broadcast_to(low, reversed_.shape)[first], torch.broadcast_to(high, reversed_.shape)[first]
        raise ConstraintError(f"{called}: min {below.item()} is above max {above.item()}{at(reversed_)}")


def at(mask: Tensor) -> str:
    """Where a mask is first set, for a message; nothing where it has no dimensions."""
    return f" at index {list(_first(mask))}" if mask.dim() else ""


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())
