"""The slow twin of an optimizer: parameters with their state, their rows and what is declared for them.

A parameter whose rows differ is stepped row by row, each as a parameter of its own with the steps that it has taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from paramstate import UnsupportedError
from reference import MOMENTS, Settings, adam
from reference_limits import Limit, RefusedError

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
        self.step, self.moments = None, {}
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

    def finish_rows(self, *, values_moved: bool) -> None:
        """The end of a transaction: an age that all rows share is the parameter's; new values are projected."""
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


@dataclass
class Reference:
    """Moves moments by meaning: parameters are known by a key that the test chose and that no action changes."""

    groups: list[Settings]
    max_grad_norm: float | None = None
    entries: dict[str, Entry] = field(default_factory=dict)

    def step(self, chosen: Mapping[str, Sequence[bool]] | None = None) -> float | None:
        """Update every parameter that has a gradient, or its chosen rows; the global norm where one is asked for."""
        named = {} if chosen is None else chosen
        stepping = {key: e for key, e in self.entries.items() if e.grad is not None and not e.frozen}
        norm, coefficient = None, 1.0
        if self.max_grad_norm is not None:
            grads = [e.grad[e.mask(e.active(named.get(key)))] for key, e in stepping.items() if e.grad is not None]
            norm, coefficient = norm_coefficient(grads, self.max_grad_norm)
        for key, entry in self.entries.items():
            if key in stepping:
                self._update(entry, coefficient, named.get(key))
            else:
                entry.project(named.get(key))
        return norm

    def _update(self, entry: Entry, coefficient: float, chosen: Sequence[bool] | None) -> None:
        settings = self.groups[entry.group]
        if entry.step is None:
            keys = MOMENTS if settings.amsgrad else MOMENTS[:2]
            entry.step, entry.moments = 0.0, {key: torch.zeros_like(entry.value) for key in keys}
        if chosen is not None or entry.rows is not None:
            entry.rows = entry.rows_along(0) if chosen is not None else entry.rows
        active = entry.active(chosen)
        mask = entry.mask(active)
        entry.step += 1
        if entry.rows is None:
            self._update_whole(entry, coefficient)
        else:
            self._update_rows(entry, coefficient, active)
        limit = entry.limit
        if limit is not None and not limit.is_box:
            entry.value = limit.projected(entry.value, mask)

    def _update_whole(self, entry: Entry, coefficient: float) -> None:
        assert entry.step is not None
        self._write(entry, ..., entry.step, coefficient)

    def _update_rows(self, entry: Entry, coefficient: float, active: Sequence[bool]) -> None:
        rows = entry.rows
        assert rows is not None
        entry.value = entry.value.clone()
        entry.moments = {key: moment.clone() for key, moment in entry.moments.items()}
        for row, acts in enumerate(active):
            if acts:
                rows.ages[row] += 1
                self._write(entry, (slice(None),) * rows.dim + (row,), rows.ages[row], coefficient)
        entry.settle()

    def _write(self, entry: Entry, where: object, age: float, coefficient: float) -> None:
        """Update the elements that `where` names, which have taken `age` steps with this one."""
        limit, settings = entry.limit, self.groups[entry.group]
        assert entry.grad is not None
        low, high = (None, None) if limit is None or not limit.is_box else limit.bounds(entry.value)
        bounds = None if low is None else low[where], None if high is None else high[where]
        moments = {key: moment[where] for key, moment in entry.moments.items()}
        zero = limit is not None and limit.zero_exp_avg
        value, moments = adam(entry.value[where], entry.grad[where], moments, age, settings, coefficient, bounds, zero)
        if where is ...:
            entry.value, entry.moments = value, moments
            return
        entry.value[where] = value
        for key, moment in moments.items():
            entry.moments[key][where] = moment

    def copied(self) -> Reference:
        return replace(self, groups=list(self.groups), entries={k: e.copied() for k, e in self.entries.items()})


def norm_coefficient(grads: list[torch.Tensor], max_norm: float) -> tuple[float, float]:
    """The global norm and torch's clip coefficient. Exact where the squares sum exactly, as a test must see to."""
    norm = math.sqrt(math.fsum(float(x) ** 2 for g in grads for x in g.double().flatten()))
    return norm, min(1.0, max_norm / (norm + 1e-6))


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
