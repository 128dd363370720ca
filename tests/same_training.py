"""One training script, run with torch's optimizer and with ours: what it leaves behind, and how the two compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import paramstate
from small_models import assert_same_bits, state_by_name

OPTIMIZERS = (torch.optim.AdamW, paramstate.AdamW)


def whose(value: object) -> str | None:
    """Test IDs: which package an optimizer class is of."""
    return value.__module__.partition(".")[0] if isinstance(value, type) else None


@dataclass
class Training:
    """What a script leaves behind: the loss of each step, and value and state of each parameter."""

    losses: list[float]
    tensors: dict[str, dict[str, torch.Tensor]]

    @classmethod
    def of(cls, losses: Sequence[float], model: nn.Module, optimizer: torch.optim.Optimizer) -> Training:
        """What is there now."""
        return cls(list(losses), state_by_name(model, optimizer))


def assert_same_to_rounding(ours: Training, torchs: Training, *, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Losses, values, moments and steps of two runs are the same within the tolerances, and something was trained."""
    assert len(ours.losses) == len(torchs.losses) > 1
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(torchs.losses), rtol=rtol, atol=atol)
    assert len(set(torchs.losses)) > 1, "the loss never moved"
    assert ours.tensors.keys() == torchs.tensors.keys()
    for name, expected in torchs.tensors.items():
        torch.testing.assert_close(
            ours.tensors[name], expected, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_run(a: Training, b: Training) -> None:
    """Two runs are the same, bit for bit."""
    assert a.losses == b.losses
    assert a.losses
    assert_same_bits(a.tensors, b.tensors)
