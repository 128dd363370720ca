"""How a tensor of one shape can be a tensor of another: a part of it, its dimensions split, permuted and merged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]

MOST_PARTS = 64
"""A fused tensor has no more parts than that."""
_MOST_FACTORS = 5


@dataclass(frozen=True, slots=True)
class Part:
    """A slice along one dimension, or the same slice of each of ``blocks`` equal blocks of that dimension."""

    dim: int
    start: int
    length: int
    size: int
    """Of the whole dimension."""
    blocks: int = 1

    def of(self, tensor: Tensor) -> Tensor:
        """That part of ``tensor``."""
        if self.blocks == 1:
            return tensor.narrow(self.dim, self.start, self.length)
        inner: Tensor = tensor.unflatten(self.dim, (self.blocks, self.size // self.blocks))
        return inner.narrow(self.dim + 1, self.start, self.length).flatten(self.dim, self.dim + 1)

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write that part of ``whole``, which is contiguous."""
        inner: Tensor = whole.unflatten(self.dim, (self.blocks, self.size // self.blocks))
        inner.narrow(self.dim + 1, self.start, self.length).copy_(part.unflatten(self.dim, (self.blocks, self.length)))

    def shape(self, whole: Shape) -> Shape:
        """The shape of that part of a tensor of shape ``whole``."""
        return (*whole[: self.dim], self.blocks * self.length, *whole[self.dim + 1 :])

    @property
    def span(self) -> tuple[float, float, int]:
        """Where it begins and ends, as fractions of a block, and the number of blocks: alike for weight and bias."""
        block = self.size // self.blocks
        return (self.start / block, (self.start + self.length) / block, self.blocks)

    def __str__(self) -> str:
        each = f" of each of {self.blocks} blocks" if self.blocks > 1 else ""
        return "[" + ":, " * self.dim + f"{self.start}:{self.start + self.length}]{each}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Reshape to ``factors``, permute these by ``order``, reshape to ``target``: elements move, none changes."""

    source: Shape
    factors: Shape
    order: tuple[int, ...]
    target: Shape

    def of(self, tensor: Tensor) -> Tensor:
        """``tensor`` in this layout."""
        return tensor.reshape(self.factors).permute(self.order).reshape(self.target)

    @property
    def inverse(self) -> Layout:
        """The way back."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return Layout(self.target, tuple(self.factors[i] for i in self.order), tuple(back), self.source)

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves, and the shape stays."""
        return self.source == self.target and self.order == tuple(range(len(self.order)))

    def __str__(self) -> str:
        if self.order == tuple(range(len(self.order))):
            return f"reshaped {list(self.source)} -> {list(self.target)}"
        letters = [chr(ord("a") + i) for i in range(len(self.factors))]
        moved = [letters[i] for i in self.order]
        right = _grouped(moved, [self.factors[i] for i in self.order], self.target)
        left = _grouped(letters, list(self.factors), self.source)
        if (left, right) == ("a b", "b a"):
            return "transposed"
        sizes = [f"{letter}={size}" for letter, size in zip(letters, self.factors, strict=True) if "(" in left + right]
        return f"{left} -> {right}" + (f", {' '.join(sizes)}" if sizes else "")


def _grouped(letters: list[str], sizes: list[int], shape: Shape) -> str:
    """The letters, with those that make up one dimension of ``shape`` in brackets: ``a (b c)``."""
    words, rest = [], list(zip(letters, sizes, strict=True))
    for size in shape:
        group, product = [], 1
        while rest and product < size:
            letter, factor = rest.pop(0)
            group.append(letter)
            product *= factor
        words.append(f"({' '.join(group)})" if len(group) > 1 else "".join(group) or "1")
    return " ".join(words)


def identity(shape: Shape) -> Layout:
    """The layout in which nothing moves."""
    return Layout(shape, shape, tuple(range(len(shape))), shape)


def layouts(source: Shape, target: Shape) -> Iterator[Layout]:
    """Every way to lay out ``source`` as ``target`` with at most one dimension split in two, simple ones first."""
    if math.prod(source) != math.prod(target):
        return
    if source == target:
        yield identity(source)
    seen = {(source, tuple(range(len(source))))} if source == target else set()
    for factors in _factorings(source, target):
        for order in itertools.permutations(range(len(factors))):
            permuted = tuple(factors[i] for i in order)
            if (factors, order) not in seen and _merges(permuted, target):
                seen.add((factors, order))
                yield Layout(source, factors, order, target)


def _factorings(source: Shape, target: Shape) -> Iterator[Shape]:
    plain = tuple(size for size in source if size != 1)
    yield plain
    for dim, size in enumerate(plain):
        wanted = {part for part in target if 1 < part < size and size % part == 0}
        for first in sorted(wanted | {size // part for part in wanted}):
            split = (*plain[:dim], first, size // first, *plain[dim + 1 :])
            if len(split) <= _MOST_FACTORS:
                yield split


def _merges(factors: Shape, target: Shape) -> bool:
    """Whether neighbouring factors multiply to the sizes of ``target``."""
    left = list(factors)
    for size in target:
        product = 1
        while product < size and left:
            product *= left.pop(0)
        if product != size:
            return False
    return not left


def parts(whole: Shape, target: Shape, most: int = MOST_PARTS) -> Iterator[Part]:
    """The slices of a tensor of shape ``whole`` that have as many elements as ``target``, at least 1 in ``most``."""
    count, wanted = math.prod(whole), math.prod(target)
    if not 0 < wanted < count <= most * wanted:
        return
    for dim, size in enumerate(whole):
        if size * wanted % count:
            continue
        for blocks in sorted({1, *(n for n in target if n > 1 and size % n == 0)}):
            if size * wanted // count % blocks == 0:
                length = size * wanted // count // blocks
                starts = range(0, size // blocks - length + 1, length)
                yield from (Part(dim, start, length, size, blocks) for start in starts)
