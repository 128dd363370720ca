"""The parameters of an optimizer's groups: how they come in, and how they are found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from torch import Tensor, nn

from paramstate import _core
from paramstate.errors import OverlapError, SelectionError, UnknownParameterError, listed
from paramstate.selection.patterns import matching, nearest
from paramstate.selection.selecting import Selection, select
from paramstate.selection.tied import selected_whole

from .enrolment import Enrolment
from .table import Entry
from .tables import OnReplace, SelectedGroup
from .wrappers import Tree

Key = Tensor | str
Several = Selection | nn.Module
Which = Key | Several | Iterable[Key | Several]
"""One or several parameters: by tensor, name or pattern, as a selection, or by the module that holds them."""


def keys_of(which: Which) -> list[Key | Several]:
    """What was given as one or several parameters, one by one.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(which, (Tensor, str, Selection, nn.Module)):
        return [which]
    if not isinstance(which, Iterable):
        raise TypeError(
            "parameters are given as tensors, names, patterns, modules, selections, or several of these; got "
            f"{type(which).__name__}"
        )
    return list(which)


class Membership(Enrolment):
    """Groups, state and identity table, held together.

    A subclass calls :meth:`_begin_identity` before torch's constructor and :meth:`_end_identity` after it. IDs are
    given when they are first needed, so that construction costs little more than torch's; where the parameters lived in
    the models is recorded at once.
    """

    def _begin_identity(
        self, params: Any, model: nn.Module | None, store: _core.Store | None, on_replace: OnReplace
    ) -> Any:
        """Prepare the tables that ``add_param_group`` fills; returns ``params`` in torch's form."""
        if on_replace not in get_args(OnReplace):
            raise ValueError(f"on_replace must be one of {listed(get_args(OnReplace))}, got {on_replace!r}")
        self._make_tables(_core.Store() if store is None else store)
        self._on_replace = on_replace
        self._handed_over = store is not None
        self._under_construction = True
        self._index = {}
        if model is not None:
            self._know(model)
        if isinstance(params, nn.Module):
            return self._named_parameters(params)
        if isinstance(params, Selection):
            return [{"params": params}]
        if store is not None and model is None:
            params = list(params)
            self._require_names(params)
        return params

    def _require_names(self, params: list[Any]) -> None:
        """A store that was handed over is matched by name."""
        groups = [group for group in params if isinstance(group, dict)]
        named = [isinstance(group["params"], (nn.Module, Selection)) or "param_names" in group for group in groups]
        if not (groups and all(named)) and not (params and isinstance(params[0], tuple)):
            raise ValueError(
                "store= is matched by name, and these parameters have none: give the model, or named_parameters()"
            )

    def _named_parameters(self, given: nn.Module | Selection) -> list[tuple[str, Tensor]]:
        """The parameters of what was given in place of parameters, under their canonical names."""
        if isinstance(given, Selection):
            tree = Tree(given.model)
            selected = given.resolve(tree)
            self._know(given.model, tree)
            return [(names[0], param) for param, names in selected.items()]
        return [(places[0].path, param) for param, places in self._know(given).items()]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as :meth:`torch.optim.Optimizer.add_param_group` does.

        Its ``"params"`` may also be a module, or a selection, which ``rebind`` resolves anew. Bare parameters take
        their names from the slots of the models that the optimizer knows, so a group of bare parameters joins an
        optimizer that was built from named ones.

        Raises:
            OverlapError: two parameters share memory, or one was ``expand()``ed. The group is not added.
            SelectionError: a module or a selection holds parameters that are in another group already.

        Example:
            >>> import torch
            >>> from paramstate import AdamW, select
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
            >>> opt = AdamW(select(model, "1"))
            >>> opt.add_param_group({"params": model[0].parameters(), "lr": 1e-4})
            >>> list(opt.ids)
            ['1.weight', '1.bias', '0.weight', '0.bias']
        """
        given = param_group.get("params") if isinstance(param_group, dict) else None
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
        if isinstance(given, Selection):
            self._selected.append(SelectedGroup(given.expression, len(self.param_groups) - 1))

    def _take_names(self, group: dict[str, Any]) -> None:
        params = group.get("params")
        has_names = bool(self.param_groups) and "param_names" in self.param_groups[0]
        if isinstance(params, (nn.Module, Selection)):
            named = self._named_parameters(params)
            self._require_new(named)
            group["params"] = named if has_names or not self.param_groups else [param for _, param in named]
        elif has_names and params is not None and "param_names" not in group and self._slots.models:
            bare = [params] if isinstance(params, Tensor) else list(params)
            places = self._place_index()
            if bare and all(isinstance(param, Tensor) and param in places for param in bare):
                bare = [(places[param][0].path, param) for param in bare]
            group["params"] = bare

    def _require_new(self, named: list[tuple[str, Tensor]]) -> None:
        """Refuse parameters that are in a group already, as torch does, and say which."""
        for number, group in enumerate(self.param_groups):
            present = set(group["params"])
            twice = [name for name, param in named if param in present]
            if twice:
                raise SelectionError(
                    "some parameters appear in more than one parameter group: "
                    f"{listed(twice)} {'is' if len(twice) == 1 else 'are'} in group {group.get('name', number)!r} "
                    "already; subtract one selection from the other"
                )

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
        position = 0
        while index >= len(self.param_groups[position]["params"]):
            index -= len(self.param_groups[position]["params"])
            position += 1
        group = self.param_groups[position]
        places = self._place_index().get(group["params"][index])
        if places:
            return repr(places[0].path)
        given = group.get("param_names")
        return repr(given[index]) if given else f"number {index} of group {position}"

    def _entry(self, param: Tensor) -> Entry | None:
        self._sync()
        return self._table.of(param)

    def _has(self, entry: Entry) -> bool:
        """Whether a parameter that was found before is still in the optimizer."""
        self._sync()
        return self._table.of(entry.param) is entry

    def _find(self, key: Key) -> Entry:
        self._sync()
        return self._table.find(key)

    def _select(self, which: Which) -> list[Entry]:
        return list(dict.fromkeys(entry for key in keys_of(which) for entry in self._entries_for(key)))

    def _entries_for(self, key: Key | Several) -> list[Entry]:
        """The parameters of a selection, of a pattern over the optimizer's own names, or the one that is meant."""
        self._sync()
        if isinstance(key, nn.Module):
            key = self._selection_of(key)
        if isinstance(key, Selection):
            return [self._entry_of_selected(param, names) for param, names in key.resolve().items()]
        if isinstance(key, str) and not self._table.is_name(key):
            chosen = set(matching(key, self._table.ids()))
            if chosen:
                return list(selected_whole({entry: self._table.names(entry) for entry in self._table}, chosen))
            self._require_meant(key)
        return [self._table.find(key)]

    def _require_meant(self, text: str) -> None:
        """Refuse a pattern that no name matches, and that is no name which several share.

        Raises:
            UnknownParameterError: with the nearest names, of parameters and of what holds them.
        """
        names = self._table.ids()
        if names and text not in self._table.ambiguous:
            raise UnknownParameterError(f"no parameter is called {text!r}; {nearest(text, names)}")

    def _selection_of(self, module: nn.Module) -> Selection:
        """The parameters of a module: as a part of the model that it is in, where the optimizer knows that."""
        for model in self._slots.models:
            if any(module is part for part in model.modules()):
                return select(model, module)
        return select(module)

    def _entry_of_selected(self, param: Tensor, names: list[str]) -> Entry:
        entry = self._table.of(param)
        if entry is None:
            raise UnknownParameterError(
                f"parameter {names[0]!r} is selected, and it is in no group of this optimizer; add it with "
                "opt.add_param_group(...) or opt.rebind(model, group=...), or leave it out of the selection"
            )
        return entry
