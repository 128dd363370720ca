"""What went into what: scales that are another parameter's values, and biases that absorbed another's contribution.

Folding a LayerNorm ``y = w * x + b`` into the linear map ``W`` behind it makes ``W' = W * w`` (and may centre it), and
its bias ``c' = c + b W``. Folding the bias of one linear map into that of the next makes ``c2' = c2 + c1' W2``, where
``c1'`` may have absorbed a LayerNorm's already, and leaves ``c1`` zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .link import Link
from .matching import primary
from .relation import rounding
from .report import ALL_ZERO, ZERO_BEFORE, Row
from .sides import VALUE, Side
from .structure import module_of, numbers


@dataclass(frozen=True, slots=True)
class _Vector:
    """Values that may have been pushed through a linear map, and the tensors that they are made of."""

    value: Tensor
    names: tuple[str, ...]


class Folding:
    """A last look at the rows: scales and changed vectors are explained by what is missing on the other side."""

    def __init__(self, ours: Side, theirs: Side, links: list[Link]) -> None:
        self._ours, self._theirs = ours, theirs
        self._by_module: defaultdict[str, list[Link]] = defaultdict(list)
        self._link_of: dict[str, Link] = {}
        for link in links:
            if link.b_part is None:
                self._by_module[module_of(link.b)].append(link)
                self._link_of[link.b] = link

    def annotate(self, rows: list[Row]) -> list[Row]:
        """The rows, with what was folded into them; what went elsewhere says so."""
        gone = [row for row in rows if row.role == VALUE and row.a is not None and self._is_gone(row)]
        found = [self._explained(row, gone) for row in rows]
        into: defaultdict[str, list[str]] = defaultdict(list)
        for row in found:
            for name in row.folded:
                into[name].append(row.b or "")
        return [self._says_where(row, into) if row.kind in {"missing", "changed"} else row for row in found]

    @staticmethod
    def _is_gone(row: Row) -> bool:
        return row.kind == "missing" or (row.kind == "changed" and row.note == ALL_ZERO)

    @staticmethod
    def _says_where(row: Row, into: Mapping[str, list[str]]) -> Row:
        targets = into.get(row.a or "", [])
        if not targets or row.role != VALUE:
            return row
        where = ", ".join(targets[:3]) + (f" and {len(targets) - 3} more" if len(targets) > 3 else "")
        return replace(row, note="; ".join(filter(None, (row.note, f"folded into {where}"))))

    def _explained(self, row: Row, gone: list[Row]) -> Row:
        if row.role != VALUE or row.b is None or row.inverse:
            return row
        if row.kind == "scaled" and row.scales is not None:
            return self._named_scales(row, row.scales)
        if row.kind == "changed" and row.note in {"", ZERO_BEFORE} and row.b in self._link_of:
            return self._absorbed(row, gone)
        return self._made_of(row, gone) if row.kind == "new" and row.note == "" else row

    def _named_scales(self, row: Row, scales: Tensor) -> Row:
        """Which vector of the first side the factors are."""
        names = [name for name, roles in self._ours.items() if _is_vector(primary(roles), scales.numel())]
        for name in sorted(names, key=lambda name: numbers(name) != numbers(row.b or "")):
            value = primary(self._ours[name]).to(scales)
            if float((value - scales).norm()) <= 1e-4 * float(scales.norm()):
                return replace(row, folded=(name,))
        return row

    def _absorbed(self, row: Row, gone: list[Row]) -> Row:
        """A vector to which those that are gone were added, after the linear maps of its module."""
        link = self._link_of[row.b or ""]
        if VALUE not in self._ours[link.a]:
            return row
        return self._sum_of(row, link.source(self._ours[link.a][VALUE]), gone)

    def _made_of(self, row: Row, gone: list[Row]) -> Row:
        """A vector that is new: it had been zero, and was not worth a tensor."""
        after = self._theirs[row.b or ""].get(VALUE)
        return row if after is None or not bool(after.any()) else self._sum_of(row, torch.zeros_like(after), gone)

    def _sum_of(self, row: Row, before: Tensor, gone: list[Row]) -> Row:
        after = self._theirs[row.b or ""].get(VALUE)
        if after is None or not (before.is_floating_point() and after.is_floating_point()):
            return row
        found = after.reshape(-1).to(torch.float64)
        tolerance = 2 * rounding(before.dtype, after.dtype)
        for added in self._additions(row.b or "", gone, after.numel()):
            total = before.reshape(-1).to(torch.float64) + added.value
            for centred in (False, True) if after.ndim == 1 else (False,):
                expected = total - total.mean() if centred else total
                if float((expected - found).norm()) <= tolerance * float(added.value.norm()):
                    note = "" if row.note == ZERO_BEFORE else row.note
                    over = (0,) if centred else ()
                    return replace(row, kind="folded", folded=added.names, centred=over, note=note)
        return row

    def _additions(self, b: str, gone: list[Row], size: int) -> Iterator[_Vector]:
        """What may have been added to a bias: a vector that is gone, through a matrix of the same module."""
        near = [row for row in gone if numbers(row.a or "") == numbers(b)] or gone
        vectors = [vector for row in near for vector in self._vectors(row, near)]
        for matrix in self._by_module[module_of(b)]:
            for vector in vectors:
                pushed = self._through(matrix, vector, size)
                if pushed is not None:
                    yield pushed

    def _vectors(self, row: Row, gone: list[Row]) -> Iterator[_Vector]:
        """The vector of a row that is gone; one that is zero now may have absorbed another before that."""
        name = row.a or ""
        if row.kind == "missing":
            if VALUE in self._ours[name] and not row.a_part:
                yield _Vector(self._ours[name][VALUE].reshape(-1).to(torch.float64), (name,))
            return
        link = self._link_of.get(row.b or "")
        if link is None:
            return
        own = link.source(self._ours[name][VALUE]).reshape(-1).to(torch.float64)
        yield _Vector(own, (name,))
        lost = [other for other in gone if other.kind == "missing"]
        for added in self._additions(link.b, lost, own.numel()):
            yield _Vector(own + added.value, (name, *added.names))

    def _through(self, link: Link, vector: _Vector, size: int) -> _Vector | None:
        """A vector of the first side, multiplied by a matrix of it in the second side's layout."""
        if VALUE not in self._ours[link.a]:
            return None
        matrix = link.source(self._ours[link.a][VALUE])
        if matrix.ndim < 2 or matrix.numel() != size * vector.value.numel() or not matrix.is_floating_point():
            return None
        for first in range(matrix.ndim):
            for last in range(first, matrix.ndim):
                dims = list(range(first, last + 1))
                length = matrix[(0,) * first].flatten(0, last - first).shape[0]
                if length != vector.value.numel():
                    continue
                rows = matrix.movedim(dims, list(range(len(dims)))).reshape(length, size).to(torch.float64)
                product = vector.value @ rows
                if bool(product.any()):
                    return _Vector(product, vector.names)
        return None


def _is_vector(tensor: Tensor, length: int) -> bool:
    return tensor.ndim == 1 and tensor.numel() == length and tensor.is_floating_point()
