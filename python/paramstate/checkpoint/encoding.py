"""Plain data as JSON from which it is read back exactly, with tensors beside it.

What JSON lacks is an object with one key, which begins with a single ``$``:

==============================  =======================================================
``{"$tensor": key}``            the tensor that the file has under this key
``{"$complex": key}``           the same, its last dimension being (real, imaginary)
``{"$tuple": [...]}``           a tuple
``{"$float": "inf"}``           a float that is infinite, or ``nan``
``{"$items": [[key, value]]}``  a dict with keys that are no text
==============================  =======================================================

A key that begins with ``$`` gets another one in front.

A tensor's key is the path that leads to it, ``state/0.weight/exp_avg``; ``/`` and ``%`` within a part of it are written
``%2F`` and ``%25``, so that no two paths are alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paramstate.errors import SaveError

from .container import obstacle


class Encoder:
    """Makes JSON of plain data, and collects the tensors in it.

    Example:
        >>> import torch
        >>> encoder = Encoder()
        >>> encoder.encoded({"lr": torch.tensor(0.1), "betas": (0.9, 0.999)}, "param_groups", "0")
        {'lr': {'$tensor': 'param_groups/0/lr'}, 'betas': {'$tuple': [0.9, 0.999]}}
        >>> list(encoder.tensors)
        ['param_groups/0/lr']
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def encoded(self, value: Any, *path: str) -> Any:
        """A value as JSON.

        Raises:
            SaveError: it is neither a tensor that the format has, nor a number, text, None, or a dict, list or tuple of
                such; the message says where it stands.
        """
        if value is None or isinstance(value, (int, str)):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        if isinstance(value, Tensor):
            return self._beside(value, path)
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, tuple):
            return {"$tuple": self._items(value, path)}
        if isinstance(value, list):
            return self._items(value, path)
        raise SaveError(
            f"{_called(path)} is a {type(value).__qualname__}; a file holds tensors, numbers, text, None, and dicts, "
            "lists and tuples of these: convert it, or delete it before saving"
        )

    def _items(self, values: Sequence[Any], path: tuple[str, ...]) -> list[Any]:
        return [self.encoded(value, *path, str(number)) for number, value in enumerate(values)]

    def _mapping(self, values: Mapping[Any, Any], path: tuple[str, ...]) -> dict[str, Any]:
        if all(isinstance(key, str) for key in values):
            return {_escaped(key): self.encoded(value, *path, key) for key, value in values.items()}
        return {"$items": self._items([list(item) for item in values.items()], path)}

    def _beside(self, tensor: Tensor, path: tuple[str, ...]) -> dict[str, str]:
        reason = obstacle(tensor)
        if reason is not None:
            raise SaveError(f"{_called(path)} {reason}")
        mark = "$tensor"
        if tensor.is_complex():
            mark, tensor = "$complex", torch.view_as_real(tensor.detach().resolve_conj())
        key = "/".join(part.replace("%", "%25").replace("/", "%2F") for part in path)
        self.tensors[key] = tensor
        return {mark: key}


def decoded(value: Any, tensors: MutableMapping[str, Tensor]) -> Any:
    """What an :class:`Encoder` made this JSON of; takes the tensors that it names out of ``tensors``.

    Raises:
        LookupError, TypeError, ValueError: it is not of one's making.
    """
    if isinstance(value, list):
        return [decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if not any(_is_mark(key) for key in value):
        return {key.removeprefix("$"): decoded(item, tensors) for key, item in value.items()}
    ((mark, held),) = value.items()
    return _marked(mark, held, tensors)


def _marked(mark: str, held: Any, tensors: MutableMapping[str, Tensor]) -> Any:
    if mark == "$tensor":
        return tensors.pop(held)
    if mark == "$complex":
        return torch.view_as_complex(tensors.pop(held))
    if mark == "$float":
        return float(held)
    items = decoded(held, tensors)
    if mark == "$tuple":
        return tuple(items)
    if mark == "$items":
        return {key: item for key, item in items}  # noqa: C416  # `dict(...)` would take pairs of letters, too
    raise ValueError(f"unknown mark {mark!r}")


def _is_mark(key: str) -> bool:
    return key.startswith("$") and not key.startswith("$$")


def _escaped(key: str) -> str:
    return f"${key}" if key.startswith("$") else key


def _called(path: Sequence[str]) -> str:
    """How a message names the place of a value."""
    room, owner, *keys = path
    if room == "state":
        return f"parameter {owner!r}: its state {'/'.join(keys)!r}"
    if room == "param_groups":
        return f"group {owner}: its {'/'.join(keys)!r}"
    return f"the state dict's {'/'.join(path)!r}"
