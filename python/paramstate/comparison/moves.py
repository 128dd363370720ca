"""How elements that only moved got to their new places."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .content import find_layout
from .fingerprint import order_along
from .layout import Layout
from .link import Link


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """Lay out anew, then reorder the slices along one dimension."""

    layout: Layout
    order: Tensor | None = None
    dim: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """``tensor``, moved."""
        laid_out = self.layout.of(tensor)
        return laid_out if self.order is None else laid_out.index_select(self.dim, self.order.to(laid_out.device))

    def __str__(self) -> str:
        return str(self.layout) if self.order is None else f"reordered along dim {self.dim}"


def find_move(link: Link, tensor: Tensor, target: Tensor) -> Move | None:
    """The move that makes ``target`` from the link's part of ``tensor``, if there is one."""
    layout = find_layout(link.part(tensor), target)
    if layout is not None:
        return Move(layout)
    laid_out = link.source(tensor).to(target.device, target.dtype)
    for dim in range(target.ndim):
        order = order_along(laid_out, target, dim)
        if order is not None:
            return Move(link.layout, order, dim)
    return None
