"""Constraints that are functions, and constraints as they are given and saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paramstate.errors import ConstraintError, UnsupportedError

from .constraints import Box, Constraint, FunctionOfValues, NonNegative
from .norm_constraints import MaxNorm, UnitNorm


@dataclass(frozen=True, slots=True)
class Projection(Constraint):
    """A function of the values, for what no other constraint says: ``function(values) -> values``.

    It is given a copy, without gradient, directly after the step, and what it returns becomes the value. A plain
    callable that is declared as a constraint becomes one of these.

    Example:
        >>> import torch
        >>> from paramstate import Adam
        >>> layer = torch.nn.Linear(3, 3, bias=False)
        >>> opt = Adam(layer, constraints={"weight": torch.tril})
        >>> bool(layer.weight.triu(1).any())
        False
    """

    function: FunctionOfValues

    def require_fits(self, param: Tensor, called: str) -> None:
        """See :meth:`Constraint.require_fits`: the function is called once to see."""
        try:
            self._projected(param, called)
        except ConstraintError:
            raise
        except Exception as error:
            raise ConstraintError(f"{called}: the function fails: {type(error).__name__}: {error}") from error

    def project_(self, param: Tensor, called: str) -> None:
        """See :meth:`Constraint.project_`."""
        param.copy_(self._projected(param, called))

    def holds(self, param: Tensor) -> bool:
        """See :meth:`Constraint.holds`."""
        projected = self._projected(param, "")
        return not bool(((projected != param) & ~(projected.isnan() & param.isnan())).any())

    def as_data(self) -> dict[str, Any]:
        """Only that there was one: a function is not saved.

        Example:
            >>> import torch
            >>> from paramstate import Projection
            >>> Projection(torch.nn.functional.relu).as_data()
            {'kind': 'projection', 'function': 'relu'}
        """
        return {"kind": "projection", "function": getattr(self.function, "__qualname__", type(self.function).__name__)}

    def _projected(self, param: Tensor, called: str) -> Tensor:
        with torch.no_grad():
            values = self.function(param.detach().clone())
        if not isinstance(values, Tensor) or values.shape != param.shape:
            got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ConstraintError(
                f"{called}: the function must return a tensor of shape {list(param.shape)}, got {got}"
            )
        return values.to(param)


def as_constraint(declared: object) -> Constraint:
    """What was given as a constraint, as one.

    Raises:
        TypeError: it is none.
    """
    if isinstance(declared, Constraint):
        return declared
    if declared is NonNegative or (isinstance(declared, type) and issubclass(declared, Constraint)):
        name = getattr(declared, "__name__", "")
        raise TypeError(f"a constraint is what {name}(...) gives, got {name} itself: call it")
    if callable(declared):
        return Projection(declared)
    raise TypeError(
        f"a constraint must be a Box, NonNegative(), MaxNorm, UnitNorm or a function of the values, got "
        f"{type(declared).__name__}"
    )


def from_data(data: dict[str, Any]) -> Constraint | None:
    """The constraint that :meth:`Constraint.as_data` wrote; ``None`` for a function, which is not saved.

    Raises:
        UnsupportedError: a later version wrote a kind that this one does not know.
    """
    settings = {key: value for key, value in data.items() if key != "kind"}
    kind = data.get("kind")
    if kind == "projection":
        return None
    if kind == "box":
        return Box(**settings)
    if kind == "max_norm":
        return MaxNorm(**settings)
    if kind == "unit_norm":
        return UnitNorm(**settings)
    raise UnsupportedError(f"the state dict holds a constraint of an unknown kind, {kind!r}; update paramstate")
