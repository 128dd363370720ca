"""What differs between the rows of one parameter: how many steps each has taken, and whether it is frozen.

A parameter whose rows never differ has none of this and pays nothing for it. Rows lie along any one dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paramstate.errors import RowIndexError, UnsupportedError

RowIndex = Tensor | Sequence[int] | slice | int
"""Which rows: a mask with one element for each row, or indices; negative ones count from the end."""


@dataclass(slots=True)
class Rows:
    """One parameter's rows along ``dim``.

    With the parameter's scalar ``step`` t, row r has taken ``t - offsets[r]`` steps: a step of all rows leaves the
    offsets as they are, and a row that sits one out gets one more.
    """

    dim: int
    offsets: Tensor
    """int64 of shape (n,), on the host."""
    frozen: Tensor | None = None
    """bool of shape (n,), on the host; ``None`` where no row is frozen."""

    @classmethod
    def alike(cls, count: int, dim: int) -> Rows:
        """``count`` rows that have taken every step."""
        return cls(dim, torch.zeros(count, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def common_offset(self) -> int | None:
        """The offset that all rows share; ``None`` where they differ or one is frozen."""
        if self.frozen is not None and bool(self.frozen.any()):
            return None
        if not len(self):
            return 0
        first = int(self.offsets[0])
        return first if bool((self.offsets == first).all()) else None

    def fits(self, param: Tensor) -> bool:
        """Whether the parameter has so many rows."""
        return self.dim < param.dim() and len(self) == param.shape[self.dim]

    def begun_anew(self) -> Rows | None:
        """The rows of a parameter that was never stepped: those that are frozen stay so."""
        if self.frozen is None:
            return None
        return Rows(self.dim, torch.zeros_like(self.offsets), self.frozen)

    def copied(self) -> Rows:
        """The same in memory of its own."""
        return Rows(self.dim, self.offsets.clone(), None if self.frozen is None else self.frozen.clone())

    def as_data(self) -> dict[str, Any]:
        """Plain data for a state dict."""
        return {"dim": self.dim, "offsets": self.offsets, "frozen": self.frozen}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Rows:
        """What :meth:`as_data` wrote, copied.

        Raises:
            TypeError, ValueError: something else wrote it.
        """
        rows = cls(**data).copied()
        if type(rows.dim) is not int or rows.dim < 0:
            raise ValueError(f"the dim of rows is {rows.dim!r}")
        if rows.offsets.dtype != torch.int64 or rows.offsets.dim() != 1:
            raise ValueError(f"the offsets of rows are {rows.offsets.dtype} of shape {list(rows.offsets.shape)}")
        if rows.frozen is not None and (rows.frozen.dtype != torch.bool or rows.frozen.shape != rows.offsets.shape):
            raise ValueError(f"the frozen rows are {rows.frozen.dtype} of shape {list(rows.frozen.shape)}")
        return rows

    def broadcast(self, values: Tensor, param: Tensor) -> Tensor:
        """One value for each row, shaped to broadcast to the parameter and on its device."""
        shape = [1] * param.dim()
        shape[self.dim] = -1
        return values.to(param.device).reshape(shape)


def along(rows: Rows | None, param: Tensor, dim: int, called: str) -> Rows:
    """The rows of a parameter along ``dim``, made where there are none yet.

    Raises:
        UnsupportedError: the rows differ along another dimension already.
    """
    if rows is None:
        return Rows.alike(param.shape[dim], dim)
    common = rows.common_offset
    if rows.dim != dim and common is not None:
        return Rows(dim, torch.full((param.shape[dim],), common, dtype=torch.int64))
    if rows.dim != dim:
        differ = bool((rows.offsets != rows.offsets[0]).any())
        some_frozen = rows.frozen is not None and bool(rows.frozen.any())
        reasons = [*(["steps taken"] if differ else []), *(["frozen rows"] if some_frozen else [])]
        advice = [*(["opt.reset(...)"] if differ else []), *(["opt.unfreeze_rows(...)"] if some_frozen else [])]
        raise UnsupportedError(
            f"{called}: its rows differ along dim {rows.dim} already ({' and '.join(reasons)}), and a second such "
            f"dimension, {dim}, is not kept; use dim={rows.dim}, or {' and '.join(advice)} first"
        )
    return rows


def normal_dim(dim: int, param: Tensor, called: str) -> int:
    """A dimension counted from the front.

    Raises:
        RowIndexError: the parameter has no such dimension.
    """
    if not -param.dim() <= dim < param.dim():
        raise RowIndexError(f"{called} has shape {list(param.shape)}, and no dim {dim}")
    return dim % param.dim()


def row_indices(index: RowIndex, count: int, called: str) -> Tensor:
    """Which rows are meant, as int64 indices on the host from 0 to ``count - 1``, in the order given.

    Raises:
        RowIndexError: a mask has another length, or an index points beyond the rows.
        TypeError: it is neither a mask nor indices.
    """
    if isinstance(index, slice):
        return torch.arange(count)[index]
    given = torch.as_tensor([index] if isinstance(index, int) else index).detach().cpu()
    if given.dtype is torch.bool:
        if given.shape != (count,):
            raise RowIndexError(f"{called} has {count} rows, the mask has shape {list(given.shape)}")
        return given.nonzero().flatten()
    if given.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if given.is_floating_point() or given.is_complex():
        raise TypeError(f"{called}: rows are named by a boolean mask or by integers, got {given.dtype}")
    if given.dim() != 1:
        raise RowIndexError(f"{called}: row indices must be one-dimensional, got shape {list(given.shape)}")
    beyond = given[(given < -count) | (given >= count)]
    if beyond.numel():
        raise RowIndexError(f"{called} has {count} rows, the index {int(beyond[0])} points beyond them")
    return given.to(torch.int64) % count


def row_mask(index: RowIndex, count: int, called: str) -> Tensor:
    """Which rows are meant, as a bool mask of shape (count,) on the host; raises as :func:`row_indices`."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[row_indices(index, count, called)] = True
    return mask
