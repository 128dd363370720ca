"""The state of a parameter that was never stepped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def initial_state(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state of a parameter that was never stepped, as torch creates it: moments zero, in its dtype and strides."""
    keys = MOMENTS if group["amsgrad"] else MOMENTS[:2]
    return {
        "step": step_tensor(0.0, param, group),
        **{key: torch.zeros_like(param, memory_format=torch.preserve_format) for key in keys},
    }


def step_tensor(count: float, param: Tensor, group: dict[str, Any]) -> Tensor:
    """A step as torch keeps it: on the parameter's device where the whole step runs there, else on the host."""
    on_device = group["capturable"] or group["fused"]
    return torch.full(
        (), count, dtype=_get_scalar_dtype(is_fused=group["fused"]), device=param.device if on_device else "cpu"
    )
