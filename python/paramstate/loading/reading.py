"""The parameters of a state dict in torch's layout: what each is called, and which state and ID were saved for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Shared:
    """A bare name that several groups use, and the group in which it stands for this parameter."""

    name: str
    group: int
    """The number of the group,"""
    groups: int
    """and how many there are: among as many others, a number tells the group."""
    labelled: bool = field(compare=False)
    """Whether the group has a ``name`` of its own, which tells it better."""


@dataclass(slots=True)
class Saved:
    """One parameter of a state dict."""

    key: Any
    names: list[str]
    id: int | None
    state: dict[str, Any] | None
    group: int
    """The number of its group."""
    shared: Shared | None
    """Where only the group tells it from others, and no name was kept for it."""
    traits: dict[str, Any] | None = None
    """What was declared for it; ``None`` where the state dict does not say."""

    @property
    def label(self) -> str:
        """How a report calls it."""
        return self.names[0] if self.names else f"position {self.key}"

    @property
    def rests_on_number(self) -> bool:
        """Whether nothing but the group's number tells it from the others of its name."""
        return self.shared is not None and not self.shared.labelled


class GivenNames:
    """What the groups' ``param_names`` call each parameter.

    A name that several parameters share says nothing by itself: it counts only with the group's ``name`` or number in
    front, written as the identity table writes it.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._given: dict[Any, str] = {}
        numbers: dict[Any, int] = {}
        for number, group in enumerate(groups):
            names = group.get("param_names")
            if names is not None and len(names) == len(group["params"]):
                for key, name in zip(group["params"], names, strict=True):
                    self._given.setdefault(key, name)
                    numbers.setdefault(key, number)
        uses = Counter(self._given.values())
        shared = {key: name for key, name in self._given.items() if uses[name] > 1}
        self._qualified = _numbered(
            {key: f"{groups[numbers[key]].get('name', numbers[key])}:{name}" for key, name in shared.items()}
        )
        within = Counter((numbers[key], name) for key, name in shared.items())
        labels = [group.get("name") for group in groups]
        own = [label is not None and labels.count(label) == 1 for label in labels]
        self._shared = {
            key: Shared(name, numbers[key], len(groups), own[numbers[key]])
            for key, name in shared.items()
            if within[numbers[key], name] == 1
        }

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

    def shared(self, key: Any) -> Shared | None:
        """The name and the group of a parameter that shares its name with others, but not within its group."""
        return self._shared.get(key)


def _numbered(names: Mapping[Any, str]) -> dict[Any, str]:
    """The same names, with ``#2``, ``#3`` and so on behind those that came before."""
    seen: Counter[str] = Counter()
    numbered = {}
    for key, name in names.items():
        seen[name] += 1
        numbered[key] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return numbered


def saved_parameters(state_dict: Mapping[str, Any], renamed: Mapping[str, str], known: Collection[str]) -> list[Saved]:
    """The parameters of a state dict, by position, each once.

    Args:
        state_dict: torch's layout, with or without ``param_names`` and our own key.
        renamed: saved name to our name.
        known: our names.
    """
    identity = state_dict.get("paramstate") or {}
    groups = state_dict["param_groups"]
    places = [(number, key) for number, group in enumerate(groups) for key in group["params"]]
    given = GivenNames(groups)
    in_keys = _are_names([key for _, key in places], renamed, known)
    found: dict[Any, Saved] = {}
    for position, (number, key) in enumerate(places):
        own = _at(identity.get("names"), position, len(places)) or []
        names = _named_by_key(own, key, in_keys) if in_keys is not None else given.added_to(own, key)
        alone = in_keys is not None or own or any(name in renamed for name in names)
        shared = None if alone else given.shared(key)
        id = _at(identity.get("ids"), position, len(places))
        names = [renamed.get(name, name) for name in names]
        traits = _at(identity.get("traits"), position, len(places))
        found.setdefault(key, Saved(key, names, id, _state(state_dict["state"].get(key)), number, shared, traits))
    return list(found.values())


def _are_names(keys: list[Any], renamed: Mapping[str, str], known: Collection[str]) -> bool | None:
    """Whether the keys are names, as ``torch.distributed.checkpoint`` has them, that we know; ``None`` for numbers.

    It puts them in the order of our groups and leaves ``param_names`` in the order that was saved: these say nothing
    then. Nor do the keys where we know none of them; their order decides, as torch means it.
    """
    if not keys or not all(isinstance(key, str) for key in keys):
        return None
    return any(renamed.get(key, key) in known for key in keys)


def _named_by_key(own: list[str], key: str, are_known: bool) -> list[str]:
    return [*own, key] if are_known else own


def _at(values: Any, position: int, length: int) -> Any:
    return values[position] if values is not None and len(values) == length else None


def _state(held: dict[str, Any] | None) -> dict[str, Any] | None:
    """One parameter's saved state; moments that were saved as codes and scales are tensors again."""
    if not (isinstance(held, Mapping) and any(isinstance(value, Mapping) for value in held.values())):
        return held
    from paramstate.precision.portable import restored

    return restored(held)
