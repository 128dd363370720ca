"""How often others than an optimizer wrote a parameter, remembered with its values and put back with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from .hooks import listeners
from .membership import Membership
from .table import Entry
from .versions import Baseline, baseline, foreign_writes

WriteCounts = Mapping[int, int]
"""The writes of others, by the address of the entry in each optimizer that knows the parameter."""


def write_counts(param: Tensor) -> WriteCounts:
    """What every optimizer that knows the parameter knows of writes by others since the moments began."""
    counts = {}
    for entry, now in _known(param):
        writes = None if entry.baseline is None else foreign_writes(entry.baseline, now)
        if writes is not None:
            counts[id(entry)] = writes
    return counts


def put_back(param: Tensor, counts: WriteCounts) -> None:
    """Values came back, and whatever was written between is gone with them.

    Where nothing was known of writes then, because there were no moments yet, there are none.
    """
    for entry, now in _known(param):
        before = counts.get(id(entry), 0)
        writes = None if entry.baseline is None else foreign_writes(entry.baseline, now)
        if entry.baseline is None or writes is None:
            entry.baseline = now._replace(version=now.version - before)
        else:
            entry.baseline = entry.baseline._replace(version=entry.baseline.version + writes - before)


def _known(param: Tensor) -> Iterator[tuple[Entry, Baseline]]:
    for optimizer in listeners():
        entry = optimizer._table.of(param) if isinstance(optimizer, Membership) else None
        if isinstance(optimizer, Membership) and entry is not None:
            now = baseline(param, optimizer.state.get(param, {}))
            if now is not None:
                yield entry, now
