"""Which saved parameter belongs to which of ours: by name where both sides have names, by position otherwise.

Nothing is changed here: a state dict is read, matched, and checked.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import LoadError, listed

SIZES = "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
_NO_OPTIONS = ("params", "param_names", "name")
"""Keys of a group that say which group it is, not how its parameters are stepped."""


@dataclass(slots=True)
class LoadReport:
    """What a load did; the lists hold canonical names, or positions where there are no names."""

    matched_by: Literal["name", "position"]
    loaded: list[str] = field(default_factory=list)
    """Ours that took over saved state."""
    missing: list[str] = field(default_factory=list)
    """Ours that the saved side does not have."""
    unexpected: list[str] = field(default_factory=list)
    """Saved ones that we do not have."""
    reshaped: list[str] = field(default_factory=list)
    """Matched, but with state of another shape: refused."""
    retyped: list[str] = field(default_factory=list)
    """Matched, with moments of another dtype than the value: they keep theirs."""


@dataclass(slots=True)
class Saved:
    """One parameter of a state dict."""

    key: Any
    names: list[str]
    id: int | None
    state: dict[str, Any] | None
    group: int
    """The number of its group."""

    @property
    def label(self) -> str:
        """How a report calls it."""
        return self.names[0] if self.names else f"position {self.key}"


@dataclass(slots=True)
class Ours:
    """One parameter of the optimizer."""

    param: Tensor
    names: list[str]
    label: str
    group: int
    """The number of its group."""


class GivenNames:
    """What the groups' ``param_names`` call each parameter.

    A name that several parameters share says nothing by itself: it counts only with the group's ``name`` or number in
    front, written as the identity table writes it.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]]) -> None:
        self._given: dict[Any, str] = {}
        labels: dict[Any, str] = {}
        for number, group in enumerate(groups):
            names = group.get("param_names")
            if names is not None and len(names) == len(group["params"]):
                for key, name in zip(group["params"], names, strict=True):
                    self._given.setdefault(key, name)
                    labels.setdefault(key, str(group.get("name", number)))
        uses = Counter(self._given.values())
        shared = {key: f"{labels[key]}:{name}" for key, name in self._given.items() if uses[name] > 1}
        self._qualified = _numbered(shared)

    def added_to(self, own: Iterable[str], key: Any) -> list[str]:
        """All names of a parameter: its own first; a qualified one only where it has none of its own.

        A number in a qualified name may be another group's by now, so it is not to compete with a name that was kept.
        """
        names = list(dict.fromkeys(own))
        if key in self._qualified:
            return names or [self._qualified[key]]
        if key in self._given and self._given[key] not in names:
            names.append(self._given[key])
        return names


def _numbered(names: Mapping[Any, str]) -> dict[Any, str]:
    """The same names, with ``#2``, ``#3`` and so on behind those that came before."""
    seen: Counter[str] = Counter()
    numbered = {}
    for key, name in names.items():
        seen[name] += 1
        numbered[key] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return numbered


def saved_parameters(state_dict: Mapping[str, Any], renamed: Mapping[str, str]) -> list[Saved]:
    """The parameters of a state dict, by position, each once.

    Args:
        state_dict: torch's layout, with or without ``param_names`` and our own key.
        renamed: saved name to our name.
    """
    identity = state_dict.get("paramstate") or {}
    groups = state_dict["param_groups"]
    places = [(number, key) for number, group in enumerate(groups) for key in group["params"]]
    given = GivenNames(groups)
    found: dict[Any, Saved] = {}
    for position, (number, key) in enumerate(places):
        own = _at(identity.get("names"), position, len(places)) or []
        names = [renamed.get(name, name) for name in given.added_to(own, key)]
        id = _at(identity.get("ids"), position, len(places))
        found.setdefault(key, Saved(key, names, id, state_dict["state"].get(key), number))
    return list(found.values())


def _at(values: Any, position: int, length: int) -> Any:
    return values[position] if values is not None and len(values) == length else None


def match(
    saved: list[Saved], ours: list[Ours], *, strict: bool, strict_names: bool
) -> tuple[list[tuple[Saved, Ours]], LoadReport]:
    """Pair saved parameters with ours; by position only within a group, never across the border to the next.

    Raises:
        LoadError: names are required and one side has none; or, when strict, a side has parameters that the other
            lacks.
    """
    named = bool(saved) and all(item.names for item in saved) and all(item.names for item in ours)
    if not named:
        if strict_names:
            side = "the state dict" if not all(item.names for item in saved) else "the optimizer"
            raise LoadError(
                f"strict_names: {side} has no parameter names, so only positions could decide; build the optimizer "
                "from the model or from named_parameters(), or load without strict_names"
            )
        return _by_position(saved, ours, strict)
    return _by_name(saved, ours, strict)


