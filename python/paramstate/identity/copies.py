"""Deep copies and pickles of an optimizer: identity and public attributes go along, models do not.

Modules are held weakly and never pickled: an optimizer must pickle where the model does not.
"""

from __future__ import annotations

import copy
import pickle
import sys
import weakref
from typing import Any, SupportsIndex

from paramstate import _core
from paramstate.declared.constraints import Constraint
from paramstate.errors import UnsupportedError

from .following import Following
from .hooks import listen
from .selected_groups import portable
from .table import TRAITS

_OTHER_PICKLERS = frozenset({"cloudpickle", "dill"})
"""Those that pickle any function."""
_LENT = ("grad_scale", "found_inf")
"""What a gradient scaler puts on an optimizer for the time of one step."""


class Copying(Following):
    """The part of an optimizer that is copied and pickled."""

    def __getstate__(self) -> dict[str, Any]:
        self._sync()
        identity = {
            "on_replace": self._on_replace,
            "state_dtype": self._state_dtype,
            "is_retyped": self._is_retyped,
            "entries": [
                (entry.id, entry.param, entry.label, self._table.names(entry), {k: getattr(entry, k) for k in TRAITS})
                for entry in self._table
            ],
            "ambiguous": self._table.ambiguous,
            "selected": portable(self),
        }
        return {**self._public_attributes(), **super().__getstate__(), "_identity": identity}

    def _public_attributes(self) -> dict[str, Any]:
        """Those of the instance, but for a method that was wrapped: a copy's would step the original."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if not (name.startswith("_") or name in _LENT or callable(getattr(type(self), name, None)))
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_identity" in state:
            identity = state["_identity"]
            state = {key: value for key, value in state.items() if key != "_identity"}
            self._make_tables(_core.Store())
            self._on_replace = identity["on_replace"]
            self._is_retyped = identity["is_retyped"]
            self._keep_all_as(identity["state_dtype"])
            for id, param, label, names, traits in identity["entries"]:
                entry = self._table.add(param, names, label, id)
                for trait, value in traits.items():
                    setattr(entry, trait, value)
                self._traits_changed(entry)
            self._table.ambiguous = identity["ambiguous"]
            self._selected = list(identity["selected"])
        elif "_table" not in self.__dict__:  # what torch's class pickled
            self._make_tables(_core.Store())
        super().__setstate__(state)
        listen(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        self._sync()
        # Another pickler, which takes any function, may be the one at work where one is imported.
        if _OTHER_PICKLERS.isdisjoint(sys.modules):
            for entry in self._table:
                _require_pickles(entry.constraint, self._table.called(entry))
        return super().__reduce_ex__(protocol)

    def __copy__(self) -> Copying:
        twin = self.__class__.__new__(self.__class__)
        twin.__setstate__(self.__getstate__())
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Copying:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # A model that is copied in the same call, before or after, is found in the memo when the copy is first used.
        twin._selected = list(self._selected)
        twin._copied_from = (memo, [weakref.ref(model) for model in self._slots.models])
        return twin


def _require_pickles(constraint: Constraint | None, called: str) -> None:
    """Name the parameter whose constraint is a function that pickle cannot find again.

    Raises:
        UnsupportedError: it is a lambda, or defined inside another function.
    """
    try:
        pickle.dumps(constraint)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UnsupportedError(
            f"{called}: its constraint cannot be pickled ({error}); declare a function that is defined at the top of a "
            "module, in place of a lambda or of one inside another function"
        ) from error
