"""The slow twin of an optimizer: it steps each parameter by itself, and one whose rows differ row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from reference import MOMENTS, Settings, unrounded_adam
from reference_model import Entry
from reference_precision import COMPENSATION, Kind, chosen, completed, divided, is_short, kept_as

Exact = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""A value and its moments before they are rounded to what they are stored in."""


@dataclass
class Reference:
    """Moves moments by meaning: parameters are known by a key that the test chose and that no action changes."""

    groups: list[Settings]
    max_grad_norm: float | None = None
    kind: Kind | None = None
    """What was declared for all about the dtype of their moments."""
    rounding: str = "nearest"
    entries: dict[str, Entry] = field(default_factory=dict)
    library: Callable[[str, str], torch.Tensor] | None = None
    """What the library stored under a key and a name, asked where it had the choice."""

    def step(self, rows: Mapping[str, Sequence[bool]] | None = None) -> float | None:
        """Update every parameter that has a gradient, or its chosen rows; the global norm where one is asked for."""
        named = {} if rows is None else rows
        stepping = {key: e for key, e in self.entries.items() if e.grad is not None and not e.frozen}
        norm, coefficient = None, 1.0
        if self.max_grad_norm is not None:
            grads = [e.grad[e.mask(e.active(named.get(key)))] for key, e in stepping.items() if e.grad is not None]
            norm, coefficient = norm_coefficient(grads, self.max_grad_norm)
        for key, entry in self.entries.items():
            if key in stepping:
                self._update(key, entry, coefficient, named.get(key))
            else:
                entry.project(named.get(key))
        return norm

    def _update(self, key: str, entry: Entry, coefficient: float, rows: Sequence[bool] | None) -> None:
        entry.keep_as_declared(self.kind)
        self._begin(entry)
        if rows is not None:
            entry.rows = entry.rows_along(0)
        active = entry.active(rows)
        mask = entry.mask(active)
        exact = self._widened(entry)
        assert entry.step is not None
        entry.step += 1
        if entry.rows is None:
            self._write(entry, exact, ..., entry.step, coefficient)
        else:
            for row, acts in enumerate(active):
                if acts:
                    entry.rows.ages[row] += 1
                    where = (slice(None),) * entry.rows.dim + (row,)
                    self._write(entry, exact, where, entry.rows.ages[row], coefficient)
            entry.settle()
        self._store_moments(key, entry, exact, mask)
        self._store_value(key, entry, exact, mask)
        limit = entry.limit
        if limit is not None and not limit.is_box:
            entry.value = limit.projected(entry.value, mask)

    def _begin(self, entry: Entry) -> None:
        """State that is lacking is zeros, and what a wider value left over is no more."""
        if entry.step is None:
            kind = kept_as(entry.kind or self.kind, entry.value)
            keys = MOMENTS if self.groups[entry.group].amsgrad else MOMENTS[:2]
            dtype = {None: entry.value.dtype, "bfloat16": torch.bfloat16}.get(kind, torch.float32)
            entry.step, entry.moments = 0.0, {key: torch.zeros_like(entry.value, dtype=dtype) for key in keys}
            entry.compact = frozenset(keys if kind == "8bit" else ())
        if self.rounding == "kahan" and is_short(entry.value):
            entry.moments.setdefault(COMPENSATION, torch.zeros_like(entry.value))
        elif self.rounding == "kahan":
            entry.moments.pop(COMPENSATION, None)

    def _widened(self, entry: Entry) -> Exact:
        """Value and moments as the update reads them; it writes its results over them."""
        assert entry.grad is not None
        tensors = {name: moment for name, moment in entry.moments.items() if name != COMPENSATION}
        read = (entry.value, entry.grad, *tensors.values())
        wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in read) else torch.float32
        value = entry.value.to(wide, copy=True)
        if self._is_compensated(entry):
            value = completed(entry.value, entry.moments[COMPENSATION], wide)
        return value, {name: moment.to(wide, copy=True) for name, moment in tensors.items()}

    def _is_compensated(self, entry: Entry) -> bool:
        return self.rounding == "kahan" and is_short(entry.value)

    def _write(self, entry: Entry, exact: Exact, where: object, age: float, coefficient: float) -> None:
        """Update the elements that `where` names, which have taken `age` steps with this one."""
        limit, settings = entry.limit, self.groups[entry.group]
        assert entry.grad is not None
        low, high = (None, None) if limit is None or not limit.is_box else limit.bounds(entry.value)
        bounds = None if low is None else low[where], None if high is None else high[where]
        zero = limit is not None and limit.zero_exp_avg
        value, moments = exact
        read = {key: moment[where] for key, moment in moments.items()}
        value[where], written = unrounded_adam(
            value[where], entry.grad[where], read, age, settings, coefficient, bounds, zero
        )
        for key, moment in written.items():
            moments[key][where] = moment

    def _store_moments(self, key: str, entry: Entry, exact: Exact, mask: torch.Tensor) -> None:
        # Moments narrower than their value are rounded at random whatever is asked for, others as the value is.
        is_random = self.rounding == "stochastic" or not is_short(entry.value)
        for name, moment in exact[1].items():
            old, compact = entry.moments[name], name in entry.compact
            if compact or (is_random and is_short(old)):
                new = self._chosen(key, name, moment, compact=compact)
            else:
                new = moment.to(old.dtype)
            entry.moments[name] = new if compact else torch.where(mask, new, old)

    def _store_value(self, key: str, entry: Entry, exact: Exact, mask: torch.Tensor) -> None:
        old, is_scaled = entry.value, entry.limit is not None and entry.limit.norm is not None
        if self._is_compensated(entry):
            new, left_over = divided(exact[0], old)
            entry.moments[COMPENSATION] = torch.where(mask, left_over, entry.moments[COMPENSATION])
        elif self.rounding == "stochastic" and is_short(old) and not is_scaled:
            new = self._chosen(key, "value", exact[0], compact=False)
        else:
            new = exact[0].to(old.dtype)
        entry.value = torch.where(mask, new, old)

    def _chosen(self, key: str, name: str, exact: torch.Tensor, *, compact: bool) -> torch.Tensor:
        assert self.library is not None
        return chosen(exact, self.library(key, name), name, eight_bits=compact)

    def copied(self) -> Reference:
        return replace(self, groups=list(self.groups), entries={k: e.copied() for k, e in self.entries.items()})


def norm_coefficient(grads: list[torch.Tensor], max_norm: float) -> tuple[float, float]:
    """The global norm and torch's clip coefficient. Exact where the squares sum exactly, as a test must see to."""
    norm = math.sqrt(math.fsum(float(x) ** 2 for g in grads for x in g.double().flatten()))
    return norm, min(1.0, max_norm / (norm + 1e-6))