def _by_position(saved: list[Saved], ours: list[Ours], strict: bool) -> tuple[list[tuple[Saved, Ours]], LoadReport]:
    report = LoadReport("position")
    pairs: list[tuple[Saved, Ours]] = []
    groups: defaultdict[int, tuple[list[Saved], list[Ours]]] = defaultdict(lambda: ([], []))
    for candidate in saved:
        groups[candidate.group][0].append(candidate)
    for item in ours:
        groups[item.group][1].append(item)
    for number, (there, here) in sorted(groups.items()):
        if strict and len(there) != len(here):
            raise LoadError(
                f"{SIZES}: group {number} has {len(there)} parameters there and {len(here)} here, and one side has no "
                "names; build the optimizer with the saved groups, or give strict=False to load what each group shares"
            )
        pairs += zip(there, here, strict=False)
        report.missing += [item.label for item in here[len(there) :]]
        report.unexpected += [item.label for item in there[len(here) :]]
    return pairs, report


def _by_name(saved: list[Saved], ours: list[Ours], strict: bool) -> tuple[list[tuple[Saved, Ours]], LoadReport]:
    report = LoadReport("name")
    by_name: dict[str, Ours] = {}
    for rank in range(max((len(item.names) for item in ours), default=0)):
        for item in ours:
            if rank < len(item.names):
                by_name.setdefault(item.names[rank], item)
    pairs: list[tuple[Saved, Ours]] = []
    taken: set[Tensor] = set()
    for candidate in saved:
        found = next((by_name[name] for name in candidate.names if name in by_name), None)
        if found is None or found.param in taken:
            report.unexpected.append(candidate.label)
        else:
            taken.add(found.param)
            pairs.append((candidate, found))
    report.missing = [item.label for item in ours if item.param not in taken]
    if strict and (report.missing or report.unexpected):
        raise LoadError(
            f"{SIZES}: missing in the state dict: {listed(report.missing) or 'none'}; unexpected in it: "
            f"{listed(report.unexpected) or 'none'}. Give names= to map renamed ones, or strict=False to load the rest"
        )
    return pairs, report


def check(pairs: Iterable[tuple[Saved, Ours]], report: LoadReport, shaped: Iterable[str], *, strict: bool) -> None:
    """Check shapes and dtypes of what would be loaded, and complete the report.

    Args:
        pairs: saved with ours.
        report: gets ``loaded``, ``reshaped`` and ``retyped``.
        shaped: the state keys whose tensors must have the parameter's shape.
        strict: whether another shape is an error, or only leaves that parameter without state.

    Raises:
        LoadError: strict and a shape differs, or a moment is of no floating dtype.
    """
    for saved, ours in pairs:
        tensors = {key: value for key in shaped if isinstance(value := (saved.state or {}).get(key), Tensor)}
        wrong = next((key for key, tensor in tensors.items() if tensor.shape != ours.param.shape), None)
        if wrong is not None:
            if strict:
                raise LoadError(
                    f"parameter {ours.label!r}: the saved {wrong!r} has shape {list(tensors[wrong].shape)}, the "
                    f"parameter has {list(ours.param.shape)}; load with strict=False to leave its state out"
                )
            report.reshaped.append(ours.label)
            continue
        for key, tensor in tensors.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                raise LoadError(
                    f"parameter {ours.label!r}: the saved {key!r} has dtype {tensor.dtype}, which holds no moments"
                )
        if any(tensor.dtype != ours.param.dtype for tensor in tensors.values()):
            report.retyped.append(ours.label)
        report.loaded.append(ours.label)


def check_ids(pairs: Iterable[tuple[Saved, Ours]]) -> None:
    """Check that the saved IDs can be taken over, before anything is.

    Raises:
        LoadError: one is no integer from 1 to 2**63 - 1, or two parameters have the same.
    """
    owners: dict[int, Ours] = {}
    remedy = "mend state_dict['paramstate']['ids'], or delete it to keep the optimizer's own IDs"
    for saved, ours in pairs:
        if saved.id is None:
            continue
        if type(saved.id) is not int or not 1 <= saved.id < 2**63:
            raise LoadError(
                f"parameter {ours.label!r}: the saved ID is {saved.id!r}, an ID is an integer from 1 to 2**63 - 1; "
                f"{remedy}"
            )
        other = owners.setdefault(saved.id, ours)
        if other is not ours:
            raise LoadError(
                f"parameters {other.label!r} and {ours.label!r} have the same saved ID {saved.id}; {remedy}"
            )


def options_by_name(
    saved: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    pairs: Iterable[tuple[Saved, Ours]],
    *,
    strict: bool,
) -> list[dict[str, Any]]:
    """The options that our groups are to have: each those of the saved group that holds its parameters.

    A group none of whose parameters was saved keeps its own. So does one whose parameters come from saved groups of
    different options, unless strict. A group's ``name`` stays what it is.

    Args:
        saved: the groups of the state dict.
        groups: ours.
        pairs: saved parameters with ours, matched by name.
        strict: refuse a group whose parameters come from saved groups of different options.

    Raises:
        LoadError: strict, and the options of a group cannot be told.
    """
    holders = {ours.param: (there, ours) for there, ours in pairs}
    result = []
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
) -> dict[str, Any]:
    """The options of one group, from the saved groups in ``sources``, each with one of the parameters it gives."""
    kept = {key: value for key, value in ours.items() if key != "params"}
    if not sources:
        return kept
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
            return kept
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
