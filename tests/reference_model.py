"""The slow twin of an optimizer: parameters with their state, their rows and what is declared for them.

A parameter whose rows differ is stepped row by row, each as a parameter of its own with the steps that it has taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from paramstate import UnsupportedError
from reference_limits import Limit, RefusedError
from reference_precision import COMPENSATION, Kind, kept_as, stored

TensorMap = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class RowAges:
    """What the rows along one dimension have of their own."""

    dim: int
    ages: list[int]
    """How many steps each has taken."""
    frozen: list[bool]

    @classmethod
    def alike(cls, count: int, dim: int, age: int) -> RowAges:
        return cls(dim, [age] * count, [False] * count)

    @property
    def differ(self) -> bool:
        return any(self.frozen) or len(set(self.ages)) > 1

    def copied(self) -> RowAges:
        return RowAges(self.dim, list(self.ages), list(self.frozen))


@dataclass
class Entry:
    """One logical parameter: what it is called now, and everything that must follow it."""

    id: int
    name: str
    value: torch.Tensor
    group: int
    step: float | None = None
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    grad: torch.Tensor | None = None
    trains: bool = True
    """`requires_grad`."""
    frozen: bool = False
    trained: bool | None = None
    """`requires_grad` before it was frozen; `None` where freezing left that alone."""
    rows: RowAges | None = None
    limit: Limit | None = None
    kind: Kind | None = None
    """What was declared for it about the dtype of its moments."""
    compact: frozenset[str] = frozenset()
    """The moments that are kept in eight bits; here they are the floats that they read as."""

    def copied(self) -> Entry:
        """An independent entry with the same bits; a deep copy of a parameter has no gradient."""
        moments = {key: tensor.clone() for key, tensor in self.moments.items()}
        rows = None if self.rows is None else self.rows.copied()
        return replace(self, value=self.value.clone(), moments=moments, grad=None, rows=rows)

    def replaced_by(self, *, trains: bool) -> None:
        """Another object stands for it: with a gradient that fits it, and with none to come where freezing stopped that
        and nobody turned it on again."""
        self.trains = trains and (self.trains or not self.frozen or self.trained is None)
        if self.grad is not None and (self.grad.shape, self.grad.dtype) != (self.value.shape, self.value.dtype):
            self.grad = None

    # ---- freezing -------------------------------------------------------------------------------------------------

    def freeze(self, *, stop_gradient: bool) -> None:
        self.frozen = True
        if stop_gradient and self.trained is None:
            self.trained, self.trains = self.trains, False

    def unfreeze(self) -> None:
        self.frozen = False
        if self.trained is not None:
            self.trains, self.trained = self.trained, None

    # ---- rows -----------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        return int(self.step or 0)

    def forget(self) -> None:
        """As if it had never been stepped; frozen rows stay frozen."""
        self.step, self.moments, self.compact = None, {}, frozenset()
        if self.rows is not None:
            self.rows.ages = [0] * len(self.rows.ages)
        self.settle()

    def settle(self) -> None:
        """Rows that are alike have nothing of their own."""
        if self.rows is not None and not any(self.rows.frozen) and set(self.rows.ages) <= {self.steps}:
            self.rows = None

    def rows_along(self, dim: int) -> RowAges:
        """Its rows along this dimension.

        Raises:
            RefusedError: they differ along another.
        """
        if self.rows is None:
            return RowAges.alike(self.value.shape[dim], dim, self.steps)
        if self.rows.dim == dim:
            return self.rows.copied()
        if self.rows.differ:
            raise RefusedError(UnsupportedError)
        age = self.rows.ages[0] if self.rows.ages else self.steps
        return RowAges.alike(self.value.shape[dim], dim, age)

    def freeze_rows(self, frozen: Sequence[bool], dim: int) -> None:
        rows = self.rows_along(dim)
        rows.frozen = [before or now for before, now in zip(rows.frozen, frozen, strict=True)]
        self.rows = rows
        self.settle()

    def unfreeze_rows(self, thawed: Callable[[int], bool]) -> None:
        if self.rows is not None:
            self.rows.frozen = [held and not thawed(row) for row, held in enumerate(self.rows.frozen)]
            self.settle()

    def move_rows(
        self, dim: int, values: Sequence[int | None], states: Sequence[int | None], fill: Sequence[torch.Tensor] = ()
    ) -> None:
        """Let rows come from others; a new one (`None`) has the next of the values to fill with, and fresh state.

        Raises:
            RefusedError: nothing was changed.
        """
        rows, limit = self._moved_rows(dim, values, states), self.limit
        if limit is not None:
            known = [state if value is None else value for value, state in zip(values, states, strict=True)]
            limit = limit.with_rows(dim, self.value.shape, known)
        self.rows, self.limit = rows, limit
        self.value = gathered(self.value, dim, values, fill)
        self.moments = {key: gathered(moment, dim, states) for key, moment in self.moments.items()}
        self.compact = frozenset()
        self.grad = None if self.grad is None else gathered(self.grad, dim, values)

    def _moved_rows(self, dim: int, values: Sequence[int | None], states: Sequence[int | None]) -> RowAges | None:
        if None not in states or not self.steps:  # no row gets another age than the rest
            if self.rows is None or self.rows.dim != dim:
                return self.rows
            rows = self.rows
        else:
            rows = self.rows_along(dim)
        ages = [0 if source is None else rows.ages[source] for source in states]
        return RowAges(dim, ages, [source is not None and rows.frozen[source] for source in values])

    def finish_rows(self, kind: Kind | None, *, values_moved: bool) -> None:
        """The end of a transaction: an age that all rows share is the parameter's; new values are projected."""
        self.keep_as_declared(kind)
        rows = self.rows
        if rows is not None and not rows.differ:
            if rows.ages and self.step is not None:
                self.step = float(rows.ages[0])
            self.rows = None
        if values_moved:
            self.project()

    def carry(self, carry: TensorMap, value: torch.Tensor) -> None:
        """State, ages, gradient and bounds go through the map; the value is given.

        Raises:
            RefusedError: what differed from row to row would lie along no dimension, or the constraint is a function.
        """
        rows = self._carried_rows(carry)
        if self.limit is not None:
            self.limit = self.limit.carried(carry, self.value.shape)
        self.value, self.rows = value, rows
        self.moments = {key: carry(moment) for key, moment in self.moments.items()}
        self.compact = frozenset()
        self.grad = None if self.grad is None else carry(self.grad).to(value.dtype)
        if rows is not None and not rows.differ:
            self.step = None if self.step is None else float(rows.ages[0])
            self.rows = None

    def _carried_rows(self, carry: TensorMap) -> RowAges | None:
        if self.rows is None or not self.value.numel():
            return None
        ages = carry(self._of_elements(self.rows.ages))
        frozen = carry(self._of_elements([int(held) for held in self.rows.frozen]))
        for dim in range(ages.dim()):
            found = [ages.select(dim, row).unique().tolist() for row in range(ages.shape[dim])]
            held = [frozen.select(dim, row).unique().tolist() for row in range(ages.shape[dim])]
            if all(len(one) == 1 for one in [*found, *held]):
                return RowAges(dim, [one for (one,) in found], [bool(one) for (one,) in held])
        raise RefusedError(UnsupportedError)

    def _of_elements(self, numbers: Sequence[int]) -> torch.Tensor:
        assert self.rows is not None
        shape = [1] * self.value.dim()
        shape[self.rows.dim] = -1
        return torch.tensor(numbers).reshape(shape).expand(self.value.shape).contiguous()

    # ---- precision ------------------------------------------------------------------------------------------------

    def keep_as_declared(self, of_all: Kind | None) -> None:
        """Its moments are kept as was declared for it, else for all."""
        kind = kept_as(self.kind or of_all, self.value)
        if kind is None:
            self.compact = frozenset()
            return
        for name in self.moments.keys() - {COMPENSATION} - (self.compact if kind == "8bit" else set()):
            self.moments[name] = stored(self.moments[name], name, kind)
        self.compact = frozenset(self.moments.keys() - {COMPENSATION}) if kind == "8bit" else frozenset()

    def write_moment(self, name: str, moment: torch.Tensor) -> None:
        """Other numbers in the tensor that is there."""
        self.moments[name] = stored(moment, name, "8bit") if name in self.compact else moment

    # ---- constraints ----------------------------------------------------------------------------------------------

    def active(self, chosen: Sequence[bool] | None = None) -> list[bool]:
        """Which rows a step updates; those along dim 0 where none differ."""
        if self.rows is None:
            return [True] * self.value.shape[0] if chosen is None else list(chosen)
        named = [True] * len(self.rows.frozen) if chosen is None else chosen
        return [on and not held for on, held in zip(named, self.rows.frozen, strict=True)]

    def mask(self, active: Sequence[bool]) -> torch.Tensor:
        """The same for each element."""
        shape = [1] * self.value.dim()
        shape[0 if self.rows is None else self.rows.dim] = -1
        return torch.tensor(active, dtype=torch.bool).reshape(shape).broadcast_to(self.value.shape)

    def project(self, chosen: Sequence[bool] | None = None) -> None:
        """Bring the value, or its chosen rows, to its constraint; what is frozen is left alone."""
        if chosen is not None:
            self.rows = self.rows_along(0)
        if self.limit is not None and not self.frozen:
            self.value = self.limit.projected(self.value, self.mask(self.active(chosen)))
        self.settle()


def gathered(
    tensor: torch.Tensor, dim: int, sources: Sequence[int | None], fill: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Rows along `dim` from others, one after another; those from none are the next of `fill`, or zeros."""
    if not sources:
        return tensor.narrow(dim, 0, 0).clone()
    new = iter(fill)
    shape = [size for at, size in enumerate(tensor.shape) if at != dim]
    rows = [
        tensor.select(dim, source) if source is not None else next(new, torch.zeros(shape)).to(tensor.dtype)
        for source in sources
    ]
    return torch.stack(rows, dim)
