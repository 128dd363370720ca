"""Deep copies and pickles of an optimizer: identity goes along, models do not.

Modules are held weakly and never pickled: an optimizer must pickle where the model does not.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

from . import _core
from .following import Following
from .hooks import listen


class Copying(Following):
    """The part of an optimizer that is copied and pickled."""

    def __getstate__(self) -> dict[str, Any]:
        self._sync()
        identity = {
            "on_replace": self._on_replace,
            "entries": [
                (entry.id, entry.param, entry.label, self._table.names(entry), entry.constraint)
                for entry in self._table
            ],
            "ambiguous": self._table.ambiguous,
        }
        return {**super().__getstate__(), "_identity": identity}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_identity" in state:
            identity = state["_identity"]
            state = {key: value for key, value in state.items() if key != "_identity"}
            self._on_replace = identity["on_replace"]
            self._make_tables(_core.Store())
            for id, param, label, names, constraint in identity["entries"]:
                entry = self._table.add(param, names, label, id)
                entry.constraint = constraint
                if constraint is not None:
                    self._constrained = True
                    self._table.store.set_bounds(id, constraint.min, constraint.max)
            self._table.ambiguous = identity["ambiguous"]
        super().__setstate__(state)
        listen(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Copying:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # A model that is copied in the same call, before or after, is found in the memo when the copy is first used.
        twin._copied_from = (memo, [weakref.ref(model) for model in self._slots.models])
        return twin
