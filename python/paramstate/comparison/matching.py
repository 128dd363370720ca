"""Who is whose partner: by ``map=`` first, by name then, by content where names do not meet."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from paramstate.errors import UnknownParameterError, listed

from .content import match_by_content
from .layout import identity, layouts
from .link import Link
from .sides import VALUE, Side

Names = str | list[str]
Transform = Callable[[Tensor], Tensor | Sequence[Tensor]]
NameMap = Mapping[str, Names | tuple[Names, Transform]] | Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Mapped:
    """A partner that the caller named together with the map that carries the values there."""

    a: str
    b: str
    transform: Transform
    index: int | None
    """Which of the tensors that the map gives; ``None`` where it gives one."""

    def of(self, tensor: Tensor) -> Tensor:
        """The value as it should be on the other side."""
        made = self.transform(tensor)
        if isinstance(made, Tensor):
            return made
        return made[self.index or 0]


@dataclass(slots=True)
class Partners:
    """What belongs together, and what is left on either side."""

    links: list[Link] = field(default_factory=list)
    mapped: list[Mapped] = field(default_factory=list)

    def of_a(self) -> set[str]:
        """The names on the one side that have a partner."""
        return {link.a for link in self.links} | {link.a for link in self.mapped}

    def of_b(self) -> set[str]:
        """The names on the other side that have a partner."""
        return {link.b for link in self.links} | {link.b for link in self.mapped}


def match(a: Side, b: Side, name_map: NameMap | None) -> Partners:
    """Find the partners.

    Raises:
        UnknownParameterError: ``name_map`` leads from or to a name that is on neither side.
    """
    partners = Partners()
    if name_map is not None:
        _by_map(a, b, name_map, partners)
    taken_a, taken_b = partners.of_a(), partners.of_b()
    for name in a:
        if name in b and name not in taken_a and name not in taken_b:
            partners.links.append(_link(a, b, name, name, "name"))
    taken_a, taken_b = partners.of_a(), partners.of_b()
    left_a = {name: primary(a[name]) for name in a if name not in taken_a}
    left_b = {name: primary(b[name]) for name in b if name not in taken_b}
    if left_a and left_b:
        partners.links += match_by_content(left_a, left_b, list(partners.links))
    return partners


def primary(roles: Mapping[str, Tensor]) -> Tensor:
    """The tensor by which a parameter is recognised: its value, else the largest of its state."""
    return roles[VALUE] if VALUE in roles else max(roles.values(), key=Tensor.numel)


def _link(a: Side, b: Side, one: str, other: str, by: Any) -> Link:
    source, target = tuple(primary(a[one]).shape), tuple(primary(b[other]).shape)
    return Link(one, other, next(layouts(source, target), identity(source)), by)


def _by_map(a: Side, b: Side, name_map: NameMap, partners: Partners) -> None:
    if not isinstance(name_map, Mapping):
        called = {name: name_map(name) for name in a}
        name_map = {name: to for name, to in called.items() if to is not None}
    for name, target in name_map.items():
        _known(name, a, "first")
        names, transform = target if isinstance(target, tuple) else (target, None)
        for index, to in enumerate([names] if isinstance(names, str) else names):
            _known(to, b, "second")
            if transform is None:
                partners.links.append(_link(a, b, name, to, "map"))
            else:
                partners.mapped.append(Mapped(name, to, transform, None if isinstance(names, str) else index))


def _known(name: str, side: Side, which: str) -> str:
    if name not in side:
        near = difflib.get_close_matches(name, side, n=3) or [*side][:3]
        raise UnknownParameterError(
            f"map= names {name!r}, which the {which} side does not have; the nearest names there are {listed(near)}"
        )
    return name
