"""The answer of ``diff``: rows, which print as a table."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from paramstate import table

from .link import MatchedBy
from .relation import Kind
from .sides import VALUE

KINDS: tuple[Kind, ...] = ("equal", "re-laid-out", "centred", "scaled", "folded", "changed", "missing", "new")
"""What a row may say, the mildest first."""
ALL_ZERO, ZERO_BEFORE = "all zero now", "all zero before"
_TURNED = {ALL_ZERO: ZERO_BEFORE, ZERO_BEFORE: ALL_ZERO}
_DIRECTED = ("centred", "scaled", "folded")


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What became of one tensor. Where several things did, ``kind`` is the gravest, and the other fields tell all."""

    a: str | None
    """Its name in the first side; ``None`` where it is new."""
    b: str | None
    """Its name in the second side; ``None`` where it is missing."""
    kind: Kind
    role: str = VALUE
    """``"value"``, or the key of an optimizer's state."""
    matched_by: MatchedBy | None = None
    """What made them partners."""
    exact: bool = False
    """Equal bit for bit, as far as elements were not moved; otherwise to the rounding of the coarser dtype."""
    a_part: str = ""
    """Which part of the first side's tensor, where that is a fused one."""
    b_part: str = ""
    layout: str = ""
    """How its elements moved: ``transposed``, or a pattern such as ``a (b c) -> b a c``; empty where they did not."""
    order: Tensor | None = None
    """The permutation, where slices along a dimension were reordered."""
    centred: tuple[int, ...] = ()
    """The dimensions, as the second side has them, over which a mean was subtracted."""
    scale: float | None = None
    """The factor, where it is one number."""
    scale_dim: int | None = None
    """The dimension along which the factors differ."""
    scales: Tensor | None = None
    """Those factors, in float64."""
    inverse: bool = False
    """The centring and scaling lead from the second side to the first."""
    folded: tuple[str, ...] = ()
    """The tensors of the first side (of the second where ``inverse``) that went into this one."""
    max_abs: float = 0.0
    """The largest absolute difference, once laid out alike; NaN where there is no partner, or one of another size."""
    relative: float = math.nan
    """The norm of the difference by the norm of the first side's value."""
    a_shape: tuple[int, ...] | None = None
    b_shape: tuple[int, ...] | None = None
    a_dtype: torch.dtype | None = None
    b_dtype: torch.dtype | None = None
    note: str = ""

    @property
    def mirrored(self) -> Row:
        """The same, seen from the other side."""
        turned: dict[Kind, Kind] = {"missing": "new", "new": "missing"}
        return replace(
            self,
            a=self.b,
            b=self.a,
            kind=turned.get(self.kind, self.kind),
            a_part=self.b_part,
            b_part=self.a_part,
            inverse=self.kind in _DIRECTED and not self.inverse,
            a_shape=self.b_shape,
            b_shape=self.a_shape,
            a_dtype=self.b_dtype,
            b_dtype=self.a_dtype,
            note=_TURNED.get(self.note, self.note),
        )

    def label(self, name: str | None, part: str) -> str:
        """How a table calls one side of it."""
        if name is None:
            return "-"
        return name + part + ("" if self.role == VALUE else f" ({self.role})")

    @property
    def details(self) -> str:
        """All that was found, in words."""
        said = [self.layout] if self.layout else []
        if self.kind == "equal" and not self.exact:
            said.append("to rounding")
        if self.scales is not None:
            low, high = float(self.scales.min()), float(self.scales.max())
            said.append(f"scaled along dim {self.scale_dim} by {low:.4g} to {high:.4g}")
        if self.scale is not None:
            said.append(f"scaled by {self.scale:.6g}")
        if self.centred:
            said.append(f"centred over dim {' and '.join(map(str, self.centred))}")
        if self.inverse:
            said.append("seen from the second side")
        if self.folded:
            said.append("from " + ", ".join(self.folded))
        if self.a_dtype is not None and self.b_dtype is not None and self.a_dtype != self.b_dtype:
            said.append(f"{_short(self.a_dtype)} -> {_short(self.b_dtype)}")
        return "; ".join([*said, self.note] if self.note else said)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain numbers and text, for JSON: ``None`` stands for what is not a number."""
        names = [name for name in self.__dataclass_fields__ if name not in ("order", "scales")]
        plain = {name: _plain(getattr(self, name)) for name in names}
        for name, tensor in (("order", self.order), ("scales", self.scales)):
            plain[name] = None if tensor is None else tensor.tolist()
        return plain


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _short(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True)
class OutputRow:
    """How much one output of the two models differs."""

    name: str
    max_abs: float
    relative: float
    log_softmax: float | None
    """The largest difference after a log-softmax over the last dimension: what matters where these are logits."""
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class DiffReport:
    """What ``diff`` found. Prints as a table, by rich where that prints it.

    Example:
        >>> import torch
        >>> from paramstate import diff
        >>> old = {"weight": torch.ones(2), "bias": torch.ones(2)}
        >>> report = diff(old, {"weight": torch.ones(2), "bias": torch.tensor([1.0, 3.0])})
        >>> report.equal, report.identical, report.summary
        (False, False, '1 equal, 1 changed')
        >>> [row.max_abs for row in report.of("bias")], list(report.by_kind)
        ([2.0], ['equal', 'changed'])
        >>> report.as_dict()["rows"][1]["kind"]
        'changed'
    """

    rows: list[Row]
    outputs: list[OutputRow] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing differs beyond the rounding of the coarser dtype, and nothing moved.

        Example:
            >>> import torch
            >>> from paramstate import diff
            >>> report = diff({"w": torch.ones(2), "b": torch.ones(2)}, {"w": torch.ones(2), "b": torch.zeros(2)})
            >>> report.equal
            False
        """
        return all(row.kind == "equal" for row in self.rows)

    @property
    def identical(self) -> bool:
        """Whether every pair is equal bit for bit and nothing moved.

        Example:
            >>> import torch
            >>> from paramstate import diff
            >>> third = torch.tensor([1 / 3])
            >>> report = diff({"w": third}, {"w": third.bfloat16()})
            >>> report.equal, report.identical
            (True, False)
        """
        return all(row.kind == "equal" and row.exact for row in self.rows)

    @property
    def by_kind(self) -> dict[Kind, list[Row]]:
        """The rows of each kind, the mildest first; kinds that did not occur are left out.

        Example:
            >>> import torch
            >>> from paramstate import diff
            >>> report = diff({"w": torch.ones(2), "b": torch.ones(2)}, {"w": torch.ones(2), "b": torch.zeros(2)})
            >>> {kind: [row.a for row in rows] for kind, rows in report.by_kind.items()}
            {'equal': ['w'], 'changed': ['b']}
        """
        grouped = {kind: [row for row in self.rows if row.kind == kind] for kind in KINDS}
        return {kind: rows for kind, rows in grouped.items() if rows}

    @property
    def summary(self) -> str:
        """How many there are of each kind.

        Example:
            >>> import torch
            >>> from paramstate import diff
            >>> report = diff({"w": torch.ones(2), "b": torch.ones(2)}, {"w": torch.ones(2), "b": torch.zeros(2)})
            >>> report.summary
            '1 equal, 1 changed'
        """
        counts = Counter(row.kind for row in self.rows)
        return ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]) or "nothing to compare"

    def of(self, name: str) -> list[Row]:
        """The rows in which a parameter occurs, under its name on either side.

        Example:
            >>> import torch
            >>> from paramstate import diff
            >>> report = diff({"w": torch.ones(2), "b": torch.ones(2)}, {"w": torch.ones(2), "b": torch.zeros(2)})
            >>> [(row.kind, row.max_abs) for row in report.of("b")]
            [('changed', 1.0)]
        """
        return [row for row in self.rows if name in (row.a, row.b)]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain numbers and text, for JSON.

        Example:
            >>> import torch
            >>> from paramstate import diff
            >>> report = diff({"w": torch.ones(2), "b": torch.ones(2)}, {"w": torch.ones(2), "b": torch.zeros(2)})
            >>> import json
            >>> json.loads(json.dumps(report.as_dict()))["rows"][1]["kind"]
            'changed'
        """
        outputs = [{name: _plain(getattr(row, name)) for name in row.__dataclass_fields__} for row in self.outputs]
        return {"equal": self.equal, "rows": [row.as_dict() for row in self.rows], "outputs": outputs}

    def __str__(self) -> str:
        shown = self._cells()
        parts = [table.plain(_COLUMNS, shown)] if shown else []
        return "\n".join([*parts, self.summary, *self._output_lines()])

    def __rich__(self) -> Any:
        return table.rich("diff", _COLUMNS, self._cells(), "\n".join([self.summary, *self._output_lines()]))

    def _cells(self) -> list[tuple[str, ...]]:
        """What differs or changed its name; what is equal is only counted, in the summary."""
        return [
            (row.label(row.a, row.a_part), row.label(row.b, row.b_part), row.kind, _size(row), row.details)
            for row in self.rows
            if row.kind != "equal" or not row.exact or row.a != row.b
        ]

    def _output_lines(self) -> list[str]:
        return [
            f"output {row.name}: {row.note or f'differs by at most {row.max_abs:.3g}'}"
            + ("" if row.log_softmax is None else f", its log-softmax by {row.log_softmax:.3g}")
            for row in self.outputs
        ]


_COLUMNS = ("a", "b", "kind", "max |b - a|", "details")


def _size(row: Row) -> str:
    return "" if row.kind in {"missing", "new", "re-laid-out"} or math.isnan(row.max_abs) else f"{row.max_abs:.3g}"
