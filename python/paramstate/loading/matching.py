"""Which saved parameter belongs to which of ours: by name where both sides have names, by position otherwise."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from paramstate.errors import LoadError, listed

from .reading import Saved, Shared

SIZES = "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"


@dataclass(slots=True)
class LoadReport:
    """What a load did; the lists hold canonical names, or positions where there are no names.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> saved = AdamW(torch.nn.Linear(2, 1)).state_dict()
        >>> report = AdamW(torch.nn.Linear(2, 1, bias=False)).load_state_dict(saved, strict=False)
        >>> report.matched_by, report.loaded, report.unexpected
        ('name', ['weight'], ['bias'])
    """

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
    """Matched, with moments of another dtype than the value: they keep theirs, widened where the value is wider."""
    by_group: list[str] = field(default_factory=list)
    """Ours whose bare name several groups share, told apart by the group's number: a side does not name its groups."""
    kept_options: list[str] = field(default_factory=list)
    """The ``name``, or else the number, of each group of ours that kept its own options, lr and all."""
    undeclared: list[str] = field(default_factory=list)
    """Ours whose saved constraint is a function, which is not saved, and for which none is declared here."""


@dataclass(slots=True)
class Ours:
    """One parameter of the optimizer."""

    param: Tensor
    names: list[str]
    label: str
    group: int
    """The number of its group."""
    shared: Shared | None
    """Where the groups give several parameters its bare name."""


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
    return _by_name(saved, ours, strict, strict_names)


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


def _by_name(
    saved: list[Saved], ours: list[Ours], strict: bool, strict_names: bool
) -> tuple[list[tuple[Saved, Ours]], LoadReport]:
    named = _same_name(saved, ours)
    taken = {item.param for item in named.values()}
    grouped = _same_group(
        [item for item in saved if item.key not in named], [item for item in ours if item.param not in taken]
    )
    numbered = {item.key for item in saved if item.key in named and item.rests_on_number} | grouped.keys()
    refused = numbered if strict_names else set()
    found = {key: item for key, item in {**named, **grouped}.items() if key not in refused}
    report = LoadReport("name", by_group=[found[item.key].label for item in saved if item.key in numbered - refused])
    taken = {item.param for item in found.values()}
    report.missing = [item.label for item in ours if item.param not in taken]
    report.unexpected = [item.label for item in saved if item.key not in found]
    if strict and (report.missing or report.unexpected):
        raise LoadError(
            f"{SIZES}: missing in the state dict: {listed(report.missing) or 'none'}; unexpected in it: "
            f"{listed(report.unexpected) or 'none'}. Give names= to map renamed ones, or strict=False to load the rest"
        )
    return [(item, found[item.key]) for item in saved if item.key in found], report


def _same_name(saved: list[Saved], ours: list[Ours]) -> dict[Any, Ours]:
    """Ours by the key of the saved one that has a name of it; a main name goes before an alias."""
    by_name: dict[str, Ours] = {}
    for rank in range(max((len(item.names) for item in ours), default=0)):
        for item in ours:
            if rank < len(item.names):
                by_name.setdefault(item.names[rank], item)
    found: dict[Any, Ours] = {}
    taken: set[Tensor] = set()
    for candidate in saved:
        match = next((by_name[name] for name in candidate.names if name in by_name), None)
        if match is not None and match.param not in taken:
            taken.add(match.param)
            found[candidate.key] = match
    return found


def _same_group(saved: list[Saved], ours: list[Ours]) -> dict[Any, Ours]:
    """Ours by the key of the saved one that shares the bare name with others and is in the group of the same number.

    Where both groups have a ``name``, and not the same, they are not one another's.
    """
    places: dict[Shared | None, Ours] = {item.shared: item for item in ours if item.shared is not None}
    found: dict[Any, Ours] = {}
    for candidate in saved:
        match = places.get(candidate.shared)
        if match is not None and not (_is_labelled(candidate) and _is_labelled(match)):
            found[candidate.key] = match
    return found


def _is_labelled(item: Saved | Ours) -> bool:
    return item.shared is not None and item.shared.labelled
