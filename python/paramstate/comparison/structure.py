"""What names and places tell about partners where content does not: constants, and values that changed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from .layout import Part
from .link import Link

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SHORT = {"w": "weight", "b": "bias"}


@cache
def words(name: str) -> frozenset[str]:
    """What a name is made of: ``blocks.0.ln1.w`` gives blocks, 0, ln, 1 and weight."""
    found = (word.lower() for word in _WORDS.findall(name))
    return frozenset(_SHORT.get(word, word) for word in found)


@cache
def numbers(name: str) -> tuple[str, ...]:
    """The numbers that are a whole part of a name: those of layers."""
    return tuple(part for part in name.split(".") if part.isdigit())


def affinity(a: str, b: str) -> float:
    """How alike two names are, from 0 to 2: whether they name the same layer, and the share of words in common."""
    ours, theirs = words(a), words(b)
    return (numbers(a) == numbers(b)) + len(ours & theirs) / max(len(ours | theirs), 1)


def shared_words(a: str, b: str) -> frozenset[str]:
    """The words that two names have in common beyond weight, bias and the layer: ``ln`` of ``h.0.ln_1.weight``."""
    return (words(a) & words(b)) - frozenset(_SHORT.values()) - frozenset(numbers(a))


def module_of(name: str) -> str:
    """The name of the module that holds the parameter."""
    return name.rpartition(".")[0]


def leaf_of(name: str) -> str:
    """The parameter's own name in its module."""
    return name.rpartition(".")[2]


class Neighbours:
    """Links that were found, by the modules that they connect: what is left in these modules belongs together."""

    def __init__(self, links: Iterable[Link]) -> None:
        self._by_modules: dict[tuple[str, str], list[Link]] = {}
        for link in links:
            self._by_modules.setdefault((module_of(link.a), module_of(link.b)), []).append(link)

    def support(self, a: str, part: Part | None, b: str) -> float:
        """How much the links between the two modules speak for this pair; 0 where there are none.

        A link that uses the same share of its tensor (the second of three, say), and whose names share words with
        these beyond the kind of parameter, speaks for it most.
        """
        links = self._by_modules.get((module_of(a), module_of(b)), [])
        return max((_speaks(link, a, part, b) for link in links), default=0.0)


def _speaks(link: Link, a: str, part: Part | None, b: str) -> float:
    if _span(part) != _span(link.a_part) or link.b_part is not None:
        return 0.0
    alike = _kinship(link.a, a) * _kinship(link.b, b)
    return 1.0 + alike if alike else 0.0


def _span(part: Part | None) -> tuple[float, float, int] | None:
    return part.span if part is not None else None


def _kinship(one: str, other: str) -> float:
    """How alike two parameters of one module are called, weight or bias apart: ``W_Q`` and ``b_Q`` are kin."""
    kinds = frozenset(_SHORT.values())
    ours, theirs = words(leaf_of(one)) - kinds, words(leaf_of(other)) - kinds
    return len(ours & theirs) / len(ours | theirs) if ours or theirs else 1.0
