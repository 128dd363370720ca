"""How a parameter and its gradient may lie in memory: for each case a way to make both."""

from __future__ import annotations

from collections.abc import Callable

import torch

Make = Callable[[], torch.Tensor]

LAYOUTS: dict[str, tuple[Make, Make]] = {
    "parameter channels_last, gradient contiguous": (
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(2, 3, 4, 5),
    ),
    "both channels_last": (
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    ),
    "both transposed": (lambda: torch.randn(4, 5).t(), lambda: torch.randn(4, 5).t()),
    "gradient transposed": (lambda: torch.randn(5, 4), lambda: torch.randn(4, 5).t()),
    "parameter transposed": (lambda: torch.randn(4, 5).t(), lambda: torch.randn(5, 4)),
    "parameter sliced": (lambda: torch.randn(5, 8)[:, ::2], lambda: torch.randn(5, 4)),
    "parameter a slice of rows": (lambda: torch.randn(9, 4)[2:7], lambda: torch.randn(5, 4)),
    "gradient sliced": (lambda: torch.randn(5, 4), lambda: torch.randn(10, 9)[::2, 1:5]),
    "gradient expanded": (lambda: torch.randn(5, 4), lambda: torch.randn(5, 1).expand(5, 4)),
    "gradient expanded from a number": (lambda: torch.randn(5, 4), lambda: torch.tensor(0.5).expand(5, 4)),
    "gradient flipped and copied": (lambda: torch.randn(5, 4), lambda: torch.randn(5, 4).flip(0)),
    "dimensions of size one": (lambda: torch.randn(1, 5, 1), lambda: torch.randn(5, 1, 1).permute(1, 0, 2)),
    "large and sliced": (lambda: torch.randn(300, 800)[:, ::2], lambda: torch.randn(400, 300).t()),
    "5 dimensions permuted": (
        lambda: torch.randn(2, 3, 2, 3, 2).permute(4, 1, 0, 3, 2),
        lambda: torch.randn(2, 3, 2, 3, 2),
    ),
}
