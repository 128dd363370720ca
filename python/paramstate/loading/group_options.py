"""Which options a group has after a load by name: those of the saved group that holds its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paramstate.errors import LoadError

from .matching import Ours
from .reading import Saved

_NO_OPTIONS = ("params", "param_names", "name")
"""Keys of a group that say which group it is, not how its parameters are stepped."""


def options_by_name(
    saved: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    pairs: Iterable[tuple[Saved, Ours]],
    *,
    strict: bool,
) -> list[dict[str, Any] | None]:
    """The options that our groups are to have: each those of the saved group that holds its parameters.

    ``None`` stands for a group that keeps its own: none of its parameters was saved, or, unless strict, they come from
    saved groups of different options. A group's ``name`` stays what it is.

    Args:
        saved: the groups of the state dict.
        groups: ours.
        pairs: saved parameters with ours, matched by name.
        strict: refuse a group whose parameters come from saved groups of different options.

    Raises:
        LoadError: strict, and the options of a group cannot be told.
    """
    holders = {ours.param: (there, ours) for there, ours in pairs}
    result: list[dict[str, Any] | None] = []
    for number, group in enumerate(groups):
        sources: dict[int, str] = {}
        for param in group["params"]:
            if param in holders:
                there, ours = holders[param]
                sources.setdefault(there.group, ours.label)
        if not group["params"] and number < len(saved) and not saved[number]["params"]:
            sources = {number: ""}  # no parameter can tell, and both are empty: then the place does, as in torch
        result.append(_options_from(saved, sources, number, group, strict))
    return result


def _options_from(
    saved: Sequence[Mapping[str, Any]], sources: Mapping[int, str], number: int, ours: Mapping[str, Any], strict: bool
) -> dict[str, Any] | None:
    """The options of one group, from the saved groups in ``sources``, each with one of the parameters it gives."""
    if not sources:
        return None
    (first, parameter), *others = sources.items()
    for other, another in others:
        key = _differing(saved[first], saved[other])
        if key is not None and strict:
            raise LoadError(
                f"group {number}: parameter {parameter!r} was saved in group {first} and {another!r} in group {other}, "
                f"which differ in {key!r}; build the optimizer with the saved groups, or give strict=False to keep "
                "this group's own options"
            )
        if key is not None:
            return None
    named = {} if others or "name" not in saved[first] else {"name": saved[first]["name"]}
    named.update({"name": ours["name"]} if "name" in ours else {})
    return {**{key: value for key, value in saved[first].items() if key not in _NO_OPTIONS}, **named}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first option in which two groups differ."""
    options = [key for key in dict.fromkeys([*one, *other]) if key not in _NO_OPTIONS]
    return next((key for key in options if not (key in one and key in other and _equal(one[key], other[key]))), None)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype
        return both and torch.equal(a.detach().cpu(), b.detach().cpu())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
