"""Declared constraints: what a parameter's values must satisfy after every step.

A constraint of single elements (:class:`Box`) is applied inside the step, as each value is written. The others look at
several elements at once and are applied right after it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paramstate.errors import ConstraintError

from .bounds import Bound, broadcast_bound, require_ordered
from .row_moves import FRESH, moved

FunctionOfValues = Callable[[Tensor], Tensor]


class Constraint(ABC):
    """What values must satisfy, and how they are brought to it. Constraints are values: they are never changed.

    Example:
        >>> from paramstate import Box, Constraint, MaxNorm, NonNegative, Projection, UnitNorm
        >>> kinds = (Box(0.0, 1.0), NonNegative(), MaxNorm(1.0), UnitNorm(), Projection(torch.tril))
        >>> all(isinstance(constraint, Constraint) for constraint in kinds)
        True
    """

    @property
    def norm(self) -> tuple[str, float, list[int] | None] | None:
        """What the step holds after its update: ``"at_most"`` or ``"exactly"``, the norm, the dimensions.

        Example:
            >>> from paramstate import Box, MaxNorm
            >>> MaxNorm(2.0, dim=1).norm, Box(0.0, 1.0).norm
            (('at_most', 2.0, [1]), None)
        """
        return None

    @property
    def is_held_by_the_step(self) -> bool:
        """Whether the compiled step knows it; what it does not know is projected right after.

        Example:
            >>> from paramstate import Box, Projection, UnitNorm
            >>> [kind.is_held_by_the_step for kind in (Box(0.0, 1.0), UnitNorm(), Projection(torch.tril))]
            [True, True, False]
        """
        return self.norm is not None

    @abstractmethod
    def require_fits(self, param: Tensor, called: str) -> None:
        """Check that the constraint can hold for a parameter.

        Raises:
            ConstraintError: it cannot; the message begins with ``called``.

        Example:
            >>> from paramstate import MaxNorm
            >>> MaxNorm(1.0, dim=1).require_fits(torch.zeros(3), "parameter 'bias'")
            Traceback (most recent call last):
                ...
            paramstate.errors.ConstraintError: parameter 'bias' has shape [3], the norm is to be taken over dim 1
        """

    @abstractmethod
    def project_(self, param: Tensor, called: str) -> None:
        """Bring values to what the constraint asks for, in place.

        Example:
            >>> from paramstate import MaxNorm
            >>> values = torch.tensor([3.0, 4.0])
            >>> MaxNorm(1.0).project_(values, "values")
            >>> values
            tensor([0.6000, 0.8000])
        """

    @abstractmethod
    def holds(self, param: Tensor) -> bool:
        """Whether projecting would change nothing.

        Example:
            >>> from paramstate import UnitNorm
            >>> UnitNorm().holds(torch.tensor([0.6, 0.8])), UnitNorm().holds(torch.tensor([3.0, 4.0]))
            (True, False)
        """

    def with_rows(self, dim: int, ndim: int, sources: Tensor, called: str) -> Constraint:  # noqa: ARG002  for those that hold tensors
        """The same constraint for rows from ``sources`` along ``dim``, of a parameter of ``ndim`` dimensions.

        Raises:
            ConstraintError: it says something else of each row, and a row is new.

        Example:
            >>> from paramstate import Box
            >>> low = Box(min=torch.tensor([0.0, 1.0, 2.0]))  # of a parameter of shape (3,)
            >>> low.with_rows(0, 1, torch.tensor([2, 0]), "parameter 'bias'").min
            tensor([2., 0.])
        """
        return self

    @abstractmethod
    def as_data(self) -> dict[str, Any]:
        """The constraint as plain data for a state dict; :func:`from_data` reads it.

        Example:
            >>> from paramstate import MaxNorm
            >>> MaxNorm(2.0, dim=1).as_data()
            {'kind': 'max_norm', 'max': 2.0, 'dim': 1}
        """


@dataclass(frozen=True, slots=True, eq=False)
class Box(Constraint):
    """Every element stays between two bounds, both included.

    Elementwise, so on the host it costs no pass of its own: the step clamps each value as it writes it. A bound is
    rounded to the parameter's dtype, as ``torch.clamp_`` does; a NaN lies outside no bound.

    Args:
        min: lower bound, a number or a tensor (copied) that broadcasts to the parameter; ``None`` for none.
        max: upper bound, likewise.
        zero_exp_avg: set the first moment to zero where a bound binds in a step. Kept momentum, the default, holds an
            element at its bound for a while after its gradient has turned.

    Raises:
        ConstraintError: a bound is not a number, ``min`` is above ``max``, or there is no bound at all. Bounds that are
            tensors are checked where they are declared, so that the message names the parameter.

    Example:
        >>> Box(0.0, 1.0)
        Box(min=0.0, max=1.0)
        >>> Box(1.0, 0.0)
        Traceback (most recent call last):
            ...
        paramstate.errors.ConstraintError: Box: min 1.0 is above max 0.0
    """

    min: Bound = None
    max: Bound = None
    zero_exp_avg: bool = False

    def __post_init__(self) -> None:
        for label, bound in (("min", self.min), ("max", self.max)):
            if bound is not None and not isinstance(bound, (int, float, Tensor)):
                raise ConstraintError(f"Box: {label} must be a number, a tensor or None, got {type(bound).__name__}")
            if isinstance(bound, (int, float)) and math.isnan(bound):
                raise ConstraintError(f"Box: {label} is nan")
            if isinstance(bound, Tensor):
                object.__setattr__(self, label, _own(bound, label))
        if not isinstance(self.zero_exp_avg, bool):
            raise ConstraintError(f"Box: zero_exp_avg must be True or False, got {self.zero_exp_avg!r}")
        if self.min is None and self.max is None:
            raise ConstraintError("Box: neither min nor max is given")
        if self.scalars is not None and self.low > self.high:
            raise ConstraintError(f"Box: min {self.min} is above max {self.max}")

    def __repr__(self) -> str:
        shown = f"min={_shown(self.min)}, max={_shown(self.max)}"
        return f"Box({shown}, zero_exp_avg=True)" if self.zero_exp_avg else f"Box({shown})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Box):
            return NotImplemented
        return (
            self.zero_exp_avg == other.zero_exp_avg
            and _same_bound(self.min, other.min)
            and _same_bound(self.max, other.max)
        )

    def __hash__(self) -> int:
        return hash((Box, self.zero_exp_avg))

    @property
    def is_held_by_the_step(self) -> bool:
        """See :attr:`Constraint.is_held_by_the_step`: elements are clamped as they are written."""
        return True

    @property
    def scalars(self) -> tuple[float | None, float | None] | None:
        """Both bounds as numbers; ``None`` where one of them is a tensor.

        Example:
            >>> Box(min=0.0).scalars, Box(torch.zeros(2), 1.0).scalars
            ((0.0, None), None)
        """
        low, high = self.min, self.max
        return None if isinstance(low, Tensor) or isinstance(high, Tensor) else (low, high)

    @property
    def low(self) -> float | Tensor:
        """The lower bound, infinite where there is none.

        Example:
            >>> Box(max=1.0).low
            -inf
        """
        return -math.inf if self.min is None else self.min

    @property
    def high(self) -> float | Tensor:
        """The upper bound, infinite where there is none.

        Example:
            >>> Box(max=1.0).high
            1.0
        """
        return math.inf if self.max is None else self.max

    def require_fits(self, param: Tensor, called: str) -> None:
        """See :meth:`Constraint.require_fits`."""
        low = broadcast_bound(param, called, "min", self.min)
        high = broadcast_bound(param, called, "max", self.max)
        if low is not None and high is not None:
            require_ordered(called, low, high)

    def bounds_for(self, param: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Both bounds as tensors of the parameter's dtype and device.

        Example:
            >>> Box(0, 0.1).bounds_for(torch.zeros(2, dtype=torch.bfloat16))  # 0.1, rounded to bfloat16
            (tensor(0., dtype=torch.bfloat16), tensor(0.1001, dtype=torch.bfloat16))
        """
        return broadcast_bound(param, "", "min", self.min), broadcast_bound(param, "", "max", self.max)

    def project_(self, param: Tensor, called: str) -> None:  # noqa: ARG002
        """See :meth:`Constraint.project_`."""
        param.clamp_(*self.bounds_for(param))

    def holds(self, param: Tensor) -> bool:
        """See :meth:`Constraint.holds`."""
        clamped = param.clamp(*self.bounds_for(param))
        return not bool(((clamped != param) & ~param.isnan()).any())

    def at_bound(self, param: Tensor) -> Tensor:
        """Where values are at a bound: a mask of the parameter's shape.

        Example:
            >>> Box(0.0, 1.0).at_bound(torch.tensor([0.0, 0.5, 1.0]))
            tensor([ True, False,  True])
        """
        low, high = self.bounds_for(param)
        mask = torch.zeros_like(param, dtype=torch.bool)
        for bound in (low, high):
            if bound is not None:
                mask |= param == bound
        return mask

    def with_rows(self, dim: int, ndim: int, sources: Tensor, called: str) -> Box:
        """See :meth:`Constraint.with_rows`: per-element bounds move along."""
        low, high = (_with_rows(bound, dim, ndim, sources, called) for bound in (self.min, self.max))
        return Box(low, high, self.zero_exp_avg)

    def as_data(self) -> dict[str, Any]:
        """See :meth:`Constraint.as_data`."""
        return {"kind": "box", "min": self.min, "max": self.max, "zero_exp_avg": self.zero_exp_avg}


