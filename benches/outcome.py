"""What a row is, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from timing import Spread, Times

BANDWIDTH_TARGET = 0.9  # of the machine's plain read-modify-write loop, in every large row


@dataclass(frozen=True)
class Target:
    """The number that a row's own number is held against."""

    bound: Literal["at least", "at most"]
    number: float
    unit: Literal["×", "ms"] = "×"

    def met(self, value: float) -> bool:
        """Whether a measured number reaches it."""
        return value >= self.number if self.bound == "at least" else value <= self.number

    def __str__(self) -> str:
        sign = "≥" if self.bound == "at least" else "≤"
        return f"{sign} {self.number:g} {self.unit}"


@dataclass(frozen=True)
class Outcome:
    """One row, measured."""

    number: Spread  # what the target is about: a ratio of times, or milliseconds
    ours: Spread  # seconds
    theirs: Spread | None  # seconds
    setting: str  # what torch was given
    bandwidth: Spread | None = None  # share of the machine's
    bytes_moved: int | None = None
    notes: tuple[str, ...] = ()
    times: Times = field(default_factory=dict)  # everything, for the file


@dataclass(frozen=True)
class Row:
    """A line of the table: a name to pick it by, a title to read, a target, and how to measure it."""

    name: str
    title: str
    target: Target
    measure: Callable[[], Outcome]
