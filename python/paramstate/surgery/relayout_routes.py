"""Which new parameter comes from which old ones: as the user says, else as the contents of both models tell."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from paramstate.comparison.compare import compared
from paramstate.comparison.fingerprint import element_hashes, fingerprint
from paramstate.comparison.layout import Part
from paramstate.comparison.link import Link, MatchedBy
from paramstate.comparison.moves import Move, find_move
from paramstate.comparison.relation import compare
from paramstate.comparison.report import DiffReport, Row
from paramstate.comparison.sides import VALUE
from paramstate.errors import RelayoutError, StateShapeError, UnknownParameterError, listed
from paramstate.identity.membership import Key, Membership
from paramstate.identity.table import Entry
from paramstate.identity.wrappers import Place

from .relayout import Sources, TensorMap, require_shape, sources_of

Origin = Key | tuple[Key | Sequence[Key], TensorMap] | None
"""Where a new parameter comes from: an old one, one or several with the map from them, or from none."""

_PURE = ("equal", "re-laid-out")
_SHOWN = 6


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """How one new parameter is made from old ones."""

    name: str
    param: Tensor
    places: list[Place]
    entries: list[Entry]
    sources: Sources
    layout: str
    matched_by: MatchedBy
    differs: bool = False
    """Its value is not what the old values give."""


class Routes:
    """The routes into a model.

    Args:
        optimizer: whose parameters the old ones are.
        places: the parameters of the new model, with their slots.
        leaving: the old parameters that are not in the new model.
    """

    def __init__(self, optimizer: Membership, places: Mapping[Tensor, list[Place]], leaving: Iterable[Entry]) -> None:
        self._optimizer = optimizer
        self._places = places
        self._leaving = list(leaving)
        self._by_path = {place.path: param for param, own in places.items() for place in own}
        self.routes: list[Route] = []
        self.fresh: set[Tensor] = set()
        """New parameters of which the user says that they come from none."""

    # ---- what the user says -----------------------------------------------------------------------------------------

    def take(self, maps: Mapping[str, Origin]) -> None:
        """Follow what the user says.

        Raises:
            UnknownParameterError: a name is on neither side.
            ValueError: a parameter is in both models, or is told twice.
            StateShapeError: a map mixes elements, or does not give the shape of the new parameter.
        """
        told: dict[Tensor, str] = {}
        for name, origin in maps.items():
            param = self._target(name)
            first = told.setdefault(param, name)
            if first != name:
                raise ValueError(f"maps: {first!r} and {name!r} are one parameter of the new model; name it once")
            if origin is None:
                self.fresh.add(param)
            else:
                self.routes.append(self._told(name, param, origin))

    def _target(self, name: str) -> Tensor:
        param = self._by_path.get(name)
        if param is None:
            near = difflib.get_close_matches(name, self._by_path, n=3) or [*self._by_path][:3]
            raise UnknownParameterError(
                f"maps: the new model has no parameter {name!r}; the nearest names there are {listed(near)}"
            )
        if self._optimizer._table.of(param) is not None:
            raise ValueError(
                f"maps: parameter {name!r} of the new model is trained already, and keeps its state; leave it out"
            )
        return param

    def _told(self, name: str, param: Tensor, origin: Origin) -> Route:
        keys, carry = origin if isinstance(origin, tuple) else (origin, _as_it_is)
        assert keys is not None
        entries = [self._source(key) for key in ([keys] if isinstance(keys, (str, Tensor)) else keys)]
        called = f"parameter {name!r} from {self._named(entries)}"
        sources = sources_of(carry, [entry.param.shape for entry in entries], called, _device(entries[0].param))
        require_shape(sources, param.shape, called)
        layout = "" if sources.is_identity else "by map"
        differs = not _gives(sources, [entry.param for entry in entries], param)
        return Route(name, param, self._places[param], entries, sources, layout, "map", differs)

    def _source(self, key: Key) -> Entry:
        entry = self._optimizer._table.find(key)
        if entry.param in self._places:
            raise ValueError(
                f"maps: parameter {self._optimizer._table.name(entry)!r} is in the new model itself, where it keeps "
                "its state; leave it out of maps, or give a selection of the new model without it"
            )
        return entry

    def _named(self, entries: Sequence[Entry]) -> str:
        return " and ".join(repr(self._optimizer._table.name(entry)) for entry in entries)

    # ---- what the contents tell -------------------------------------------------------------------------------------

    def derive(self) -> list[Row]:
        """Find the routes that the user does not say, by name and by content.

        Returns:
            list: the rows of the comparison that are no pure re-layout, of which :meth:`require_pure` makes an error.
        """
        told = {route.param for route in self.routes} | self.fresh
        used = {entry for route in self.routes for entry in route.entries}
        targets = [p for p in self._places if p not in told and self._optimizer._table.of(p) is None]
        ours = self._names_of([entry for entry in self._leaving if entry not in used])
        theirs = {place.path: param for param in targets for place in self._places[param]}
        rows, links = compared(
            {name: {VALUE: entry.param.detach()} for name, entry in ours.items()},
            {name: {VALUE: param.detach()} for name, param in theirs.items()},
        )
        by_key = {link.key: link for link in links}
        impure = [row for row in rows if row.kind not in _PURE and (row.a or row.b_part or row.folded)]
        pieces: defaultdict[Tensor, list[_Piece]] = defaultdict(list)
        for row in rows:
            if row.kind in _PURE and row.a is not None and row.b is not None:
                link, param = by_key[row.a, row.a_part, row.b, row.b_part], theirs[row.b]
                move = find_move(link, ours[row.a].param.detach(), link.target(param.detach()))
                assert move is not None
                pieces[param].append(_Piece(ours[row.a], row, link, move))
        spoilt = {theirs[row.b] for row in impure if row.b is not None}
        for param, found in pieces.items():
            if param not in spoilt:
                self.routes.append(self._derived(param, found))
        # A tied parameter may have found its place under another of its names.
        placed = {entry for route in self.routes for entry in route.entries}
        return [row for row in impure if row.kind != "missing" or row.a_part or ours[row.a or ""] not in placed]

    def _names_of(self, entries: Iterable[Entry]) -> dict[str, Entry]:
        """Every name of the parameters, without the group that qualifies it where that leaves them apart."""
        named: dict[str, Entry] = {}
        for entry in entries:
            names = self._optimizer._table.names(entry) or [self._optimizer._table.name(entry)]
            for name in names:
                bare = name.removeprefix(f"{entry.label}:")
                named[name if bare in named else bare] = entry
        return named

    def _derived(self, param: Tensor, pieces: list[_Piece]) -> Route:
        name = self._places[param][0].path
        # A parameter that is tied on both sides is found under each of its names.
        pieces = [piece for piece in pieces if piece.row.b == pieces[0].row.b]
        called = f"parameter {name!r} from {self._named([piece.entry for piece in pieces])}"
        self._require_told(pieces, called)
        shapes = [piece.entry.param.shape for piece in pieces]
        sources = sources_of(lambda *given: _assembled(pieces, given, param.shape), shapes, called)
        layout = "; ".join(filter(None, (piece.layout for piece in pieces)))
        entries = [piece.entry for piece in pieces]
        return Route(name, param, self._places[param], entries, sources, layout, pieces[0].link.by)

    def _require_told(self, pieces: list[_Piece], called: str) -> None:
        """Refuse a guess: content decides nothing where it is constant, nor where two hold the same."""
        for piece in pieces:
            rivals = self._rivals(piece)
            if rivals:
                raise StateShapeError(
                    f"{called}: {self._named(rivals)} holds the same values and another state, so content does not "
                    "tell which of them it is; say it in maps"
                )

    def _rivals(self, piece: _Piece) -> list[Entry]:
        if piece.link.by not in {"content", "structure"}:
            return []
        alike = next((entries for entries in self._alike if piece.entry in entries), [])
        return [entry for entry in alike if entry is not piece.entry and not self._same_state(entry, piece.entry)]

    @cached_property
    def _alike(self) -> list[list[Entry]]:
        """The old parameters that hold the same elements as another."""
        by_print: defaultdict[tuple[int, torch.dtype, int], list[Entry]] = defaultdict(list)
        for entry in self._leaving:
            if not entry.param.is_meta:
                by_print[_print(entry.param)].append(entry)
        return [entries for entries in by_print.values() if len(entries) > 1]

    def _same_state(self, one: Entry, other: Entry) -> bool:
        held, also = (self._optimizer.state.get(entry.param) or {} for entry in (one, other))
        if held.keys() != also.keys():
            return False
        pairs = [(torch.as_tensor(held[key]), torch.as_tensor(also[key])) for key in held]
        return all(a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten().to(a.device)) for a, b in pairs)


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A part of an old parameter that is found in a new one, or in a part of it."""

    entry: Entry
    row: Row
    link: Link
    move: Move

    @property
    def layout(self) -> str:
        """How it got there, in words."""
        part = f"part {self.row.a_part}" if self.row.a_part else ""
        place = f"as part {self.row.b_part}" if self.row.b_part else ""
        moved = "" if self.move.layout.is_identity and self.move.order is None else str(self.move)
        return ", ".join(filter(None, (part, moved, place)))


