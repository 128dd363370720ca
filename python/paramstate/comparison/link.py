"""Two parameters that belong together, and how the one is laid out as the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .layout import Layout, Part

MatchedBy = Literal["name", "map", "content", "structure"]


@dataclass(frozen=True, slots=True)
class Link:
    """A parameter of the one side, or a part of it, and its partner on the other."""

    a: str
    b: str
    layout: Layout
    by: MatchedBy
    a_part: Part | None = None
    b_part: Part | None = None

    @property
    def reversed(self) -> Link:
        """The same, seen from the other side."""
        return Link(self.b, self.a, self.layout.inverse, self.by, self.b_part, self.a_part)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Which parts of what belong together, as a row of the report names them."""
        return self.a, str(self.a_part or ""), self.b, str(self.b_part or "")

    def part(self, tensor: Tensor) -> Tensor:
        """The part of the one side's tensor."""
        return tensor if self.a_part is None else self.a_part.of(tensor)

    def source(self, tensor: Tensor) -> Tensor:
        """The part of the one side's tensor, in the other's layout."""
        return self.layout.of(self.part(tensor))

    def target(self, tensor: Tensor) -> Tensor:
        """The part of the other side's tensor."""
        return tensor if self.b_part is None else self.b_part.of(tensor)
