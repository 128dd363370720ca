"""What can go wrong, one class for each cause.

Every message names the parameter, what was expected, what came, and what to call. Errors of the step are raised before
the first write: values, moments and steps are as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ParamStateError(Exception):
    """The base of every error that this package raises about parameters and their state."""


class ReplacedParameterError(ParamStateError, RuntimeError):
    """A tracked parameter is no longer the one in the model, and following it by itself would be a guess."""


class StateShapeError(ParamStateError, ValueError):
    """A value, its gradient or its state have different shapes."""


class RelayoutError(StateShapeError):
    """A new model is no pure re-layout of the old one. Nothing was changed.

    Args:
        message: what was found of the first few parameters.
        report: what became of every parameter that is no pure re-layout, as ``diff`` reports it.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class OverlapError(ParamStateError, ValueError):
    """Two parameters share memory, or one shares memory with itself."""


class LoadError(ParamStateError, ValueError):
    """A state dict does not fit the optimizer. Nothing was changed."""


class SelectionError(ParamStateError, ValueError):
    """A selection that holds a tied parameter by half, or two that claim the same parameter."""


class ConstraintError(ParamStateError, ValueError):
    """Bounds that cannot hold: reversed, not a number, of a shape that does not broadcast, or absent."""


class RowIndexError(ParamStateError, IndexError):
    """Rows that a parameter does not have."""


class EditError(ParamStateError, RuntimeError):
    """An edit session was asked for what it cannot do now: undo without a step back, or work while it is closed."""


class UnsupportedError(ParamStateError, RuntimeError):
    """A feature was asked for where it cannot be honoured."""


class _NameError(ParamStateError, KeyError):
    """A look-up error whose message prints as text: ``KeyError`` alone would print its ``repr``."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnknownParameterError(_NameError):
    """A name or an object that no parameter of the optimizer answers to."""


class AmbiguousNameError(_NameError):
    """A name that stands for several: a bare one that parameters share, or "the" base model where there are more."""


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Names for a message: quoted, and cut where there are many.

    >>> listed(["a", "b"])
    "'a', 'b'"
    >>> listed([str(i) for i in range(10)], limit=2)
    "'0', '1' and 8 more"
    """
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