def _assembled(pieces: list[_Piece], given: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """A new parameter's tensor from those of its pieces."""
    parts = [(piece.link.b_part, piece.move.of(piece.link.part(t))) for piece, t in zip(pieces, given, strict=True)]
    whole = next((tensor for part, tensor in parts if part is None), None)
    if whole is not None:
        return whole
    made = torch.full(shape, torch.nan, dtype=given[0].dtype, device=given[0].device)
    for part, tensor in parts:
        assert isinstance(part, Part)
        part.put(made, tensor)
    return made


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _device(param: Tensor) -> torch.device | None:
    return None if param.is_meta else param.device


def _gives(sources: Sources, values: Sequence[Tensor], param: Tensor) -> bool:
    """Whether the old values, moved, are the new one."""
    if param.is_meta or any(value.is_meta for value in values):
        return True
    return compare(sources.of(values), param.detach()) is not None


def _print(param: Tensor) -> tuple[int, torch.dtype, int]:
    """What tensors that hold the same elements have in common."""
    return param.numel(), param.dtype, fingerprint(element_hashes(param.detach(), param.dtype))


def described(row: Row) -> str:
    """One row of a comparison in a message."""
    made = f"parameter {row.label(row.a, row.a_part)!r}" if row.a is not None else f"new {row.b!r}"
    to = "" if row.a is None or row.b is None else f" -> {row.label(row.b, row.b_part)!r}"
    said = ", ".join(filter(None, (row.kind, row.details)))
    return f"{made}{to}: {said}"


def require_pure(rows: Sequence[Row]) -> None:
    """Refuse what no re-layout explains.

    Raises:
        RelayoutError: there is something; the message says what was found of each parameter.
    """
    if rows:
        report = DiffReport(list(rows))
        shown = "\n  ".join(described(row) for row in rows[:_SHOWN])
        more = f"\n  and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        raise RelayoutError(
            "the new model is no pure re-layout of the old one, so moments cannot follow; say in maps where a new "
            "parameter comes from (None: from nowhere), in drop what is to go, or start afresh "
            f"({report.summary}; the error's report has all):\n  {shown}{more}",
            report,
        )
