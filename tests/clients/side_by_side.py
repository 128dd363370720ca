"""One client's script, run with torch's class and with ours; only the class is another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

import paramstate

Result = TypeVar("Result")


def as_with_torch(
    script: Callable[[type[torch.optim.Optimizer]], Result],
    name: str = "AdamW",
    *,
    rtol: float = 1e-5,
    atol: float = 1e-7,
    seed: int = 0,
) -> Result:
    """Run ``script`` with both classes of this name from the same seed, and compare all that it returns.

    Returns:
        What the script returned with our class, for further assertions.
    """
    torch.manual_seed(seed)
    theirs = script(getattr(torch.optim, name))
    torch.manual_seed(seed)
    ours = script(getattr(paramstate, name))
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    return ours


def same_bits(one: Any, other: Any) -> None:
    """Everything in two results is equal, bit for bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)
