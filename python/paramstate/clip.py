"""Clipping of values and gradients, with everything that belongs to a parameter kept."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor

from . import _core
from .declared.bounds import Bound, broadcast_bound, require_ordered, require_values
from .declared.constraints import Constraint
from .errors import ConstraintError
from .identity.hooks import listeners
from .identity.membership import Membership
from .identity.table import Entry
from .identity.versions import own_writes


@overload
def clip_(param: Tensor, min: Bound = None, max: Bound = None) -> Tensor: ...
@overload
def clip_(param: Tensor, min: Callable[[Tensor], Tensor]) -> Tensor: ...
def clip_(param: Tensor, min: Bound | Callable[[Tensor], Tensor] = None, max: Bound = None) -> Tensor:
    """Clip a parameter in place: its ID, moments and step stay, and its version counter grows.

    Args:
        param: the parameter, of any shape, floating dtype and device.
        min: lower bound, a number or a tensor that broadcasts to the parameter; or a function that is given a copy of
            the values and returns new ones of the same shape, for bounds that depend on other values.
        max: upper bound, likewise. Without any bound, the constraint that the parameter's optimizer declared for it
            is applied.

    Returns:
        Tensor: the parameter itself.

    Raises:
        ConstraintError: ``min`` is above ``max`` somewhere, a bound is NaN or no real number, a bound does not
            broadcast, the parameter is complex, the function returns another shape or comes with a second bound, or
            there is neither a bound nor a declared constraint. The values are as they were.
        UnsupportedError: the parameter is on the meta device, where it has no values.
        TypeError: ``param`` is no tensor.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([-2.0, 0.5, 3.0]))
        >>> clip_(weight, -1.0, 1.0) is weight
        True
        >>> weight.tolist()
        [-1.0, 0.5, 1.0]
        >>> clip_(weight, lambda values: values.clamp(max=values.mean())).tolist()
        [-1.0, 0.1666666716337204, 0.1666666716337204]
    """
    if not isinstance(param, Tensor):
        raise TypeError(
            f"clip_ takes the parameter itself, got {type(param).__name__}; "
            "opt.param(opt.ids[name]) is the one of a name"
        )
    called = _Called(param)
    if callable(max) or (callable(min) and max is not None):
        raise ConstraintError(f"{called}: a function takes the place of both bounds; give it as the only one")
    if callable(min) or (min is None and max is None):
        require_values(called, param)
        constraint = _by_function(min) if callable(min) else _declared(param)
        with torch.no_grad(), own_writes(_entries(param)):
            constraint.project_(param, str(called))
        return param
    low, high = broadcast_bound(param, called, "min", min), broadcast_bound(param, called, "max", max)
    if low is not None and high is not None:
        require_ordered(called, low, high)
    require_values(called, param)
    with torch.no_grad(), own_writes(_entries(param)):
        param.clamp_(low, high)
    return param


def _by_function(function: Callable[[Tensor], Tensor]) -> Constraint:
    from .declared.projections import Projection

    return Projection(function)


def _entries(param: Tensor) -> list[Entry]:
    """What the optimizers that know the parameter keep about it."""
    known = (optimizer._table.of(param) for optimizer in listeners() if isinstance(optimizer, Membership))
    return [entry for entry in known if entry is not None]


def _declared(param: Tensor) -> Constraint:
    for optimizer in listeners():
        if isinstance(optimizer, Membership):
            entry = optimizer._entry(param)
            if entry is not None and entry.constraint is not None:
                return entry.constraint
    raise ConstraintError(
        f"{_Called(param)}: no bound is given and no optimizer declared a constraint for it; give min, max or a "
        "function, or declare one with opt.constrain(...)"
    )


class _Called:
    """How a message names a parameter: by the name that its optimizer knows, else by its shape; found when printed."""

    def __init__(self, param: Tensor) -> None:
        self._param = param

    def __str__(self) -> str:
        for optimizer in listeners():
            if isinstance(optimizer, Membership):
                entry = optimizer._entry(self._param)
                if entry is not None:
                    return optimizer._table.called(entry)
        return f"parameter of shape {list(self._param.shape)}"


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the global norm of gradients in place: torch's function, with a second pass only where it clips.

    Every gradient that is there is counted, also that of a parameter or of rows which an optimizer froze, and one that
    was left where ``requires_grad`` is off: this function cannot know. The optimizer's ``max_grad_norm`` leaves out
    what the optimizer froze.

    Args:
        parameters: parameters whose ``.grad`` is clipped.
        max_norm: largest norm allowed.
        norm_type: order of the norm; for 2 on the host our kernels are used (sums in float64 and in one fixed order,
            so the result does not depend on the number of threads), for every other order torch's own function.
        error_if_nonfinite: raise where the norm is NaN or infinite.
        foreach: passed on to torch's function where that is used.

    Returns:
        Tensor: the total norm, 0-dim, before clipping.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set. No gradient is changed then.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if isinstance(parameters, types.GeneratorType) and not given:
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2)
    grads = [param.grad for param in given if param.grad is not None]
    threads = torch.get_num_threads()
    squares, elsewhere = _core.sum_of_squares(grads, threads=threads) if float(norm_type) == 2.0 else (0.0, [0])
    if elsewhere or not grads:
        return torch.nn.utils.clip_grad_norm_(given, max_norm, norm_type, error_if_nonfinite, foreach)
    norm = math.sqrt(squares)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(
            f"The total norm of order {float(norm_type)} for gradients from `parameters` is non-finite, so it cannot "
            "be clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    coefficient = clip_coefficient(norm, float(max_norm))
    if coefficient != 1.0:
        left = _core.scale_(grads, coefficient, threads=threads)
        torch.autograd.graph.increment_version(grads)
        for index in left:
            # Gradients that share a part of their memory: scaled one after another, as torch does.
            grads[index].mul_(coefficient)
    dtype = grads[0].dtype
    for grad in grads:
        dtype = torch.promote_types(dtype, grad.dtype)
    return torch.tensor(norm, dtype=dtype)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """What gradients are multiplied with: ``min(1, max_norm / (norm + 1e-6))``, and NaN where the norm is.

    >>> clip_coefficient(0.5, 1.0)
    1.0
    """
    coefficient = max_norm / (norm + 1e-6)
    return 1.0 if coefficient > 1.0 else coefficient


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Clip each element of the gradients to ``[-clip_value, clip_value]``, in place: torch's own function.

    Args:
        parameters: parameters whose ``.grad`` is clipped.
        clip_value: the bound.
        foreach: as in :func:`torch.nn.utils.clip_grad_value_`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([-3.0, 0.5])
        >>> clip_grad_value_(weight, 1.0)
        >>> weight.grad
        tensor([-1.0000,  0.5000])
    """
    torch.nn.utils.clip_grad_value_(parameters, clip_value, foreach)
