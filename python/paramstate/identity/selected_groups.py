"""Groups that were given as selections: what ``rebind`` adds to them, and what of them a pickle carries."""

from __future__ import annotations

import pickle
from collections.abc import Container, Iterable
from typing import Any

from torch import Tensor, nn

from paramstate.errors import SelectionError

from .membership import Membership
from .table import Entry
from .tables import SelectedGroup
from .wrappers import Place, Tree

Claims = list[tuple[dict[str, Any], dict[Tensor, list[Place]]]]
"""For each group that gets parameters, these with their slots."""


def claims_on(optimizer: Membership, model: nn.Module, tree: Tree, mine: Iterable[Entry]) -> Claims:
    """The new parameters of a model that belong to the selections of an optimizer's groups.

    Args:
        optimizer: the optimizer, not matched with the model yet.
        model: the model.
        tree: the walk over it.
        mine: the parameters that are matched with the model. A group that has none of them belongs to another model.

    Raises:
        SelectionError: two groups claim the same parameter.
    """
    if not optimizer._selected:
        return []
    return _Claiming(optimizer, tree, set(mine)).claims(model)


class _Claiming:
    """One resolution of all selections, against one model."""

    def __init__(self, optimizer: Membership, tree: Tree, mine: set[Entry]) -> None:
        self._optimizer = optimizer
        self._tree = tree
        self._mine = mine
        self._places: dict[Tensor, list[Place]] = {}
        for place in tree.places:
            self._places.setdefault(place.param, []).append(place)
        self._paths = {place.path for place in tree.places}
        missing = (entry for entry in mine if entry.param not in self._places)
        self._awaited = {name for entry in missing for name in _bare_names(optimizer, entry)}

    def claims(self, model: nn.Module) -> Claims:
        found: Claims = []
        claimed: dict[Tensor, int] = {}
        for selected in self._optimizer._selected:
            resolved = selected.expression.resolve_what_is_there(model, self._tree)
            position = self._position(selected, resolved)
            new = [] if position is None else [param for param in resolved if self._is_new(param)]
            for param in new:
                first = claimed.setdefault(param, position or 0)
                if first != position:
                    raise SelectionError(
                        f"parameter {self._places[param][0].path!r} is new, and the selections of groups {first} and "
                        f"{position} both claim it; build the optimizer with selections that do not overlap"
                    )
            if position is not None and new:
                found.append((self._optimizer.param_groups[position], {param: self._places[param] for param in new}))
        return found

    def _is_new(self, param: Tensor) -> bool:
        """Whether it is not tracked, and no tracked parameter will be followed to it by name."""
        awaited = any(place.path in self._awaited for place in self._places[param])
        return self._optimizer._table.of(param) is None and not awaited

    def _position(self, selected: SelectedGroup, resolved: dict[Tensor, list[str]]) -> int | None:
        """The group now: clients move groups, so the one that holds most of what is selected."""
        groups = self._optimizer.param_groups
        names = {name for own in resolved.values() for name in own}
        shares = [self._share(group, resolved, names) for group in groups]
        best = max(range(len(groups)), key=lambda number: (shares[number], number == selected.position), default=None)
        if best is None or not self._decides(groups[best]):
            return None
        if not shares[best] and (best != selected.position or self._share(groups[best], self._places, self._paths)):
            return None  # the model has what this group holds, and none of it is selected: it is another's
        return best

    def _share(self, group: dict[str, Any], resolved: Container[Tensor], names: set[str]) -> int:
        """How many parameters of the group are among these, by object or by name."""
        entries = (self._optimizer._table.of(param) for param in group["params"])
        return sum(
            entry.param in resolved or not names.isdisjoint(_bare_names(self._optimizer, entry))
            for entry in entries
            if entry is not None
        )

    def _decides(self, group: dict[str, Any]) -> bool:
        """Whether the group is not another model's."""
        return not group["params"] or any(self._optimizer._table.of(param) in self._mine for param in group["params"])


def _bare_names(optimizer: Membership, entry: Entry) -> list[str]:
    """The names of a parameter without the group that qualifies them."""
    return [name.removeprefix(f"{entry.label}:") for name in optimizer._table.names(entry)]


def portable(optimizer: Membership) -> list[SelectedGroup]:
    """The selections of an optimizer's groups in a form that pickles.

    A predicate or a type that cannot be pickled gives way to the names that its group has now.
    """
    if not optimizer._selected:
        return []
    from paramstate.selection.expressions import Called

    carried = []
    for selected in optimizer._selected:
        if _pickles(selected):
            carried.append(selected)
        elif selected.position < len(optimizer.param_groups):
            entries = map(optimizer._table.find, optimizer.param_groups[selected.position]["params"])
            names = tuple(tuple(_bare_names(optimizer, entry)) for entry in entries)
            carried.append(SelectedGroup(Called(tuple(own for own in names if own)), selected.position))
    return carried


def _pickles(selected: SelectedGroup) -> bool:
    try:
        pickle.dumps(selected)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True
