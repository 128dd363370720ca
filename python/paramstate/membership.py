"""The parameters of an optimizer's groups, each with its entry in the identity table.

Groups and state are torch's own plain containers, which clients edit at will; here the table is brought up to date with
them, and a tensor object that takes the place of another is put in its place everywhere.

Nothing here knows what an optimizer keeps in its state beyond "tensors": the step is the subclass's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from . import _core
from .constraints import Box
from .errors import OverlapError, ReplacedParameterError, listed
from .identity import Entry, IdentityTable
from .slots import SlotTable
from .wrappers import Place, Tree

OnReplace = Literal["keep", "reset", "error"]
Key = Tensor | str


class Membership(torch.optim.Optimizer):
    """Groups, state and identity table, held together.

    A subclass calls :meth:`_begin_identity` before torch's constructor and :meth:`_end_identity` after it. IDs are
    given when they are first needed, so that construction costs little more than torch's; where the parameters lived in
    the models is recorded at once.
    """

    _shaped_state: ClassVar[tuple[str, ...]] = ()
    """The keys of state tensors that have the parameter's shape; the subclass's to say."""

    _table: IdentityTable
    _slots: SlotTable
    _walk: _core.Walk
    _on_replace: OnReplace
    _index: dict[Tensor, list[Place]] | None
    _roster: list[list[Tensor]]
    _watched: bool
    _copied_from: tuple[dict[int, Any], list[weakref.ref[nn.Module]]] | None
    _lock: threading.RLock
    _constrained: bool
    _handed_over: bool
    _aliases: list[tuple[Tensor, dict[str, Any]]]
    _left: list[tuple[Entry, Tensor, Tensor | None]]
    _under_construction: bool

    def _begin_identity(
        self, params: Any, model: nn.Module | None, store: _core.Store | None, on_replace: OnReplace
    ) -> Any:
        """Prepare the tables that ``add_param_group`` fills; returns ``params`` in torch's form."""
        if on_replace not in get_args(OnReplace):
            raise ValueError(f"on_replace must be one of {listed(get_args(OnReplace))}, got {on_replace!r}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._on_replace = on_replace
        self._make_tables(_core.Store() if store is None else store)
        self._handed_over = store is not None
        self._under_construction = True
        self._index = {}
        if model is not None:
            self._know(model)
        if isinstance(params, nn.Module):
            return self._named_parameters(params)
        if store is not None and model is None:
            params = list(params)
            self._require_names(params)
        return params

    def _require_names(self, params: list[Any]) -> None:
        """A store that was handed over is matched by name."""
        groups = [group for group in params if isinstance(group, dict)]
        named = [isinstance(group["params"], nn.Module) or "param_names" in group for group in groups]
        if not (groups and all(named)) and not (params and isinstance(params[0], tuple)):
            raise ValueError(
                "store= is matched by name, and these parameters have none: give the model, or named_parameters()"
            )

    def _make_tables(self, store: _core.Store) -> None:
        self._table = IdentityTable(store)
        self._slots = SlotTable()
        self._walk = _core.Walk(store)
        self._index = None
        self._roster = []
        self._watched = False
        self._copied_from = None
        self._lock = threading.RLock()
        self._constrained = False
        self._handed_over = False
        self._aliases = []
        self._left = []
        self._under_construction = False

    def _know(self, model: nn.Module) -> dict[Tensor, list[Place]]:
        """Know a model from now on; returns its parameters with their slots."""
        tree = Tree(model)
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

    def _named_parameters(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        """The parameters of a model that was given in place of parameters, under their canonical names."""
        return [(places[0].path, param) for param, places in self._know(model).items()]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as :meth:`torch.optim.Optimizer.add_param_group` does.

        Its ``"params"`` may also be a module. Bare parameters take their names from the slots of the models that the
        optimizer knows, so a group of bare parameters joins an optimizer that was built from named ones.

        Raises:
            OverlapError: two parameters share memory, or one was ``expand()``ed. The group is not added.
        """
        if isinstance(param_group, dict):
            self._take_names(param_group)
        super().add_param_group(param_group)
        if not self._under_construction:
            try:
                self._require_own_memory()
            except BaseException:
                self.param_groups.pop()
                raise
            self._sync()

    def _take_names(self, group: dict[str, Any]) -> None:
        params = group.get("params")
        has_names = bool(self.param_groups) and "param_names" in self.param_groups[0]
        if isinstance(params, nn.Module):
            named = self._named_parameters(params)
            group["params"] = named if has_names or not self.param_groups else [param for _, param in named]
        elif has_names and params is not None and "param_names" not in group and self._slots.models:
            bare = [params] if isinstance(params, Tensor) else list(params)
            places = self._place_index()
            if bare and all(isinstance(param, Tensor) and param in places for param in bare):
                bare = [(places[param][0].path, param) for param in bare]
            group["params"] = bare

    def _place_index(self) -> dict[Tensor, list[Place]]:
        if self._index is not None:
            return self._index
        index: dict[Tensor, list[Place]] = {}
        for place in self._slots.places():
            index.setdefault(place.param, []).append(place)
        return index

    def _admit(self, position: int, index: dict[Tensor, list[Place]]) -> None:
        """Give the parameters of a group their IDs."""
        group = self.param_groups[position]
        new = [param for param in dict.fromkeys(group["params"]) if self._table.of(param) is None]
        if not new:
            return
        label = str(group.get("name", position))
        given = dict(zip(group["params"], group.get("param_names", ()), strict=False))
        for param in new:
            here = index.get(param, [])
            names = [place.path for place in here] or ([given[param]] if param in given else [])
            entry = self._table.add(param, names, label)
            if here:
                self._slots.settle(entry, here)
            if self._handed_over:
                self._adopt_stored_state(entry)
        self._watched = False

    def _require_own_memory(self) -> None:
        """Refuse parameters that share memory with themselves or with each other."""
        every = [param for group in self.param_groups for param in group["params"]]
        for one, other in _core.overlapping(every):
            if one == other:
                raise OverlapError(
                    f"parameter {self._described(one)} shares memory with itself: shape {list(every[one].shape)}, "
                    f"strides {list(every[one].stride())} (an expand()ed tensor); give it its own with .contiguous()"
                )
            raise OverlapError(
                f"parameters {self._described(one)} and {self._described(other)} share memory, so each would be "
                "updated twice; give one of them memory of its own with .clone(), or leave it out"
            )

    def _described(self, index: int) -> str:
        """A parameter by its position across groups, called by its name where it has one."""
        for position, group in enumerate(self.param_groups):
            if index < len(group["params"]):
                param, given = group["params"][index], group.get("param_names", ())
                places = self._place_index().get(param)
                if places:
                    return repr(places[0].path)
                return repr(given[index]) if given else f"number {index} of group {position}"
            index -= len(group["params"])
        raise IndexError(index)

    def _adopt_stored_state(self, entry: Entry) -> None:
        """Take over the state and the constraint that a handed-over store holds under the ID."""
        lent = {
            key: tensor
            for key in self._table.store.keys(entry.id)
            if key != "value" and isinstance(tensor := self._table.store.lent(entry.id, key), Tensor)
        }
        if lent:
            self.state[entry.param] = lent
        low, high = self._table.store.bounds(entry.id)
        if low is not None or high is not None:
            entry.constraint = Box(low, high)
            self._constrained = True

    def _follow(self, entry: Entry, new: Tensor, places: list[Place] | None = None) -> None:
        """Let ``new`` stand for a parameter: in the groups, in the state, and for its gradient."""
        old = entry.param
        if self._on_replace == "error":
            raise ReplacedParameterError(
                f"parameter {self._table.name(entry)!r} was replaced by another tensor, and on_replace='error' forbids "
                "it; change it in place, or call opt.replace_(...)"
            )
        self._table.follow(entry, new)
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if param is old:
                    group["params"][index] = new
        self._carry_state(old, new)
        if new.grad is None and old.grad is not None and _alike(old.grad, new):
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

    def _carry_state(self, old: Tensor, new: Tensor) -> None:
        state = self.state.pop(old, None)
        if not state or self.state.get(new) or self._on_replace == "reset":
            return
        self.state[new] = state
        if new.dtype != old.dtype:
            self._widen_state(new)

    def _widen_state(self, param: Tensor) -> None:
        """The default policy for the dtype of state: it widens when the value does, and is never narrowed."""
        state = self.state[param]
        for key, held in state.items():
            shaped = isinstance(held, Tensor) and held.shape == param.shape and key != "step"
            if shaped and held.is_floating_point() and held.dtype.itemsize < param.dtype.itemsize:
                state[key] = held.to(param.dtype)

    def _sync(self) -> None:
        """Bring the table up to date with ``param_groups``, which clients edit."""
        self._resolve_copies()
        self._drop_aliases()
        groups = [list(group["params"]) for group in self.param_groups]
        if not _same_objects(groups, self._roster):
            self._enroll(groups)

    def _enroll(self, groups: list[list[Tensor]]) -> None:
        current = {param for group in groups for param in group}
        gone = [entry for entry in self._table if entry.param not in current]
        places = self._place_index() if any(self._table.of(param) is None for param in current) else {}
        for position, params in enumerate(groups):
            for index, param in enumerate(params):
                if self._table.of(param) is None:
                    partner = self._partner(position, index, gone, places)
                    if partner is not None:
                        gone.remove(partner)
                        self._follow(partner, param)
        for former in gone:
            if former.param not in self.state:
                self._slots.release(former)
                self._table.forget(former)
        for position in range(len(groups)):
            self._admit(position, places)
        ids = [[self._table.find(param).id for param in group] for group in groups]
        self._walk.enroll(groups, ids)
        self._roster = groups
        self._index = None
        self._watched = False

    def _partner(self, position: int, index: int, gone: list[Entry], places: dict[Tensor, list[Place]]) -> Entry | None:
        """In whose place a client put a new object.

        In a model that is known its slot tells. Otherwise its place in the group does, but only where the client moved
        the state too, or changed nothing else in the group: a whole list of other parameters is just that.
        """
        params = self.param_groups[position]["params"]
        paths = [place.path for place in places.get(params[index], [])]
        if paths:
            return next((entry for entry in gone if set(paths) & set(self._table.names(entry))), None)
        before = self._roster[position] if position < len(self._roster) else []
        if len(before) != len(params):
            return None
        partner = next((entry for entry in gone if entry.param is before[index]), None)
        if partner is None or self._is_in_a_model(partner):
            return None
        moved = bool(self.state.get(params[index])) or not self.state.get(partner.param)
        alone = sum(one is not other for one, other in zip(before, params, strict=True)) == 1
        return partner if moved or alone else None

    def _is_in_a_model(self, entry: Entry) -> bool:
        """Whether a slot of a model still holds the parameter."""
        modules = ((slot.module(), slot.attribute) for slot in entry.slots)
        return any(m is not None and m._parameters.get(attribute) is entry.param for m, attribute in modules)

    def _drop_aliases(self) -> None:
        """Forget what was left for a client that edits state right after a replacement."""
        for old, state in self._aliases:
            if self.state.get(old) is state and self._table.of(old) is None:
                del self.state[old]
        self._aliases.clear()

    def _orphans(self) -> list[Tensor]:
        """Tensors that have state but are in no group."""
        current = {param for group in self.param_groups for param in group["params"]}
        return [key for key in self.state if isinstance(key, Tensor) and key not in current]

    def _entry(self, param: Tensor) -> Entry | None:
        self._sync()
        return self._table.of(param)

    def _find(self, key: Key) -> Entry:
        self._sync()
        return self._table.find(key)

    def _select(self, which: Key | Iterable[Key]) -> list[Entry]:
        keys = [which] if isinstance(which, (Tensor, str)) else list(which)
        return [self._find(key) for key in keys]

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


def _alike(grad: Tensor, param: Tensor) -> bool:
    return grad.shape == param.shape and grad.dtype == param.dtype and grad.device == param.device


def _same_objects(groups: list[list[Tensor]], others: list[list[Tensor]]) -> bool:
    return len(groups) == len(others) and all(
        len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
        for one, other in zip(groups, others, strict=True)
    )
