"""Selections: parts of a model, said once and resolved whenever they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from paramstate.errors import UnknownParameterError, listed
from paramstate.identity.wrappers import Tree, require_module

from .expressions import (
    Below,
    Called,
    Complement,
    Everything,
    Expression,
    Intersection,
    Names,
    OfType,
    Pattern,
    Union,
    Where,
)
from .preview import Preview, preview_of


class Selection:
    """Parameters of a model, as :func:`select` describes them. Immutable, and resolved anew each time it is used.

    It is iterated over as ``model.parameters()`` is, so it goes wherever parameters are taken. ``a & b``, ``a | b``,
    ``a - b`` and ``~a`` (the rest of the model) make other selections. A selection holds its model; a deep copy of the
    two holds the copy.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
        >>> decayed = select(model, nn.Linear) & select(model, "*.weight")
        >>> decayed.names, len(decayed.params), "1.weight" in decayed
        (['0.weight', '2.weight'], 2, False)
        >>> [name for name, _ in (~decayed).named_parameters()]
        ['0.bias', '1.weight', '1.bias', '2.bias']
        >>> decayed.resolve()[model[2].weight], decayed.model is model, decayed.preview().numel
        (['2.weight'], True, 6)
        >>> str(decayed.expression)
        "(Linear & '*.weight')"
    """

    __slots__ = ("_expression", "_model")

    def __init__(self, model: nn.Module, expression: Expression) -> None:
        self._model = model
        self._expression = expression

    @property
    def model(self) -> nn.Module:
        """The model that it is resolved against."""
        return self._model

    @property
    def expression(self) -> Expression:
        """What is selected, without the model."""
        return self._expression

    def on(self, model: nn.Module) -> Selection:
        """The same selection on another model.

        >>> from torch import nn
        >>> heads = select(nn.Sequential(nn.Linear(2, 1)), nn.Linear)
        >>> heads.on(nn.Sequential(nn.ReLU(), nn.Linear(2, 1))).names
        ['1.weight', '1.bias']
        """
        return Selection(model, self._expression)

    def resolve(self, tree: Tree | None = None) -> dict[Tensor, list[str]]:
        """The selected parameters, in the model's order, each with its canonical names.

        Args:
            tree: a walk over the model that was just made, to save another.

        Raises:
            UnknownParameterError: it selects nothing, or a part of it does; the message has the nearest names.
            SelectionError: a tied parameter is selected by some of its names only.
        """
        return self._expression.resolve(self._model, tree)

    @property
    def names(self) -> list[str]:
        """The canonical name of each selected parameter; of a tied one the first."""
        return [names[0] for names in self.resolve().values()]

    @property
    def params(self) -> list[Tensor]:
        """The selected parameters, each once."""
        return list(self.resolve())

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and parameter, as ``model.named_parameters()`` gives them."""
        return ((names[0], param) for param, names in self.resolve().items())

    def preview(self) -> Preview:
        """What is selected now: prints as a table; ``preview().rows`` has the data."""
        selected = self.resolve()
        everything = Everything().resolve(self._model)
        return preview_of(selected, {param: names for param, names in everything.items() if param not in selected})

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.resolve())

    def __len__(self) -> int:
        return len(self.resolve())

    def __contains__(self, item: object) -> bool:
        """Whether a parameter, given as the tensor or by any of its names, is selected."""
        selected = self.resolve()
        if isinstance(item, Tensor):
            return item in selected
        return any(item in names for names in selected.values())

    def __and__(self, other: Selection) -> Selection:
        return self._combined(other, Intersection)

    def __or__(self, other: Selection) -> Selection:
        return self._combined(other, lambda one, two: Union((one, two)))

    def __sub__(self, other: Selection) -> Selection:
        return self._combined(other, lambda one, two: Intersection(one, Complement(two)))

    def __invert__(self) -> Selection:
        return Selection(self._model, Complement(self._expression))

    def _combined(self, other: Selection, combine: Callable[[Expression, Expression], Expression]) -> Selection:
        if not isinstance(other, Selection):
            return NotImplemented
        _require_same(self._model, other)
        return Selection(self._model, combine(self._expression, other._expression))

    def __repr__(self) -> str:
        return f"select({type(self._model).__name__}: {self._expression})"


Selectable = str | Tensor | nn.Module | type[nn.Module] | Callable[[str, Tensor], bool] | Selection


