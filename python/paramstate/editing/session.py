"""Edit sessions: change weights, look, and get the exact original back, or keep the edit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from paramstate.errors import EditError, UnknownParameterError, listed
from paramstate.identity.membership import Key, Several
from paramstate.identity.write_counts import put_back
from paramstate.selection.patterns import matching, nearest
from paramstate.selection.selecting import Selectable, Selection, select

from .captures import Capture, Captured, Item, capture, items_of

if TYPE_CHECKING:
    from paramstate.comparison import DiffReport


@dataclass(frozen=True, slots=True)
class Change:
    """What an edit did to one parameter or buffer."""

    name: str
    replaced: bool
    """Another tensor object stands in the slot."""
    requires_grad: bool
    """``requires_grad`` is another."""
    max_change: float | None
    """The greatest change of a value; ``None`` where shape or dtype differ, or there was or is no tensor."""


class Companion(Protocol):
    """What goes back and forth together with the values: an optimizer's state."""

    def take(self) -> Any:
        """All of it as it is."""
        ...

    def is_still(self, taken: Any) -> bool:
        """Whether it is what was taken, bit for bit."""
        ...

    def give(self, taken: Any, names: Iterable[str]) -> None:
        """Put back what was taken, of these parameters."""
        ...


@dataclass(frozen=True, slots=True)
class _Step:
    """One point of a session's history."""

    label: str
    values: Capture
    companion: Any


_open_sessions: weakref.WeakKeyDictionary[Any, list[weakref.ref[EditSession]]] = weakref.WeakKeyDictionary()
"""The sessions of each owner that are open, the innermost last. One that nobody holds any more is over: it keeps no
model alive and stands in nobody's way, and its edit stays."""


