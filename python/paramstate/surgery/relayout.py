"""Maps that only move elements: what may carry state from one layout of a value to another.

A map is judged by what it does to probes. Pushed through it, numbered elements say where each element of the result
comes from; a second probe, of signs, must then arrive in just that way. The first alone would believe a map that
sorts, or one that puts the mean of its neighbours in the place of each element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paramstate.errors import StateShapeError

TensorMap = Callable[..., Tensor]
"""From one tensor, or from as many as it has sources, to one."""


_EXACT_IN_FLOAT32 = 1 << 24
"""So many elements can be numbered."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where each element of a tensor comes from: a place in others, whose elements are numbered through."""

    shapes: tuple[torch.Size, ...]
    """Of the tensors that it comes from."""
    index: Tensor
    """int64, of the shape of the result, on the host."""

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The result for tensors of these shapes, in memory of its own."""
        flat = [tensor.detach().reshape(-1).to(tensors[0].device) for tensor in tensors]
        together = flat[0] if len(flat) == 1 else torch.cat(flat)
        return together[self.index.to(together.device)]

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves, and the shape stays."""
        return self.shapes == (self.index.shape,) and bool((_numbers(self.index.numel()) == self.index.flatten()).all())

    @property
    def offsets(self) -> list[int]:
        """The number of the first element of each of the tensors that it comes from."""
        counts = [shape.numel() for shape in self.shapes]
        return [sum(counts[:position]) for position in range(len(counts))]


def _numbers(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int64)


def sources_of(
    carry: TensorMap, shapes: Sequence[torch.Size], called: str, device: torch.device | None = None
) -> Sources:
    """Where the elements of what a map gives come from. It may leave some out, or use some several times.

    Args:
        carry: the map; it is called twice, with a float64 tensor for each of ``shapes``, or with float32 ones where it
            fails on these.
        shapes: of what it takes.
        called: how a message names what is carried.
        device: where the map works; the host by default.

    Raises:
        StateShapeError: it does not give a tensor, or mixes or changes elements.
    """
    total = sum(shape.numel() for shape in shapes)
    numbered = _numbers(total).to(torch.float64)
    found = _carried(carry, numbered, shapes, called, device)
    index = found.nan_to_num(-1.0).to(torch.int64)
    known = bool(((index == found) & (index >= 0) & (index < total)).all())
    signs = _signs(total)
    if not known or not torch.equal(_carried(carry, signs, shapes, called, device), signs[index]):
        raise StateShapeError(
            f"{called}: the map for its state is no pure re-layout, it mixes or changes elements; moments cannot "
            "follow: start them afresh, or give a map that only moves elements"
        )
    return Sources(tuple(shapes), index)


def _signs(count: int) -> Tensor:
    """Ones with signs that follow no rule; the first two descend, which tells a map that sorts."""
    drawn = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(1489))
    signs = (2 * drawn - 1).to(torch.float64)
    signs[:1], signs[1:2] = 1.0, -1.0
    return signs


def _carried(
    carry: TensorMap, elements: Tensor, shapes: Sequence[torch.Size], called: str, device: torch.device | None
) -> Tensor:
    try:
        carried = _called_with(carry, elements, shapes, device)
    except Exception as error:
        carried = _called_with_float32(carry, elements, shapes, device)
        if carried is None:
            taken = " and ".join(str(list(shape)) for shape in shapes)
            raise StateShapeError(
                f"{called}: the map for its state fails on shape {taken}: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(carried, Tensor):
        raise StateShapeError(f"{called}: the map for its state must return a tensor, got {type(carried).__name__}")
    return carried.detach().to("cpu", torch.float64)


def _called_with(
    carry: TensorMap, elements: Tensor, shapes: Sequence[torch.Size], device: torch.device | None
) -> object:
    parts = elements.split([shape.numel() for shape in shapes])
    with torch.no_grad():
        return carry(*(part.clone().reshape(shape).to(device) for part, shape in zip(parts, shapes, strict=True)))


def _called_with_float32(
    carry: TensorMap, elements: Tensor, shapes: Sequence[torch.Size], device: torch.device | None
) -> object:
    """What a map gives that multiplies by a matrix of the model's dtype; ``None`` where it fails here too."""
    if len(elements) > _EXACT_IN_FLOAT32:
        return None
    try:
        return _called_with(carry, elements.to(torch.float32), shapes, device)
    except Exception:  # noqa: BLE001  the first failure is the one that is told
        return None


def require_shape(sources: Sources, target: torch.Size, called: str) -> None:
    """Check that a map gives the shape of the value.

    Raises:
        StateShapeError: it gives another.
    """
    if sources.index.shape != target:
        raise StateShapeError(
            f"{called}: the map for its state gives shape {list(sources.index.shape)}, the new value has "
            f"{list(target)}; give the same map that carried the value, or let the state start afresh"
        )


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a tensor: by the result ``name``, as the one at ``position`` of those that it comes from."""

    name: str
    sources: Sources
    position: int

    def elements(self) -> Tensor:
        """The numbers of the elements that are used, within the tensor that they come from."""
        first = self.sources.offsets[self.position]
        index = self.sources.index.flatten() - first
        return index[(index >= 0) & (index < self.sources.shapes[self.position].numel())]


def require_each_once(called: str, shape: torch.Size, uses: Sequence[Use]) -> None:
    """Check that all uses together take every element of a tensor exactly once.

    Raises:
        StateShapeError: elements are repeated or dropped; the message says which, how many, and by what.
    """
    counts = torch.zeros(shape.numel(), dtype=torch.int64)
    for use in uses:
        counts += torch.bincount(use.elements(), minlength=len(counts))
    repeated, dropped = (counts > 1).nonzero().flatten(), (counts == 0).nonzero().flatten()
    if len(repeated):
        users = [use.name for use in uses if bool((use.elements() == repeated[0]).any())]
        raise StateShapeError(
            f"{called}: the map for its state is no pure re-layout, it repeats elements: {_some(repeated, shape)}, "
            f"used by {' and '.join(map(repr, users))}; moments of one value cannot serve two"
        )
    if len(dropped):
        raise StateShapeError(
            f"{called}: the map for its state is no pure re-layout, it drops elements: {_some(dropped, shape)}, used "
            f"by none of {', '.join(repr(use.name) for use in uses)}"
        )


def _some(numbers: Tensor, shape: torch.Size) -> str:
    place = [int(at) for at in torch.unravel_index(numbers[0], shape)]
    return f"{len(numbers)} of {shape.numel()}, the first at {place}"


def require_relayout(called: str, carry: TensorMap, shape: torch.Size, target: torch.Size) -> Sources:
    """Check that ``carry`` is a pure re-layout from ``shape`` to ``target``.

    Moments of moved elements are the moved moments; of mixed, dropped or repeated ones they are not.

    Args:
        called: how a message names the parameter.
        carry: the map to check.
        shape: the shape that it takes.
        target: the shape that it must give.

    Returns:
        Sources: where each element comes from.

    Raises:
        StateShapeError: it gives another shape, or drops, repeats or mixes elements; the message says which.
    """
    sources = sources_of(carry, [shape], called)
    require_shape(sources, target, called)
    require_each_once(called, shape, [Use("the new value", sources, 0)])
    return sources
