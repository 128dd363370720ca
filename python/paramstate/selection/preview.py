"""What a selection holds, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One parameter of a selection."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    numel: int
    requires_grad: bool
    tied: tuple[str, ...] = ()
    """Its other names."""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        shape = " x ".join(map(str, self.shape)) or "scalar"
        called = " = ".join((self.name, *self.tied))
        dtype = str(self.dtype).removeprefix("torch.")
        return called, shape, dtype, f"{self.numel:,}", "yes" if self.requires_grad else "no"


@dataclass(frozen=True, slots=True, repr=False)
class Preview:
    """A selection as it resolves now: it prints as a table, and :attr:`rows` has the data."""

    rows: tuple[PreviewRow, ...]
    outside: tuple[PreviewRow, ...] = ()
    """The parameters of the model that are not selected."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PreviewRow]:
        return iter(self.rows)

    @property
    def numel(self) -> int:
        """The number of selected elements."""
        return sum(row.numel for row in self.rows)

    def __str__(self) -> str:
        header = ("name", "shape", "dtype", "elements", "requires_grad")
        table = [header, *(row.cells for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [_aligned(cells, widths) for cells in table]
        every = len(self.rows) + len(self.outside)
        elements = self.numel + sum(row.numel for row in self.outside)
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([*lines, f"{len(self.rows)} of {every} parameters, {self.numel:,} of {elements:,} elements"])

    __repr__ = __str__


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    name, shape, dtype, numel, requires_grad = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join((name, shape, dtype, numel.strip().rjust(widths[3]), requires_grad)).rstrip()


def preview_of(selected: Mapping[Tensor, list[str]], outside: Mapping[Tensor, list[str]]) -> Preview:
    """The table of parameters, each with its names."""
    return Preview(_rows(selected), _rows(outside))


def _rows(parameters: Mapping[Tensor, list[str]]) -> tuple[PreviewRow, ...]:
    return tuple(
        PreviewRow(names[0], tuple(param.shape), param.dtype, param.numel(), param.requires_grad, tuple(names[1:]))
        for param, names in parameters.items()
    )
