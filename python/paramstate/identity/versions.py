"""Who wrote a parameter: the step of its optimizer, a call of ours, or somebody else.

torch counts the writes of every tensor. The compiled step makes one write a step, so the count at the moment when the
moments began, plus the steps taken since, is what it should be now; what is beyond that was written by others, under
moments that belong to the values before. It costs nothing while training: the count is noted once for each parameter,
when its state is created.

Where somebody else wrote the step, that count says nothing any more; it is noted anew with the next look.

Not seen: writes through ``param.data`` or into the storage, which torch does not count. Not known: how many writes a
step makes that torch computes; there only a comparison without a step in between can tell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .table import Entry


class Baseline(NamedTuple):
    """What the count of writes was, and at which step."""

    version: int
    step: float
    counter: tuple[Tensor, int] | None
    """What holds the step, and the count of its writes where torch counts them: the compiled step makes none."""


def baseline(param: Tensor, state: dict[str, Any]) -> Baseline | None:
    """The baseline from now on; ``None`` where torch counts nothing, or there are no moments."""
    step = state.get("step")
    if param.is_inference() or step is None:
        return None
    counter = (step, step._version) if isinstance(step, Tensor) and not step.is_inference() else None
    return Baseline(param._version, float(step), counter)


def foreign_writes(since: Baseline, now: Baseline) -> int | None:
    """The writes that no step of the optimizer made; ``None`` where the counts do not fit together."""
    if not _same_counter(since.counter, now.counter):
        return None
    writes = (now.version - since.version) - (now.step - since.step)
    return int(writes) if writes >= 0 and now.step >= since.step else None


def _same_counter(one: tuple[Tensor, int] | None, other: tuple[Tensor, int] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one[0] is other[0] and one[1] == other[1]


@contextlib.contextmanager
def own_writes(entries: Iterable[Entry]) -> Iterator[None]:
    """Writes that the caller asked us for: they are nobody else's."""
    before = [(entry, entry.param, entry.param._version) for entry in entries if entry.baseline is not None]
    yield
    for entry, param, version in before:
        if entry.baseline is not None and entry.param is param:
            entry.baseline = entry.baseline._replace(version=entry.baseline.version + param._version - version)
