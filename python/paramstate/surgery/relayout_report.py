"""What a re-layout did."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from paramstate import table
from paramstate.errors import UnknownParameterError, listed

_COLUMNS = ("new", "from", "by", "layout", "ID")


@dataclass(frozen=True, slots=True)
class Carried:
    """What became of one new parameter's state."""

    name: str
    """Its canonical name in the new model."""
    sources: tuple[str, ...]
    """The old parameters whose state it has."""
    layout: str
    """How elements moved; empty where they did not."""
    matched_by: str
    """``"map"``, ``"name"``, ``"content"`` or ``"structure"``."""
    keeps_id: bool
    """Whether it is one old parameter, with its ID. One of several parts has an ID of its own."""
    differs: bool
    """Its value is not what the old values give: possible only where a map was given."""


@dataclass(frozen=True, slots=True)
class RelayoutReport:
    """What ``relayout`` did, with canonical names. Prints as a table, by rich where that prints it.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> old, new = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
        >>> report = AdamW(old).relayout(new, {"weight": ("weight", lambda t: t.T)}, drop=["bias"])
        >>> report.dropped, report.unmanaged
        (['bias'], ['bias'])
    """

    carried: list[Carried] = field(default_factory=list)
    """New parameters with the state of old ones."""
    kept: list[str] = field(default_factory=list)
    """Parameters that are in the new model as they were: the same tensor object."""
    dropped: list[str] = field(default_factory=list)
    """Old ones that were to go."""
    unmanaged: list[str] = field(default_factory=list)
    """Trainable parameters of the new model that come from none, and are in no group."""
    adopted: list[str] = field(default_factory=list)
    """Those of them that ``group=`` took in, with fresh state."""

    @property
    def differing(self) -> list[str]:
        """New parameters whose value is not what the map gives of the old ones.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> old, new = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False)
            >>> report = AdamW(old).relayout(new, {"weight": ("weight", lambda t: t.T)})
            >>> report.differing  # the new layer has values of its own
            ['weight']
        """
        return [item.name for item in self.carried if item.differs]

    def of(self, name: str) -> Carried:
        """What became of the new parameter ``name``.

        Raises:
            UnknownParameterError: no state was carried to it.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> old, new = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False)
            >>> report = AdamW(old).relayout(new, {"weight": ("weight", lambda t: t.T)})
            >>> report.of("weight").sources, report.of("weight").keeps_id
            (('weight',), True)
        """
        found = [item for item in self.carried if item.name == name]
        if not found:
            names = [item.name for item in self.carried]
            near = difflib.get_close_matches(name, names, n=3) or names[:3]
            raise UnknownParameterError(
                f"no state was carried to a parameter {name!r}; the nearest that have some are {listed(near) or 'none'}"
            )
        return found[0]

    def __str__(self) -> str:
        cells = self._cells()
        return "\n".join([*([table.plain(_COLUMNS, cells)] if cells else []), self._summary])

    def __rich__(self) -> Any:
        return table.rich("relayout", _COLUMNS, self._cells(), self._summary)

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                item.name,
                ", ".join(item.sources),
                item.matched_by,
                "; ".join(filter(None, (item.layout, "value differs" if item.differs else ""))),
                "kept" if item.keeps_id else "new",
            )
            for item in self.carried
        ]

    @property
    def _summary(self) -> str:
        counts = {
            "carried": len(self.carried),
            **{name: len(getattr(self, name)) for name in ("kept", "dropped", "unmanaged", "adopted")},
        }
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing to carry"
