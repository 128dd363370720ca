"""Declaring constraints, and holding them where the step itself does not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .constraints import Box, Constraint
from .errors import ConstraintError
from .identity import Entry
from .membership import Membership, Which
from .projections import AnyConstraint, Projection, as_constraint
from .versions import own_writes


class Constraining(Membership):
    """The part of an optimizer that keeps constraints."""

    def constrain(self, which: Which, constraint: AnyConstraint | None) -> None:
        """Declare a constraint that holds after every step; the values are projected at once.

        A learning rate of 0 does not suspend it. A parameter has one constraint: another takes its place.

        Args:
            which: a parameter, a name, or several of them.
            constraint: a :class:`Box`, :func:`NonNegative`, :class:`MaxNorm`, :class:`UnitNorm`, or a function of the
                values; ``None`` takes the constraint off.

        Raises:
            UnknownParameterError: one of them is not known. Nothing is declared then.
            ConstraintError: it cannot hold for one of them (reversed or NaN bounds, bounds that do not broadcast, a
                complex parameter, a dimension that is not there). Nothing is declared then.

        Example:
            >>> import torch
            >>> from paramstate import Adam, Box
            >>> layer = torch.nn.Linear(2, 1)
            >>> opt = Adam(layer)
            >>> opt.constrain("weight", Box(torch.tensor([0.0, -1.0]), 1.0))  # a lower bound for each input
            >>> bool((layer.weight[:, 0] >= 0).all())
            True
        """
        declared = None if constraint is None else as_constraint(constraint)
        entries = self._select(which)
        for entry in entries:
            if declared is not None:
                declared.require_fits(entry.param, self._called_entry(entry))
        for entry in entries:
            self._set_constraint(entry, declared)
            self._project_entry(entry)

    def at_bounds(self, which: Which | None = None) -> dict[str, int]:
        """How many values are at one of their declared bounds now.

        Args:
            which: a parameter, a name, or several of them; by default all whose constraint is a :class:`Box`.

        Returns:
            dict: the parameter's name to the number of its elements that equal a bound.

        Example:
            >>> import torch
            >>> from paramstate import Adam, Box
            >>> weight = torch.nn.Parameter(torch.tensor([-3.0, 0.0, 3.0]))
            >>> opt = Adam([("weight", weight)], constraints=Box(-1.0, 1.0))
            >>> opt.at_bounds()
            {'weight': 2}
        """
        self._sync()
        entries = list(self._table) if which is None else self._select(which)
        return {
            self._table.name(entry): int(entry.constraint.at_bound(entry.param.detach()).sum())
            for entry in entries
            if isinstance(entry.constraint, Box)
        }

    def _set_constraint(self, entry: Entry, constraint: Constraint | None) -> None:
        entry.constraint = constraint
        self._traits_changed(entry)

    def _called_entry(self, entry: Entry) -> str:
        return f"parameter {self._table.name(entry)!r}"

    def _project(self, params: Iterable[Tensor]) -> None:
        """Apply declared constraints with torch operations, after a step that was torch's."""
        for param in params:
            entry = self._table.of(param)
            if entry is not None and entry.constraint is not None:
                if isinstance(entry.constraint, Box) and entry.constraint.zero_exp_avg:
                    self._zero_where_bound(entry, entry.constraint)
                self._project_entry(entry)

    def _zero_where_bound(self, entry: Entry, box: Box) -> None:
        low, high = box.bounds_for(entry.param)
        beyond = torch.zeros_like(entry.param, dtype=torch.bool)
        beyond |= False if low is None else entry.param < low
        beyond |= False if high is None else entry.param > high
        self.state[entry.param]["exp_avg"].masked_fill_(self._spared(entry, beyond), 0.0)

    def _spared(self, entry: Entry, mask: Tensor) -> Tensor:
        """A mask of elements without those of frozen rows."""
        if entry.rows is None or entry.rows.frozen is None:
            return mask
        return mask & ~entry.rows.broadcast(entry.rows.frozen, mask)

    def _project_by_function(self, updated: Iterable[Tensor]) -> None:
        """Apply the constraints that are functions, which no kernel knows, after a step.

        Raises:
            ConstraintError: one of them failed; the step was taken, and the message says whose was not applied.
        """
        if not self._constrained:
            return
        for param in updated:
            entry = self._table.of(param)
            if entry is not None and isinstance(entry.constraint, Projection):
                try:
                    self._project_entry(entry)
                except Exception as error:
                    raise ConstraintError(
                        f"{self._called_entry(entry)}: the step was taken, and its constraint was not applied: "
                        f"{type(error).__name__}: {error}"
                    ) from error

    def _project_idle(self, updated: Iterable[Tensor]) -> None:
        """Apply declared constraints to parameters that a step did not update: a client may have given them values."""
        if not self._constrained:
            return
        done = set(map(id, updated))
        for entry in self._table:
            if entry.constraint is not None and id(entry.param) not in done:
                self._project_entry(entry)

    def _project_entry(self, entry: Entry) -> None:
        """Project where that changes something, so that the version counter of an idle parameter stays.

        What is frozen is left alone.
        """
        constraint, param = entry.constraint, entry.param
        if constraint is None or entry.frozen or param.is_meta or constraint.holds(param.detach()):
            return
        with torch.inference_mode() if param.is_inference() else torch.no_grad(), own_writes([entry]):
            before = param.detach().clone() if entry.rows is not None and entry.rows.frozen is not None else None
            constraint.project_(param, self._called_entry(entry))
            if before is not None:
                param.copy_(torch.where(self._spared(entry, torch.ones_like(param, dtype=torch.bool)), param, before))
