"""What a selection is made of: patterns, types, places and predicates, and the set operations between them.

An expression holds no model. It is resolved against the tree of one, each time anew, so that it outlives the model that
it was written for: an optimizer keeps the expressions of its groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from paramstate.errors import UnknownParameterError, listed
from paramstate.identity.wrappers import Tree

from .patterns import matching, nearest
from .tied import selected_whole

Predicate = Callable[[str, Tensor], bool]


class Names:
    """The slots of one model, numbered, as expressions look at them.

    Args:
        model: the model.
        tree: the walk over it.
        strict: whether an expression that finds nothing is an error.
    """

    def __init__(self, model: nn.Module, tree: Tree, *, strict: bool = True) -> None:
        self.places = tree.places
        self.paths = [place.path for place in tree.places]
        self.modules = [("", model), *((link.prefix, link.child) for link in tree.links)]
        self.strict = strict
        self.by_param: dict[Tensor, list[int]] = {}
        self.by_path: dict[str, list[int]] = {}
        for number, place in enumerate(tree.places):
            self.by_param.setdefault(place.param, []).append(number)
            self.by_path.setdefault(place.path, []).append(number)

    @property
    def model(self) -> str:
        """How a message calls the model."""
        return type(self.modules[0][1]).__name__

    def shown(self, numbers: set[int]) -> str:
        """Some of these slots, for a message."""
        return listed([self.paths[number] for number in sorted(numbers)], 3) or "none"

    def of_parameter(self, path: str) -> set[int]:
        """Every slot of the parameter that is called ``path``: each of a tied parameter's names stands for it."""
        return {number for found in self.by_path.get(path, ()) for number in self.by_param[self.places[found].param]}

    def below(self, prefix: str) -> set[int]:
        """The slots whose names begin with ``prefix``, which ends with a dot or is empty."""
        return {number for number, path in enumerate(self.paths) if path.startswith(prefix)}

    def found(self, numbers: set[int], missing: Callable[[], str]) -> set[int]:
        """What an expression found.

        Raises:
            UnknownParameterError: it is nothing, with the message that ``missing`` makes.
        """
        if not numbers and self.strict:
            raise UnknownParameterError(missing())
        return numbers


class Expression(ABC):
    """One way to say which parameters are meant."""

    @abstractmethod
    def slots(self, names: Names) -> set[int]:
        """The slots that are meant.

        Raises:
            UnknownParameterError: the expression, or a part of it, finds none. The message has the nearest names.
        """

    def resolve(self, model: nn.Module, tree: Tree | None = None) -> dict[Tensor, list[str]]:
        """The parameters that are meant, in the model's order, each with its names.

        Raises:
            UnknownParameterError: a part of the expression, or all of it, finds none.
            SelectionError: a tied parameter is meant by some of its names only.
        """
        names = Names(model, Tree(model) if tree is None else tree)
        chosen = self.slots(names)
        parameters = {param: [names.paths[number] for number in numbers] for param, numbers in names.by_param.items()}
        return selected_whole(parameters, {names.paths[number] for number in chosen})

    def resolve_what_is_there(self, model: nn.Module, tree: Tree) -> dict[Tensor, list[str]]:
        """As :meth:`resolve`, without what is missing now and without parameters that are meant by half."""
        names = Names(model, tree, strict=False)
        chosen = self.slots(names)
        return {
            param: [names.paths[number] for number in numbers]
            for param, numbers in names.by_param.items()
            if chosen.issuperset(numbers)
        }

    def __and__(self, other: Expression) -> Expression:
        return Intersection(self, other)

    def __or__(self, other: Expression) -> Expression:
        return Union((self, other))

    def __sub__(self, other: Expression) -> Expression:
        return Intersection(self, Complement(other))

    def __invert__(self) -> Expression:
        return Complement(self)


@dataclass(frozen=True, slots=True)
class Everything(Expression):
    """All parameters of the model."""

    def slots(self, names: Names) -> set[int]:
        """Every slot."""
        return names.found(set(range(len(names.places))), lambda: "the model has no parameters")

    def __str__(self) -> str:
        return "**"


@dataclass(frozen=True, slots=True)
class Pattern(Expression):
    """A parameter's full name, or a glob on dotted boundaries with everything below it."""

    text: str

    def slots(self, names: Names) -> set[int]:
        """The slots of the parameter that is called so, else those whose names match."""
        whole = names.of_parameter(self.text)
        if whole:
            return whole
        found = {number for path in matching(self.text, names.by_path) for number in names.by_path[path]}
        return names.found(found, lambda: f"{self} matches no parameter; {nearest(self.text, names.by_path)}")

    def __str__(self) -> str:
        return repr(self.text)


