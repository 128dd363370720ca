"""What a step is refused for: each obstacle that the compiled walk found, as an error that says what to do."""

from __future__ import annotations

from typing import NoReturn

from paramstate import _core
from paramstate.errors import (
    ConstraintError,
    OverlapError,
    ParamStateError,
    StateShapeError,
    UnsupportedError,
)
from paramstate.identity.membership import Membership
from paramstate.precision.state_dtype import MOMENTS

from .places_in_groups import GroupPlace, called_at, param_at


def raise_for(optimizer: Membership, problem: _core.Problem) -> NoReturn:
    """Raise what stands in the way of a step, by name.

    Raises:
        StateShapeError, OverlapError, ConstraintError: what the walk found.
    """
    name = called_at(optimizer, (problem.group, problem.index))
    other = None if problem.other is None else called_at(optimizer, problem.other)
    raise _of_shapes(name, problem) or _of_rows(name, problem) or _of_memory(name, other, problem)


def raise_for_unkept(optimizer: Membership, place: GroupPlace) -> NoReturn:
    """Raise for moments that cannot be kept in what is declared, by name.

    Raises:
        StateShapeError: one has not the shape of the parameter.
        UnsupportedError: one is no ordinary tensor of floats.
    """
    name, param = called_at(optimizer, place), param_at(optimizer, place)
    held = {key: optimizer.state[param][key] for key in MOMENTS if key in optimizer.state[param]}
    for key, moment in held.items():
        if moment.shape != param.shape:
            raise StateShapeError(
                _STATE_SHAPE.format(name=name, key=key, got=list(moment.shape), expected=list(param.shape))
            )
    kinds = "; ".join(f"{key} of {held[key].dtype} and {held[key].layout} on {held[key].device}" for key in held)
    raise UnsupportedError(
        f"parameter {name}: its moments cannot be kept as state_dtype={optimizer._kept_as(param)!r} ({kinds}); put "
        f"floating tensors on {param.device} there, or call opt.reset({name})"
    )


_STATE_SHAPE = (
    "parameter {name}: its state {key!r} has shape {got}, the parameter has {expected}; opt.replace_({name}, value, "
    "state=map) carries state through a change of shape, opt.reset({name}) starts it afresh"
)


def _of_shapes(name: str, problem: _core.Problem) -> ParamStateError | None:
    """What does not have the shape of the value."""
    if problem.kind == "state_shape":
        return StateShapeError(
            _STATE_SHAPE.format(name=name, key=problem.key, got=problem.got, expected=problem.expected)
        )
    if problem.kind == "grad_shape":
        return StateShapeError(
            f"parameter {name}: its gradient has shape {problem.got}, the parameter has {problem.expected}; call "
            f"zero_grad() and backward() again, and opt.replace_({name}, value, state=map) to carry the state"
        )
    if problem.kind in ("bound_shape", "bound_dtype", "dim", "rows_dtype", "rows_undeclared"):
        return ConstraintError(
            f"parameter {name} of shape {problem.expected}: what was declared as its {problem.key!r} (shape "
            f"{problem.got}) does not fit it any more; declare it anew with opt.constrain(...)"
        )
    return None


def _of_rows(name: str, problem: _core.Problem) -> ParamStateError | None:
    """Rows that are not those whose steps are known."""
    if problem.kind == "rows_length":
        return StateShapeError(
            f"parameter {name}: it has {problem.expected[0]} rows, and {problem.got[0]} rows are known to differ "
            f"({problem.key}); use opt.edit_rows() to change the number of rows; opt.unfreeze_rows({name}) "
            f"and opt.reset({name}) let all of them start afresh"
        )
    if problem.kind == "rows_ahead":
        return StateShapeError(
            f"parameter {name}: its state 'step' is {problem.expected[0]}, and a row was made at step "
            f"{problem.got[0]}; put the former 'step' back, or call opt.reset({name})"
        )
    return None


def _of_memory(name: str, other: str | None, problem: _core.Problem) -> ParamStateError:
    """Memory that would be written twice."""
    if problem.kind == "expanded":
        return OverlapError(
            f"parameter {name}: {problem.key!r} shares memory with itself (shape {problem.got}, an expand()ed "
            "tensor); give it memory of its own with .contiguous()"
        )
    if problem.kind == "state_overlap":
        return OverlapError(
            f"parameter {name}: {problem.key!r} shares memory with something else that the step writes; give it "
            "memory of its own with .clone()"
        )
    both = name if other is None else f"{name} and {other}"
    return OverlapError(
        f"parameters {both} share memory, so each would be updated twice; give one of them memory of its own with "
        ".clone()"
    )
