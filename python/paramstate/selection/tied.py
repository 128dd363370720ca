"""Tied parameters: one object under several names is selected whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from paramstate.errors import SelectionError

T = TypeVar("T")


def selected_whole(parameters: dict[T, list[str]], chosen: set[str]) -> dict[T, list[str]]:
    """Those of ``parameters``, each with all of its names, that have a name among the chosen ones.

    Raises:
        SelectionError: another of its names is not chosen.
    """
    found = {}
    for param, names in parameters.items():
        inside, outside = _split(names, chosen)
        if inside and outside:
            raise SelectionError(
                f"parameter {inside[0]!r} is tied to {outside[0]!r}, which is not selected; name {outside[0]!r} as "
                "well to select the parameter (a full name stands for all of its names), or subtract it to leave it out"
            )
        if inside:
            found[param] = names
    return found


def _split(names: Iterable[str], chosen: set[str]) -> tuple[list[str], list[str]]:
    inside: list[str] = []
    outside: list[str] = []
    for name in names:
        (inside if name in chosen else outside).append(name)
    return inside, outside