AnyConstraint = Constraint | FunctionOfValues
"""What may be given as a constraint: a function becomes a :class:`Projection`."""


def NonNegative(*, zero_exp_avg: bool = False) -> Box:  # noqa: N802  a constraint reads as a noun, as Box does
    """Every element stays at or above zero.

    Args:
        zero_exp_avg: as in :class:`Box`.

    Returns:
        Box: from 0, without an upper bound.

    Example:
        >>> NonNegative()
        Box(min=0.0, max=None)
    """
    return Box(min=0.0, zero_exp_avg=zero_exp_avg)


def _own(bound: Tensor, label: str) -> Tensor:
    """A bound in memory of its own, so that nobody writes it, and of a floating dtype that the kernels read."""
    if bound.is_complex() or bound.layout is not torch.strided:
        raise ConstraintError(f"Box: {label} must be a dense tensor of real numbers, got {bound.dtype}, {bound.layout}")
    if not bound.is_floating_point():
        return bound.to(torch.float64)
    narrow = bound.dtype.itemsize < 2
    return bound.detach().to(torch.float32) if narrow else bound.detach().clone()


def _shown(bound: Bound) -> str:
    return f"tensor of shape {list(bound.shape)}" if isinstance(bound, Tensor) else repr(bound)


def _same_bound(one: Bound, other: Bound) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is not Tensor and type(other) is not Tensor and one == other


def _with_rows(bound: Bound, dim: int, ndim: int, sources: Tensor, called: str) -> Bound:
    """A bound for other rows. One that is the same for all rows serves new ones too."""
    at = dim - ndim + bound.dim() if isinstance(bound, Tensor) else -1
    if not isinstance(bound, Tensor) or at < 0 or bound.shape[at] == 1:
        return bound
    first = bound.narrow(at, 0, min(1, bound.shape[at]))
    if bound.shape[at] and bool((bound == first).all()):
        return first.clone()
    if bool((sources == FRESH).any()):
        raise ConstraintError(
            f"{called}: its bounds differ from row to row, and a new row has none; take them off with "
            "opt.constrain(..., None) before the edit and declare them for all rows after it, or give state_of="
        )
    return moved(bound, at, sources)
