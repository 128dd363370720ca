"""The rule by which a row is within the seeds' spread of float32, fixed before any result was seen."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Literal

from fidelity_training import Run

ALLOWED = 2.0  # of the baseline's standard deviations
_T_OF_95_PERCENT = {4: 2.776}  # Student's t, two-sided, by degrees of freedom


@dataclass(frozen=True)
class Verdict:
    """A row against the baseline, seed by seed."""

    mean: float
    deviation: float  # sample standard deviation over seeds
    difference: float  # of means, which is the mean of differences seed by seed
    margin: float  # half of the 95 % interval of that
    spread: float  # the baseline's own sample standard deviation

    @property
    def in_spreads(self) -> float:
        """The difference in units of the baseline's spread."""
        return self.difference / self.spread

    @property
    def word(self) -> Literal["within", "above", "below"]:
        """The rule: within, if the means differ by at most two of the baseline's standard deviations."""
        if math.fabs(self.in_spreads) <= ALLOWED:
            return "within"
        return "below" if self.in_spreads < 0 else "above"


def judge(runs: list[Run], baseline: list[Run]) -> Verdict:
    """Compare the final losses of runs with the same seeds."""
    finals, base = [run.final for run in runs], [run.final for run in baseline]
    differences = [final - of_base for final, of_base in zip(finals, base, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Verdict(
        mean=statistics.fmean(finals),
        deviation=statistics.stdev(finals),
        difference=statistics.fmean(differences),
        margin=_T_OF_95_PERCENT[len(differences) - 1] * error,
        spread=statistics.stdev(base),
    )
