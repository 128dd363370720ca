"""Partners by content, where names do not meet: whole tensors, and parts of fused ones.

First what only moved, by a fingerprint that knows no order; then what was centred or scaled on the way; then what
content cannot decide (constants, changed values), by the company it keeps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .fingerprint import element_hashes, fingerprint, is_constant
from .layout import Layout, Part, Shape, layouts, parts
from .link import Link
from .relation import compare, explain
from .structure import Neighbours, affinity, numbers, shared_words

_SAMPLE = 32
_PROBED = 4
_MOST_RELATED_PARTS = 8
"""Looking for centred or scaled parts costs more than for moved ones: queries, keys and values are 3 to 8."""

Tensors = Mapping[str, Tensor]


def match_by_content(a: Tensors, b: Tensors, known: list[Link]) -> list[Link]:
    """Links between what is left on both sides.

    Args:
        a: what has no partner yet on the one side.
        b: and on the other.
        known: the links that there are already: neighbours of these are likely to belong together.
    """
    forward, backward = _Search(a, b), _Search(b, a)
    both = ((forward, backward), (backward, forward))
    for stage in (_Search.moved, _Search.related_nearby, _Search.related_anywhere):
        # Where the second side is the one that was centred, hardly anything is found forward: backward goes first.
        for search, other in both if stage is _Search.moved or forward.has_related() else both[::-1]:
            for link in stage(search):
                search.take(link)
                other.take(link.reversed)
    links = [*known, *forward.links]
    for search, other in both:
        context = links if search is forward else [link.reversed for link in (*known, *forward.links)]
        for link in search.supported(context):
            search.take(link)
            other.take(link.reversed)
    return forward.links


class _Search:
    """The search for partners of whole tensors ``b`` among tensors ``a`` and their parts."""

    def __init__(self, a: Tensors, b: Tensors) -> None:
        self._a, self._b = a, b
        self._used: defaultdict[str, list[Part | None]] = defaultdict(list)
        self._done: set[str] = set()
        self.links: list[Link] = []

    def take(self, link: Link) -> None:
        """Count a link as settled."""
        self.links.append(link)
        self._used[link.a].append(link.a_part)
        self._done.add(link.b)

    def _left(self) -> list[str]:
        return [name for name in self._b if name not in self._done]

    def _is_free(self, name: str, part: Part | None) -> bool:
        used = self._used[name]
        return not used or (part is not None and all(other is not None and _apart(part, other) for other in used))

    def _candidates(self, b: str) -> Iterator[tuple[str, Part | None]]:
        """What has as many elements as ``b`` and is not used, the likeliest first."""
        shape = tuple(self._b[b].shape)
        for a in sorted(self._a, key=lambda name: -affinity(name, b)):
            whole = tuple(self._a[a].shape)
            same = math.prod(whole) == math.prod(shape)
            found: Iterable[Part | None] = (None,) if same else parts(whole, shape, _MOST_RELATED_PARTS)
            yield from ((a, part) for part in found if self._is_free(a, part))

    # ---- what only moved ----------------------------------------------------------------------------------------

    def moved(self) -> Iterator[Link]:
        """Links of tensors that hold the same elements."""
        index = self._index()
        for b in self._left():
            tensor = self._b[b]
            if is_constant(tensor):
                continue
            key = (tensor.dtype, fingerprint(element_hashes(tensor, tensor.dtype)))
            found = sorted(index.get(key, ()), key=lambda item: (not self._is_free(*item), -affinity(item[0], b)))
            for a, part in found:
                layout = self._layout(a, part, tensor) if self._is_free(a, part) else None
                if layout is not None:
                    yield Link(a, b, layout, "content", part)
                    break

    def _index(self) -> dict[tuple[torch.dtype, int], list[tuple[str, Part | None]]]:
        """The fingerprints of all tensors and parts that could be a partner."""
        wanted: defaultdict[torch.dtype, set[Shape]] = defaultdict(set)
        for name in self._left():
            wanted[self._b[name].dtype].add(tuple(self._b[name].shape))
        index: defaultdict[tuple[torch.dtype, int], list[tuple[str, Part | None]]] = defaultdict(list)
        for a, tensor in self._a.items():
            whole = tuple(tensor.shape)
            for dtype, shapes in wanted.items():
                fitting = {shape: list(parts(whole, shape)) for shape in shapes}
                same = any(math.prod(shape) == math.prod(whole) for shape in shapes)
                if tensor.is_meta or not (same or any(fitting.values())):
                    continue
                hashes = element_hashes(tensor, dtype)
                if same:
                    index[dtype, fingerprint(hashes)].append((a, None))
                for part in {part for found in fitting.values() for part in found}:
                    index[dtype, fingerprint(part.of(hashes))].append((a, part))
        return index

    def _layout(self, a: str, part: Part | None, target: Tensor) -> Layout | None:
        """The layout in which the elements are at their places."""
        tensor = self._a[a] if part is None else part.of(self._a[a])
        return find_layout(tensor, target)

    # ---- what was centred or scaled -----------------------------------------------------------------------------

    def related_nearby(self) -> Iterator[Link]:
        """Links of tensors of one layer of which one was made from the other."""
        return self._related(_same_layer, 1, self._left())

    def related_anywhere(self) -> Iterator[Link]:
        """The same in all layers, which takes the square of their number; a vector is too easily explained for that."""
        return self._related(lambda a, b: not _same_layer(a, b), 2, self._left())

    def has_related(self) -> bool:
        """Whether one of the first few was made from something of its layer, or nothing is left."""
        matrices = [name for name in self._left() if self._b[name].squeeze().ndim > 1][:_PROBED]
        return not matrices or next(self._related(_same_layer, 2, matrices), None) is not None

    def _related(self, admitted: Callable[[str, str], bool], dims: int, targets: list[str]) -> Iterator[Link]:
        for b in targets:
            tensor = self._b[b]
            if tensor.squeeze().ndim < dims or is_constant(tensor) or not tensor.is_floating_point():
                continue
            candidates = (item for item in self._candidates(b) if admitted(item[0], b))
            link = next(self._explained(b, tensor, candidates), None)
            if link is not None:
                yield link

    def _explained(self, b: str, target: Tensor, candidates: Iterable[tuple[str, Part | None]]) -> Iterator[Link]:
        for a, part in candidates:
            tensor = self._a[a] if part is None else part.of(self._a[a])
            if is_constant(tensor):
                continue
            for layout in layouts(tuple(tensor.shape), tuple(target.shape)):
                if explain(layout.of(tensor), target) is not None:
                    yield Link(a, b, layout, "content", part)

    # ---- what content cannot decide -----------------------------------------------------------------------------

    def supported(self, context: list[Link]) -> Iterator[Link]:
        """Links that the neighbourhood speaks for, the best supported first."""
        neighbours = Neighbours(context)
        found: list[tuple[float, int, Link]] = []
        for b in self._left():
            target = self._b[b]
            for a, part in self._candidates(b):
                tensor = self._a[a] if part is None else part.of(self._a[a])
                layout = next(layouts(tuple(tensor.shape), tuple(target.shape)), None)
                score = self._score(neighbours, a, part, b, equal=_all_equal(tensor, target))
                if layout is not None and score:
                    found.append((score, len(found), Link(a, b, layout, "structure", part)))
        for _, _, link in sorted(found, key=lambda item: (-item[0], item[1])):
            if link.b not in self._done and self._is_free(link.a, link.a_part):
                yield link

    def _score(self, neighbours: Neighbours, a: str, part: Part | None, b: str, *, equal: bool) -> float:
        likeness = affinity(a, b)
        support = neighbours.support(a, part, b)
        if support:
            return 4 * support + 2 * equal + likeness
        if self._a[a].shape != self._b[b].shape or numbers(a) != numbers(b):
            return 0.0
        by_elimination = equal and numbers(a)
        return likeness + equal if by_elimination or shared_words(a, b) else 0.0


def _same_layer(a: str, b: str) -> bool:
    return numbers(a) == numbers(b)


def find_layout(tensor: Tensor, target: Tensor) -> Layout | None:
    """The layout in which ``tensor`` is ``target``, if there is one."""
    for layout in layouts(tuple(tensor.shape), tuple(target.shape)):
        if _agrees_on_a_sample(layout, tensor, target) and compare(layout.of(tensor), target) is not None:
            return layout
    return None


def _agrees_on_a_sample(layout: Layout, tensor: Tensor, target: Tensor) -> bool:
    """A look at a few elements, since most layouts are wrong and each costs a pass over memory."""
    count = target.numel()
    if count == 0:
        return True
    moved = tensor.reshape(layout.factors).permute(layout.order)
    places = torch.arange(_SAMPLE) * max(count // _SAMPLE, 1) % count
    here, there = torch.unravel_index(places, moved.shape), torch.unravel_index(places, target.shape)
    return compare(moved[here], target[there]) is not None


def _all_equal(tensor: Tensor, target: Tensor) -> bool:
    return (
        tensor.numel() > 0
        and is_constant(tensor)
        and is_constant(target)
        and bool(tensor.flatten()[0] == target.flatten()[0])
    )


def _apart(one: Part, other: Part) -> bool:
    """Whether two parts of one tensor share no element."""
    if (one.dim, one.blocks) != (other.dim, other.blocks):
        return False
    return one.start + one.length <= other.start or other.start + other.length <= one.start
