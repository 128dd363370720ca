"""Interleaved timing on a noisy machine: all that is compared runs in every round; ratios are taken within a round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WARM_UPS = 3
ROUNDS = 15

Action = Callable[[], object]
Times = dict[str, list[float]]


def nothing() -> None:
    """Stand for the preparation that a contestant does not need."""


@dataclass(frozen=True)
class Contestant:
    """What is timed, and what happens before it each time, untimed."""

    run: Action
    before: Action = nothing

    def timed(self) -> float:
        """Prepare, then run once under the clock."""
        self.before()
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of one quantity over the rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise values."""
        return cls(statistics.median(values), min(values), max(values))


def measure(contestants: Mapping[str, Contestant], rounds: int = ROUNDS) -> Times:
    """Seconds of each contestant in each round; who goes first changes from round to round."""
    names = list(contestants)
    for _ in range(WARM_UPS):
        for contestant in contestants.values():
            contestant.timed()
    times: Times = {name: [] for name in names}
    gc.collect()
    gc.disable()  # a collection would fall on whoever happens to run
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(contestants[name].timed())
    finally:
        gc.enable()
    return times


def ratios(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """How many times as long the first takes as the second, round by round."""
    return Spread.of([a / b for a, b in zip(slower, faster, strict=True)])


def fastest(candidates: Mapping[str, Action], repeats: int = 3) -> str:
    """The name of the candidate with the least time: the setting that the other side is given."""
    least = {name: float("inf") for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            least[name] = min(least[name], Contestant(run).timed())
    return min(least, key=lambda name: least[name])
