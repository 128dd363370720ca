"""The bits of tensors: they tell 0.0 from -0.0, and let a NaN equal itself."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(values: Tensor) -> Tensor:
    """The bits of floating elements, as integers of their size; elements of other dtypes as they are.

    >>> as_integers(torch.tensor([1.0, -0.0])).tolist()
    [1065353216, -2147483648]
    """
    return values.view(_INTEGERS[values.dtype.itemsize]) if values.is_floating_point() else values


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one device have the same shape, dtype and bits.

    >>> same_bits(torch.tensor(float("nan")), torch.tensor(float("nan"))), same_bits(torch.zeros(1), -torch.zeros(1))
    (True, False)
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_complex():
        one, other = (torch.view_as_real(values.resolve_conj()) for values in (one, other))
    return torch.equal(as_integers(one.resolve_neg()), as_integers(other.resolve_neg()))