@dataclass(frozen=True, slots=True)
class Below(Expression):
    """Everything below a module, which is remembered by its places in the model."""

    prefixes: tuple[str, ...]
    kind: str

    def slots(self, names: Names) -> set[int]:
        """The slots below each of the places."""
        found = {number for prefix in self.prefixes for number in names.below(prefix)}
        return names.found(found, self._missing(names))

    def _missing(self, names: Names) -> Callable[[], str]:
        path = self.prefixes[0].removesuffix(".")
        return lambda: f"the module {self} holds no parameter now; {nearest(path, names.by_path)}"

    def __str__(self) -> str:
        return f"{self.prefixes[0].removesuffix('.')!r} ({self.kind})"


@dataclass(frozen=True, slots=True)
class Called(Expression):
    """Parameters that were given as tensors: each is remembered by its names."""

    parameters: tuple[tuple[str, ...], ...]

    def slots(self, names: Names) -> set[int]:
        """The slots of each parameter, found by any of its names."""
        return {number for known in self.parameters for number in self._slots_of(known, names)}

    def _slots_of(self, known: Sequence[str], names: Names) -> set[int]:
        found = {number for name in known for number in names.of_parameter(name)}
        return names.found(
            found, lambda: f"no parameter is called {known[0]!r} now; {nearest(known[0], names.by_path)}"
        )

    def __str__(self) -> str:
        return ", ".join(repr(known[0]) for known in self.parameters)


@dataclass(frozen=True, slots=True)
class OfType(Expression):
    """Everything in modules of a type."""

    kind: type[nn.Module]

    def slots(self, names: Names) -> set[int]:
        """The slots in and below the modules of that type."""
        inside = {id(part) for _, module in names.modules if isinstance(module, self.kind) for part in module.modules()}
        found = {number for number, place in enumerate(names.places) if id(place.module) in inside}
        return names.found(found, lambda: self._missing(names))

    def _missing(self, names: Names) -> str:
        types = dict.fromkeys(type(place.module).__name__ for place in names.places)
        return f"no module of type {self} holds a parameter; {nearest(self.kind.__name__, types)}"

    def __str__(self) -> str:
        return self.kind.__name__


@dataclass(frozen=True, slots=True)
class Where(Expression):
    """The parameters for which a predicate holds, which is asked for each of their names."""

    predicate: Predicate

    def slots(self, names: Names) -> set[int]:
        """The slots for which the predicate holds."""
        found = {number for number, place in enumerate(names.places) if self.predicate(place.path, place.param)}
        return names.found(
            found, lambda: f"{self} holds for no parameter; it was asked for {listed(list(names.by_path), 3)}"
        )

    def __str__(self) -> str:
        return f"the predicate {getattr(self.predicate, '__name__', repr(self.predicate))}"


@dataclass(frozen=True, slots=True)
class Union(Expression):
    """What any of several expressions means."""

    parts: tuple[Expression, ...]

    def slots(self, names: Names) -> set[int]:
        """The slots of each part."""
        return set().union(*(part.slots(names) for part in self.parts))

    def __str__(self) -> str:
        return f"({' | '.join(map(str, self.parts))})"


@dataclass(frozen=True, slots=True)
class Intersection(Expression):
    """What both of two expressions mean."""

    one: Expression
    other: Expression

    def slots(self, names: Names) -> set[int]:
        """The slots of both."""
        one, other = self.one.slots(names), self.other.slots(names)
        return names.found(
            one & other,
            lambda: (
                f"{self} selects no parameter of {names.model}: {self.one} selects {names.shown(one)}, and "
                f"{self.other} selects {names.shown(other)}"
            ),
        )

    def __str__(self) -> str:
        return f"({self.one} & {self.other})"


@dataclass(frozen=True, slots=True)
class Complement(Expression):
    """Everything in the model but what an expression means."""

    part: Expression

    def slots(self, names: Names) -> set[int]:
        """The slots that are not the part's."""
        rest = set(range(len(names.places))) - self.part.slots(names)
        return names.found(
            rest, lambda: f"{self} selects no parameter of {names.model}: {self.part} selects all of them"
        )

    def __str__(self) -> str:
        return f"~{self.part}"
