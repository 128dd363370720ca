"""Going on in another layout of the same model: state moves into the parameters of a model that was made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paramstate import _core, table
from paramstate.declared.constraints import Constraint
from paramstate.errors import OverlapError, StateShapeError, UnsupportedError, listed
from paramstate.identity.membership import Which
from paramstate.identity.rebinding import Rebinding
from paramstate.identity.sharding import is_sharded
from paramstate.identity.table import Entry
from paramstate.identity.wrappers import Place, Tree
from paramstate.selection.selecting import Selection

from .carried_constraints import carried_constraint
from .carried_state import CarriedState
from .relayout import Use, require_each_once

if TYPE_CHECKING:
    from .relayout_routes import Origin, Route

_COLUMNS = ("new", "from", "by", "layout", "ID")


@dataclass(frozen=True, slots=True)
class Carried:
    """What became of one new parameter's state."""

    name: str
    """Its canonical name in the new model."""
    sources: tuple[str, ...]
    """The old parameters whose state it has."""
    layout: str
    """How elements moved; empty where they did not."""
    matched_by: str
    """``"map"``, ``"name"``, ``"content"`` or ``"structure"``."""
    keeps_id: bool
    """Whether it is one old parameter, with its ID. One of several parts has an ID of its own."""
    differs: bool
    """Its value is not what the old values give: possible only where a map was given."""


@dataclass(frozen=True, slots=True)
class RelayoutReport:
    """What ``relayout`` did, with canonical names. Prints as a table, by rich where that prints it.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> old, new = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
        >>> report = AdamW(old).relayout(new, {"weight": ("weight", lambda t: t.T)}, drop=["bias"])
        >>> report.dropped, report.unmanaged
        (['bias'], ['bias'])
    """

    carried: list[Carried] = field(default_factory=list)
    """New parameters with the state of old ones."""
    kept: list[str] = field(default_factory=list)
    """Parameters that are in the new model as they were: the same tensor object."""
    dropped: list[str] = field(default_factory=list)
    """Old ones that were to go."""
    unmanaged: list[str] = field(default_factory=list)
    """Trainable parameters of the new model that come from none, and are in no group."""
    adopted: list[str] = field(default_factory=list)
    """Those of them that ``group=`` took in, with fresh state."""

    @property
    def differing(self) -> list[str]:
        """New parameters whose value is not what the map gives of the old ones."""
        return [item.name for item in self.carried if item.differs]

    def of(self, name: str) -> Carried:
        """What became of the new parameter ``name``.

        Raises:
            KeyError: no state was carried to it.
        """
        found = [item for item in self.carried if item.name == name]
        if not found:
            raise KeyError(name)
        return found[0]

    def __str__(self) -> str:
        cells = self._cells()
        return "\n".join([*([table.plain(_COLUMNS, cells)] if cells else []), self._summary])

    def __rich__(self) -> Any:
        return table.rich("relayout", _COLUMNS, self._cells(), self._summary)

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                item.name,
                ", ".join(item.sources),
                item.matched_by,
                "; ".join(filter(None, (item.layout, "value differs" if item.differs else ""))),
                "kept" if item.keeps_id else "new",
            )
            for item in self.carried
        ]

    @property
    def _summary(self) -> str:
        counts = {
            "carried": len(self.carried),
            **{name: len(getattr(self, name)) for name in ("kept", "dropped", "unmanaged", "adopted")},
        }
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing to carry"


class Relayouting(Rebinding):
    """The part of an optimizer that follows a model into another layout."""

    def relayout(
        self,
        model: nn.Module | Selection,
        maps: Mapping[str, Origin] | None = None,
        *,
        drop: Which = (),
        group: int | str | Mapping[str, Any] | None = None,
        label: str | None = None,
    ) -> RelayoutReport:
        """Go on with a model that holds the same weights in another layout: moments move as the values did.

        A new parameter may be an old one laid out anew, a part of one (a fused projection that was split), or put
        together from several. State tensors, pending gradients, steps (of single rows too), bounds and frozen rows
        move with their elements; group, frozen or not, and constraint are those of the old parameters. Where one old
        parameter becomes one new one its ID stays; a part or a union gets an ID of its own, derived from its name. No
        value is written. All is done, or nothing where anything does not fit.

        Args:
            model: the new model, or a selection of it where not all of its parameters are meant.
            maps: new name to where it comes from: an old name; an old name, or several, with the function that makes
                the new tensor (or its part) from the old ones; or ``None``, from nowhere. What it does not mention is
                found as :func:`diff` finds it, by name and by content, and must be a pure re-layout.
            drop: old parameters that the new model does not have, to be dropped with their state.
            group: what adopts trainable parameters that come from nowhere, as in :meth:`rebind`. By default they are
                only reported.
            label: the name or number of the group whose parameters the model takes over; needed only where several
                models are trained and contents cannot tell.

        Returns:
            RelayoutReport: what went where.

        Raises:
            RelayoutError: what ``maps`` does not mention is no pure re-layout: values were processed, or an old
                parameter has no place. Its ``report`` says what was found. Nothing is changed.
            StateShapeError: a map drops, repeats or mixes elements or gives another shape; sources are in different
                groups; a tied parameter is untied. Nothing is changed.
            ConstraintError: a declared constraint cannot be said of the new layout. Nothing is changed.
            UnsupportedError: steps would differ along two dimensions, or a parameter is sharded. Nothing is changed.
            OverlapError: new parameters share memory. Nothing is changed.
            UnknownParameterError: ``maps``, ``drop`` or ``group`` names what is not there. Nothing is changed.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> fused = torch.nn.ModuleDict({"qkv": torch.nn.Linear(2, 6, bias=False)})
            >>> opt = AdamW(fused)
            >>> split = torch.nn.ModuleDict({head: torch.nn.Linear(2, 2, bias=False) for head in "qkv"})
            >>> for new, old in zip(split.parameters(), fused["qkv"].weight.chunk(3)):
            ...     _ = new.data.copy_(old)
            >>> print(opt.relayout(split))  # nothing more to say: found by content
            new       from        by       layout      ID
            --------  ----------  -------  ----------  ---
            q.weight  qkv.weight  content  part [0:2]  new
            k.weight  qkv.weight  content  part [2:4]  new
            v.weight  qkv.weight  content  part [4:6]  new
            3 carried
        """
        with self._lock:
            adopter = self._adopting_group(group)
            self._sync()
            pending = _Relayout(self, model, label)
            pending.plan(maps or {}, self._select(drop))
            pending.require_own_memory()
            pending.install()
            unmanaged = pending.unmanaged
            names = [places[0].path for places in unmanaged.values()]
            if group is not None and unmanaged:
                self._adopt(unmanaged, adopter, group)
            self._sync()
            self._slots.clean(self._table)
            self._watched = False
            return pending.report([] if group is not None else names, names if group is not None else [])


class _Relayout:
    """One re-layout: planned and checked without a change, then installed."""

    def __init__(self, optimizer: Relayouting, model: nn.Module | Selection, label: str | None) -> None:
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

    # ---- the plan ---------------------------------------------------------------------------------------------------

    def plan(self, maps: Mapping[str, Origin], drop: Sequence[Entry]) -> None:
        """Find what comes from where, and make what moves."""
        from .relayout_routes import Routes, require_pure

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
