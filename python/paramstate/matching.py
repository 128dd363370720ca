"""Which saved parameter belongs to which of ours: by name where both sides have names, by position otherwise.

Nothing is changed here: a state dict is read, matched, and checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from .errors import LoadError, listed

SIZES = "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"


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


def saved_parameters(state_dict: Mapping[str, Any], renamed: Mapping[str, str]) -> list[Saved]:
    """The parameters of a state dict, by position, each once.

    Args:
        state_dict: torch's layout, with or without ``param_names`` and our own key.
        renamed: saved name to our name.
    """
    identity = state_dict.get("paramstate") or {}
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    given = [name for group in state_dict["param_groups"] for name in _names_of(group)]
    found: dict[Any, Saved] = {}
    for position, key in enumerate(keys):
        own = _at(identity.get("names"), position, len(keys)) or []
        names = [*own, *([given[position]] if given[position] is not None else [])]
        names = [renamed.get(name, name) for name in dict.fromkeys(names)]
        state = state_dict["state"].get(key)
        found.setdefault(key, Saved(key, names, _at(identity.get("ids"), position, len(keys)), state))
    return list(found.values())


def _names_of(group: Mapping[str, Any]) -> list[str | None]:
    names = group.get("param_names")
    return list(names) if names is not None and len(names) == len(group["params"]) else [None] * len(group["params"])


def _at(values: Any, position: int, length: int) -> Any:
    return values[position] if values is not None and len(values) == length else None


def match(
    saved: list[Saved], ours: list[Ours], *, strict: bool, strict_names: bool
) -> tuple[list[tuple[Saved, Ours]], LoadReport]:
    """Pair saved parameters with ours.

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
    report.missing = [item.label for item in ours[len(saved) :]]
    report.unexpected = [item.label for item in saved[len(ours) :]]
    if strict and len(saved) != len(ours):
        raise LoadError(
            f"{SIZES}: it has {len(saved)} parameters, the optimizer {len(ours)}, and one side has no names"
        )
    return list(zip(saved, ours, strict=False)), report


def _by_name(saved: list[Saved], ours: list[Ours], strict: bool) -> tuple[list[tuple[Saved, Ours]], LoadReport]:
    report = LoadReport("name")
    by_name: dict[str, Ours] = {}
    for rank in range(max(len(item.names) for item in ours)):
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
