"""What a session of edits remembers of a model: which tensor stands in which slot, its bits, and ``requires_grad``."""

from __future__ import annotations

from collections import Counter
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

    @property
    def names(self) -> tuple[str, ...]:
        """All of its names: several where it is tied."""
        ...

    def held(self) -> Tensor | None:
        """The tensor that stands there now; ``None`` where none does."""
        ...

    def is_held(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` stands there now."""
        ...

    def put(self, tensor: Tensor | None) -> None:
        """Let ``tensor`` stand there."""
        ...


@dataclass(frozen=True, slots=True)
class SlotItem:
    """A parameter or buffer of a model, with all the slots that hold it."""

    names: tuple[str, ...]
    slots: tuple[tuple[nn.Module, str], ...]

    @property
    def name(self) -> str:
        """See :attr:`Item.name`."""
        return self.names[0]

    def held(self) -> Tensor | None:
        """See :meth:`Item.held`."""
        module, attribute = self.slots[0]
        for registered in (module._parameters, module._buffers):
            if attribute in registered:
                return registered[attribute]
        raise EditError(
            f"{self.name!r} left the model while it was edited: a session restores values and objects, not slots "
            "that were removed; put a parameter there first"
        )

    def is_held(self, tensor: Tensor) -> bool:
        """See :meth:`Item.is_held`."""
        return any(
            held.get(attribute) is tensor
            for module, attribute in self.slots
            for held in (module._parameters, module._buffers)
        )

    def put(self, tensor: Tensor | None) -> None:
        """See :meth:`Item.put`."""
        trains = tensor is not None and tensor.requires_grad
        for module, attribute in self.slots:
            if getattr(module, attribute, ...) is not tensor:
                setattr(module, attribute, tensor)
        if tensor is not None and tensor.requires_grad != trains:
            tensor.requires_grad_(trains)  # an optimizer that froze it meanwhile saw it come


@dataclass(frozen=True, slots=True)
class Captured:
    """One item as it was."""

    tensor: Tensor | None
    """The object, whose values may be others by now; ``None`` where none stood there."""
    bits: Tensor
    """A copy of its values."""
    requires_grad: bool
    writes: WriteCounts
    """The writes of others until then."""

    @classmethod
    def of(cls, tensor: Tensor | None, device: torch.device | str | None) -> Captured:
        """A tensor as it is, with the copy on ``device``, by default the tensor's own."""
        if tensor is None:
            return cls(None, torch.empty(0), requires_grad=False, writes={})
        copy = tensor.detach().clone() if device is None else tensor.detach().to(device, copy=True)
        return cls(tensor, copy, tensor.requires_grad, write_counts(tensor))

    def is_still(self, tensor: Tensor | None) -> bool:
        """Whether ``tensor`` is the same object with the same bits."""
        if tensor is None or self.tensor is None:
            return tensor is self.tensor
        return (
            tensor is self.tensor
            and tensor.requires_grad == self.requires_grad
            and same_bits(tensor.detach().to(self.bits.device), self.bits)
        )

    def restored(self) -> Tensor | None:
        """The object, with the values that it had."""
        if self.tensor is None:
            return None
        if not same_bits(self.tensor.detach().to(self.bits.device), self.bits):
            if self.tensor.shape != self.bits.shape or self.tensor.dtype != self.bits.dtype:
                become(self.tensor, self.bits.to(self.tensor.device, copy=True))
            else:
                with torch.no_grad():
                    self.tensor.copy_(self.bits)
        if self.tensor.is_leaf and self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)
        return self.tensor


def become(tensor: Tensor, values: Tensor) -> None:
    """Take other memory; a gradient follows to its dtype, as with ``module.to(...)``, and goes with another shape."""
    grad, tensor.grad = tensor.grad if tensor.is_leaf else None, None
    tensor.data = values
    if grad is not None and grad.shape == values.shape:
        tensor.grad = grad.to(values.dtype)


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
    tied = [
        SlotItem(tuple(place.path for place in held), tuple((place.module, place.attribute) for place in held))
        for held in slots.values()
    ]
    return [*tied, *buffer_items([(tree, "")], wanted, [item.name for item in tied])]


def buffer_items(
    models: Iterable[tuple[Tree, str]], params: Container[Tensor], taken: Iterable[str] = ()
) -> list[SlotItem]:
    """The buffers that belong to parameters, under their canonical names; also those that are ``None``.

    They are those of the modules that hold one of the parameters, and all those below a module of which every parameter
    is given: a module of rotary embeddings has no parameter of its own.

    Args:
        models: a walk over each model, and the label that qualifies the names that it shares with another.
        params: the parameters.
        taken: the names of these.
    """
    found: dict[nn.Module, tuple[str, str]] = {}
    for tree, label in models:
        whole: set[nn.Module] = set()
        for parent, _, module, prefix in [Link(tree.root, "", tree.root, tree.prefix), *tree.links]:
            every = list(module.parameters())
            if parent in whole or (every and all(param in params for param in every)):
                whole.add(module)
            if module in whole or any(param in params for param in module._parameters.values() if param is not None):
                found.setdefault(module, (prefix, label))
    slots = [(prefix, label, module, key) for module, (prefix, label) in found.items() for key in module._buffers]
    sharing = Counter([*taken, *(prefix + key for prefix, _, _, key in slots)])
    items: dict[str, SlotItem] = {}
    for prefix, label, module, key in slots:
        name = prefix + key
        own = name if sharing[name] == 1 else _unused(f"{label}:{name}", items)
        items[own] = SlotItem((own,), ((module, key),))
    return list(items.values())


def _unused(name: str, taken: Container[str]) -> str:
    candidate, count = name, 2
    while candidate in taken:
        candidate, count = f"{name}#{count}", count + 1
    return candidate
