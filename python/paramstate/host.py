"""One step on the host: hand the groups to the compiled walk, and act on what it found.

The walk reads every tensor anew, checks all of them, and only then writes. Where something stands in its way it writes
nothing and says what; this file removes the obstacle (creates state, follows a client's edit of the groups) or raises,
and lets it walk again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from . import _core
from .clip import clip_coefficient
from .errors import OverlapError, StateShapeError
from .functional import adam_step, sum_of_squares
from .identified import IdentifiedOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class HostStep:
    """One attempt to step an optimizer; made anew for each step.

    Args:
        optimizer: an Adam whose identity is settled.
        max_grad_norm: clip the global norm of the gradients to this, in the same pass.
    """

    def __init__(self, optimizer: IdentifiedOptimizer, max_grad_norm: float | None) -> None:
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._created: list[tuple[Tensor, str | None]] = []
        self.grad_norm: float | None = None

    def run(self) -> None:
        """Take the step.

        Raises:
            StateShapeError, OverlapError: see there. Values, moments and steps are as they were.
        """
        try:
            outcome = self._walk()
        except BaseException:
            self._discard_created()
            raise
        if outcome.written_grads:
            torch.autograd.graph.increment_version(outcome.written_grads)
        _increment_versions(outcome.updated)
        self.grad_norm = outcome.grad_norm
        self._step_elsewhere(outcome.elsewhere)

    def _walk(self) -> _core.Outcome:
        optimizer = self._optimizer
        settings = [_settings(group) for group in optimizer.param_groups]
        scale = getattr(optimizer, "grad_scale", None)
        squares: float | None = None
        while True:
            outcome = optimizer._walk.step(
                [group["params"] for group in optimizer.param_groups],
                optimizer.state,
                settings,
                threads=torch.get_num_threads(),
                max_grad_norm=self._max_grad_norm,
                grad_scale=None if scale is None else float(scale),
                elsewhere_squares=squares,
            )
            if outcome.stale:
                optimizer._sync()
            elif outcome.problems:
                self._raise_for(outcome.problems[0])
            elif outcome.retyped:
                for group, index in outcome.retyped:
                    optimizer._widen_state(optimizer.param_groups[group]["params"][index])
            elif outcome.missing:
                for group, index in outcome.missing:
                    self._create(optimizer.param_groups[group], index)
            elif outcome.elsewhere and squares is None:
                squares = self._squares(outcome.elsewhere)
            else:
                return outcome

    # ---- state --------------------------------------------------------------------------------------------------

    def _create(self, group: dict[str, Any], index: int) -> None:
        param = group["params"][index]
        state = self._optimizer.state[param]
        if not state:
            self._created.append((param, None))
            state.update(initial_state(param, group))
            return
        lacking = [key for key in ("step", *MOMENTS[:2]) if key not in state]
        if lacking:
            raise KeyError(
                f"parameter {self._optimizer.name_of(param)!r}: its state lacks {lacking[0]!r}; put it there, or call "
                "opt.reset(...) to start afresh"
            )
        self._created.append((param, "max_exp_avg_sq"))
        state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])

    def _discard_created(self) -> None:
        for param, key in self._created:
            if key is None:
                self._optimizer.state.pop(param, None)
            else:
                self._optimizer.state[param].pop(key, None)

    # ---- elsewhere ----------------------------------------------------------------------------------------------

    def _squares(self, elsewhere: list[tuple[int, int]]) -> float:
        if self._max_grad_norm is None:
            return 0.0
        groups = self._optimizer.param_groups
        return sum_of_squares([groups[group]["params"][index].grad for group, index in elsewhere])

    def _step_elsewhere(self, elsewhere: list[tuple[int, int]]) -> None:
        coefficient = 1.0
        if self.grad_norm is not None and self._max_grad_norm is not None:
            coefficient = clip_coefficient(self.grad_norm, self._max_grad_norm)
        by_group: dict[int, list[Tensor]] = {}
        for group, index in elsewhere:
            by_group.setdefault(group, []).append(self._optimizer.param_groups[group]["params"][index])
        for group, params in by_group.items():
            assert isinstance(self._optimizer, torch.optim.Adam)
            adam_step(self._optimizer, self._optimizer.param_groups[group], params, coefficient=coefficient)
            self._optimizer._project(params)

    # ---- errors -------------------------------------------------------------------------------------------------

    def _raise_for(self, problem: _core.Problem) -> None:
        name = self._called(problem.group, problem.index)
        if problem.kind == "state_shape":
            raise StateShapeError(
                f"parameter {name}: its state {problem.key!r} has shape {problem.got}, the parameter has "
                f"{problem.expected}; opt.replace_({name}, value, state=map) carries state through a change of shape, "
                f"opt.reset({name}) starts it afresh"
            )
        if problem.kind == "grad_shape":
            raise StateShapeError(
                f"parameter {name}: its gradient has shape {problem.got}, the parameter has {problem.expected}; call "
                f"zero_grad() and backward() again, and opt.replace_({name}, value, state=map) to carry the state"
            )
        if problem.kind == "expanded":
            raise OverlapError(
                f"parameter {name}: {problem.key!r} shares memory with itself (shape {problem.got}, an expand()ed "
                "tensor); give it memory of its own with .contiguous()"
            )
        if problem.kind == "state_overlap":
            raise OverlapError(
                f"parameter {name}: {problem.key!r} shares memory with something else that the step writes; give it "
                "memory of its own with .clone()"
            )
        other = "" if problem.other is None else f" and {self._called(*problem.other)}"
        raise OverlapError(
            f"parameters {name}{other} share memory, so each would be updated twice; give one of them memory of its "
            "own with .clone()"
        )

    def _called(self, group: int, index: int) -> str:
        return repr(self._optimizer.name_of(self._optimizer.param_groups[group]["params"][index]))


def initial_state(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state of a parameter that was never stepped, as torch creates it: moments zero, in its dtype and strides."""
    on_device = group["capturable"] or group["fused"]
    step = torch.zeros(
        (), dtype=_get_scalar_dtype(is_fused=group["fused"]), device=param.device if on_device else "cpu"
    )
    keys = MOMENTS if group["amsgrad"] else MOMENTS[:2]
    return {"step": step, **{key: torch.zeros_like(param, memory_format=torch.preserve_format) for key in keys}}


def _settings(group: dict[str, Any]) -> tuple[float, float, float, float, float, bool, bool, bool]:
    beta1, beta2 = group["betas"]
    return (
        float(group["lr"]),
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        bool(group["decoupled_weight_decay"]),
        bool(group["amsgrad"]),
        bool(group["maximize"]),
    )


def _increment_versions(params: list[Tensor]) -> None:
    """Tell autograd that values changed: a backward through a saved one must raise instead of using the new one."""
    try:
        torch.autograd.graph.increment_version(params)
    except RuntimeError:
        # Inference tensors keep no version, and one of them stops the whole list.
        torch.autograd.graph.increment_version([param for param in params if not param.is_inference()])
