"""Private attributes that an optimizer has in common with the wrappers that imitate it."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class Shared(Generic[T]):
    """A private attribute of an optimizer, one and the same for it and for every wrapper that imitates its class.

    Lightning and Fabric give a wrapper the optimizer's class, so that it has our methods, but none of its attributes:
    those it looks up in the optimizer. What such a method writes would be the wrapper's own, and hide the optimizer's.
    So it is kept in a dict that both reach.

    Args:
        default: the value before the first is set.
    """

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, optimizer: None, owner: type) -> Shared[T]: ...
    @overload
    def __get__(self, optimizer: object, owner: type) -> T: ...
    def __get__(self, optimizer: Any, owner: type) -> Any:
        if optimizer is None:
            return self
        shared: dict[str, Any] = getattr(optimizer, "_shared", {})
        return shared.get(self._name, self._default)

    def __set__(self, optimizer: Any, value: T) -> None:
        optimizer._shared[self._name] = value