class EditSession:
    """An edit of a model, made by :func:`edit` or :meth:`Adam.edit`: the original is at hand until it is closed.

    While it is open the model may be changed in any way: in place, through ``.data``, by assigning new parameters.
    Leaving the ``with`` block, also by an exception, restores the original bit for bit, unless :meth:`commit` kept the
    edit. A session that is not used as a context manager ends with :meth:`close`.

    Sessions may be nested, the inner one closed first: its original is what the outer one's edit had made. The end of
    a ``with`` block closes what was opened inside it and is still open.

    Args:
        owner: the model or the optimizer; sessions of one owner are a stack.
        items: what the session holds.
        device: where the copies are kept; by default on each tensor's own device.
        companion: what goes back and forth together with the values.

    Example:
        >>> import torch
        >>> from paramstate import edit
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> _ = layer.weight.data.fill_(1.0)
        >>> with edit(layer) as session:
        ...     _ = layer.weight.data.fill_(2.0)
        ...     session.mark("doubled")
        ...     _ = layer.weight.data.fill_(3.0)
        ...     session.undo(); print(layer.weight.item(), session.history, session.is_edited)
        ...     session.redo(); print(layer.weight.item(), session.base()["weight"].item())
        ...     session.toggle(); print(session.tensors()["weight"].item(), session.changes())
        ...     session.restore()
        ...     session.toggle()
        ...     print(session.diff().summary)
        ...     session.commit()
        2.0 ['base', 'doubled', 'edit'] True
        3.0 1.0
        1.0 []
        1 changed
        >>> layer.weight.item(), session.is_open
        (3.0, False)
        >>> session = edit(layer)
        >>> _ = layer.weight.data.zero_()
        >>> session.close()
        >>> layer.weight.item()
        3.0
    """

    def __init__(
        self,
        owner: object,
        items: Sequence[Item],
        device: torch.device | str | None = None,
        companion: Companion | None = None,
    ) -> None:
        self._items = items
        self._device = device
        self._companion = companion
        self._history = [_Step("base", capture(items, device), None if companion is None else companion.take())]
        self._position = 0
        self._record: list[Change] | None = None
        self._committed: list[Change] = []
        self._reference = weakref.ref(self)
        self._stack = _open_sessions.setdefault(owner, [])
        self._stack[:] = [*(other for other in self._stack if other() is not None), self._reference]

    # ---- what one holds -------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether the original is still at hand."""
        return self._reference in self._stack

    @property
    def is_edited(self) -> bool:
        """Whether the model holds anything else than the original now."""
        return self.is_open and bool(self.changes())

    @property
    def history(self) -> list[str]:
        """The labels of the marked steps, the original first."""
        return [step.label for step in self._history]

    def base(self) -> dict[str, Tensor]:
        """The original values by name: copies, not the model's tensors."""
        base = self._history[0].values
        return {name: captured.bits for name, captured in base.items() if captured.tensor is not None}

    def tensors(self) -> dict[str, Tensor]:
        """What the model holds now, by name: the model's tensors."""
        held = ((item.name, item.held()) for item in self._items)
        return {name: tensor for name, tensor in held if tensor is not None}

    def changes(self) -> list[Change]:
        """What differs from the original; once the session is closed, what its edit had changed."""
        if self._record is not None:
            return self._record
        base = self._history[0].values
        held = ((item.held(), base[item.name], item.name) for item in self._items)
        return [_change(name, before, now) for now, before, name in held if not before.is_still(now)]

    def diff(self) -> DiffReport:
        """The original against what the model holds now, as :func:`paramstate.diff` reports it."""
        from paramstate.comparison import diff

        return diff(self.base(), {name: tensor.detach() for name, tensor in self.tensors().items()})

    # ---- going back and forth -------------------------------------------------------------------------------------

    def mark(self, label: str = "edit") -> None:
        """Remember what the model holds now as one step of the history; steps that were undone are forgotten.

        Without a change since the last step, of state neither where the session carries it, nothing is remembered.
        """
        self._require_innermost()
        last = self._history[self._position]
        now = capture(self._items, self._device, last.values)
        if any(now[name] is not held for name, held in last.values.items()) or not self._is_still(last):
            del self._history[self._position + 1 :]
            self._history.append(_Step(label, now, None if self._companion is None else self._companion.take()))
            self._position += 1

    def _is_still(self, step: _Step) -> bool:
        return self._companion is None or self._companion.is_still(step.companion)

    def undo(self) -> None:
        """Go back by one step of the history; what was changed since the last one is marked first.

        Raises:
            EditError: the model holds the original already.
        """
        self.mark()
        if self._position == 0:
            raise EditError("there is nothing to undo: the model holds the original")
        self._go_to(self._position - 1)

    def redo(self) -> None:
        """Go forward by one step that was undone.

        Raises:
            EditError: none was, or the model was changed since.
        """
        self.mark()
        if self._position + 1 == len(self._history):
            raise EditError("there is nothing to redo: no step was undone since the last change")
        self._go_to(self._position + 1)

    def toggle(self) -> None:
        """Change between the original and the latest edit.

        Raises:
            EditError: there is no edit yet.
        """
        self.mark()
        if len(self._history) == 1:
            raise EditError("there is no edit to change to: the model holds the original")
        self._go_to(len(self._history) - 1 if self._position == 0 else 0)

    def restore(self, *which: Key | Several) -> None:
        """Go back to the original, of all or of some; the edit stays in the history.

        Args:
            which: parameters and buffers by name or pattern, as tensors, modules or selections; all by default. Of a
                module or a selection it is what this session holds.

        Raises:
            UnknownParameterError: one of them is not in this session. Nothing is restored then.
        """
        names = list(dict.fromkeys(name for one in which for name in self._names_of(one)))
        self.mark()
        if which:
            self._put(self._history[0], names)
            self.mark("restored: " + ", ".join(names))
        else:
            self._go_to(0)

    def _names_of(self, one: Key | Several) -> list[str]:
        """The names of what a parameter, a name, a module or a selection stands for in this session."""
        names = {name: item.name for item in self._items for name in item.names}
        if isinstance(one, str):
            found = [names[one]] if one in names else [names[name] for name in matching(one, names)]
            missing = nearest(one, names)
        else:
            tensors = [one] if isinstance(one, Tensor) else [*_tensors_of(one)]
            found = [item.name for item in self._items if any(map(self._holder(item), tensors))]
            missing = f"it holds {listed(list(names), 3)}"
        if not found:
            called = f"a tensor of shape {list(one.shape)}" if isinstance(one, Tensor) else _called(one)
            raise UnknownParameterError(f"{called} is not in this edit; {missing}")
        return found

    def _holder(self, item: Item) -> Callable[[Tensor], bool]:
        """Whether a tensor is an item's, now or in the original."""
        original = self._history[0].values[item.name].tensor
        return lambda tensor: tensor is original or item.is_held(tensor)

    def commit(self) -> None:
        """Keep what the model holds now: it is the original from here on."""
        self._require_innermost()
        self._committed = self.changes()
        self.mark()
        self._history, self._position = [self._history[self._position]], 0

    def close(self) -> None:
        """End the session: the original, or what was last committed, is what remains."""
        if not self.is_open:
            return
        self._require_innermost()
        record = self.changes() or self._committed
        self._go_to(0)
        self._record = record
        self._history = [replace(self._history[0], companion=None)]
        self._companion = None
        self._stack.remove(self._reference)

    def __enter__(self) -> EditSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_open:
            for inner in self._inside():  # its original is a part of this one's edit
                inner.close()
        self.close()

    def _go_to(self, position: int) -> None:
        self._put(self._history[position])
        self._position = position

    def _put(self, step: _Step, names: Iterable[str] | None = None) -> None:
        wanted = set(step.values) if names is None else set(names)
        restored = [item for item in self._items if item.name in wanted]
        for item in restored:
            item.put(step.values[item.name].restored())
        if self._companion is not None:
            self._companion.give(step.companion, wanted)
        for captured in (step.values[name] for name in wanted):
            if captured.tensor is not None:
                put_back(captured.tensor, captured.writes)

    def _require_innermost(self) -> None:
        if not self.is_open:
            raise EditError("this edit is closed; open another with edit(...)")
        if self._inside():
            raise EditError("an edit inside this one is still open; close it first")

    def _inside(self) -> list[EditSession]:
        """The sessions that were opened after this one and are still open, the innermost first."""
        living = [session for reference in reversed(self._stack) if (session := reference()) is not None]
        return living[: living.index(self)]

    def _holds(self, tensor: Tensor) -> bool:
        return any(item.is_held(tensor) for item in self._items)


