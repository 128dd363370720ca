"""Reading a side of a comparison: tensors under the names of the parameters that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from paramstate.identified import IdentifiedOptimizer
from paramstate.identity.wrappers import Tree
from paramstate.loading.reading import GivenNames, saved_parameters

VALUE = "value"
"""The role of a parameter's own value; the others are the keys of its state."""

Roles = dict[str, Tensor]
Side = dict[str, Roles]
"""Name of a parameter or buffer to its tensors, each under its role."""


@runtime_checkable
class HasTensors(Protocol):
    """Anything that can be asked for its tensors by name, as an edit session can."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Name to tensor."""


Comparable = nn.Module | torch.optim.Optimizer | Mapping[str, Any] | HasTensors


def read(side: Comparable) -> Side:
    """The tensors of one side, not copied.

    Raises:
        TypeError: it is nothing that has named tensors.
    """
    if isinstance(side, nn.Module):
        return _values(_module_tensors(side))
    if isinstance(side, IdentifiedOptimizer):
        return _identified(side)
    if isinstance(side, torch.optim.Optimizer):
        return _plain_optimizer(side)
    if isinstance(side, Mapping):
        return _state_dict(side) if {"state", "param_groups"} <= side.keys() else _values(_mapped(side))
    if isinstance(side, HasTensors):
        return _values(side.tensors())
    raise TypeError(
        f"diff compares modules, optimizers, state dicts, mappings from name to tensor and objects with tensors(); got "
        f"{type(side).__name__}"
    )


def _values(tensors: Mapping[str, Tensor]) -> Side:
    return {name: {VALUE: tensor.detach()} for name, tensor in tensors.items()}


def _module_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under their canonical names; a tied one under each of its names."""
    tree = Tree(model)
    found: dict[str, Tensor] = {place.path: place.param for place in tree.places}
    for module, prefix in [(model, ""), *((link.child, link.prefix) for link in tree.links)]:
        found.update({prefix + name: buffer for name, buffer in module._buffers.items() if buffer is not None})
    return found


def _mapped(side: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {str(name): value for name, value in side.items() if isinstance(value, Tensor)}
    if side and not found:
        raise TypeError(f"a mapping without tensors cannot be compared; its keys are {[*side][:8]}")
    return found


def _identified(optimizer: IdentifiedOptimizer) -> Side:
    optimizer._sync()
    table = optimizer._table
    return {
        table.name(entry): _with_state(entry.param, optimizer.state.get(entry.param, {}))
        for entry in table
        if any(entry.param is param for group in optimizer.param_groups for param in group["params"])
    }


def _plain_optimizer(optimizer: torch.optim.Optimizer) -> Side:
    named = names_of(optimizer)
    return {named[param]: _with_state(param, optimizer.state.get(param, {})) for param in named}


def names_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """What each parameter of any optimizer is called: by its name where it has one, else by its position."""
    if isinstance(optimizer, IdentifiedOptimizer):
        optimizer._sync()
        return {entry.param: optimizer._table.name(entry) for entry in optimizer._table}
    given = GivenNames(optimizer.param_groups)
    params: Iterable[Tensor] = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
    names = {param: given.added_to((), param) for param in params}
    return {param: own[0] if own else str(position) for position, (param, own) in enumerate(names.items())}


def _with_state(param: Tensor, state: Mapping[str, Any]) -> Roles:
    return {VALUE: param.detach(), **_state_tensors(state)}


def _state_tensors(state: Mapping[str, Any]) -> Roles:
    numbers = (bool, int, float, Tensor)
    return {key: torch.as_tensor(value).detach() for key, value in state.items() if isinstance(value, numbers)}


def _state_dict(side: Mapping[str, Any]) -> Side:
    """An optimizer's state dict, which has no values."""
    return {
        saved.names[0] if saved.names else str(saved.key): roles
        for saved in saved_parameters(side, {}, _names_in_keys(side))
        if (roles := _state_tensors(saved.state or {}))
    }


def _names_in_keys(state_dict: Mapping[str, Any]) -> set[str]:
    """The keys of parameters that are names, as ``torch.distributed.checkpoint`` writes them."""
    return {key for group in state_dict["param_groups"] for key in group["params"] if isinstance(key, str)}
