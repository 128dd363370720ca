"""What the arguments of :func:`select` mean, as an expression."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from paramstate.errors import UnknownParameterError, listed
from paramstate.identity.wrappers import Tree

from .expressions import Below, Called, Everything, Expression, Names, OfType, Pattern, Union, Where
from .selecting import Selectable, Selection


def read(model: nn.Module, what: Sequence[Selectable]) -> Expression:
    """The union of all that is meant; everything where nothing is said.

    Raises:
        UnknownParameterError: a module or a tensor is not in the model.
        ValueError: a selection is one on another model.
        TypeError: it is nothing that selects.
    """
    reading = _Reading(model)
    parts = tuple(reading.expression(item) for item in what)
    if not parts:
        return Everything()
    return parts[0] if len(parts) == 1 else Union(parts)


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
            what._require_on(self._model)
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
