"""Canonical names: where a parameter lives in a model, without the parts that wrappers add to its path.

Wrappers are recognised by their type and never by text, so a user's own submodule called ``module`` keeps its name. A
wrapper's package is looked up only where it is imported already: nothing is imported for the sake of looking.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

# Where each wrapper's class is found, and the attribute under which it keeps the module that it wraps.
_WRAPPERS: tuple[tuple[str, str, str], ...] = (
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("peft", "PeftModel", "base_model"),
    ("peft.tuners.tuners_utils", "BaseTuner", "model"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer", "base_layer"),
    ("peft.utils.other", "AuxiliaryTrainingWrapper", "original_module"),
    ("peft.utils.other", "TrainableTokensWrapper", "token_adapter"),
)


class Place(NamedTuple):
    """One slot of a model: the attribute of a module that holds a parameter."""

    path: str
    """Its canonical name."""
    module: nn.Module
    attribute: str
    param: nn.Parameter


class Link(NamedTuple):
    """One edge of the tree of modules."""

    parent: nn.Module
    name: str
    child: nn.Module
    prefix: str = ""
    """What the canonical names of the child's parameters begin with."""


def _wrapper_types() -> list[tuple[type, str]]:
    """The wrapper classes whose packages are imported, each with the attribute that holds the wrapped module."""
    found = []
    for package, name, attribute in _WRAPPERS:
        wrapper = getattr(sys.modules.get(package), name, None)
        if isinstance(wrapper, type):
            found.append((wrapper, attribute))
    return found


def require_module(model: object) -> None:
    """Check that a model is one.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


class Tree:
    """A walk over a model: its slots under their canonical names, and its links.

    Args:
        model: the root of the walk.
        prefix: what all canonical names begin with.
        pending: an assignment that is about to happen, as ``(parent, name, child)``: the walk sees it as done.

    A module that is reached by several paths is visited along each, so that a tied parameter shows all its names; a
    path that leads back into itself is cut.
    """

    def __init__(self, model: nn.Module, pending: Link | None = None, prefix: str = "") -> None:
        require_module(model)
        self.root = model
        self.prefix = prefix
        self.places: list[Place] = []
        self.links: list[Link] = []
        self._pending = pending
        self._wrappers = _wrapper_types()
        self._wrapped_by_type: dict[type, tuple[str, ...]] = {}
        self._visit(model, prefix, set())

    def _visit(self, module: nn.Module, prefix: str, above: set[int]) -> None:
        for attribute, param in module._parameters.items():
            if param is not None:
                self.places.append(Place(prefix + attribute, module, attribute, param))
        wrapped = self._wrapped_attributes(type(module))
        above = above | {id(module)}
        for name, child in self._children(module):
            if id(child) not in above:
                below = prefix if name in wrapped else f"{prefix}{name}."
                self.links.append(Link(module, name, child, below))
                self._visit(child, below, above)

    def _children(self, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        pending = self._pending if self._pending is not None and self._pending.parent is module else None
        for name, child in module._modules.items():
            if pending is not None and name == pending.name:
                yield name, pending.child
            elif child is not None:
                yield name, child

    def _wrapped_attributes(self, kind: type) -> tuple[str, ...]:
        known = self._wrapped_by_type.get(kind)
        if known is None:
            known = tuple(attribute for wrapper, attribute in self._wrappers if issubclass(kind, wrapper))
            self._wrapped_by_type[kind] = known
        return known


def canonical_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of ``model`` under their canonical names: the qualified names without what wrappers add.

    A tied parameter stands under each of its names.

    Args:
        model: any module, wrapped or not by ``DistributedDataParallel``, ``DataParallel``, ``torch.compile``,
            FSDP, activation checkpointing, or PEFT.

    Returns:
        dict: canonical name to parameter, in the order of ``model.named_parameters()``.

    Example:
        >>> import torch
        >>> model = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Linear(2, 1)))
        >>> [name for name, _ in model.named_parameters()]
        ['module.0.weight', 'module.0.bias']
        >>> list(canonical_names(model))
        ['0.weight', '0.bias']
    """
    return {place.path: place.param for place in Tree(model).places}
