"""Selections: parts of a model, said once and resolved whenever they are used."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from paramstate.identity.wrappers import Tree, require_module

if TYPE_CHECKING:
    from .expressions import Expression
    from .preview import Preview


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
        """The model that it is resolved against.

        Example:
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
            >>> select(model, "0").model is model
            True
        """
        return self._model

    @property
    def expression(self) -> Expression:
        """What is selected, without the model.

        Example:
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
            >>> str((select(model, "0") & select(model, "*.bias")).expression)
            "('0' & '*.bias')"
        """
        return self._expression

    def on(self, model: nn.Module) -> Selection:
        """The same selection on another model.

        >>> from torch import nn
        >>> heads = select(nn.Sequential(nn.Linear(2, 1)), nn.Linear)
        >>> heads.on(nn.Sequential(nn.ReLU(), nn.Linear(2, 1))).names
        ['1.weight', '1.bias']
        """
        return Selection(model, self._expression)

    def _require_on(self, model: nn.Module) -> None:
        """Check that this is a selection on ``model``.

        Raises:
            ValueError: it is one on another object.
        """
        if self._model is not model:
            raise ValueError(
                f"{self!r} is a selection on another model object; selection.on(model) is the same one on this model"
            )

    def resolve(self, tree: Tree | None = None) -> dict[Tensor, list[str]]:
        """The selected parameters, in the model's order, each with its canonical names.

        Args:
            tree: a walk over the model that was just made, to save another.

        Raises:
            UnknownParameterError: it selects nothing, or a part of it does; the message has the nearest names.
            SelectionError: a tied parameter is selected by some of its names only.

        Example:
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
            >>> model[1].bias = model[0].bias  # tied
            >>> select(model, "0.bias").resolve()[model[0].bias]
            ['0.bias', '1.bias']
        """
        return self._expression.resolve(self._model, tree)

    @property
    def names(self) -> list[str]:
        """The canonical name of each selected parameter; of a tied one the first.

        Example:
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
            >>> select(model, "*.weight").names
            ['0.weight', '1.weight']
        """
        return [names[0] for names in self.resolve().values()]

    @property
    def params(self) -> list[Tensor]:
        """The selected parameters, each once.

        Example:
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
            >>> select(model, "1").params[0] is model[1].weight
            True
        """
        return list(self.resolve())

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and parameter, as ``model.named_parameters()`` gives them.

        Example:
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
            >>> dict(select(model, "1").named_parameters())["1.bias"] is model[1].bias
            True
        """
        return ((names[0], param) for param, names in self.resolve().items())

    def preview(self) -> Preview:
        """What is selected now: prints as a table; ``preview().rows`` has the data.

        Example:
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
            >>> preview = select(model, "1").preview()
            >>> [(row.name, row.shape) for row in preview.rows], preview.numel
            ([('1.weight', (1, 2)), ('1.bias', (1,))], 3)
        """
        from .expressions import Everything
        from .preview import preview_of

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
        return self._combined(other, operator.and_)

    def __or__(self, other: Selection) -> Selection:
        return self._combined(other, operator.or_)

    def __sub__(self, other: Selection) -> Selection:
        return self._combined(other, operator.sub)

    def __invert__(self) -> Selection:
        return Selection(self._model, ~self._expression)

    def _combined(self, other: Selection, combine: Callable[[Expression, Expression], Expression]) -> Selection:
        if not isinstance(other, Selection):
            return NotImplemented
        other._require_on(self._model)
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

    Returns:
        Selection: resolved whenever it is used.

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
    from .reading import read

    require_module(model)
    return Selection(model, read(model, what))
