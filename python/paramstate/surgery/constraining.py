"""Declaring constraints, and holding them where the step itself does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from paramstate.bits import same_bits
from paramstate.declared.bounds import require_values
from paramstate.declared.constraints import AnyConstraint, Box, Constraint
from paramstate.declared.rows import Rows
from paramstate.errors import ConstraintError, listed
from paramstate.identity.membership import Membership, Which
from paramstate.identity.table import Entry
from paramstate.identity.tables import between_steps
from paramstate.identity.versions import own_writes

ChosenRows = Mapping[int, Tensor]
"""The rows that a step is for, as a mask by ID; all where there is none."""


class Constraining(Membership):
    """The part of an optimizer that keeps constraints."""

    @between_steps
    def constrain(self, which: Which, constraint: AnyConstraint | None) -> None:
        """Declare a constraint that holds after every step; the values are projected at once.

        A learning rate of 0 does not suspend it. A parameter has one constraint: another takes its place.

        What is frozen is not projected, neither parameters nor rows. A norm that is taken over frozen and free rows is
        that of all of them, and scales the free ones only, by the factor that all would need: it may stay off its
        limit. A step of some rows does the same with those that it leaves out.

        Args:
            which: a parameter, a name, a pattern, a module, a selection, or several of them.
            constraint: a :class:`Box`, :func:`NonNegative`, :class:`MaxNorm`, :class:`UnitNorm`, or a function of the
                values; ``None`` takes the constraint off.

        Raises:
            UnknownParameterError: one of them is not known. Nothing is declared then.
            ConstraintError: it cannot hold for one of them (reversed or NaN bounds, bounds that do not broadcast, a
                complex parameter, a dimension that is not there, a function that fails). Nothing is declared then.

        Example:
            >>> import torch
            >>> from paramstate import Adam, Box
            >>> layer = torch.nn.Linear(2, 1)
            >>> opt = Adam(layer)
            >>> opt.constrain("weight", Box(torch.tensor([0.0, -1.0]), 1.0))  # a lower bound for each input
            >>> bool((layer.weight[:, 0] >= 0).all())
            True
        """
        self._declare([(which, constraint)])

    def _declare(self, wanted: Iterable[tuple[Which, AnyConstraint | None]]) -> None:
        """Declare several constraints: all of them, or none where one cannot hold."""
        from paramstate.declared.projections import as_constraint

        given = [(which, None if constraint is None else as_constraint(constraint)) for which, constraint in wanted]
        declared = [(entry, constraint) for which, constraint in given for entry in self._select(which)]
        for entry, constraint in declared:
            if constraint is not None:
                constraint.require_fits(entry.param, self._table.called(entry))
        with self._all_or_nothing([entry for entry, _ in declared], [constraint for _, constraint in declared]):
            for entry, constraint in declared:
                entry.constraint = constraint
                self._traits_changed(entry)
                self._project_entry(entry)

    @contextmanager
    def _all_or_nothing(self, entries: list[Entry], constraints: list[Constraint | None]) -> Iterator[None]:
        """Take back what is declared where projecting fails, which only code of the user's can do."""
        may_fail = any(constraint is not None and not constraint.is_held_by_the_step for constraint in constraints)
        before = [(entry, entry.constraint, entry.param.detach().clone() if may_fail else None) for entry in entries]
        try:
            yield
        except BaseException:
            for entry, constraint, value in before:
                entry.constraint = constraint
                self._traits_changed(entry)
                if value is not None and not same_bits(value, entry.param.detach()):
                    with torch.no_grad(), own_writes([entry]):
                        entry.param.copy_(value)
            raise

    def at_bounds(self, which: Which | None = None) -> dict[str, int]:
        """How many values are at one of their declared bounds now.

        Args:
            which: a parameter, a name, a pattern, a module, a selection, or several of them; by default all whose
                constraint is a :class:`Box`.

        Returns:
            dict: the parameter's name to the number of its elements that equal a bound.

        Raises:
            UnknownParameterError: one of them is not known.
            UnsupportedError: one of them is on the meta device, where it has no values.

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
        counts: dict[str, int] = {}
        for entry in entries:
            if isinstance(entry.constraint, Box):
                require_values(self._table.called(entry), entry.param)
                counts[self._table.name(entry)] = int(entry.constraint.at_bound(entry.param.detach()).sum())
        return counts

    def _project_after_step(
        self,
        updated: Iterable[Tensor] = (),
        elsewhere: Iterable[Tensor] = (),
        chosen: ChosenRows | None = None,
        *,
        what: str = "the step was taken",
    ) -> None:
        """Apply the declared constraints that the step itself did not hold: all of them, also where some fail.

        Args:
            updated: what the kernels stepped; what no kernel knows, as a function, is left.
            elsewhere: what torch stepped.
            chosen: by ID the rows that were stepped, of parameters of which not all were.
            what: what an error says of the step.

        Raises:
            ConstraintError: some failed; the message says whose was not applied, and why.
        """
        if not self._constrained:
            return
        done, stepped = set(map(id, updated)), set(map(id, elsewhere))
        failed: list[tuple[Entry, Exception]] = []
        for entry in self._table:
            if entry.constraint is None or (id(entry.param) in done and entry.constraint.is_held_by_the_step):
                continue
            try:
                if id(entry.param) in stepped and isinstance(entry.constraint, Box) and entry.constraint.zero_exp_avg:
                    self._zero_where_bound(entry, entry.constraint, chosen or {})
                self._project_entry(entry, chosen)
            except Exception as error:  # noqa: BLE001  a function of the user's may raise anything
                failed.append((entry, error))
        if failed:
            (entry, reason), others = failed[0], [self._table.name(entry) for entry, _ in failed[1:]]
            raise ConstraintError(
                f"{self._table.called(entry)}: {what}, and its constraint was not applied: "
                f"{type(reason).__name__}: {reason}" + (f"; nor were those of {listed(others)}" if others else "")
            ) from reason

    def _zero_where_bound(self, entry: Entry, box: Box, chosen: ChosenRows) -> None:
        low, high = box.bounds_for(entry.param)
        beyond = torch.zeros_like(entry.param, dtype=torch.bool)
        beyond |= False if low is None else entry.param < low
        beyond |= False if high is None else entry.param > high
        self.state[entry.param]["exp_avg"].masked_fill_(
            beyond & rows_to_project(entry.rows, beyond, chosen.get(entry.id)), 0.0
        )

    def _project_entry(self, entry: Entry, chosen: ChosenRows | None = None) -> None:
        """Project where that changes something, so that the version counter of an idle parameter stays.

        What is frozen is left alone, and so are rows that a step of some rows left out.
        """
        if entry.constraint is not None and not entry.frozen:
            with own_writes([entry]):
                named = (chosen or {}).get(entry.id)
                project_rows_(entry.constraint, entry.param, entry.rows, self._table.called(entry), named)


def project_rows_(
    constraint: Constraint, param: Tensor, rows: Rows | None, called: str, named: Tensor | None = None
) -> None:
    """Bring values to what a constraint asks for, in place, in all rows that :func:`rows_to_project` tells."""
    if param.is_meta or constraint.holds(param.detach()):
        return
    with torch.inference_mode() if param.is_inference() else torch.no_grad():
        before = None if rows is None and named is None else param.detach().clone()
        constraint.project_(param, called)
        if before is not None:
            param.copy_(torch.where(rows_to_project(rows, param, named), param, before))


def rows_to_project(rows: Rows | None, param: Tensor, named: Tensor | None) -> Tensor:
    """A mask, to be broadcast, of the rows that are not frozen and, where a step named some, are among these."""
    if rows is None:
        if named is None:
            return torch.ones((), dtype=torch.bool, device=param.device)
        rows = Rows.alike(len(named), 0)
    mask = torch.ones(len(rows), dtype=torch.bool)
    mask &= mask if rows.frozen is None else ~rows.frozen
    mask &= mask if named is None else named
    return rows.broadcast(mask, param)
