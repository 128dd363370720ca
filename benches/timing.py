"""Interleaved timing on a noisy machine: all that is compared takes turns; ratios are taken within a round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from scale import ROUNDS, WARM_UPS

Action = Callable[[], object]
Times = dict[str, dict[int, float]]  # seconds by round


def nothing() -> None:
    """Stand for the preparation that a contestant does not need."""


def rest() -> None:
    """Wait until the threads of whoever ran before have stopped spinning: who runs later would not meet them."""
    time.sleep(0.02)


@dataclass(frozen=True)
class Contestant:
    """What is timed, what happens before it each time, untimed, and in which rounds: in all, or in every n-th."""

    run: Action
    before: Action = nothing
    every: int = 1

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
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise values."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))


def measure(contestants: Mapping[str, Contestant], rounds: int = ROUNDS) -> Times:
    """Seconds of each contestant in each of its rounds; who goes first changes from round to round."""
    names = list(contestants)
    for _ in range(WARM_UPS):
        for contestant in contestants.values():
            contestant.timed()
    times: Times = {name: {} for name in names}
    gc.collect()
    gc.disable()  # a collection would fall on whoever happens to run
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if turn % contestants[name].every == 0:
                    times[name][turn] = contestants[name].timed()
    finally:
        gc.enable()
    return times


def ratios(slower: Mapping[int, float], faster: Mapping[int, float]) -> Spread:
    """How many times as long the first takes as the second, round by round, in the rounds of both."""
    return Spread.of(seconds / faster[turn] for turn, seconds in slower.items() if turn in faster)


def least_times(candidates: Mapping[str, Contestant], repeats: int = 3) -> dict[str, float]:
    """Seconds of each candidate at best: who is worth timing in every round."""
    least = {name: float("inf") for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            least[name] = min(least[name], candidate.timed())
    return least
