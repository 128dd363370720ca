"""What torch's own list of optimizer configurations, `optim_db`, holds for Adam and AdamW, made into test cases.

Nothing of the list is repeated here: what a release of torch lists is what is tested. It is asked for every device that
has entries of its own, since on the host a tensor `lr` or `capturable` is listed for none; and torch's class is asked
what it takes here, so that a case is either one that torch steps or one that it refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

import paramstate

# Importing it forbids the whole process settings such as `torch.backends.cudnn.benchmark = True`.
torch.backends.__allow_nonbracketed_mutation_flag = True

CLASSES = {"Adam": paramstate.Adam, "AdamW": paramstate.AdamW}
INFOS: dict[str, OptimizerInfo] = {info.name: info for info in optim_db if info.name in CLASSES}
LISTING_DEVICES = ("cpu", "cuda", "mps")
FOR_LOOP = {"foreach": False, "fused": False, "capturable": False}

# How near to torch's for-loop: relative, and absolute. Where values or moments are all smaller than 1, the absolute
# part shrinks with the largest of them, or it would hide small moments.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-7, 1e-7),
    torch.complex128: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5),
    torch.complex64: (1.3e-6, 1e-5),
    torch.bfloat16: (5e-3, 5e-3),
    torch.float16: (5e-3, 5e-3),
}


@dataclass(frozen=True)
class Case:
    """One configuration of one class; `options` are fresh on each call, as a tensor `lr` is shared and written."""

    name: str
    description: str
    dtype: torch.dtype
    listed: dict[str, Any]

    def __str__(self) -> str:
        dtype = "" if self.dtype is torch.float32 else f", {str(self.dtype).removeprefix('torch.')}"
        return f"{self.name}: {self.description}{dtype}"

    @property
    def ours(self) -> type[torch.optim.Adam]:
        return CLASSES[self.name]

    @property
    def theirs(self) -> type[torch.optim.Adam]:
        return INFOS[self.name].optim_cls

    def options(self, **changes: Any) -> dict[str, Any]:
        return copy.deepcopy(self.listed) | changes

    def trainable(self, value: Tensor) -> Tensor:
        """A parameter that a step of this case can write: under `differentiable` it must not be a leaf."""
        if not self["differentiable"]:
            return leaf(value)
        parameter = leaf(value).clone()
        parameter.retain_grad()
        return parameter

    def for_loop(self) -> dict[str, Any]:
        """The options with which torch's for-loop computes the same."""
        options = self.options(**FOR_LOOP)
        if self["betas"]:  # the for-loop rounds a tensor to the dtype of the moment: 0.9 is 0.898 in bfloat16
            options["betas"] = tuple(map(float, self["betas"]))
        return options

    def __getitem__(self, option: str) -> Any:
        return self.listed.get(option)


def listed(info: OptimizerInfo, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """All configurations, by what torch calls them: without a flag, with all of them off, and with each one on."""
    of_dtype = copy.copy(info)
    of_dtype.optim_inputs_func = lambda device: info.optim_inputs_func(device, dtype=dtype)
    found: dict[str, dict[str, Any]] = {}
    for device in LISTING_DEVICES:
        for plain in of_dtype.optim_inputs_func(device):
            found.setdefault(f"{plain.desc} & no flag", plain.kwargs)
        for flagged in _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, of_dtype):
            found.setdefault(flagged.desc, flagged.kwargs)
    return found


def cases(dtype: torch.dtype) -> list[Case]:
    return [
        Case(name, description, dtype, options)
        for name, info in INFOS.items()
        for description, options in listed(info, dtype).items()
    ]


def refusal(case: Case, cls: type[torch.optim.Adam] | None = None) -> Exception | None:
    """The error that a class, torch's by default, raises for a case when it is built or first stepped."""
    parameter = case.trainable(torch.ones(2, dtype=case.dtype))
    parameter.grad = torch.ones_like(parameter)
    try:
        (cls or case.theirs)([parameter], **case.options()).step()
    except (AssertionError, RuntimeError, ValueError) as error:
        return error
    return None


def taken(dtype: torch.dtype = torch.float32) -> list[Case]:
    """The cases that torch steps on the host."""
    return [case for case in cases(dtype) if refusal(case) is None]


def refused(dtype: torch.dtype = torch.float32) -> list[Case]:
    """The cases that torch refuses on the host."""
    return [case for case in cases(dtype) if refusal(case) is not None]


def each(of: Sequence[Case]) -> pytest.MarkDecorator:
    """One test for each case, under its readable name."""
    return pytest.mark.parametrize("case", of, ids=str)


def leaf(value: Tensor) -> Tensor:
    """A parameter as users have it, but without the class."""
    return value.detach().requires_grad_()


def assert_near(ours: Tensor, theirs: Tensor, what: str, scale: float = 1.0) -> None:
    """Dtype, device, shape and strides are the same, and values within the table's tolerances."""
    rtol, atol = TOLERANCES[theirs.dtype]
    torch.testing.assert_close(
        ours, theirs, rtol=rtol, atol=atol * scale, check_stride=True, msg=lambda text: f"{what}: {text}"
    )


def assert_states_near(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, pairs: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Of each pair of parameters the values and all tensors of the state; each kind of tensor by its own magnitude."""
    kinds: dict[str, list[tuple[Tensor, Tensor]]] = {"value": list(pairs)}
    for number, (mine, other) in enumerate(pairs):
        states = ours.state.get(mine), theirs.state.get(other)
        keys = [None if state is None else list(state) for state in states]
        if keys[0] != keys[1]:
            pytest.fail(f"state of parameter {number}: {keys[0]}, torch's is {keys[1]}")
        for key in keys[0] or ():
            kinds.setdefault(key, []).append((states[0][key], states[1][key]))
    for kind, tensors in kinds.items():
        scale = max(float(theirs.detach().abs().max()) for _, theirs in tensors if theirs.numel())
        for number, (mine, other) in enumerate(tensors):
            assert_near(mine, other, f"{kind} number {number}", min(1.0, scale))
