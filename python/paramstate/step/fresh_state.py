"""The state of a parameter that was never stepped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from paramstate.precision.state_dtype import COMPENSATION, Kind, is_short, zeros

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def initial_state(
    param: Tensor, group: dict[str, Any], kind: Kind | None = None, *, compensated: bool = False
) -> dict[str, Tensor]:
    """The state of a parameter that was never stepped: zeros in its strides.

    Args:
        param: the parameter.
        group: whose options hold for it.
        kind: in what its moments are kept; by default in its dtype, as torch creates them.
        compensated: whether what its rounding leaves over is kept.
    """
    keys = MOMENTS if group["amsgrad"] else MOMENTS[:2]
    state = {"step": step_tensor(0.0, param, group), **{key: zeros(param, key, kind) for key in keys}}
    if compensated:
        state[COMPENSATION] = zeros(param, COMPENSATION, None)
    return state


def is_compensated(param: Tensor, rounding: str) -> bool:
    """Whether what the rounding of a parameter's value leaves over is kept."""
    return rounding == "kahan" and is_short(param)


def step_tensor(count: float, param: Tensor, group: dict[str, Any]) -> Tensor:
    """A step as torch keeps it: on the parameter's device where the whole step runs there, else on the host."""
    on_device = group["capturable"] or group["fused"]
    return torch.full(
        (), count, dtype=_get_scalar_dtype(is_fused=group["fused"]), device=param.device if on_device else "cpu"
    )
