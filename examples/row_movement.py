"""How far new rows move in their first steps, in learning rates a step: about 1.0 is what a fresh Adam does."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from torch import Tensor, nn

FIRST = 10  # steps of a row that are looked at


class Movement:
    """Collects how far rows move in their first steps."""

    def __init__(self, rates: Mapping[str, float]) -> None:
        self._rates = rates
        self._by_age: list[list[float]] = [[] for _ in range(FIRST)]

    def watch(self, params: nn.ParameterDict, age: Tensor, step: Callable[[], object]) -> None:
        """Step, and note the mean of |change| / lr over the elements of new rows, each attribute with equal weight.

        Args:
            params: by attribute, with rows along dim 0.
            age: of shape (n,): which step this is for each row, from 1; beyond `FIRST` a row is no longer new.
            step: takes the step.
        """
        before = {name: param.detach().clone() for name, param in params.items()}
        step()
        for steps in age[age <= FIRST].unique().tolist():
            is_new = age == steps
            moved = [
                (params[name].detach() - old)[is_new].abs().mean().item() / self._rates[name]
                for name, old in before.items()
            ]
            self._by_age[steps - 1].append(statistics.fmean(moved))

    @property
    def by_age(self) -> list[float]:
        """The mean over all new rows of their first, second, ... step."""
        return [statistics.fmean(seen) for seen in self._by_age if seen]

    @property
    def mean(self) -> float:
        """The mean over those steps."""
        return statistics.fmean(self.by_age)
