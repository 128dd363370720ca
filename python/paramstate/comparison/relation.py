"""How one tensor was made from another of the same shape: equal, centred, scaled, or just changed.

With ``x`` as a matrix whose rows are the slices along one dimension, or as a single row, one model covers them all:

    y_ij = w_i * x_ij - mean over i (centring over the dimension) - mean over j (centring over the rest)

with or without either centring. Unknown are only the ``w_i``. Two rows tell whether the model can hold, which costs a
few numbers of each tensor: only then all rows are solved for, and the whole tensor is checked. That is what makes
trying many partners affordable.

1. Without centring over the dimension ``w_i = <y_i, x_i> / <x_i, x_i>``, with ``x_i`` centred if the rest is.
2. With it, an unknown row ``c`` is subtracted from all rows alike, so it drops out of the difference of two rows,
   ``y_p - y_q = w_p x_p - w_q x_q``: two unknowns. With ``w_p`` known, every other ``w_i`` follows as in 1 from
   ``y_i - y_p + w_p x_p = w_i x_i``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from paramstate.bits import same_bits

Kind = Literal["equal", "re-laid-out", "centred", "scaled", "folded", "changed", "missing", "new"]

_SAMPLED_ROWS = 4


@dataclass(frozen=True, slots=True)
class Relation:
    """What was found about two tensors of one shape."""

    kind: Kind
    exact: bool = False
    """Equal bit for bit."""
    centred: tuple[int, ...] = ()
    """The dimensions over which the mean was subtracted."""
    scale: float | None = None
    """The one factor."""
    scale_dim: int | None = None
    """The dimension along which factors differ."""
    scales: Tensor | None = None
    """Those factors."""


CHANGED = Relation("changed")


def compare(x: Tensor, y: Tensor) -> Relation | None:
    """Whether two tensors are equal: bit for bit, or as far as the coarser of their dtypes can tell."""
    if x.is_meta or y.is_meta:
        return None
    x = x.to(y.device)
    if x.dtype == y.dtype:
        if same_bits(x, y):
            return Relation("equal", exact=True)
        return Relation("equal") if torch.equal(x, y) else None
    rounded = torch.equal(x.to(y.dtype), y) or torch.equal(y.to(x.dtype), x)
    return Relation("equal") if rounded else None


def magnitude(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The largest absolute difference, and the norm of the difference by the norm of ``x``."""
    if x.is_meta or y.is_meta or not x.numel():
        return (0.0, 0.0) if not x.numel() else (math.nan, math.nan)
    dtype = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
    wide, to = x.to(y.device, dtype), y.to(dtype)
    difference = torch.where(wide == to, 0.0, to - wide)  # two infinities differ by nothing
    largest, norm, base = (float(value) for value in (difference.abs().max(), difference.norm(), wide.norm()))
    if norm == 0.0:
        return largest, 0.0
    return largest, norm / base if base else math.inf


def explain(x: Tensor, y: Tensor) -> Relation | None:
    """Centring and scaling, together or alone, by which ``y`` was made from ``x``; ``None`` where there is none."""
    if not (x.is_floating_point() and y.is_floating_point()) or x.is_meta or y.is_meta or x.shape != y.shape:
        return None
    if not bool(x.any()) or not bool(y.any()):
        return None  # from and to zero lead no factors
    y, tolerance = y.to(x.device), rounding(x.dtype, y.dtype)
    for hypothesis in _hypotheses(x.shape):
        if hypothesis.can_hold(x, y, tolerance):
            relation = hypothesis.solve(x, y, tolerance)
            if relation is not None:
                return relation
    return None


def rounding(*dtypes: torch.dtype) -> float:
    """What rounding may leave: a few roundings in the coarser dtype."""
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return eps * (64 if eps < 1e-6 else 4)


def _hypotheses(shape: torch.Size) -> Iterator[_Hypothesis]:
    dims = [dim for dim, size in enumerate(shape) if size > 1]
    yield _Hypothesis(None, over_dim=False, over_rest=False)
    if len(dims) == 1:
        yield _Hypothesis(None, over_dim=False, over_rest=True)
        return
    for over_dim, over_rest in ((False, False), (True, False), (False, True), (True, True)):
        for dim in dims:
            yield _Hypothesis(dim, over_dim=over_dim, over_rest=over_rest)


