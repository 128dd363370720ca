"""Changes of values and state that the user asks for, under IDs that stay."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import StateShapeError
from .identity import Entry
from .membership import Key, Membership, Which
from .relayout import TensorMap, require_relayout
from .versions import own_writes


class Surgery(Membership):
    """The part of an optimizer that replaces and resets parameters."""

    def reset(self, which: Which) -> None:
        """Make the state of parameters as if they had never been stepped. Values and IDs stay.

        Args:
            which: a parameter, a name, a pattern over names, a selection, or several of them.

        Raises:
            UnknownParameterError: one of them is not known. Nothing is reset then.
            SelectionError: a pattern finds a tied parameter by some of its names only. Nothing is reset then.
        """
        for entry in self._select(which):
            self._forget_state(entry)

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
        entry = self._find(which)
        old, name = entry.param, self._table.name(entry)
        self._require_untracked(entry, value)
        carried: dict[str, Any] = {}
        if callable(state):
            require_relayout(name, state, old.shape, value.shape)
            carried = self._carried(entry, state)
        elif state not in ("keep", "reset"):
            raise ValueError(f"state must be 'keep', 'reset' or a map, got {state!r}")
        elif state == "keep" and value.shape != old.shape:
            raise StateShapeError(
                f"parameter {name!r} has shape {list(old.shape)}, the new value has {list(value.shape)}; to carry the "
                "state give the map that carried the value as state=, to start afresh state='reset'"
            )
        constraint = entry.constraint
        if constraint is not None:
            constraint = constraint.carried(state, old.shape) if callable(state) else constraint
            constraint.require_fits(value, f"parameter {name!r}")
        if value.shape == old.shape and not isinstance(value, nn.Parameter):
            with torch.no_grad(), own_writes([entry]):
                # A view of the parameter itself, as its transpose is, cannot be read while it is written.
                old.copy_(value.clone() if _share_storage(value, old) else value)
        else:
            self._install(entry, value)
        if carried:
            self.state[entry.param].update(carried)
        elif state == "reset":
            self._forget_state(entry)
        if constraint is not None:
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

    def _carried(self, entry: Entry, carry: TensorMap) -> dict[str, Any]:
        held = self.state.get(entry.param) or {}
        return {
            key: carry(tensor.detach()).clone()
            for key, tensor in held.items()
            if isinstance(tensor, Tensor) and tensor.shape == entry.param.shape and key != "step"
        }

    def _install(self, entry: Entry, value: Tensor) -> None:
        """Put a new parameter in the place of the old one, everywhere."""
        old = entry.param
        if isinstance(value, nn.Parameter):
            new = value
        else:
            new = nn.Parameter(value.detach().to(old.device, old.dtype).clone(), requires_grad=old.requires_grad)
        self._exchange(entry, new)
        self._put_into_slots(entry, new)


def _share_storage(a: Tensor, b: Tensor) -> bool:
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return False
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