def select(model: nn.Module, *what: Selectable) -> Selection:
    """Select parameters of ``model``. Several descriptions are a union; none selects everything.

    Names are canonical: without what DDP, ``torch.compile``, PEFT and other wrappers add. A full name or a tensor
    stands for the parameter, under all its names where it is tied. A module and a tensor are remembered by where they
    stand in the model, so a selection outlives their replacement.

    Args:
        model: the model.
        what: any of

            * a pattern on dotted boundaries, with everything below it: ``"hyper_net"`` does not match
              ``hyper_net_ema``; ``*`` is one component or a part of one, ``**`` any number of them;
            * a module of the model, or a type of modules: everything in them;
            * a parameter of the model;
            * a predicate ``f(name, param) -> bool``;
            * another selection on this model.

    Raises:
        UnknownParameterError: a module or a tensor is not in the model. That a pattern, a type or a predicate finds
            nothing is raised when the selection is used.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"hyper_net": nn.Linear(2, 2), "hyper_net_ema": nn.Linear(2, 2)})
        >>> select(model, "hyper_net").names
        ['hyper_net.weight', 'hyper_net.bias']
        >>> (select(model, nn.Linear) - select(model, "*.bias")).names
        ['hyper_net.weight', 'hyper_net_ema.weight']
        >>> select(model, "hypernet").names
        Traceback (most recent call last):
            ...
        paramstate.errors.UnknownParameterError: 'hypernet' matches no parameter; the nearest names are 'hyper_net', ...
        >>> select(model, "hyper_net").preview()
        name              shape  dtype    elements  requires_grad
        ---------------------------------------------------------
        hyper_net.weight  2 x 2  float32         4  yes
        hyper_net.bias    2      float32         2  yes
        2 of 4 parameters, 6 of 12 elements
    """
    require_module(model)
    reading = _Reading(model)
    parts = tuple(reading.expression(item) for item in what)
    if not parts:
        return Selection(model, Everything())
    return Selection(model, parts[0] if len(parts) == 1 else Union(parts))


def _require_same(model: nn.Module, selection: Selection) -> None:
    if selection.model is not model:
        raise ValueError(
            f"{selection!r} is a selection on another model object; selection.on(model) is the same one on this model"
        )


class _Reading:
    """What the arguments of one :func:`select` mean. The model is walked at most once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @cached_property
    def _tree(self) -> Tree:
        return Tree(self._model)

    @cached_property
    def _names(self) -> dict[Tensor, tuple[str, ...]]:
        numbers = Names(self._model, self._tree).by_param
        return {param: tuple(self._tree.places[number].path for number in own) for param, own in numbers.items()}

    def expression(self, what: Any) -> Expression:
        """The expression for one argument."""
        if isinstance(what, str):
            return Pattern(what)
        if isinstance(what, Selection):
            _require_same(self._model, what)
            return what.expression
        if isinstance(what, Tensor):
            return self._parameter(what)
        if isinstance(what, nn.Module):
            return self._module(what)
        if isinstance(what, type):
            if not issubclass(what, nn.Module):
                raise TypeError(f"cannot select by the type {what.__name__}: give a type of torch.nn.Module")
            return OfType(what)
        if callable(what):
            return Where(what)
        raise TypeError(
            f"cannot select by {type(what).__name__}: give a pattern, a module, a type of modules, a parameter, a "
            "predicate or a selection (several of them as further arguments)"
        )

    def _parameter(self, param: Tensor) -> Expression:
        if param in self._names:
            return Called((self._names[param],))
        alike = [names[0] for other, names in self._names.items() if other.shape == param.shape]
        raise UnknownParameterError(
            f"a tensor of shape {list(param.shape)} is no parameter of {type(self._model).__name__}; of that shape are "
            f"{listed(alike, 3) or 'none'}"
        )

    def _module(self, module: nn.Module) -> Expression:
        links = self._tree.links
        prefixes = tuple(dict.fromkeys(link.prefix for link in links if link.child is module))
        if module is self._model or "" in prefixes:
            return Everything()
        if not prefixes:
            alike = [link.prefix.removesuffix(".") for link in links if type(link.child) is type(module)]
            raise UnknownParameterError(
                f"this {type(module).__name__} is not in {type(self._model).__name__}; of that type are "
                f"{listed(alike, 3) or 'none'}"
            )
        own = dict.fromkeys(module.parameters())
        below = [place for place in self._tree.places if place.path.startswith(prefixes)]
        if own and any(place.param not in own for place in below):
            # A wrapper around the module has parameters of its own under the same canonical name, as LoRA layers have.
            return Called(tuple(self._names[param] for param in own))
        return Below(prefixes, type(module).__name__)
