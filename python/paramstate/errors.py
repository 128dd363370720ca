"""What can go wrong, one class for each cause.

Every message names the parameter, what was expected, what came, and what to call. Errors of the step are raised before
the first write: values, moments and steps are as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ParamStateError(Exception):
    """The base of every error that this package raises about parameters and their state.

    Example:
        >>> from paramstate import LoadError, ParamStateError
        >>> issubclass(LoadError, ParamStateError), issubclass(LoadError, ValueError)
        (True, True)
    """


class ReplacedParameterError(ParamStateError, RuntimeError):
    """A tracked parameter is no longer the one in the model, and following it by itself would be a guess.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = AdamW(model)
        >>> del model.bias
        >>> opt.step()
        Traceback (most recent call last):
            ...
        paramstate.errors.ReplacedParameterError: parameters left the model: 'bias'; appeared in it: none. opt.rebind...
    """


class StateShapeError(ParamStateError, ValueError):
    """A value, its gradient or its state have different shapes.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> AdamW(torch.nn.Linear(2, 1)).replace_("weight", torch.zeros(3, 1))
        Traceback (most recent call last):
            ...
        paramstate.errors.StateShapeError: parameter 'weight' has shape [1, 2], the new value has [3, 1]; to carry...
    """


class RelayoutError(StateShapeError):
    """A new model is no pure re-layout of the old one. Nothing was changed.

    Args:
        message: what was found of the first few parameters.
        report: what became of every parameter that is no pure re-layout, as ``diff`` reports it.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> try:
        ...     AdamW(torch.nn.Linear(2, 1, bias=False)).relayout(torch.nn.Linear(2, 1, bias=False))
        ... except ValueError as error:  # a RelayoutError is one
        ...     print(error.report.summary)
        1 changed
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class OverlapError(ParamStateError, ValueError):
    """Two parameters share memory, or one shares memory with itself.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> memory = torch.zeros(4)
        >>> AdamW([("low", torch.nn.Parameter(memory[:3])), ("high", torch.nn.Parameter(memory[1:]))])
        Traceback (most recent call last):
            ...
        paramstate.errors.OverlapError: parameters 'low' and 'high' share memory, so each would be updated twice; ...
    """


class LoadError(ParamStateError, ValueError):
    """A state dict, or a file, does not fit the optimizer or is none. Nothing was changed.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> AdamW(torch.nn.Linear(2, 1)).load_state_dict(AdamW(torch.nn.Linear(2, 1, bias=False)).state_dict())
        Traceback (most recent call last):
            ...
        paramstate.errors.LoadError: ... missing in the state dict: 'bias'; unexpected in it: none. Give names=...
    """


class SaveError(ParamStateError, ValueError):
    """The optimizer holds what a file cannot. Nothing was written.

    Example:
        >>> import torch
        >>> from paramstate import AdamW, save
        >>> opt = AdamW(torch.nn.Linear(2, 1))
        >>> opt.param_groups[0]["schedule"] = lambda step: 1 / step
        >>> save(opt, "opt.safetensors")
        Traceback (most recent call last):
            ...
        paramstate.errors.SaveError: group 0: its 'schedule' is a function; a file holds tensors, numbers, text, None...
    """


class SelectionError(ParamStateError, ValueError):
    """A selection that holds a tied parameter by half, or two that claim the same parameter.

    Example:
        >>> import torch
        >>> from paramstate import select
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> select(model, "0").names
        Traceback (most recent call last):
            ...
        paramstate.errors.SelectionError: parameter '0.weight' is tied to '1.weight', which is not selected; name...
    """


class ConstraintError(ParamStateError, ValueError):
    """Bounds that cannot hold: reversed, not a number, of a shape that does not broadcast, or absent.

    Example:
        >>> from paramstate import Box
        >>> Box(1.0, 0.0)
        Traceback (most recent call last):
            ...
        paramstate.errors.ConstraintError: Box: min 1.0 is above max 0.0
    """


class RowIndexError(ParamStateError, IndexError):
    """Rows that a parameter does not have.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> AdamW(torch.nn.Embedding(3, 2)).freeze_rows("weight", [3])
        Traceback (most recent call last):
            ...
        paramstate.errors.RowIndexError: parameter 'weight' has 3 rows, the index 3 points beyond them
    """


class EditError(ParamStateError, RuntimeError):
    """An edit session was asked for what it cannot do now: undo without a step back, or work while it is closed.

    Example:
        >>> import torch
        >>> from paramstate import edit
        >>> session = edit(torch.nn.Linear(2, 1))
        >>> session.undo()
        Traceback (most recent call last):
            ...
        paramstate.errors.EditError: there is nothing to undo: ...
        >>> session.close()
    """


class UnsupportedError(ParamStateError, RuntimeError):
    """A feature was asked for where it cannot be honoured.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> table = torch.nn.Embedding(3, 2)
        >>> opt = AdamW(table)
        >>> opt.freeze_rows("weight", [0])
        >>> opt.freeze_rows("weight", [1], dim=1)
        Traceback (most recent call last):
            ...
        paramstate.errors.UnsupportedError: parameter 'weight': its rows differ along dim 0 already ...
    """


class _NameError(ParamStateError, KeyError):
    """A look-up error whose message prints as text: ``KeyError`` alone would print its ``repr``."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnknownParameterError(_NameError):
    """A name or an object that no parameter of the optimizer answers to.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> AdamW(torch.nn.Linear(2, 1)).id_of("weigth")
        Traceback (most recent call last):
            ...
        paramstate.errors.UnknownParameterError: no parameter is called 'weigth'; the nearest names are 'weight'
    """


class AmbiguousNameError(_NameError):
    """A name that stands for several: a bare one that parameters share, or "the" base model where there are more.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> groups = [{"params": list(model.named_parameters())} for model in (one, other)]
        >>> AdamW(groups).id_of("weight")
        Traceback (most recent call last):
            ...
        paramstate.errors.AmbiguousNameError: the name 'weight' is shared by '0:weight', '1:weight'; use one of these
    """


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Names for a message: quoted, and cut where there are many.

    >>> listed(["a", "b"])
    "'a', 'b'"
    >>> listed([str(i) for i in range(10)], limit=2)
    "'0', '1' and 8 more"
    """
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
