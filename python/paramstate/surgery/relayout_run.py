"""One re-layout of an optimizer: planned and checked without a change, then put in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from paramstate import _core
from paramstate.declared.constraints import Constraint
from paramstate.editing.session import sessions_on
from paramstate.errors import EditError, OverlapError, StateShapeError, UnsupportedError, listed
from paramstate.identity.rebinding import Rebinding
from paramstate.identity.sharding import is_sharded
from paramstate.identity.table import Entry
from paramstate.identity.wrappers import Place, Tree
from paramstate.selection.selecting import Selection

from .carried_constraints import carried_constraint
from .carried_state import CarriedState
from .relayout import Use, require_each_once
from .relayout_report import Carried, RelayoutReport
from .relayout_routes import Origin, Route, Routes, require_pure


class RelayoutRun:
    """One re-layout: planned and checked without a change, then installed."""

    def __init__(self, optimizer: Rebinding, model: nn.Module | Selection, label: str | None) -> None:
        self._optimizer = optimizer
        self._model = model.model if isinstance(model, Selection) else model
        walk = Tree(self._model)
        chosen = model.resolve(walk) if isinstance(model, Selection) else None
        self._places: dict[Tensor, list[Place]] = {}
        for place in walk.places:
            if chosen is None or place.param in chosen:
                self._places.setdefault(place.param, []).append(place)
        entries = list(optimizer._table)
        self._kept = [entry for entry in entries if entry.param in self._places]
        self._leaving = [e for e in entries if e.param not in self._places and label in {None, e.label}]
        self._label = label
        self._routes: list[Route] = []
        self._dropped: list[Entry] = []
        self._carried: dict[Tensor, CarriedState] = {}
        self._constraints: dict[Tensor, Constraint | None] = {}
        self._rows: list[Carried] = []
        self._names_dropped: list[str] = []

    def require_no_session(self) -> None:
        """Refuse while a session would bring back a value in its old layout."""
        for entry in self._leaving:
            if any(owner is self._optimizer for owner, _ in sessions_on(entry.param)):
                raise EditError(
                    f"{self._optimizer._table.called(entry)} is in an open edit, which would bring back its value in "
                    "the old layout; close the edit before relayout(...)"
                )

    # ---- the plan ---------------------------------------------------------------------------------------------------

    def plan(self, maps: Mapping[str, Origin], drop: Sequence[Entry]) -> None:
        """Find what comes from where, and make what moves."""
        routes = Routes(self._optimizer, self._places, [entry for entry in self._leaving if entry not in drop])
        routes.take(maps)
        self._dropped = self._droppable(drop, routes.routes)
        impure = routes.derive()
        order = {param: number for number, param in enumerate(self._places)}
        self._routes = sorted(routes.routes, key=lambda route: order[route.param])
        self._leave_other_models_alone()
        names = {name for entry in self._leaving for name in self._names(entry)}
        require_pure([row for row in impure if row.a is None or row.a in names])
        self._require_every_element()
        for route in self._routes:
            self._prepare(route)

    def _droppable(self, drop: Sequence[Entry], routes: Sequence[Route]) -> list[Entry]:
        for entry in drop:
            called = f"drop: parameter {self._optimizer._table.name(entry)!r}"
            if entry not in self._leaving:
                raise ValueError(f"{called} is in the new model, or in another that stays as it is")
            users = [route.name for route in routes if entry in route.entries]
            if users:
                raise ValueError(f"{called} is what {listed(users)} comes from")
        return list(drop)

    def _names(self, entry: Entry) -> list[str]:
        table = self._optimizer._table
        names = table.names(entry) or [table.name(entry)]
        return [*names, *(name.removeprefix(f"{entry.label}:") for name in names)]

    def _leave_other_models_alone(self) -> None:
        """What belongs to a model of which nothing went over is none of this re-layout's business."""
        if self._label is not None:
            return
        gone = {entry.param for route in self._routes for entry in route.entries} | {e.param for e in self._dropped}
        gone |= {entry.param for entry in self._kept}
        for known in self._optimizer._slots.models:
            params = {place.param for place in Tree(known).places}
            if known is not self._model and not params & gone and gone:
                self._leaving = [entry for entry in self._leaving if entry.param not in params]

    def _require_every_element(self) -> None:
        """All parts together use each element of an old parameter once."""
        for entry in self._leaving:
            called = f"parameter {self._optimizer._table.name(entry)!r}"
            uses = [
                Use(route.name, route.sources, position)
                for route in self._routes
                for position, source in enumerate(route.entries)
                if source is entry
            ]
            if uses:
                self._require_untied_by_hand(entry, uses, called)
                require_each_once(called, entry.param.shape, uses)
            elif entry not in self._dropped:
                raise StateShapeError(f"{called} goes nowhere in the new model; name it in drop= if it is to go")

    def _require_untied_by_hand(self, entry: Entry, uses: list[Use], called: str) -> None:
        """Refuse to share out the moments of a tied parameter, which are those of the sum of its gradients."""
        whole = [use.name for use in uses if use.sources.index.numel() == entry.param.numel()]
        names = self._optimizer._table.names(entry)
        if len(whole) > 1 and len(names) > 1:
            raise StateShapeError(
                f"{called} is tied to {listed(names[1:])}, and the new model unties it into {listed(whole)}: its "
                f"moments can go to one of them; maps={{{whole[-1]!r}: None}} starts that one afresh"
            )

    def _prepare(self, route: Route) -> None:
        """Make the state of a new parameter."""
        optimizer, entries = self._optimizer, route.entries
        called = f"parameter {route.name!r}"
        if is_sharded(route.param) or any(is_sharded(entry.param) for entry in entries):
            raise UnsupportedError(f"{called} is sharded, or comes from one that is; change the layout before sharding")
        old = [optimizer._table.name(entry) for entry in entries]
        groups = [self._groups_of(entry) for entry in entries]
        if any(group != groups[0] for group in groups):
            raise StateShapeError(f"{called} comes from {' and '.join(map(repr, old))}, which are in different groups")
        if len({(entry.frozen, entry.trained) for entry in entries}) > 1:
            raise StateShapeError(
                f"{called} comes from {' and '.join(map(repr, old))}, of which some are frozen; freeze or unfreeze all"
            )
        constraint = carried_constraint([entry.constraint for entry in entries], route.sources, called)
        if constraint is not None:
            constraint.require_fits(route.param, called)
        self._constraints[route.param] = constraint
        self._carried[route.param] = CarriedState(optimizer, entries, route.sources, route.sources.of, called)
        self._rows.append(
            Carried(route.name, tuple(old), route.layout, route.matched_by, self._is_whole(route), route.differs)
        )

    def _groups_of(self, entry: Entry) -> set[int]:
        groups = self._optimizer.param_groups
        return {n for n, group in enumerate(groups) if any(param is entry.param for param in group["params"])}

    def _is_whole(self, route: Route) -> bool:
        """Whether it is one old parameter, all of it."""
        return len(route.entries) == 1 and route.sources.index.numel() == route.entries[0].param.numel()

    @property
    def unmanaged(self) -> dict[Tensor, list[Place]]:
        """Trainable parameters of the new model that come from none."""
        carried = {route.param for route in self._routes}
        return {
            param: places
            for param, places in self._places.items()
            if param.requires_grad and param not in carried and self._optimizer._table.of(param) is None
        }

    def require_own_memory(self) -> None:
        """Refuse memory that would be updated twice, or beside a parameter that is in no group and shares it.

        Raises:
            OverlapError: two of the new parameters share some; the message names both.
        """
        trained = [route.param for route in self._routes] + [entry.param for entry in self._kept]
        every = [param for param in {**dict.fromkeys(trained), **self.unmanaged} if _has_memory(param)]
        for one, other in _core.overlapping(every):
            names = [self._places[every[number]][0].path for number in (one, other)]
            raise OverlapError(
                f"parameters {names[0]!r} and {names[1]!r} of the new model share memory, so each would be updated "
                "twice; give a selection of the model without one of them: select(model) - select(model, ...)"
            )

    # ---- the change -------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put everything in place. Nothing here depends on what the user gave: that was checked."""
        optimizer = self._optimizer
        self._names_dropped = [optimizer._table.name(entry) for entry in self._dropped]
        whole = [route for route in self._routes if self._is_whole(route)]
        stay = {route.entries[0] for route in whole}
        consumed = [entry for entry in self._consumed() if entry not in stay]
        made = [(route, route.entries[0]) for route in self._routes if route not in whole]
        self._selections_end()
        self._regroup()
        optimizer._forget_models_of([*self._kept, *self._leaving], self._model)
        for entry in [*consumed, *self._dropped]:
            optimizer.state.pop(entry.param, None)
            optimizer._forget(entry)
        for route in whole:
            optimizer._exchange(route.entries[0], route.param)
        present = [(route.entries[0], route.places) for route in whole]
        optimizer._resettle([*present, *((entry, self._places[entry.param]) for entry in self._kept)])
        for route, source in made:
            entry = optimizer._table.add(route.param, [place.path for place in route.places], source.label)
            optimizer._slots.settle(entry, route.places)
            self._settle(route, entry, source)
        for route in whole:
            self._settle(route, route.entries[0], route.entries[0])
        optimizer._sync()

    def _consumed(self) -> list[Entry]:
        return list(dict.fromkeys(entry for route in self._routes for entry in route.entries))

    def _settle(self, route: Route, entry: Entry, source: Entry) -> None:
        """State and all that is declared."""
        optimizer, carried = self._optimizer, self._carried[route.param]
        entry.state_dtype = source.state_dtype
        carried.place(route.param)
        entry.rows, entry.constraint = carried.rows, self._constraints[route.param]
        entry.frozen, entry.trained = source.frozen, source.trained
        if entry.frozen and entry.trained is not None:
            route.param.requires_grad_(False)
        optimizer._traits_changed(entry)
        if optimizer.state.get(route.param):
            optimizer._note_version(route.param)

    def _regroup(self) -> None:
        """The new parameters stand where the first that they come from stood."""
        places: dict[Tensor, list[Route]] = {}
        for route in self._routes:
            places.setdefault(route.entries[0].param, []).append(route)
        gone = {entry.param for entry in (*self._consumed(), *self._dropped)}
        for group in self._optimizer.param_groups:
            names = group.get("param_names", [""] * len(group["params"]))
            pairs = [
                pair
                for name, param in zip(names, group["params"], strict=True)
                for pair in (
                    [(route.name, route.param) for route in places.get(param, [])] if param in gone else [(name, param)]
                )
            ]
            group["params"] = [param for _, param in pairs]
            if "param_names" in group:
                group["param_names"] = [name for name, _ in pairs]

    def _selections_end(self) -> None:
        """A group that was given as a selection of the old model is from now on what it holds."""
        optimizer = self._optimizer
        moved = {number for entry in (*self._consumed(), *self._dropped) for number in self._groups_of(entry)}
        optimizer._selected = [selected for selected in optimizer._selected if selected.position not in moved]

    def report(self, unmanaged: list[str], adopted: list[str]) -> RelayoutReport:
        """What was done."""
        kept = [self._optimizer._table.name(entry) for entry in self._kept]
        return RelayoutReport(self._rows, kept, self._names_dropped, unmanaged, adopted)


def _has_memory(param: Tensor) -> bool:
    return param.layout is torch.strided and not param.is_meta
