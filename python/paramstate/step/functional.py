"""The step through torch's own functional Adam: for every tensor that the host kernels do not take.

Other devices, complex and sparse tensors, tensor subclasses, ``capturable``, ``differentiable``, tracing. It is torch's
arithmetic, with torch's errors. What torch's function does not know (the clip coefficient, constraints) is done with
torch operations beside it, or refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import _device_dtype_check_for_fused

from paramstate.errors import UnsupportedError


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


class Gathered(NamedTuple):
    """What one call of torch's function is given, one element for each parameter with a gradient."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    has_complex: bool

    def written(self) -> list[Tensor]:
        """The tensors that every step writes."""
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.max_exp_avg_sqs, *self.steps]

    def is_ordinary(self) -> bool:
        """Whether nothing in the tensors can make torch raise when some of them are already written."""
        maxima = [self.max_exp_avg_sqs] if self.max_exp_avg_sqs else []
        moments = zip(self.exp_avgs, self.exp_avg_sqs, *maxima, strict=True)
        rows = zip(self.params, self.grads, moments, strict=True)
        return all(_are_alike(param, (grad, *held)) for param, grad, held in rows) and all(map(_counts, self.steps))


def gather(optimizer: torch.optim.Adam, group: Mapping[str, Any], params: Sequence[Tensor]) -> Gathered:
    """Collect what torch's function needs, through torch's ``_init_group``, which creates state and refuses gradients.

    Args:
        optimizer: whose ``state`` is used and filled.
        group: the options; its ``"params"`` are not looked at.
        params: the parameters to step; those without a gradient are skipped.
    """
    selected = group if params is group["params"] else {**group, "params": params}
    gathered = Gathered([], [], [], [], [], [], has_complex=any(map(torch.is_complex, params)))
    optimizer._init_group(selected, *gathered[:-1])
    return gathered


def adam_step(
    optimizer: torch.optim.Adam, group: Mapping[str, Any], gathered: Gathered, *, coefficient: float = 1.0
) -> None:
    """One step of torch's Adam over some parameters of a group.

    Args:
        optimizer: whose gradient scale is used.
        group: the options.
        gathered: the tensors, from :func:`gather`.
        coefficient: what the gradients are multiplied with first, out of place.
    """
    grads = gathered.grads
    if coefficient != 1.0:
        grads = [grad * coefficient for grad in grads]
    beta1, beta2 = group["betas"]
    adam(
        gathered.params,
        grads,
        gathered.exp_avgs,
        gathered.exp_avg_sqs,
        gathered.max_exp_avg_sqs,
        gathered.steps,
        amsgrad=group["amsgrad"],
        has_complex=gathered.has_complex,
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


def require_supported(optimizer: torch.optim.Adam, group: Mapping[str, Any], param: Tensor, called: str) -> None:
    """Raise what torch's function would raise of a parameter's device, dtype and gradient scale, only earlier."""
    is_scaled = getattr(optimizer, "grad_scale", None) is not None
    if group["fused"] or is_scaled:
        _device_dtype_check_for_fused(param)
    if is_scaled and not group["fused"]:
        raise UnsupportedError(
            f"parameter {called}: torch steps it, and unscales its gradient only where its group has fused=True; set "
            "that, or call scaler.unscale_(optimizer) before step()"
        )


class Undo:
    """State entries, and some tensors' values, as they were: put back when a step fails."""

    def __init__(self, state: dict[Any, Any]) -> None:
        self._state = state
        self._entries: dict[Tensor, tuple[dict[str, Any], dict[str, Any]] | None] = {}
        self._values: list[tuple[Tensor, Tensor]] = []

    def remember_entry(self, param: Tensor) -> None:
        """Before the state of a parameter gets, loses or exchanges entries."""
        if param not in self._entries:
            held = self._state.get(param)
            self._entries[param] = None if held is None else (held, dict(held))

    def remember_values(self, tensors: Iterable[Tensor]) -> None:
        """Before tensors are written in a way that may fail midway."""
        self._values += [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore(self) -> None:
        """Put everything back."""
        with torch.inference_mode():  # in which alone inference tensors may be written; others may be as well
            for tensor, value in self._values:
                tensor.copy_(value)
        for param, former in self._entries.items():
            if former is None:
                self._state.pop(param, None)
                continue
            held, items = former
            held.clear()
            held.update(items)
            self._state[param] = held


def _are_alike(param: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether tensors agree in all that torch's arithmetic asks for."""
    kinds = {(tensor.dtype, tensor.device, tensor.shape, tensor.layout) for tensor in (param, *others)}
    return len(kinds) == 1 and len({type(tensor) for tensor in others}) == 1 and _is_writable(param, others)


def _is_writable(param: Tensor, others: Sequence[Tensor]) -> bool:
    return param.layout is torch.strided and not any(
        tensor.is_inference()
        or any(n > 1 and not stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        for tensor in (param, *others)
    )


def _counts(step: Tensor) -> bool:
    """Whether a step is one number from which torch can compute; one on a device is not waited for."""
    return step.numel() == 1 and step.is_floating_point() and (not step.is_cpu or step.item() >= 0)
