"""What a session of edits remembers of a model: which tensor stands in which slot, its bits, and ``requires_grad``."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from paramstate.bits import same_bits
from paramstate.errors import EditError
from paramstate.identity.wrappers import Link, Place, Tree
from paramstate.identity.write_counts import WriteCounts, write_counts


class Item(Protocol):
    """One parameter or buffer of a session."""

    @property
    def name(self) -> str:
        """Its canonical name."""
        ...

    def held(self) -> Tensor:
        """The tensor that stands there now."""
        ...

    def put(self, tensor: Tensor) -> None:
        """Let ``tensor`` stand there."""
        ...


@dataclass(frozen=True, slots=True)
class SlotItem:
    """A parameter or buffer of a model, with all the slots that hold it."""

    name: str
    slots: tuple[tuple[nn.Module, str], ...]

    def held(self) -> Tensor:
        """See :meth:`Item.held`."""
        module, attribute = self.slots[0]
        held = module._parameters.get(attribute)
        tensor = module._buffers.get(attribute) if held is None else held
        if tensor is None:
            raise EditError(
                f"{self.name!r} left the model while it was edited: a session restores values and objects, not slots "
                "that were removed; put a parameter there first"
            )
        return tensor

    def put(self, tensor: Tensor) -> None:
        """See :meth:`Item.put`."""
        for module, attribute in self.slots:
            if getattr(module, attribute, None) is not tensor:
                setattr(module, attribute, tensor)


@dataclass(frozen=True, slots=True)
class Captured:
    """One item as it was."""

    tensor: Tensor
    """The object; its values may be others by now."""
    bits: Tensor
    """A copy of its values."""
    requires_grad: bool
    writes: WriteCounts
    """The writes of others until then."""

    @classmethod
    def of(cls, tensor: Tensor, device: torch.device | str | None) -> Captured:
        """A tensor as it is, with the copy on ``device``, by default the tensor's own."""
        copy = tensor.detach().clone() if device is None else tensor.detach().to(device, copy=True)
        return cls(tensor, copy, tensor.requires_grad, write_counts(tensor))

    def is_still(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is the same object with the same bits."""
        return (
            tensor is self.tensor
            and tensor.requires_grad == self.requires_grad
            and same_bits(tensor.detach().to(self.bits.device), self.bits)
        )

    def restored(self) -> Tensor:
        """The object, with the values that it had."""
        if not same_bits(self.tensor.detach().to(self.bits.device), self.bits):
            if self.tensor.shape != self.bits.shape or self.tensor.dtype != self.bits.dtype:
                self.tensor.data = self.bits.to(self.tensor.device, copy=True)
            else:
                with torch.no_grad():
                    self.tensor.copy_(self.bits)
        if self.tensor.is_leaf and self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)
        return self.tensor


Capture = dict[str, Captured]
"""Items by name."""


def capture(items: Iterable[Item], device: torch.device | str | None, before: Capture | None = None) -> Capture:
    """All items as they are; what did not change since ``before`` shares its copies."""
    taken: Capture = {}
    for item in items:
        tensor, known = item.held(), None if before is None else before[item.name]
        taken[item.name] = known if known is not None and known.is_still(tensor) else Captured.of(tensor, device)
    return taken


def items_of(model: nn.Module, params: Iterable[Tensor]) -> list[Item]:
    """The given parameters of a model, and the buffers that belong to them.

    Args:
        model: the model; wrappers do not show in the names.
        params: parameters of it.
    """
    wanted = set(params)
    tree = Tree(model)
    slots: dict[Tensor, list[Place]] = {}
    for place in tree.places:
        if place.param in wanted:
            slots.setdefault(place.param, []).append(place)
    tied = [SlotItem(held[0].path, tuple((place.module, place.attribute) for place in held)) for held in slots.values()]
    return [*tied, *buffer_items([tree], wanted)]


def buffer_items(trees: Iterable[Tree], params: Container[Tensor]) -> list[SlotItem]:
    """The buffers that belong to parameters, under their canonical names.

    They are those of the modules that hold one of the parameters, and all those below a module of which every parameter
    is given: a module of rotary embeddings has no parameter of its own.

    Args:
        trees: walks over the models.
        params: the parameters.
    """
    found: dict[nn.Module, str] = {}
    for tree in trees:
        whole: set[nn.Module] = set()
        for parent, _, module, prefix in [Link(tree.root, "", tree.root, tree.prefix), *tree.links]:
            every = list(module.parameters())
            if parent in whole or (every and all(param in params for param in every)):
                whole.add(module)
            if module in whole or any(param in params for param in module._parameters.values() if param is not None):
                found.setdefault(module, prefix)
    return [
        SlotItem(prefix + key, ((module, key),))
        for module, prefix in found.items()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
