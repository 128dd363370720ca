"""Adam over a parameter whose rows differ, with torch operations: for every tensor that the host kernels do not take.

The twin of the compiled kernel with per-row steps: each row is stepped as a parameter of its own would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from paramstate.declared.rows import Rows


def adam_step_of_rows(
    param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], rows: Rows, active: Tensor, coefficient: float
) -> None:
    """One step of Adam (see :mod:`torch.optim.adam`) over the active rows of a parameter; its ``step`` counts up.

    Args:
        param: with a dense gradient; of any floating or complex dtype, on any device.
        state: its state, as torch creates it.
        group: the options.
        rows: how many steps each row has not taken; those that are not active get one more.
        active: bool of shape (n,), on the host.
        coefficient: what the gradient is multiplied with first.
    """
    assert param.grad is not None
    state["step"].add_(1)
    offsets = rows.offsets.add_((~active).to(torch.int64))
    steps = rows.broadcast((float(state["step"]) - offsets).clamp(min=1.0).to(torch.float64), param)
    chosen = rows.broadcast(active, param)
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    tensors = [param.detach(), param.grad.detach(), *(state[name] for name in names)]
    if param.is_complex():
        tensors = [torch.view_as_real(tensor) for tensor in tensors]
        steps, chosen = steps.unsqueeze(-1), chosen.unsqueeze(-1)
    value, grad, *moments = tensors
    new_value, new_moments = _updated(value, grad, moments, steps, group, coefficient)
    with torch.no_grad():
        for old, new in zip((value, *moments), (new_value, *new_moments), strict=True):
            old.copy_(torch.where(chosen, new.to(old.dtype), old))


def _updated(
    value: Tensor, grad: Tensor, moments: list[Tensor], steps: Tensor, group: Mapping[str, Any], coefficient: float
) -> tuple[Tensor, list[Tensor]]:
    """New value and moments of every row, from Kingma & Ba 2015, Algorithm 1, with one step count for each row."""
    compute = torch.promote_types(value.dtype, torch.float32)
    beta1, beta2 = (float(beta) for beta in group["betas"])
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    value = value.to(compute)
    grad = grad.to(compute) * (-coefficient if group["maximize"] else coefficient)
    if decay and group["decoupled_weight_decay"]:
        value = value * (1.0 - lr * decay)
    elif decay:
        grad = grad + decay * value
    exp_avg = torch.lerp(moments[0].to(compute), grad, 1.0 - beta1)
    exp_avg_sq = beta2 * moments[1].to(compute) + (1.0 - beta2) * grad * grad
    maxima = [torch.maximum(moments[2].to(compute), exp_avg_sq)] if len(moments) > 2 else []
    correction1 = (1.0 - beta1**steps).to(compute)
    correction2_sqrt = (1.0 - beta2**steps).sqrt().to(compute)
    denominator = (maxima or [exp_avg_sq])[0].sqrt() / correction2_sqrt + float(group["eps"])
    return value - lr / correction1 * exp_avg / denominator, [exp_avg, exp_avg_sq, *maxima]
