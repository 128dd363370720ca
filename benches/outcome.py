"""What a row is, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from timing import Spread, Times, ratios

BANDWIDTH_TARGET = 0.9  # of the machine's plain read-modify-write loop, in every large row
OURS = "paramstate"


class NotMeasuredError(Exception):
    """A row, or one side of it, cannot be measured here; the text says why."""


@dataclass(frozen=True)
class Target:
    """The number that a row's own number is held against."""

    bound: Literal["at least", "at most"]
    number: float
    unit: str = "×"

    def met(self, value: float) -> bool:
        """Whether a measured number reaches it."""
        return value >= self.number if self.bound == "at least" else value <= self.number

    def __str__(self) -> str:
        sign = "≥" if self.bound == "at least" else "≤"
        return f"{sign} {self.number:g} {self.unit}"


@dataclass(frozen=True)
class Outcome:
    """One row, measured; or, where there is no number, why not."""

    number: Spread | None  # what the target is about
    against: str = ""  # whose time the number compares with ours
    ours: Spread | None = None  # seconds
    others: Mapping[str, Spread] = field(default_factory=dict)  # seconds of each other contestant
    over_ours: Mapping[str, Spread] = field(default_factory=dict)  # the same over ours, round by round
    missing: Mapping[str, str] = field(default_factory=dict)  # who did not run, and why; "" is the row itself
    bandwidth: Spread | None = None  # share of the machine's
    bytes_moved: int | None = None
    notes: tuple[str, ...] = ()
    times: Times = field(default_factory=dict)  # everything, for the file


def compared(
    times: Times,
    against: str,
    *,
    notes: tuple[str, ...] = (),
    missing: Mapping[str, str] | None = None,
) -> Outcome:
    """What the times of us and of others give; the number is how many times as long `against` takes as we do."""
    others = [name for name in times if name != OURS]
    over_ours = {name: ratios(times[name], times[OURS]) for name in others}
    return Outcome(
        number=over_ours.get(against),
        against=against,
        ours=Spread.of(times[OURS].values()),
        others={name: Spread.of(times[name].values()) for name in others},
        over_ours=over_ours,
        missing=missing or {},
        notes=notes,
        times=times,
    )


def not_measured(reason: str) -> Outcome:
    """A row that cannot be measured here."""
    return Outcome(number=None, missing={"": reason})


@dataclass(frozen=True)
class Row:
    """A line of the table: a name to pick it by, a title to read, a target, and how to measure it."""

    name: str
    title: str
    target: Target | None
    measure: Callable[[], Outcome]

    def verdict(self, outcome: Outcome) -> Literal["met", "missed", ""]:
        """Whether the target is met, where there is one and a number."""
        if self.target is None or outcome.number is None:
            return ""
        return "met" if self.target.met(outcome.number.median) else "missed"
