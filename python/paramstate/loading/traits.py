"""What is declared for a parameter, as plain data in a state dict: constraint, frozen or not, rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paramstate.declared.constraints import Constraint
from paramstate.declared.projections import from_data
from paramstate.declared.rows import Rows
from paramstate.errors import ConstraintError, LoadError
from paramstate.identity.membership import Membership
from paramstate.identity.table import Entry
from paramstate.precision.state_dtype import Kind, kind_of


def traits_of(entry: Entry, state_dtype: Kind | None = None) -> dict[str, Any]:
    """What differs from a parameter for which nothing is declared; empty for such a one.

    Args:
        entry: the parameter.
        state_dtype: what is declared about its moments, for it alone or for all.
    """
    data: dict[str, Any] = {}
    if entry.constraint is not None:
        data["constraint"] = entry.constraint.as_data()
    if entry.frozen:
        data["frozen"] = {"trained": entry.trained}
    if entry.rows is not None:
        data["rows"] = entry.rows.as_data()
    if state_dtype is not None:
        data["state_dtype"] = state_dtype
    return data


class Declared:
    """What a state dict says of one parameter, read and checked, to be adopted once the load has succeeded.

    Args:
        entry: our parameter.
        data: what :func:`traits_of` wrote.
        called: how a message names the parameter.

    Raises:
        LoadError: it does not fit the parameter. Nothing is changed.
    """

    def __init__(self, entry: Entry, data: Mapping[str, Any], called: str) -> None:
        self.entry = entry
        try:
            self._state_dtype = kind_of(data.get("state_dtype"))
            self._frozen = _read_frozen(data.get("frozen"))
            self._rows = Rows.from_data(data["rows"]) if data.get("rows") else None
            self._constraint, self.is_undeclared = self._chosen(data.get("constraint"))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise LoadError(
                f"{called}: what the state dict declares for it cannot be read ({error!r}); mend or delete it in "
                "state_dict['paramstate']['traits']"
            ) from error
        if self._rows is not None:
            self._require_rows(self._rows, called)
        if self._constraint is not None:
            try:
                self._constraint.require_fits(entry.param, called)
            except ConstraintError as error:
                raise LoadError(f"{error}; the state dict declares it, and was saved of another shape") from error

    def _chosen(self, data: dict[str, Any] | None) -> tuple[Constraint | None, bool]:
        """Our own constraint if there is one, else the saved; and whether that is a function, which we lack."""
        if self.entry.constraint is not None or data is None:
            return self.entry.constraint, False
        constraint = from_data(data)
        return constraint, constraint is None

    def _require_rows(self, rows: Rows, called: str) -> None:
        shape = self.entry.param.shape
        if not rows.fits(self.entry.param):
            raise LoadError(
                f"{called} has shape {list(shape)}, and the state dict knows the steps of {len(rows)} rows along dim "
                f"{rows.dim}; load it into a parameter of that many rows, then edit the rows"
            )

    def adopt(self, optimizer: Membership) -> None:
        """Let it hold for the parameter."""
        entry = self.entry
        entry.constraint, entry.rows = self._constraint, self._rows
        if self._frozen is not None and not entry.frozen:
            entry.frozen, entry.trained = True, self._frozen["trained"]
            if entry.trained is not None:
                entry.param.requires_grad_(False)
        elif self._frozen is None and entry.frozen:
            entry.frozen = False
            if entry.trained is not None:
                entry.param.requires_grad_(entry.trained)
                entry.trained = None
        if self._state_dtype is not None and entry.state_dtype is None and optimizer._state_dtype is None:
            entry.state_dtype = self._state_dtype
            optimizer._is_retyped, optimizer._roster = True, []
        optimizer._traits_changed(entry)


def _read_frozen(data: dict[str, Any] | None) -> dict[str, Any] | None:
    if data is not None and data["trained"] not in {True, False, None}:
        raise ValueError(f"'trained' is {data['trained']!r}")
    return data
