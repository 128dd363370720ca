"""Constraints of norms: what looks at several elements at once, applied right after the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paramstate.errors import ConstraintError

from .constraints import Constraint


@dataclass(frozen=True, slots=True)
class MaxNorm(Constraint):
    """Euclidean norms stay at or below a maximum; what is longer is scaled down to it, directly after the step.

    For the units of a layer: Hinton et al. 2012, arXiv:1207.0580, appendix A.1. A norm over frozen and free rows scales
    the free ones only, and so may stay above its maximum; ``step(rows=...)`` does so with the rows that it leaves out.

    Args:
        max: the greatest norm allowed, at least 0.
        dim: over which dimensions the norms are taken, as in ``torch.linalg.vector_norm``; ``None`` takes one norm of
            the whole parameter. For a ``Linear`` weight of shape (out, in), ``dim=1`` bounds each unit's input weights.

    Raises:
        ConstraintError: ``max`` is negative, infinite, NaN or no number.

    Example:
        >>> import torch
        >>> from paramstate import Adam
        >>> layer = torch.nn.Linear(3, 2)
        >>> opt = Adam(layer, constraints={"weight": MaxNorm(0.1, dim=1)})
        >>> bool((layer.weight.norm(dim=1) <= 0.1 + 1e-6).all())
        True
    """

    max: float
    dim: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.max, (int, float)) and 0.0 <= self.max < math.inf):
            raise ConstraintError(f"MaxNorm: max must be a number, at least 0 and finite, got {self.max!r}")

    @property
    def norm(self) -> tuple[str, float, list[int] | None]:
        """See :attr:`Constraint.norm`."""
        return "at_most", float(self.max), _dims(self.dim)

    def require_fits(self, param: Tensor, called: str) -> None:
        """See :meth:`Constraint.require_fits`."""
        _require_dims(param, called, self.dim)

    def project_(self, param: Tensor, called: str) -> None:  # noqa: ARG002
        """See :meth:`Constraint.project_`."""
        norm = _norms(param, self.dim)
        _scale_(param, torch.where(norm > self.max, self.max / norm, 1.0))

    def holds(self, param: Tensor) -> bool:
        """See :meth:`Constraint.holds`: to the rounding of the parameter's dtype."""
        return not bool((_norms(param, self.dim) > self.max * (1.0 + _slack(param))).any())

    def as_data(self) -> dict[str, Any]:
        """See :meth:`Constraint.as_data`."""
        return {"kind": "max_norm", "max": self.max, "dim": self.dim}


@dataclass(frozen=True, slots=True)
class UnitNorm(Constraint):
    """Euclidean norms stay 1: values are divided by their norm, directly after the step. A norm of 0 is left alone.

    A norm over frozen and free rows scales the free ones only, and so may not be 1; ``step(rows=...)`` does so with the
    rows that it leaves out.

    Args:
        dim: over which dimensions the norms are taken, as in :class:`MaxNorm`.

    Example:
        >>> import torch
        >>> from paramstate import Adam
        >>> table = torch.nn.Embedding(4, 3)
        >>> opt = Adam(table, constraints=UnitNorm(dim=1))
        >>> torch.allclose(table.weight.norm(dim=1), torch.ones(4))
        True
    """

    dim: int | tuple[int, ...] | None = None

    @property
    def norm(self) -> tuple[str, float, list[int] | None]:
        """See :attr:`Constraint.norm`."""
        return "exactly", 1.0, _dims(self.dim)

    def require_fits(self, param: Tensor, called: str) -> None:
        """See :meth:`Constraint.require_fits`."""
        _require_dims(param, called, self.dim)

    def project_(self, param: Tensor, called: str) -> None:  # noqa: ARG002
        """See :meth:`Constraint.project_`."""
        norm = _norms(param, self.dim)
        _scale_(param, torch.where(norm > 0.0, 1.0 / norm, 1.0))

    def holds(self, param: Tensor) -> bool:
        """See :meth:`Constraint.holds`: to the rounding of the parameter's dtype."""
        norm = _norms(param, self.dim)
        return not bool(((norm - 1.0).abs() > _slack(param)).logical_and(norm > 0.0).any())

    def as_data(self) -> dict[str, Any]:
        """See :meth:`Constraint.as_data`."""
        return {"kind": "unit_norm", "dim": self.dim}


def _dims(dim: int | Sequence[int] | None) -> list[int] | None:
    return None if dim is None else [dim] if isinstance(dim, int) else list(dim)


def _require_dims(param: Tensor, called: str, dim: int | Sequence[int] | None) -> None:
    several = isinstance(dim, Sequence) and len(dim) > 0 and all(isinstance(one, int) for one in dim)
    if not (dim is None or isinstance(dim, int) or several):
        raise ConstraintError(f"{called}: dim must be a dimension, or several, got {dim!r}")
    dims = _dims(dim) or []
    wrong = [d for d in dims if not -param.dim() <= d < param.dim()]
    if wrong:
        raise ConstraintError(f"{called} has shape {list(param.shape)}, the norm is to be taken over dim {wrong[0]}")
    if len({d % param.dim() for d in dims}) < len(dims):
        raise ConstraintError(f"{called}: the norm is to be taken over the same dimension twice, dim={dim}")


def _norms(param: Tensor, dim: int | tuple[int, ...] | None) -> Tensor:
    """Norms in float64, kept as dimensions of size 1."""
    values = param.detach().to(torch.complex128 if param.is_complex() else torch.float64)
    norms: Tensor = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return norms


def _scale_(param: Tensor, factor: Tensor) -> None:
    wide = torch.complex128 if param.is_complex() else torch.float64
    param.copy_(param.detach().to(wide) * factor)


def _slack(param: Tensor) -> float:
    """How far rounding may leave a norm from what it should be."""
    return 4.0 * torch.finfo(param.dtype).eps
