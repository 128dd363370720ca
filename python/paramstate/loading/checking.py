"""Whether what was matched fits: shapes and dtypes of the tensors, and IDs; found out before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from paramstate.errors import LoadError

from .matching import LoadReport, Ours
from .reading import Saved


def check(pairs: Iterable[tuple[Saved, Ours]], report: LoadReport, shaped: Iterable[str], *, strict: bool) -> None:
    """Check shapes and dtypes of what would be loaded, and complete the report.

    Args:
        pairs: saved with ours.
        report: gets ``loaded``, ``reshaped`` and ``retyped``.
        shaped: the state keys whose tensors must have the parameter's shape.
        strict: whether another shape is an error, or only leaves that parameter without state.

    Raises:
        LoadError: strict and a shape differs, or a moment is of no floating dtype.
    """
    for saved, ours in pairs:
        tensors = {key: value for key in shaped if isinstance(value := (saved.state or {}).get(key), Tensor)}
        wrong = next((key for key, tensor in tensors.items() if tensor.shape != ours.param.shape), None)
        if wrong is not None:
            if strict:
                raise LoadError(
                    f"parameter {ours.label!r}: the saved {wrong!r} has shape {list(tensors[wrong].shape)}, the "
                    f"parameter has {list(ours.param.shape)}; load with strict=False to leave its state out"
                )
            report.reshaped.append(ours.label)
            continue
        for key, tensor in tensors.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                raise LoadError(
                    f"parameter {ours.label!r}: the saved {key!r} has dtype {tensor.dtype}, which holds no moments"
                )
        if any(tensor.dtype != ours.param.dtype for tensor in tensors.values()):
            report.retyped.append(ours.label)
        report.loaded.append(ours.label)


def check_ids(pairs: Iterable[tuple[Saved, Ours]]) -> None:
    """Check that the saved IDs can be taken over, before anything is.

    Raises:
        LoadError: one is no integer from 1 to 2**63 - 1, or two parameters have the same.
    """
    owners: dict[int, Ours] = {}
    remedy = "mend state_dict['paramstate']['ids'], or delete it to keep the optimizer's own IDs"
    for saved, ours in pairs:
        if saved.id is None:
            continue
        if type(saved.id) is not int or not 1 <= saved.id < 2**63:
            raise LoadError(
                f"parameter {ours.label!r}: the saved ID is {saved.id!r}, an ID is an integer from 1 to 2**63 - 1; "
                f"{remedy}"
            )
        other = owners.setdefault(saved.id, ours)
        if other is not ours:
            raise LoadError(
                f"parameters {other.label!r} and {ours.label!r} have the same saved ID {saved.id}; {remedy}"
            )
