"""Numbers that stay the same when elements move: two tensors that differ in one hold different elements."""

from __future__ import annotations

import torch
from torch import Tensor

from paramstate.bits import as_integers

_MULTIPLIER = 0x2545F4914F6CDD1D  # an odd constant of Steele & Vigna's, as in xorshift*


def element_hashes(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A hash of each element as it is in ``dtype``; integers that wrap, so their sum knows no order and no rounding."""
    values = tensor.to(dtype)
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj()).sum(-1)
    if values.is_floating_point():
        values = as_integers(values + 0)  # which makes 0.0 of -0.0
    bits = (values.to(torch.int64) + 1) * _MULTIPLIER
    return (bits ^ (bits >> 29)) * _MULTIPLIER


def fingerprint(hashes: Tensor) -> int:
    """The fingerprint of the elements with these hashes."""
    return int(hashes.sum()) if hashes.numel() else 0


def is_constant(tensor: Tensor) -> bool:
    """Whether all elements are equal: content says nothing about such a tensor's partner."""
    return tensor.numel() < 2 or bool((tensor == tensor.flatten()[0]).all())


def order_along(x: Tensor, y: Tensor, dim: int) -> Tensor | None:
    """The index with which ``x.index_select(dim, index)`` is ``y``, if its slices along ``dim`` were only reordered."""
    mine, theirs = (_slice_hashes(tensor, dim) for tensor in (x, y))
    ours, order_x = mine.sort(stable=True)
    found, order_y = theirs.sort(stable=True)
    if not torch.equal(ours, found):
        return None
    index = torch.empty_like(order_x)
    index[order_y] = order_x
    return index if torch.equal(x.index_select(dim, index), y) else None


def _slice_hashes(tensor: Tensor, dim: int) -> Tensor:
    hashes = element_hashes(tensor, tensor.dtype).movedim(dim, 0).unsqueeze(-1).flatten(1)  # a vector's too
    places = (torch.arange(hashes.shape[1], device=hashes.device) + 1) * _MULTIPLIER
    return (hashes * (places | 1)).sum(1)
