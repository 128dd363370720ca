"""The step through torch's own functional Adam: for every tensor that the host kernels do not take.

Other devices, complex and sparse tensors, tensor subclasses, ``capturable``, ``differentiable``, tracing. It is torch's
arithmetic, with torch's errors. What torch's function does not know (the clip coefficient, constraints) is done with
torch operations beside it, or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from .errors import UnsupportedError


def sum_of_squares(grads: Sequence[Tensor]) -> float:
    """The sum of squares of all elements of ``grads``, of any device, layout and dtype."""
    if any(grad.is_meta for grad in grads):
        raise UnsupportedError(
            "max_grad_norm needs the values of gradients, which tensors on the meta device do not have"
        )
    total = 0.0
    for grad in grads:
        values = grad.coalesce().values() if grad.is_sparse else grad
        total += float(torch.linalg.vector_norm(values.detach().to(_accumulator(values)))) ** 2
    return total


def _accumulator(values: Tensor) -> torch.dtype:
    return torch.complex128 if values.is_complex() else torch.float64


def adam_step(
    optimizer: torch.optim.Adam,
    group: Mapping[str, Any],
    params: Sequence[Tensor],
    *,
    coefficient: float = 1.0,
) -> None:
    """One step of torch's Adam over some parameters of a group.

    Args:
        optimizer: whose ``state`` is used and filled, through torch's ``_init_group``.
        group: the options; its ``"params"`` are not looked at.
        params: the parameters to step; those without a gradient are skipped.
        coefficient: what the gradients are multiplied with first, out of place.
    """
    with_grad: list[Tensor] = []
    grads: list[Tensor] = []
    exp_avgs: list[Tensor] = []
    exp_avg_sqs: list[Tensor] = []
    max_exp_avg_sqs: list[Tensor] = []
    steps: list[Tensor] = []
    selected = group if params is group["params"] else {**group, "params": params}
    has_complex = optimizer._init_group(selected, with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    if coefficient != 1.0:
        grads = [grad * coefficient for grad in grads]
    beta1, beta2 = group["betas"]
    adam(
        with_grad,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        amsgrad=group["amsgrad"],
        has_complex=has_complex,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        foreach=group["foreach"],
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        fused=group["fused"],
        grad_scale=getattr(optimizer, "grad_scale", None),
        found_inf=getattr(optimizer, "found_inf", None),
        decoupled_weight_decay=group["decoupled_weight_decay"],
    )
