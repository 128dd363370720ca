"""``diff``: read both sides, find partners, judge each pair, account for the rest."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from .fingerprint import element_hashes, fingerprint
from .folding import Folding
from .layout import Part, layouts
from .link import Link
from .matching import Mapped, NameMap, Partners, match
from .moves import find_move
from .outputs import compare_outputs
from .relation import CHANGED, Relation, compare, explain, magnitude
from .report import ALL_ZERO, ZERO_BEFORE, DiffReport, Row
from .sides import VALUE, Comparable, Roles, Side, read


def diff(a: Comparable, b: Comparable, map: NameMap | None = None, inputs: Any = None) -> DiffReport:
    """What became of each parameter of ``a`` in ``b``.

    Args:
        a: a model (wrapped or not), an optimizer (values and moments), a state dict of either, a mapping from name to
            tensor, or anything with a method ``tensors()`` that returns one. Nothing is changed or copied.
        b: what it is compared with, likewise.
        map: name in ``a`` to name, or several names, in ``b``; or to a pair of these and the function that makes the
            one value from the other (for several names it returns as many tensors); or a function from name to name,
            or to ``None``. What it does not mention is matched by name, and where names do not meet by content.
        inputs: what both models are called with (a tensor, a tuple of arguments, or a dict of keyword arguments), in
            evaluation mode and without gradients: their outputs are compared too.

    Returns:
        DiffReport: one row for each pair, and for each parameter without partner.

    Raises:
        TypeError: a side has no named tensors, or ``inputs`` are given and a side cannot be called.
        UnknownParameterError: ``map`` leads from or to an unknown name.

    Example:
        >>> import torch
        >>> old = {"weight": torch.tensor([[1.0, 2.0], [3.0, 5.0]]), "bias": torch.tensor([1.0, 2.0, 6.0])}
        >>> new = {"weight": old["weight"].T, "bias": old["bias"] - old["bias"].mean()}
        >>> report = diff(old, new)
        >>> [(row.a, row.kind) for row in report.rows]
        [('weight', 're-laid-out'), ('bias', 'centred')]
    """
    found = compared(read(a), read(b), map)
    return DiffReport(found.rows, [] if inputs is None else compare_outputs(a, b, inputs))


class Comparison(NamedTuple):
    """The rows of a report, and the links that they judge."""

    rows: list[Row]
    links: list[Link]


def compared(ours: Side, theirs: Side, map: NameMap | None = None) -> Comparison:
    """What became of each parameter of one side in the other; see :func:`diff`."""
    partners = match(ours, theirs, map)
    rows = [row for link in partners.links for row in _judge_link(link, ours, theirs)]
    rows += [row for mapped in partners.mapped for row in _judge_mapped(mapped, ours, theirs)]
    rows += _left_over(ours, theirs, partners)
    rows = Folding(ours, theirs, partners.links).annotate(_in_order(rows, ours, theirs))
    back = Folding(theirs, ours, [link.reversed for link in partners.links])
    rows = [row.mirrored for row in back.annotate([row.mirrored for row in rows])]
    return Comparison(rows, partners.links)


def _judge_link(link: Link, ours: Side, theirs: Side) -> Iterator[Row]:
    """The rows of a pair: its value first, then the state that both have, then what one side lacks."""
    one, other = ours[link.a], theirs[link.b]
    for role in dict.fromkeys((*one, *other)):
        if role not in other:
            yield _alone("missing", link.a, role, one[role])
        elif role not in one:
            yield _alone("new", link.b, role, other[role])
        else:
            yield _judge(_fitting(link, one[role], other[role]), role, one[role], other[role])


def _fitting(link: Link, x: Tensor, y: Tensor) -> Link:
    """The same link for state of another shape than the value: a step count is not laid out anew."""
    fits = _reaches(link.a_part, x) and _reaches(link.b_part, y)
    if fits and tuple(link.part(x).shape) == link.layout.source and tuple(link.target(y).shape) == link.layout.target:
        return link
    return Link(link.a, link.b, next(layouts(tuple(x.shape), tuple(y.shape)), link.layout), link.by)


def _reaches(part: Part | None, tensor: Tensor) -> bool:
    return part is None or (tensor.ndim > part.dim and tensor.shape[part.dim] == part.size)


def _judge(link: Link, role: str, x: Tensor, y: Tensor) -> Row:
    row = Row(
        a=link.a,
        b=link.b,
        kind="changed",
        role=role,
        matched_by=link.by,
        a_part="" if link.a_part is None else str(link.a_part),
        b_part="" if link.b_part is None else str(link.b_part),
        a_shape=tuple(x.shape),
        b_shape=tuple(y.shape),
        a_dtype=x.dtype,
        b_dtype=y.dtype,
    )
    if link.part(x).numel() != link.target(y).numel():
        return replace(row, max_abs=math.nan, note=f"shape {list(x.shape)} -> {list(y.shape)}")
    return _judge_laid_out(row, link, x, y)


def _judge_laid_out(row: Row, link: Link, x: Tensor, y: Tensor) -> Row:
    target = link.target(y)
    relation = compare(link.source(x), target)
    if relation is None:
        moved = _moved(row, link, x, target)
        if moved is not None:
            return moved
        link, relation = _related(link, x, target)
    source = link.source(x)
    largest, relative = magnitude(source, target)
    row = replace(row, layout="" if link.layout.is_identity else str(link.layout), max_abs=largest, relative=relative)
    if relation.kind == "changed":
        inverse = explain(target, source)
        if inverse is not None:
            return replace(_with(row, inverse), inverse=True)
        return replace(row, note=_zeroed(source, target))
    return _with(row, relation)


def _zeroed(source: Tensor, target: Tensor) -> str:
    if source.is_meta or target.is_meta:
        return ""
    return ALL_ZERO if not bool(target.any()) else ZERO_BEFORE if not bool(source.any()) else ""


def _moved(row: Row, link: Link, x: Tensor, target: Tensor) -> Row | None:
    """The row of a pair whose elements are the same and stand elsewhere than the names alone would tell."""
    part = link.part(x)
    if part.is_meta or target.is_meta or part.numel() != target.numel():
        return None
    prints = (fingerprint(element_hashes(tensor.to(target.device), target.dtype)) for tensor in (part, target))
    if next(prints) != next(prints):
        return None
    largest, relative = magnitude(link.source(x), target)
    row = replace(row, kind="re-laid-out", max_abs=largest, relative=relative)
    move = find_move(link, x, target)
    return None if move is None else replace(row, layout=str(move), order=move.order)


def _related(link: Link, x: Tensor, target: Tensor) -> tuple[Link, Relation]:
    """The layout in which the one was made from the other by centring or scaling."""
    part = link.part(x)
    for layout in (link.layout, *layouts(tuple(part.shape), tuple(target.shape))):
        relation = explain(layout.of(part), target)
        if relation is not None:
            return replace(link, layout=layout), relation
    return link, CHANGED


def _with(row: Row, relation: Relation) -> Row:
    kind = relation.kind
    if (kind == "equal" and row.layout) or (kind == "equal" and row.a_part + row.b_part):
        kind = "re-laid-out"
    return replace(
        row,
        kind=kind,
        exact=relation.exact,
        centred=relation.centred,
        scale=relation.scale,
        scale_dim=relation.scale_dim,
        scales=relation.scales,
    )


def _judge_mapped(mapped: Mapped, ours: Side, theirs: Side) -> Iterator[Row]:
    one, other = ours[mapped.a], theirs[mapped.b]
    for role in dict.fromkeys((*one, *other)):
        if role not in other:
            yield _alone("missing", mapped.a, role, one[role])
        elif role not in one:
            yield _alone("new", mapped.b, role, other[role])
        else:
            yield _judge_carried(mapped, role, one, other[role])


def _judge_carried(mapped: Mapped, role: str, one: Roles, y: Tensor) -> Row:
    """The row of a pair for which the caller gave the map; state that is not shaped like the value goes round it."""
    x = one[role]
    carried = mapped.of(x) if VALUE not in one or x.shape == one[VALUE].shape else x
    row = Row(
        a=mapped.a,
        b=mapped.b,
        kind="changed",
        role=role,
        matched_by="map",
        layout="by map",
        a_shape=tuple(x.shape),
        b_shape=tuple(y.shape),
        a_dtype=x.dtype,
        b_dtype=y.dtype,
    )
    if carried.shape != y.shape:
        given = f"the map gives shape {list(carried.shape)}, there is {list(y.shape)}"
        return replace(row, max_abs=math.nan, note=given)
    largest, relative = magnitude(carried, y)
    row = replace(row, max_abs=largest, relative=relative)
    relation = compare(carried, y) or explain(carried, y)
    return row if relation is None else _with(row, relation)


def _left_over(ours: Side, theirs: Side, partners: Partners) -> Iterator[Row]:
    """A row for each parameter without partner, and for each part of a fused one of which nothing was found."""
    paired_a, paired_b = partners.of_a(), partners.of_b()
    for name, roles in ours.items():
        if name not in paired_a:
            yield from (_alone("missing", name, role, tensor) for role, tensor in roles.items())
    for name, roles in theirs.items():
        if name not in paired_b:
            yield from (_alone("new", name, role, tensor) for role, tensor in roles.items())
    used = [(link.a, link.a_part) for link in partners.links]
    for name, part in _uncovered(used):
        yield replace(_alone("missing", name, VALUE, None, ours[name]), a_part=part)
    used = [(link.b, link.b_part) for link in partners.links]
    for name, part in _uncovered(used):
        yield replace(_alone("new", name, VALUE, None, theirs[name]), b_part=part)


def _uncovered(used: Iterable[tuple[str, Part | None]]) -> Iterator[tuple[str, str]]:
    """The slices of tensors that were used in part only, of which nobody used anything."""
    by_name: defaultdict[str, list[Part]] = defaultdict(list)
    whole = set()
    for name, part in used:
        if part is None:
            whole.add(name)
        else:
            by_name[name].append(part)
    for name, found in by_name.items():
        first = found[0]
        if name in whole or any((part.dim, part.blocks) != (first.dim, first.blocks) for part in found):
            continue
        end, block = 0, first.size // first.blocks
        for part in [*sorted(found, key=lambda part: part.start), replace(first, start=block, length=0)]:
            if part.start > end:
                yield name, str(replace(first, start=end, length=part.start - end))
            end = max(end, part.start + part.length)


def _alone(kind: Any, name: str, role: str, tensor: Tensor | None, roles: Mapping[str, Tensor] | None = None) -> Row:
    held = tensor if tensor is not None else next(iter((roles or {}).values()))
    shape = tuple(held.shape)
    note = "all zero" if tensor is not None and not held.is_meta and held.numel() and not bool(held.any()) else ""
    if kind == "missing":
        return Row(a=name, b=None, kind=kind, role=role, a_shape=shape, a_dtype=held.dtype, max_abs=math.nan, note=note)
    return Row(a=None, b=name, kind=kind, role=role, b_shape=shape, b_dtype=held.dtype, max_abs=math.nan, note=note)


def _in_order(rows: list[Row], ours: Side, theirs: Side) -> list[Row]:
    """As the parameters stand in the first side, then those that are new."""
    place_a, place_b = ({name: place for place, name in enumerate(side)} for side in (ours, theirs))
    return sorted(rows, key=lambda row: (place_a.get(row.a or "", len(place_a)), place_b.get(row.b or "", -1)))
