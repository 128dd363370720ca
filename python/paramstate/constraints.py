"""Declared constraints: what a parameter's values must satisfy after every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ConstraintError


@dataclass(frozen=True, slots=True)
class Box:
    """Every element stays between two bounds, both included.

    Elementwise, so on the host it costs no pass of its own: the step clamps each value as it writes it.

    Args:
        min: lower bound, or ``None`` for none.
        max: upper bound, or ``None`` for none.

    Raises:
        ConstraintError: a bound is not a number, ``min`` is above ``max``, or there is no bound at all.

    Example:
        >>> Box(0.0, 1.0)
        Box(min=0.0, max=1.0)
        >>> Box(1.0, 0.0)
        Traceback (most recent call last):
            ...
        paramstate.errors.ConstraintError: Box: min 1.0 is above max 0.0
    """

    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        for label, bound in (("min", self.min), ("max", self.max)):
            if bound is not None and not isinstance(bound, (int, float)):
                raise ConstraintError(f"Box: {label} must be a number or None, got {type(bound).__name__}")
            if bound is not None and math.isnan(bound):
                raise ConstraintError(f"Box: {label} is nan")
        if self.min is None and self.max is None:
            raise ConstraintError("Box: neither min nor max is given")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ConstraintError(f"Box: min {self.min} is above max {self.max}")


def NonNegative() -> Box:  # noqa: N802  a constraint reads as a noun, as Box does
    """Every element stays at or above zero.

    Example:
        >>> NonNegative()
        Box(min=0.0, max=None)
    """
    return Box(min=0.0)
