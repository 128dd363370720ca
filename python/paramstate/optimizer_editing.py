"""Edit sessions on what an optimizer trains: values go back and forth, and state with them where that is wanted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .captures import Item, buffer_items
from .editing import EditSession
from .errors import listed
from .identity import TRAITS, Entry
from .membership import Membership, Which
from .rows import Rows

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
            which: a parameter, a name, or several of them; all by default. Where the model is known, the buffers of the
                modules that hold them are in the session too.
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
        entries = list(entries)
        modules: dict[nn.Module, str] = {}
        for entry in entries:
            for slot in entry.slots:
                module = slot.module()
                if module is not None:
                    modules.setdefault(module, slot.path.removesuffix(slot.attribute))
        return [*(_EntryItem(self._table.name(entry), self, entry) for entry in entries), *buffer_items(modules)]


@dataclass(frozen=True, slots=True)
class _EntryItem:
    """A parameter of an optimizer, wherever it stands."""

    name: str
    optimizer: Membership
    entry: Entry

    def held(self) -> Tensor:
        return self.entry.param

    def put(self, tensor: Tensor) -> None:
        if self.entry.param is not tensor:
            self.optimizer._exchange(self.entry, tensor)
            self.optimizer._put_into_slots(self.entry, tensor)


class _StateOf:
    """The state of some parameters, and what is declared for them, to be put back."""

    def __init__(self, optimizer: Membership, entries: Iterable[Entry]) -> None:
        self._optimizer = optimizer
        self._entries = {optimizer._table.name(entry): entry for entry in entries}

    def take(self) -> dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]:
        taken = {}
        for name, entry in self._entries.items():
            held = self._optimizer.state.get(entry.param)
            taken[name] = (
                None if held is None else {key: _copied(value) for key, value in held.items()},
                {trait: _copied(getattr(entry, trait)) for trait in TRAITS},
            )
        return taken

    def give(self, taken: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]], names: Iterable[str]) -> None:
        for name in names:
            if name not in taken:
                continue  # a buffer
            entry, (held, traits) = self._entries[name], taken[name]
            self._optimizer.state.pop(entry.param, None)
            if held is not None:
                self._optimizer.state[entry.param] = {key: _copied(value) for key, value in held.items()}
            for trait, value in traits.items():
                setattr(entry, trait, _copied(value))
            self._optimizer._traits_changed(entry)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copied() if isinstance(value, Rows) else value
