"""What a transaction over rows edits: a parameter with all that follows its rows, or a buffer beside it."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from paramstate.declared.row_moves import FRESH, Move, moved
from paramstate.declared.rows import Rows, along
from paramstate.identity.membership import Membership
from paramstate.identity.table import Entry

from .constraining import project_rows_
from .successors import successor


class EditedBuffer:
    """A tensor of the user's, in a mapping: a dict, or the buffers of a module."""

    def __init__(self, name: str, owner: MutableMapping[str, Any], key: str) -> None:
        self.called = f"buffer {name!r}"
        self._owner, self._key = owner, key
        self._old: Tensor = owner[key]
        self._version = _version(self._old)
        self.value = self._old.detach()
        self.is_changed = False

    @property
    def held(self) -> Tensor:
        """The tensor that stands there now."""
        tensor: Tensor = self._owner[self._key]
        return tensor

    @property
    def is_stale(self) -> bool:
        """Whether somebody else changed it since it was first named."""
        return self._owner.get(self._key) is not self._old or _version(self._old) != self._version

    def move(self, move: Move) -> None:
        """Move its rows."""
        self.value = moved(self.value, move.dim, move.values, move.fill)
        self.is_changed = True

    def prepare(self) -> None:
        """Make what will be installed: a parameter stays one."""
        if self._old.is_leaf and self.is_changed:
            self.value = successor(self._old, self.value)

    def install(self) -> None:
        """Put the new tensor in place."""
        self._owner[self._key] = self.value

    def withdraw(self) -> None:
        """Put the old tensor back."""
        self._owner[self._key] = self._old


class EditedParameter:
    """A parameter, its gradient, its state, and what its rows have of their own."""

    def __init__(self, optimizer: Membership, entry: Entry) -> None:
        self._optimizer = optimizer
        self.entry = entry
        self.called = optimizer._table.called(entry)
        self.old = entry.param
        self._begun = self._objects(), self._counts()
        held = optimizer.state.get(self.old) or {}
        self._step = float(held["step"]) if "step" in held else None
        self._state = {
            key: tensor
            for key, tensor in held.items()
            if key != "step" and isinstance(tensor, Tensor) and tensor.shape == self.old.shape
        }
        self._grad = self.old.grad
        self._rows = None if entry.rows is None else entry.rows.copied()
        self._constraint = entry.constraint
        self._keeps_values = True
        self.value: Tensor = self.old.detach()
        self.is_changed = False

    @property
    def is_stale(self) -> bool:
        """Whether it was stepped, written or replaced, or given other traits, since it was first named."""
        objects, counts = self._begun
        return counts != self._counts() or any(a is not b for a, b in zip(objects, self._objects(), strict=True))

    @property
    def held(self) -> Tensor:
        """The parameter as it is now."""
        return self.entry.param

    def _objects(self) -> tuple[object, ...]:
        """What must be the same objects when the edit is applied."""
        return self.entry.param, self.old.grad, self.entry.rows, self.entry.constraint

    def _counts(self) -> tuple[object, ...]:
        """How often they were written and stepped, which must be the same as well."""
        held, grad = self._optimizer.state.get(self.old) or {}, self.old.grad
        step = float(held["step"]) if "step" in held else None
        return _version(self.old), None if grad is None else _version(grad), step

    def keeps_values(self, move: Move) -> bool:
        """Whether all of its values stay what and where they are."""
        return move.keeps_values and len(move.values) == self.value.shape[move.dim]

    def move(self, move: Move) -> None:
        """Move its rows, and all that follows them."""
        rows = self._moved_rows(move)
        if self._constraint is not None:
            known = torch.where(move.values != FRESH, move.values, move.state)
            self._constraint = self._constraint.with_rows(move.dim, self.value.dim(), known, self.called)
        self._state = {key: moved(tensor, move.dim, move.state) for key, tensor in self._state.items()}
        self._keeps_values = self._keeps_values and self.keeps_values(move)
        if not self._keeps_values:
            self.value = moved(self.value, move.dim, move.values, move.fill)
            if self._grad is not None:
                self._grad = moved(self._grad, move.dim, move.values)
        self._rows = rows
        self.is_changed = True

    def _moved_rows(self, move: Move) -> Rows | None:
        fresh = bool((move.state == FRESH).any()) and bool(self._step)
        if self._rows is None and not fresh:
            return None
        if self._rows is not None and self._rows.dim != move.dim and not fresh:
            return self._rows
        rows = along(self._rows, self.value, move.dim, self.called)
        steps = int(self._step or 0)
        offsets = moved(rows.offsets, 0, move.state, torch.full((int((move.state == FRESH).sum()),), steps))
        frozen = None if rows.frozen is None else moved(rows.frozen, 0, move.values)
        return Rows(move.dim, offsets, frozen if frozen is not None and bool(frozen.any()) else None)

    def prepare(self) -> None:
        """Make all that will be installed; whatever can fail by itself fails here."""
        if not self._keeps_values:
            new = successor(self.old, self.value)
            if self._constraint is not None and not self.entry.frozen:
                project_rows_(self._constraint, new, self._rows, self.called)
            self.value = new
        else:
            self.value = self.old
        common = None if self._rows is None else self._rows.common_offset
        if common is not None:
            self._rows = None
            self._step = None if self._step is None else self._step - common

    def install(self) -> None:
        """Put all of it in place: groups, identity, state, slots."""
        optimizer, entry = self._optimizer, self.entry
        if self.value is not self.old:
            optimizer._exchange(entry, self.value)
            self.value.grad = self._grad
        entry.rows, entry.constraint = self._rows, self._constraint
        held = optimizer.state.get(self.value)
        if held:
            step = held.get("step")
            held.update(self._state)
            if isinstance(step, Tensor) and self._step is not None and float(step) != self._step:
                held["step"] = torch.full_like(step, self._step)
            if optimizer._is_retyped:
                optimizer._retype_state(self.value)
        optimizer._traits_changed(entry)
        if self.value is not self.old:
            self.old.grad = None
            optimizer._put_into_slots(entry, self.value, self.old)


def _version(tensor: Tensor) -> int | None:
    """How often it was written; inference tensors do not count."""
    return None if tensor.is_inference() else tensor._version
