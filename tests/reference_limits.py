"""The slow twin of constraints: what a parameter's values must satisfy, one rule for each kind, none of them fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

import paramstate

Bound = float | torch.Tensor | None


class RefusedError(Exception):
    """The library must refuse this, with that error, and change nothing."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__(error.__name__)
        self.error = error


@dataclass(frozen=True, eq=False)
class Limit:
    """One declared constraint; exactly one of bounds, norm and function is given."""

    low: Bound = None
    high: Bound = None
    zero_exp_avg: bool = False
    norm: float | None = None
    is_exact: bool = False
    """Whether norms are exactly `norm`, or at most."""
    dim: int | None = None
    """Over which dimension norms are taken; over all without it."""
    function: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Limit) and all(
            _same(getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__
        )

    __hash__ = None

    def declared(self) -> object:
        """What the library is given."""
        if self.function is not None:
            return self.function
        if self.norm is not None:
            return paramstate.UnitNorm(self.dim) if self.is_exact else paramstate.MaxNorm(self.norm, self.dim)
        if isinstance(self.low, float) and self.low == 0.0 and self.high is None:
            return paramstate.NonNegative(zero_exp_avg=self.zero_exp_avg)
        return paramstate.Box(self.low, self.high, self.zero_exp_avg)

    @property
    def is_box(self) -> bool:
        return self.norm is None and self.function is None

    def fits(self, value: torch.Tensor) -> bool:
        """Whether it can hold for a value of this shape."""
        return self.dim is None or self.dim < value.dim()

    def bounds(self, value: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both bounds, one for each element, in the value's dtype."""
        return _spread(self.low, value), _spread(self.high, value)

    def projected(self, value: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """The value brought to what the constraint asks for, where `active` is set."""
        return torch.where(active, self._projected(value), value)

    def _projected(self, value: torch.Tensor) -> torch.Tensor:
        if self.function is not None:
            return self.function(value.clone()).to(value.dtype)
        if self.norm is not None:
            return (value.double() * self._factor(value.double())).to(value.dtype)
        low, high = self.bounds(value)
        value = value if low is None else torch.where(value < low, low, value)
        return value if high is None else torch.where(value > high, high, value)

    def _factor(self, value: torch.Tensor) -> torch.Tensor:
        assert self.norm is not None
        squares = value.square()
        norm = (squares.sum() if self.dim is None else squares.sum(self.dim, keepdim=True)).sqrt()
        binds = norm > (0.0 if self.is_exact else self.norm)
        return torch.where(binds, self.norm / norm, 1.0)

    def with_rows(self, dim: int, shape: Sequence[int], sources: Sequence[int | None]) -> Limit:
        """The same for rows that come from others; a new row (`None`) has no bound where these differ.

        Raises:
            RefusedError: a new row has none.
        """
        low, high = (_moved(bound, dim, shape, sources) for bound in (self.low, self.high))
        return replace(self, low=low, high=high)

    def carried(self, carry: Callable[[torch.Tensor], torch.Tensor], shape: Sequence[int]) -> Limit:
        """The same behind a map of the values.

        Raises:
            RefusedError: it is a function of values in their old layout.
        """
        numbers = torch.arange(math.prod(shape)).reshape(tuple(shape))
        moved = carry(numbers)
        if self.function is not None and (moved.shape != numbers.shape or not torch.equal(moved, numbers)):
            raise RefusedError(paramstate.ConstraintError)

        def through(bound: Bound) -> Bound:
            return carry(bound.broadcast_to(shape)).clone() if isinstance(bound, torch.Tensor) else bound

        # Over another dimension than that of a matrix's rows are its columns, and the other way round.
        dim = self.dim if self.dim is None or len(shape) < 2 else 1 - self.dim
        return replace(self, low=through(self.low), high=through(self.high), dim=dim)


def _same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def _spread(bound: Bound, value: torch.Tensor) -> torch.Tensor | None:
    return None if bound is None else torch.as_tensor(bound).to(value.dtype).broadcast_to(value.shape)


def _moved(bound: Bound, dim: int, shape: Sequence[int], sources: Sequence[int | None]) -> Bound:
    """The bound's own rows decide, also where the value has no elements that they could hold."""
    if not isinstance(bound, torch.Tensor) or _serves_all_rows(bound, dim, len(shape)):
        return bound
    at = dim - len(shape) + bound.dim()
    rows = [bound.select(at, row) for row in range(bound.shape[at])]
    if rows and all(torch.equal(row, rows[0]) for row in rows):
        return rows[0].unsqueeze(at).clone()
    if None in sources:
        raise RefusedError(paramstate.ConstraintError)
    chosen = [rows[row] for row in sources if row is not None]
    return torch.stack(chosen, at) if chosen else bound.narrow(at, 0, 0)


def _serves_all_rows(bound: torch.Tensor, dim: int, ndim: int) -> bool:
    at = dim - ndim + bound.dim()
    return at < 0 or bound.shape[at] == 1
