"""One step on the host: hand the groups to the compiled walk, and act on what it found.

The walk reads every tensor anew, checks all of them, and only then writes. Where something stands in its way it writes
nothing and says what; this file removes the obstacle (creates state, follows a client's edit of the groups) or raises,
and lets it walk again.

What the kernels do not take is stepped by torch before the walk writes, so that torch's errors also come first.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from . import _core
from .clip import clip_coefficient
from .errors import OverlapError, StateShapeError
from .functional import Gathered, Undo, adam_step, gather, require_supported, sum_of_squares
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
        self._undo = Undo(optimizer.state)
        self.grad_norm: float | None = None

    def run(self) -> None:
        """Take the step.

        Raises:
            StateShapeError, OverlapError: see there. Values, moments and steps are as they were.
        """
        try:
            outcome = self._walk()
        except BaseException:
            self._undo.restore()
            raise
        if outcome.written_grads:
            torch.autograd.graph.increment_version(outcome.written_grads)
        _increment_versions(outcome.updated)
        self.grad_norm = outcome.grad_norm
        elsewhere = [self._param(place) for place in outcome.elsewhere]
        self._optimizer._project(elsewhere)
        self._optimizer._project_idle([*outcome.updated, *elsewhere])

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
                for place in outcome.retyped:
                    self._undo.remember_entry(self._param(place))
                    optimizer._widen_state(self._param(place))
            elif outcome.missing:
                for place in outcome.missing:
                    self._create(place)
            elif outcome.elsewhere and squares is None:
                # A step that was made a tensor may be one that the kernels take: the walk decides anew.
                if not self._complete(outcome.elsewhere):
                    squares = self._step_elsewhere(outcome.elsewhere)
            else:
                return outcome

    # ---- state --------------------------------------------------------------------------------------------------

    def _create(self, place: tuple[int, int]) -> None:
        group, param = self._optimizer.param_groups[place[0]], self._param(place)
        self._undo.remember_entry(param)
        state = self._optimizer.state[param]
        if not state:
            state.update(initial_state(param, group))
            return
        lacking = [key for key in ("step", *MOMENTS[:2]) if key not in state]
        if lacking:
            raise KeyError(
                f"parameter {self._called(*place)}: its state lacks {lacking[0]!r}; put it there, or call "
                "opt.reset(...) to start afresh"
            )
        state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])

    def _complete(self, elsewhere: list[tuple[int, int]]) -> bool:
        """Repair what torch's function does not take as it is in a client's state; returns whether there was any."""
        repaired = False
        for place in elsewhere:
            group, param = self._optimizer.param_groups[place[0]], self._param(place)
            state = self._optimizer.state.get(param)
            if not state:
                continue
            needed = ("step", *(MOMENTS if group["amsgrad"] else MOMENTS[:2]))
            if any(key not in state for key in needed):
                self._create(place)
                repaired = True
            if not isinstance(state["step"], Tensor):
                self._undo.remember_entry(param)
                state["step"] = step_tensor(self._number(place, state["step"]), param, group)
                repaired = True
        return repaired

    def _number(self, place: tuple[int, int], step: object) -> float:
        try:
            return float(step)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise TypeError(
                f"parameter {self._called(*place)}: its state 'step' must be a tensor or a number, got "
                f"{type(step).__name__}; put one there, or call opt.reset(...) to start afresh"
            ) from None

    # ---- elsewhere ----------------------------------------------------------------------------------------------

    def _step_elsewhere(self, elsewhere: list[tuple[int, int]]) -> float:
        """Let torch step what the kernels do not take; returns the sum of squares of those gradients, if it is needed.

        All that torch refuses by looking at a group is found out for all groups before the first is written. Where its
        arithmetic may still raise midway, the values are remembered.
        """
        optimizer = self._optimizer
        assert isinstance(optimizer, torch.optim.Adam)
        by_group: dict[int, list[Tensor]] = {}
        for place in elsewhere:
            group, param = optimizer.param_groups[place[0]], self._param(place)
            self._undo.remember_entry(param)
            by_group.setdefault(place[0], []).append(param)
            if not self._grad(place).is_sparse:  # a sparse gradient is refused first, as torch does
                require_supported(optimizer, group, param, self._called(*place))
        gathered = {
            number: gather(optimizer, optimizer.param_groups[number], params) for number, params in by_group.items()
        }
        squares, coefficient = self._clipping(elsewhere)
        if not all(self._is_safe(group, lists) for group, lists in gathered.items()):
            for lists in gathered.values():
                self._undo.remember_values(lists.written())
                self._undo.remember_values(lists.grads if hasattr(optimizer, "grad_scale") else ())
        for number, lists in gathered.items():
            adam_step(optimizer, optimizer.param_groups[number], lists, coefficient=coefficient)
        return squares

    def _is_safe(self, group: int, lists: Gathered) -> bool:
        return lists.is_ordinary() and not any(
            isinstance(beta, Tensor) for beta in self._optimizer.param_groups[group]["betas"]
        )

    def _clipping(self, elsewhere: list[tuple[int, int]]) -> tuple[float, float]:
        """The sum of squares of the gradients elsewhere, and what these are multiplied with."""
        if self._max_grad_norm is None:
            return 0.0, 1.0
        squares = sum_of_squares([self._grad(place) for place in elsewhere])
        others = set(elsewhere)
        on_host = [
            param.grad
            for number, group in enumerate(self._optimizer.param_groups)
            for index, param in enumerate(group["params"])
            if param.grad is not None and (number, index) not in others
        ]
        host_squares, left = _core.sum_of_squares(on_host, threads=torch.get_num_threads())
        assert not left, "the walk takes what the sum takes"
        scale = getattr(self._optimizer, "grad_scale", None)
        norm = math.sqrt(squares + host_squares) / (1.0 if scale is None else float(scale))
        return squares, clip_coefficient(norm, self._max_grad_norm)

    def _param(self, place: tuple[int, int]) -> Tensor:
        param: Tensor = self._optimizer.param_groups[place[0]]["params"][place[1]]
        return param

    def _grad(self, place: tuple[int, int]) -> Tensor:
        grad = self._param(place).grad
        assert grad is not None
        return grad

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
        return repr(self._optimizer.name_of(self._param((group, index))))


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