@dataclass(frozen=True, slots=True)
class _Hypothesis:
    """One form of the model: which dimension the rows run along, and over what the mean is subtracted."""

    dim: int | None
    over_dim: bool
    over_rest: bool

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(1, -1) if self.dim is None else tensor.movedim(self.dim, 0)

    def _row(self, tensor: Tensor, index: int) -> Tensor:
        row = self._rows(tensor)[index].reshape(-1).to(torch.float64)
        return row - row.mean() if self.over_rest else row

    def _matrix(self, tensor: Tensor) -> Tensor:
        return self._rows(tensor).flatten(1).to(torch.float64)

    def can_hold(self, x: Tensor, y: Tensor, tolerance: float) -> bool:
        """Whether two rows agree with it."""
        rows = self._rows(x)
        # So many numbers must be left over when the unknowns are determined, or any two tensors would agree.
        if rows.shape[0] == 0 or rows[0].numel() < 2 + self.over_rest + 2 * self.over_dim:
            return False
        if not self.over_dim:
            sample = self._sample(x)
            return bool(sample) and all(self._ratio(x, y, index, tolerance) is not None for index in sample)
        return self._pair(x, y, tolerance) is not None

    def _sample(self, x: Tensor) -> list[int]:
        """The first two that are not zero of some rows that are spread over ``x``."""
        length = self._rows(x).shape[0]
        spread = sorted({number * (length - 1) // (_SAMPLED_ROWS - 1) for number in range(_SAMPLED_ROWS)})
        return list(itertools.islice((index for index in spread if bool(self._row(x, index).any())), 2))

    def _ratio(self, x: Tensor, y: Tensor, index: int, tolerance: float) -> float | None:
        """The factor of a row, if it has one."""
        given, made = self._row(x, index), self._row(y, index)
        factor = float(given @ made / (given @ given))
        left = float((made - factor * given).norm())
        return factor if left <= tolerance * float(made.norm()) else None

    def _pair(self, x: Tensor, y: Tensor, tolerance: float) -> tuple[int, float] | None:
        """A row and its factor, from two rows whose difference agrees with the model."""
        sample = self._sample(x)
        if len(sample) < 2:
            return None
        one, other = (self._row(x, index) for index in sample)
        made = self._row(y, sample[0]) - self._row(y, sample[1])
        basis = torch.stack((one, -other), dim=1)
        gram = basis.T @ basis
        if float(torch.linalg.det(gram)) <= 1e-9 * float(gram.diagonal().prod()):
            return None  # parallel rows determine no factors
        factors = torch.linalg.solve(gram, basis.T @ made)
        left = float((made - basis @ factors).norm())
        size = float(one.norm() + other.norm()) * float(factors.abs().max())
        return (sample[0], float(factors[0])) if left <= tolerance * size else None

    def solve(self, x: Tensor, y: Tensor, tolerance: float) -> Relation | None:
        """Solve for all factors, and check the whole tensor."""
        given, made = self._matrix(x), self._matrix(y)
        plain = float((made - given).norm())
        centred_given = given - given.mean(1, keepdim=True) if self.over_rest else given
        factors = self._factors(x, y, centred_given, made, tolerance)
        if factors is None:
            return None
        predicted = factors[:, None] * centred_given
        if self.over_dim:
            predicted = predicted - predicted.mean(0, keepdim=True)
        left = float((made - predicted).norm())
        if not left <= min(tolerance * float(made.norm()), 0.1 * plain):
            return None
        return self._relation(x, factors, 10 * tolerance)

    def _factors(self, x: Tensor, y: Tensor, given: Tensor, made: Tensor, tolerance: float) -> Tensor | None:
        centred_made = made - made.mean(1, keepdim=True) if self.over_rest else made
        if self.over_dim:
            pair = self._pair(x, y, tolerance)
            if pair is None:
                return None
            reference, factor = pair
            centred_made = centred_made - centred_made[reference] + factor * given[reference]
        squares = given.square().sum(1)
        return torch.where(squares > 0.0, (given * centred_made).sum(1) / squares.clamp_min(1e-300), 1.0)

    def _relation(self, x: Tensor, factors: Tensor, tolerance: float) -> Relation | None:
        rest = tuple(dim for dim in range(x.ndim) if dim != self.dim and x.shape[dim] > 1) if self.over_rest else ()
        centred = tuple(sorted({*rest, *((self.dim,) if self.over_dim and self.dim is not None else ())}))
        one = float(factors.mean())
        if bool((factors - one).abs().max() > tolerance * max(abs(one), 1e-300)):
            return Relation("scaled", centred=centred, scale_dim=self.dim, scales=factors)
        if abs(one - 1.0) > tolerance:
            return Relation("scaled", centred=centred, scale=one)
        return Relation("centred", centred=centred) if centred else None
