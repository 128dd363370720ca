"""Parameters of an optimizer as they were, to be put back where a change of several of them fails midway."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from torch import Tensor

from paramstate.identity.membership import Membership
from paramstate.identity.table import Entry


class Snapshot:
    """Which tensors stand where: groups, state, traits, gradients, slots. Values are not copied.

    Args:
        optimizer: whose parameters are about to change.
        entries: those that change.
        side: a mapping of the user's that changes with them.
    """

    def __init__(self, optimizer: Membership, entries: Iterable[Entry], side: MutableMapping[str, Tensor]) -> None:
        self._optimizer = optimizer
        self._groups = [(group, list(group["params"])) for group in optimizer.param_groups]
        self._state = list(optimizer.state.items())
        self._left = list(optimizer._left)
        self._side, self._held = side, dict(side)
        self._entries = [
            (entry, entry.param, entry.param.grad, entry.constraint, entry.rows, self._state_of(entry))
            for entry in entries
        ]

    def _state_of(self, entry: Entry) -> tuple[dict[str, Any], dict[str, Any]] | None:
        held = self._optimizer.state.get(entry.param)
        return None if held is None else (held, dict(held))

    def restore(self) -> None:
        """Put everything back."""
        optimizer = self._optimizer
        for group, params in self._groups:
            group["params"] = params
        optimizer.state.clear()  # and filled again, so that its order is the old one as well
        optimizer.state.update(self._state)
        optimizer._left = self._left
        for entry, old, grad, constraint, rows, state in self._entries:
            if entry.param is not old:
                optimizer._table.follow(entry, old)
            if state is not None:
                held, items = state
                held.clear()
                held.update(items)
            old.grad = grad
            entry.constraint, entry.rows = constraint, rows
            for slot in entry.slots:
                module = slot.module()
                if module is not None:
                    module._parameters[slot.attribute] = old  # type: ignore[assignment]  # a slot holds a Parameter
            optimizer._traits_changed(entry)
        for key, tensor in self._held.items():
            if self._side.get(key) is not tensor:
                self._side[key] = tensor
        optimizer._watched = False