def _tensors_of(several: Several) -> Iterator[Tensor]:
    """The parameters that a selection means, or the parameters and buffers of a module."""
    yield from (several if isinstance(several, Selection) else (*several.parameters(), *several.buffers()))


def _called(one: str | Several) -> str:
    return type(one).__name__ if isinstance(one, nn.Module) else repr(one)


def sessions_on(tensor: Tensor) -> list[tuple[object, EditSession]]:
    """The open sessions that hold a parameter, each with its owner: its value will come back when they end."""
    opened = [(owner, reference()) for owner, references in list(_open_sessions.items()) for reference in references]
    return [(owner, session) for owner, session in opened if session is not None and session._holds(tensor)]


def require_state_comes_back(optimizer: object, tensor: Tensor, called: str) -> None:
    """Refuse to move a parameter's value and state together where an open session would bring back the value alone.

    Args:
        optimizer: whose state it is.
        tensor: the parameter.
        called: how the message names it.

    Raises:
        EditError: there is such a session.
    """
    if any(owner is not optimizer or session._companion is None for owner, session in sessions_on(tensor)):
        raise EditError(
            f"{called} is in an open edit that leaves its state alone: the value would come back, and the state would "
            "not follow it; open that edit with opt.edit(..., state='snapshot'), or close it first"
        )


def edit(model: nn.Module, *what: Selectable, device: torch.device | str | None = None) -> EditSession:
    """Open an edit session on a model; needs no optimizer.

    The session holds the selected parameters, the buffers of the modules that hold them, and all buffers below a module
    that is selected as a whole: values, tensor objects and ``requires_grad``. Its memory is a copy of these; steps of
    the history share what did not change.

    Args:
        model: the model.
        what: which parameters, as :func:`select` takes it; all by default.
        device: where the copies are kept (``"cpu"`` spares a GPU); by default on each tensor's own device.

    Returns:
        EditSession: to be used with ``with``, or closed.

    Raises:
        UnknownParameterError: nothing is selected.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> original = model[1].weight.clone()
        >>> with edit(model, "1") as session:
        ...     _ = model[1].weight.data.mul_(2.0)
        ...     print(session.is_edited, [change.name for change in session.changes()])
        True ['1.weight']
        >>> torch.equal(model[1].weight, original)
        True
        >>> with edit(model, "1") as session:
        ...     _ = model[1].weight.data.mul_(2.0)
        ...     session.commit()
        >>> torch.equal(model[1].weight, 2.0 * original)
        True
    """
    return EditSession(model, items_of(model, select(model, *what)), device)


def _change(name: str, before: Captured, now: Tensor | None) -> Change:
    if now is None or before.tensor is None:
        return Change(name, replaced=True, requires_grad=False, max_change=None)
    alike = now.shape == before.bits.shape and now.dtype == before.bits.dtype
    return Change(
        name,
        replaced=now is not before.tensor,
        requires_grad=now.requires_grad != before.requires_grad,
        max_change=_greatest(now.detach().to(before.bits.device), before.bits) if alike else None,
    )


def _greatest(one: Tensor, other: Tensor) -> float:
    if not one.numel():
        return 0.0
    wide = torch.complex128 if one.is_complex() else torch.float64
    return float((one.to(wide) - other.to(wide)).abs().max())
