"""Changes of values and state that the user asks for, under IDs that stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from paramstate.declared.constraints import Constraint
from paramstate.errors import StateShapeError
from paramstate.identity.membership import Key, Membership, Which
from paramstate.identity.table import Entry
from paramstate.identity.tables import between_steps
from paramstate.identity.versions import own_writes

if TYPE_CHECKING:
    from .carried_state import CarriedState
    from .relayout import TensorMap


class Surgery(Membership):
    """The part of an optimizer that replaces and resets parameters."""

    @between_steps
    def reset(self, which: Which) -> None:
        """Make the state of parameters as if they had never been stepped. Values and IDs stay.

        Args:
            which: a parameter, a name, a pattern over names, a module, a selection, or several of them.

        Raises:
            UnknownParameterError: one of them is not known. Nothing is reset then.
            SelectionError: a pattern finds a tied parameter by some of its names only. Nothing is reset then.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = AdamW(model)
            >>> model(torch.ones(1, 2)).sum().backward(); opt.step()
            >>> opt.reset("weight")
            >>> opt.state_of("weight"), opt.state_of("bias")["step"]
            ({}, tensor(1.))
        """
        for entry in self._select(which):
            self._forget_state(entry)

    @between_steps
    def replace_(self, which: Key, value: Tensor, state: Literal["keep", "reset"] | TensorMap = "keep") -> Tensor:
        """Give a parameter a new value, or a new ``nn.Parameter``, under the same ID.

        A plain tensor of the same shape is copied into the parameter. Otherwise a new ``nn.Parameter`` takes its place
        in the groups and in every slot of the models that the optimizer knows; where it knows none, assign what is
        returned.

        Args:
            which: the parameter, as the tensor or by name.
            value: the new value (of any shape), or the new ``nn.Parameter`` itself.
            state: ``"keep"``; ``"reset"``; or the map that carried the value, through which each state tensor of the
                parameter's shape is sent as well. The map must be a pure re-layout, which is checked.

        Returns:
            Tensor: the parameter as it is now.

        Raises:
            UnknownParameterError: ``which`` is not known.
            ValueError: ``value`` is another parameter of this optimizer. Nothing is changed then.
            EditError: ``state`` is a map, and an open edit would bring back the value without the state. Nothing is
                changed then.
            ConstraintError: the bounds that were declared for the parameter do not fit the new value. Nothing is
                changed then.
            StateShapeError: the shape changes and ``state`` is ``"keep"``, or the map is no re-layout. Nothing is
                changed then.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Linear(2, 3)
            >>> opt = AdamW(model)
            >>> before = opt.ids["weight"]
            >>> _ = opt.replace_("weight", model.weight.T, state=lambda t: t.T)
            >>> list(model.weight.shape), opt.ids["weight"] == before
            ([2, 3], True)
        """
        if not isinstance(value, Tensor):
            raise TypeError(f"value must be a tensor or an nn.Parameter, got {type(value).__name__}")
        entry = self._find(which)
        old, called = entry.param, f"parameter {self._table.name(entry)!r}"
        self._require_untracked(entry, value)
        carried, constraint = None, entry.constraint
        if callable(state):
            from paramstate.editing.session import require_state_comes_back

            require_state_comes_back(self, old, called)
            carried, constraint = self._carried(entry, value, state, called)
        else:
            _require_fits(entry, value, state, called)
        if constraint is not None:
            constraint.require_fits(value, called)
        if carried is not None:
            old.grad = None  # it is of the old layout, which another one of the same shape does not show
        if value.shape == old.shape and not isinstance(value, nn.Parameter):
            with torch.no_grad(), own_writes([entry]):
                # A view of the parameter itself, as its transpose is, cannot be read while it is written.
                old.copy_(value.clone() if _share_storage(value, old) else value)
        else:
            self._install(entry, value)
        if carried is not None:
            carried.place(entry.param)
            entry.rows = carried.rows
        elif state == "reset":
            self._forget_state(entry)
        if carried is not None or constraint is not None:
            entry.constraint = constraint
            self._traits_changed(entry)
        return entry.param

    def _require_untracked(self, entry: Entry, value: Tensor) -> None:
        """Refuse to let one tensor object stand for two parameters."""
        other = self._table.of(value) if isinstance(value, nn.Parameter) else None
        if other is not None and other is not entry:
            name, taken = self._table.name(entry), self._table.name(other)
            raise ValueError(
                f"parameter {name!r} cannot be replaced by parameter {taken!r}, which this optimizer holds already; to "
                f"copy the value give {taken!r}.detach(), to tie them assign it in the model and call opt.rebind(model)"
            )

    def _carried(
        self, entry: Entry, value: Tensor, carry: TensorMap, called: str
    ) -> tuple[CarriedState, Constraint | None]:
        """State and constraint behind the map that carried the value."""
        from .carried_constraints import carried_constraint
        from .carried_state import CarriedState
        from .relayout import require_relayout

        sources = require_relayout(called, carry, entry.param.shape, value.shape)
        state = CarriedState(self, [entry], sources, lambda tensors: carry(*tensors).clone(), called)
        return state, carried_constraint([entry.constraint], sources, called)

    def _install(self, entry: Entry, value: Tensor) -> None:
        """Put a new parameter in the place of the old one, everywhere."""
        old = entry.param
        if isinstance(value, nn.Parameter):
            new = value
        else:
            new = nn.Parameter(value.detach().to(old.device, old.dtype).clone(), requires_grad=old.requires_grad)
        self._exchange(entry, new)
        self._put_into_slots(entry, new, old)


def _require_fits(entry: Entry, value: Tensor, state: str, called: str) -> None:
    """Refuse a value that the state cannot stand beside, and one whose rows are not those that were frozen."""
    old, rows = entry.param, entry.rows
    if state not in {"keep", "reset"}:
        raise ValueError(f"state must be 'keep', 'reset' or a map, got {state!r}")
    if state == "keep" and value.shape != old.shape:
        raise StateShapeError(
            f"{called} has shape {list(old.shape)}, the new value has {list(value.shape)}; to carry the state give the "
            "map that carried the value as state=, to start afresh state='reset'"
        )
    if rows is None or rows.frozen is None or (rows.dim < value.dim() and value.shape[rows.dim] == len(rows)):
        return
    raise StateShapeError(
        f"{called}: some of its {len(rows)} rows along dim {rows.dim} are frozen, and the new value has shape "
        f"{list(value.shape)}; opt.unfreeze_rows(...) first"
    )


def _share_storage(a: Tensor, b: Tensor) -> bool:
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return False
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
