"""What differs between the releases of torch that are supported, all in one place."""

from __future__ import annotations

import torch

# Torch 2.10 calls it by its former name; later ones keep that as a deprecated alias.
_HEALTH_CHECK = (
    "_accelerator_graph_capture_health_check"
    if hasattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check")
    else "_cuda_graph_capture_health_check"
)


def check_graph_capture(optimizer: torch.optim.Optimizer) -> None:
    """Raise where a graph of a device is captured while the optimizer is not capturable.

    Raises:
        RuntimeError: with torch's text.
    """
    getattr(optimizer, _HEALTH_CHECK)()
