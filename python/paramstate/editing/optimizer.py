"""Edit sessions on what an optimizer trains: values go back and forth, and state with them where that is wanted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from paramstate.bits import same_bits
from paramstate.declared.rows import Rows
from paramstate.errors import listed
from paramstate.identity.membership import Membership, Which
from paramstate.identity.table import TRAITS, Entry
from paramstate.identity.wrappers import Tree

if TYPE_CHECKING:
    from .captures import Item
    from .session import EditSession

StatePolicy = Literal["keep", "snapshot", "reset"]


class OptimizerEditing(Membership):
    """The part of an optimizer that opens edit sessions."""

    def edit(
        self,
        which: Which | None = None,
        *,
        state: StatePolicy = "keep",
        device: torch.device | str | None = None,
    ) -> EditSession:
        """Open an edit session on parameters of this optimizer; see :class:`EditSession`.

        Args:
            which: a parameter, a name, or several of them; all by default. Where the model is known, the buffers that
                belong to them are in the session too, as :func:`edit` says.
            state: what becomes of their moments and steps. ``"keep"``: nothing, whatever is stepped meanwhile stays
                stepped. ``"snapshot"``: they go back and forth with the values. ``"reset"``: the edit starts with none,
                and they come back with the original; a commit leaves the edited parameters with fresh state.
            device: where the copies are kept; by default on each tensor's own device.

        Raises:
            UnknownParameterError: one of them is not known.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = AdamW(model)
            >>> model(torch.ones(1, 2)).sum().backward(); opt.step()
            >>> with opt.edit("weight", state="snapshot"):
            ...     _ = model.weight.data.zero_()
            ...     opt.step()
            >>> bool(model.weight.any()), float(opt.state_of("weight")["step"])
            (True, 1.0)
        """
        from .session import EditSession

        if state not in get_args(StatePolicy):
            raise ValueError(f"state must be one of {listed(get_args(StatePolicy))}, got {state!r}")
        self._sync()
        entries = list(self._table) if which is None else self._select(which)
        companion = None if state == "keep" else _StateOf(self, entries)
        session = EditSession(self, self._items(entries), device, companion)
        if state == "reset":
            for entry in entries:
                self._forget_state(entry)
        return session

    def _items(self, entries: Iterable[Entry]) -> list[Item]:
        from .captures import buffer_items

        items = [_EntryItem(self._table.name(entry), self, entry) for entry in entries]
        models = [(tree, self._label_of(tree)) for tree in self._slots.trees()]
        params = {item.entry.param for item in items}
        return [*items, *buffer_items(models, params, [item.name for item in items])]

    def _label_of(self, tree: Tree) -> str:
        """What qualifies the names of a model where another one shares them: the label of its first parameter."""
        entries = (self._table.of(place.param) for place in tree.places)
        return next((entry.label for entry in entries if entry is not None), "")


@dataclass(frozen=True, slots=True)
class _EntryItem:
    """A parameter of an optimizer, wherever it stands."""

    name: str
    optimizer: Membership
    entry: Entry

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.name, *self.optimizer._table.names(self.entry))))

    def held(self) -> Tensor | None:
        """The parameter, or ``None`` once it left the optimizer."""
        return self.entry.param if self.optimizer._has(self.entry) else None

    def is_held(self, tensor: Tensor) -> bool:
        return self.entry.param is tensor

    def put(self, tensor: Tensor | None) -> None:
        held = self.held()
        if held is None or tensor is None:
            return
        if held is tensor:
            self._fill_slots(tensor)
            return
        trains = tensor.requires_grad
        if not self.entry.slots:
            # Where nothing tells which slots hold it, another object there would be trained by nobody.
            from .captures import become

            become(held, tensor.data.clone())
        else:
            self.optimizer._exchange(self.entry, tensor)
            self.optimizer._put_into_slots(self.entry, tensor, held)
        self.entry.param.requires_grad_(trains)  # also where it was frozen meanwhile
        if not self.optimizer._state_fits(self.entry):
            self.optimizer._forget_state(self.entry)  # that of a value of another shape, which took this one's place

    def _fill_slots(self, tensor: Tensor) -> None:
        """Put it back where the slot holds something else that the optimizer was not shown, or nothing."""
        for slot in self.entry.slots:
            module = slot.module()
            if module is not None and module._parameters.get(slot.attribute, tensor) is not tensor:
                setattr(module, slot.attribute, tensor)


Taken = dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]
"""State, and what is declared, by name."""


class _StateOf:
    """The state of some parameters, and what is declared for them, to be put back."""

    def __init__(self, optimizer: Membership, entries: Iterable[Entry]) -> None:
        self._optimizer = optimizer
        self._entries = {optimizer._table.name(entry): entry for entry in entries}

    def take(self) -> Taken:
        return {name: _copied(self._held(entry)) for name, entry in self._entries.items()}

    def is_still(self, taken: Taken) -> bool:
        return all(_same(self._held(entry), taken[name]) for name, entry in self._entries.items())

    def _held(self, entry: Entry) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """State and what is declared, not copied."""
        # Whoever looks into torch's mapping leaves an empty entry there: that is no state.
        return self._optimizer.state.get(entry.param) or None, {trait: getattr(entry, trait) for trait in TRAITS}

    def give(self, taken: Taken, names: Iterable[str]) -> None:
        for name in names:
            if name not in taken or not self._optimizer._has(self._entries[name]):
                continue  # a buffer, or it left the optimizer
            entry, (held, traits) = self._entries[name], taken[name]
            self._optimizer.state.pop(entry.param, None)
            if held is not None:
                self._optimizer.state[entry.param] = _copied(held)
            for trait, value in traits.items():
                setattr(entry, trait, _copied(value))
            self._optimizer._traits_changed(entry)
        self._optimizer._roster = []  # the walk is told of dtypes when parameters are enrolled


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return value.copied() if isinstance(value, Rows) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.device == other.device and same_bits(one.detach(), other.detach())
    if isinstance(one, tuple) and isinstance(other, tuple):
        return all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, Rows) and isinstance(other, Rows):
        return one.dim == other.dim and _same(one.as_data(), other.as_data())
    return type(one) is type(other) and bool(one == other)
