"""What becomes of the rows of a tensor along one dimension: each new row comes from an old one, or is new."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

FRESH = -1
"""The source of a row that comes from none."""


@dataclass(frozen=True, slots=True)
class Move:
    """New rows by their sources, which are int64 of shape (new count,) on the host.

    Value and state have sources of their own: a reset row keeps its value and gets fresh state.
    """

    dim: int
    values: Tensor
    state: Tensor
    fill: Tensor | None = None
    """The values of the rows that come from none, in their order; zeros without it."""

    @classmethod
    def of_all(cls, dim: int, sources: Tensor, fill: Tensor | None = None) -> Move:
        """Value and state of each row come from the same one."""
        return cls(dim, sources, sources, fill)

    @property
    def keeps_values(self) -> bool:
        """Whether all values stay what and where they are, if the rows were ``range(len(values))`` before."""
        return bool((self.values == torch.arange(len(self.values))).all())


def moved(tensor: Tensor, dim: int, sources: Tensor, fill: Tensor | None = None) -> Tensor:
    """``tensor`` with rows along ``dim`` from ``sources``, in new memory with its dimensions in the same order.

    Args:
        tensor: any dtype and device.
        dim: along which the rows lie.
        sources: for each new row the old one, or ``FRESH``.
        fill: the fresh rows in order; zeros without it.
    """
    order = _memory_order(tensor)
    if order is not None:
        turned = moved(tensor.permute(order), order.index(dim), sources, None if fill is None else fill.permute(order))
        return turned.permute([order.index(place) for place in range(len(order))])
    fresh = (sources == FRESH).nonzero().flatten().to(tensor.device)
    if len(fresh) == len(sources):  # there may be no old row at all
        shape = list(tensor.shape)
        shape[dim] = len(sources)
        new = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    else:
        new = tensor.detach().index_select(dim, sources.clamp(min=0).to(tensor.device))
    if fill is not None:
        new.index_copy_(dim, fresh, fill.detach().to(tensor.device, tensor.dtype))
    elif len(fresh):
        new.index_fill_(dim, fresh, 0)
    return new


def _memory_order(tensor: Tensor) -> list[int] | None:
    """The dimensions as they lie in memory, the widest first; ``None`` where that is their own order.

    Weights of a convolution in ``channels_last`` stay so: their gradients arrive in that order as well.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_contiguous():
        return None
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return None if order == list(range(tensor.dim())) else order
