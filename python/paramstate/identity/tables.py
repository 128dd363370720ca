"""What an optimizer keeps beside torch's groups and state: identity table, store, walk, and the models it knows."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from paramstate import _core
from paramstate.precision.state_dtype import Kind, kept_as

from .shared import Shared
from .slots import SlotTable
from .table import Entry, IdentityTable
from .wrappers import Place, Tree

if TYPE_CHECKING:
    from paramstate.selection.expressions import Expression

# Everything that hands tensors to the compiled module imports this file.
if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"paramstate needs torch 2.10 or later, found {torch.__version__}: pip install 'torch>=2.10'")
_core.connect(torch.Tensor, nn.Parameter, torch.Tensor.__dlpack_c_exchange_api__)

OnReplace = Literal["keep", "reset", "error"]


Owner = TypeVar("Owner", bound="Tables")
Given = ParamSpec("Given")
Answer = TypeVar("Answer")


def between_steps(method: Callable[Concatenate[Owner, Given], Answer]) -> Callable[Concatenate[Owner, Given], Answer]:
    """Let a method that changes what is declared wait for a step that another thread takes."""

    @functools.wraps(method)
    def waiting(owner: Owner, /, *args: Given.args, **kwargs: Given.kwargs) -> Answer:
        with owner._lock:
            return method(owner, *args, **kwargs)

    return waiting


class SelectedGroup(NamedTuple):
    """A group whose parameters were given as a selection."""

    expression: Expression
    position: int
    """Its place among the groups when it was added."""


class Alias(NamedTuple):
    """State that stands under a tensor that was replaced as well, until the next look at the groups."""

    old: Tensor
    new: Tensor
    state: dict[str, Any]
    grad: Tensor | None
    """The gradient that moved from the old tensor to the new one."""


class Tables(torch.optim.Optimizer):
    """An optimizer's tables. Modules are held weakly, parameters strongly."""

    _shaped_state: ClassVar[tuple[str, ...]] = ()
    """The keys of state tensors that have the parameter's shape; the subclass's to say."""

    _table: IdentityTable
    _slots: SlotTable
    _walk: _core.Walk
    _lock: threading.RLock
    _aliases: list[Alias]
    _left: list[tuple[Entry, Tensor, Tensor | None]]
    _resting: dict[Tensor, tuple[list[str], Entry]]
    _selected: list[SelectedGroup]
    _itself: weakref.ref[Any]
    """The optimizer, also where a wrapper that imitates its class asks."""
    _shared: dict[str, Any]

    _on_replace = Shared[OnReplace]("keep")
    _index = Shared[dict[Tensor, list[Place]] | None](None)
    _roster = Shared[list[list[Tensor]]]([])
    _watched = Shared(default=False)
    _copied_from = Shared[tuple[dict[int, Any], list[weakref.ref[nn.Module]]] | None](None)
    _constrained = Shared(default=False)
    _state_dtype = Shared[Kind | None](None)
    """In what the moments of all parameters are kept for which nothing else is declared."""
    _is_retyped = Shared(default=False)
    """Whether anything was ever declared about that."""
    _handed_over = Shared(default=False)
    _under_construction = Shared(default=False)

    def _make_tables(self, store: _core.Store) -> None:
        self._table = IdentityTable(store)
        self._slots = SlotTable()
        self._walk = _core.Walk(store)
        self._lock = threading.RLock()
        self._aliases = []
        self._left = []
        self._resting = {}
        self._selected = []
        self._itself = weakref.ref(self)
        self._shared = {}

    def _kept_as(self, param: Tensor) -> Kind | None:
        """In what the moments of a parameter are kept; ``None`` where that is open."""
        entry = self._table.of(param)
        return kept_as((entry and entry.state_dtype) or self._state_dtype, param)

    def _know(self, model: nn.Module, tree: Tree | None = None) -> dict[Tensor, list[Place]]:
        """Know a model from now on, by a walk over it that may be given; returns its parameters with their slots."""
        tree = Tree(model) if tree is None else tree
        index: dict[Tensor, list[Place]] = {}
        for place in tree.places:
            index.setdefault(place.param, []).append(place)
        known = any(model is other for other in self._slots.models)
        self._slots.add_root(model, tree)
        if self._index is not None and not known:
            self._add_to_index(index)
        return index

    def _add_to_index(self, index: dict[Tensor, list[Place]]) -> None:
        if not self._index:
            self._index = index
            return
        for param, places in index.items():
            self._index[param] = [*self._index.get(param, ()), *places]

    def _place_index(self) -> dict[Tensor, list[Place]]:
        if self._index is not None:
            return self._index
        index: dict[Tensor, list[Place]] = {}
        for place in self._slots.places():
            index.setdefault(place.param, []).append(place)
        return index

    def _resolve_copies(self) -> None:
        """Know the models that were copied together with this optimizer."""
        if self._copied_from is None:
            return
        (memo, originals), self._copied_from = self._copied_from, None
        copies = [memo.get(id(model)) for reference in originals if (model := reference()) is not None]
        found = [model for model in copies if isinstance(model, nn.Module)]
        if found:
            self._know_slots_of(found)

    def _know_slots_of(self, models: list[nn.Module]) -> None:
        for model in models:
            self._know(model)
        places = self._place_index()
        for entry in self._table:
            self._slots.settle(entry, places.get(entry.param, []))
        self._watched = False
