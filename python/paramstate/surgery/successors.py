"""A new parameter that takes the place of another: with its attributes, its hooks and its kind."""

from __future__ import annotations

from torch import Tensor, nn


def successor(old: Tensor, value: Tensor) -> Tensor:
    """A leaf that holds ``value`` and is otherwise what ``old`` is.

    ``requires_grad``, the user's attributes, and hooks go along; the handles of hooks remove them from both.

    Args:
        old: a parameter, or a plain leaf tensor.
        value: the memory to use, of any shape; not copied.
    """
    value = value.detach()
    new: Tensor
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        if type(old) is not nn.Parameter:
            new.__class__ = type(old)
    else:
        new = value.requires_grad_(old.requires_grad)
    new.__dict__.update(old.__dict__)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        held = getattr(old, hooks, None)
        if held is not None:
            setattr(new, hooks, held)
    return new
