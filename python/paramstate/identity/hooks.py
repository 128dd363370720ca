"""The two registration hooks of ``torch.nn.Module``, shared by every optimizer that lives.

Both run before the assignment, so the old tensor or module is still in place: old and new meet there. They are
registered once, with the first optimizer, and hold optimizers weakly.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


class Listener(Protocol):
    """What is told of registrations."""

    def _on_parameter(self, module: nn.Module, attribute: str, new: nn.Parameter) -> None: ...

    def _on_module(self, parent: nn.Module, name: str, child: nn.Module) -> None: ...
    def _forget_versions(self, params: Iterable[Tensor]) -> None: ...


_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
_installed: list[object] = []


def listeners() -> list[Listener]:
    """The optimizers that live."""
    return list(_listeners)


def listen(listener: Listener) -> None:
    """Tell ``listener`` of every registration from now on, for as long as it lives."""
    if not _installed:
        _installed.append(register_module_parameter_registration_hook(_parameter_registered))
        _installed.append(register_module_module_registration_hook(_module_registered))
    _listeners.add(listener)


def _parameter_registered(module: nn.Module, name: str, param: nn.Parameter) -> None:
    for listener in listeners():
        listener._on_parameter(module, name, param)


def _module_registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if child is not None and parent._modules.get(name) is not None:
        for listener in listeners():
            listener._on_module(parent, name, child)
