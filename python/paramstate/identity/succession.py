"""One tensor object in the place of another: in the groups, in the state, for its gradient, in the models.

Nothing here knows what an optimizer keeps in its state beyond "tensors".
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from paramstate._core import Store
from paramstate.declared.constraints import Box
from paramstate.declared.rows import Rows
from paramstate.errors import ReplacedParameterError
from paramstate.precision.state_dtype import COMPENSATION, MOMENTS, Kind, dense, is_short, stored

from .sharding import is_sharded, placed_like
from .table import TRAITS, Entry
from .tables import Tables
from .versions import baseline
from .wrappers import Place

_declared: weakref.WeakKeyDictionary[Store, dict[int, dict[str, Any]]] = weakref.WeakKeyDictionary()


_declared_for_all: weakref.WeakKeyDictionary[Store, Kind] = weakref.WeakKeyDictionary()


def declared_of(store: Store) -> dict[int, dict[str, Any]]:
    """What was declared for the parameters of a store, by ID: an optimizer that it is handed to takes that over."""
    return _declared.setdefault(store, {})


class Succession(Tables):
    """The part of an optimizer that lets a parameter be another tensor, and what is declared for it follow."""

    def _follow(self, entry: Entry, new: Tensor, places: list[Place] | None = None) -> None:
        """Let ``new`` stand for a parameter: in the groups, in the state, and for its gradient."""
        old = entry.param
        if self._on_replace == "error":
            raise ReplacedParameterError(
                f"{self._table.called(entry)} was replaced by another tensor, and on_replace='error' forbids "
                "it; change it in place, or call opt.replace_(...)"
            )
        self._table.follow(entry, new)
        if entry.frozen and entry.trained is not None and not old.requires_grad:  # not set by hand since
            new.requires_grad_(False)
        held = False
        for params in self._lists():
            for index, param in enumerate(params):
                if param is old:
                    params[index] = new
                    held = True
        self._carry_state(old, new)
        # A client that exchanged them in the groups itself did so without the gradient, as torch would.
        if held and new.grad is None and old.grad is not None and _alike(old.grad, new):
            new.grad, old.grad = old.grad, None
        if places is not None:
            self._slots.settle(entry, places)
        self._watched = False

    def _exchange(self, entry: Entry, new: Tensor) -> None:
        """Follow because the user said so: the policy for replacements that nobody announced does not apply."""
        policy, self._on_replace = self._on_replace, "keep"
        try:
            self._follow(entry, new)
        finally:
            self._on_replace = policy

    def _put_into_slots(self, entry: Entry, new: Tensor, old: Tensor) -> None:
        """Assign a parameter's new tensor wherever the models hold it.

        Where no model is known the user does; that the old tensor is still used is noticed in the next step.
        """
        if not entry.slots:
            self._has_left(entry, old)
        for slot in entry.slots:
            module = slot.module()
            if module is not None:
                setattr(module, slot.attribute, new)

    def _has_left(self, entry: Entry, old: Tensor) -> None:
        """Note with which gradient a tensor left that may still be used. What was noted of it before is out of date."""
        self._left = [noted for noted in self._left if noted[1] is not old]
        self._left.append((entry, old, old.grad))

    def _lists(self) -> list[list[Tensor]]:
        """The parameters of each group; what a client put there that is no list becomes one."""
        for group in self.param_groups:
            if not isinstance(group["params"], list):
                group["params"] = list(group["params"])
        return [group["params"] for group in self.param_groups]

    def _carry_state(self, old: Tensor, new: Tensor) -> None:
        state = self.state.pop(old, None)
        if not state or self.state.get(new) or self._on_replace == "reset":
            return
        self.state[new] = state
        if is_sharded(new) != is_sharded(old):
            for key, held in state.items():
                if isinstance(held, Tensor) and held.shape == new.shape and key != "step":
                    state[key] = placed_like(held, new)
        if new.dtype != old.dtype:
            self._retype_state(new)

    def _keep_all_as(self, kind: Kind | None) -> None:
        """Declare in what the moments of all parameters are kept; without it, as in the store that was handed over."""
        store = self._table.store
        self._state_dtype = kind or _declared_for_all.get(store)
        if self._state_dtype is not None:
            self._is_retyped = True
            _declared_for_all[store] = self._state_dtype

    def _retype_state(self, param: Tensor) -> None:
        """Keep state in the dtype that is declared; by default it widens when the value does, and is never narrowed."""
        state: dict[str, Any] = self.state.get(param) or {}
        kind = self._kept_as(param)
        if not is_short(param):
            state.pop(COMPENSATION, None)  # wider values leave nothing over, and what a former one has is not theirs
        for key, held in list(state.items()):
            shaped = isinstance(held, Tensor) and held.shape == param.shape and key != "step"
            if not shaped or not held.is_floating_point():
                continue
            if key == COMPENSATION:
                state[key] = held.to(param.dtype)
            elif kind is not None and key in MOMENTS:
                state[key] = stored(held, key, kind)
            else:
                wide = held.dtype.itemsize >= param.dtype.itemsize
                state[key] = dense(held).to(held.dtype if wide else param.dtype)

    def _state_fits(self, entry: Entry) -> bool:
        """Whether the state of a parameter has its shape: it has not after one of another shape took its place."""
        held = self.state.get(entry.param) or {}
        return all(held[key].shape == entry.param.shape for key in self._shaped_state if key in held)

    def _forget_state(self, entry: Entry) -> None:
        """State as if never stepped; rows are alike again, but for those that are frozen."""
        self.state.pop(entry.param, None)
        self._begin_rows(entry)

    def _rows_of(self, entry: Entry) -> Rows | None:
        """What differs between the rows of a parameter; where a client deleted its state none has taken a step."""
        if entry.rows is None or self.state.get(entry.param):
            return entry.rows
        return entry.rows.begun_anew()

    def _begin_rows(self, entry: Entry) -> None:
        """No row has taken a step. Where the parameter has another number of rows by now, none is frozen either."""
        if entry.rows is not None:
            entry.rows = entry.rows.begun_anew() if entry.rows.fits(entry.param) else None
            self._traits_changed(entry)

    def _traits_changed(self, entry: Entry) -> None:
        """Tell the store and the walk what is declared for a parameter now."""
        box, rows = entry.constraint if isinstance(entry.constraint, Box) else None, entry.rows
        low, high = (None, None) if box is None else (box.min, box.max)
        self._table.store.set_bounds(entry.id, _number(low), _number(high))
        self._walk.declare(
            entry.id,
            frozen=entry.frozen,
            dim=0 if rows is None else rows.dim,
            offsets=None if rows is None else rows.offsets,
            frozen_rows=None if rows is None else rows.frozen,
            min=low if isinstance(low, Tensor) else None,
            max=high if isinstance(high, Tensor) else None,
            zero_at_bound=box is not None and box.zero_exp_avg,
            norm=None if entry.constraint is None else entry.constraint.norm,
        )
        self._constrained = self._constrained or entry.constraint is not None
        declared_of(self._table.store)[entry.id] = {trait: getattr(entry, trait) for trait in TRAITS}

    def _drop_aliases(self) -> None:
        """Forget what was left for a client that edits state right after a replacement.

        One that took it from under the old tensor made the exchange itself, and so without the gradient, as in torch.
        """
        for old, new, state, grad in self._aliases:
            if self.state.get(old) is state and self._table.of(old) is None:
                del self.state[old]
            elif old not in self.state and self.state.get(new) is state and new.grad is grad:
                new.grad = None
        self._aliases.clear()

    def _state_begins(self, param: Tensor) -> None:
        """The moments of ``param`` begin now, for all rows.

        What was there before a client, or a policy, may have dropped without a word about rows.
        """
        self._note_version(param)
        entry = self._table.of(param)
        if entry is not None:
            self._begin_rows(entry)

    def _note_version(self, param: Tensor) -> None:
        """The moments of ``param`` begin now: whatever else writes it from here on can be told from the steps."""
        entry = self._table.of(param)
        if entry is not None:
            entry.baseline = baseline(param, self.state[param])

    def _forget_versions(self, params: Iterable[Tensor]) -> None:
        """It is not known how often these were written, or their moments are not those that began here."""
        for param in params:
            entry = self._table.of(param)
            if entry is not None:
                entry.baseline = None


def _number(bound: float | Tensor | None) -> float | None:
    return None if isinstance(bound, Tensor) else bound


def _alike(grad: Tensor, param: Tensor) -> bool:
    return grad.shape == param.shape and grad.dtype == param.dtype and grad.device == param.device
