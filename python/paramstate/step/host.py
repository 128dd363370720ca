"""One step on the host: hand the groups to the compiled walk, and act on what it found.

The walk reads every tensor anew, checks all of them, and only then writes. Where something stands in its way it writes
nothing and says what; this file removes the obstacle (creates state, follows a client's edit of the groups) or raises,
and lets it walk again.

What the kernels do not take is stepped by torch before the walk writes, so that torch's errors also come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paramstate import _core
from paramstate.declared.rows import along
from paramstate.identified import IdentifiedOptimizer
from paramstate.identity.table import Entry
from paramstate.precision.state_dtype import COMPENSATION, zeros

from .elsewhere import Elsewhere
from .fresh_state import MOMENTS, initial_state, is_compensated, step_tensor
from .functional import Undo
from .places_in_groups import GroupPlace, called_at, param_at
from .plain_precision import require_plain
from .refusals import raise_for, raise_for_unkept


class HostStep:
    """One attempt to step an optimizer; made anew for each step.

    Args:
        optimizer: an Adam whose identity is settled.
        max_grad_norm: clip the global norm of the gradients to this, in the same pass.
        chosen_rows: parameters of which only some rows are stepped this time, with a mask of these.
        rounding: how 16-bit values are rounded, and the seed of what is random.
    """

    def __init__(
        self,
        optimizer: IdentifiedOptimizer,
        max_grad_norm: float | None,
        chosen_rows: Sequence[tuple[Entry, Tensor]] = (),
        rounding: tuple[str, int] = ("nearest", 0),
    ) -> None:
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._chosen_rows = chosen_rows
        self._rounding = rounding
        self._chosen = {entry.id: mask for entry, mask in chosen_rows}
        self._undo = Undo(optimizer.state)
        self._retyped: set[GroupPlace] = set()
        self.grad_norm: float | None = None

    def run(self) -> None:
        """Take the step.

        Raises:
            StateShapeError, OverlapError: see there. Values, moments and steps are as they were.
        """
        self._let_chosen_rows_differ()
        try:
            outcome = self._walk()
        except BaseException:
            self._undo.restore()
            raise
        finally:
            for entry, _ in self._chosen_rows:
                if entry.rows is not None and entry.rows.common_offset == 0:
                    entry.rows = None  # all took the step, as those of any other parameter
                    self._optimizer._traits_changed(entry)
        if outcome.written_grads:
            torch.autograd.graph.increment_version(outcome.written_grads)
        _increment_versions(outcome.updated)
        self.grad_norm = outcome.grad_norm
        elsewhere = [param_at(self._optimizer, place) for place in outcome.elsewhere]
        self._optimizer._forget_versions(elsewhere)
        self._optimizer._project_after_step(outcome.updated, elsewhere, self._chosen)

    def _let_chosen_rows_differ(self) -> None:
        """A parameter of which only some rows are stepped has rows of its own, at least during the step."""
        for entry, _ in self._chosen_rows:
            rows = along(self._optimizer._rows_of(entry), entry.param, 0, self._optimizer._table.called(entry))
            if rows is not entry.rows:
                entry.rows = rows
                self._optimizer._traits_changed(entry)

    def _begin_state(self, param: Tensor) -> None:
        self._optimizer._state_begins(param)
        self._let_chosen_rows_differ()

    def _walk(self) -> _core.Outcome:
        optimizer = self._optimizer
        settings = [_settings(group) for group in optimizer.param_groups]
        scale = getattr(optimizer, "grad_scale", None)
        squares: float | None = None
        while True:
            outcome = optimizer._walk.step(
                optimizer._lists(),
                optimizer.state,
                settings,
                threads=torch.get_num_threads(),
                max_grad_norm=self._max_grad_norm,
                grad_scale=None if scale is None else float(scale),
                elsewhere_squares=squares,
                rows=list(self._chosen.items()) or None,
                rounding=self._rounding,
            )
            if outcome.stale:
                optimizer._sync()
            elif outcome.problems:
                raise_for(optimizer, outcome.problems[0])
            elif outcome.retyped:
                self._retype(outcome.retyped)
            elif outcome.missing:
                for place in outcome.missing:
                    self._create(place)
            elif outcome.elsewhere and squares is None:
                # A step that was made a tensor may be one that the kernels take: the walk decides anew.
                if not self._complete(outcome.elsewhere):
                    squares = self._step_elsewhere(outcome.elsewhere)
            else:
                return outcome

    def _step_elsewhere(self, elsewhere: list[GroupPlace]) -> float:
        """Let torch step what the kernels do not take; where state is about to begin, rows begin with it."""
        optimizer = self._optimizer
        for place in elsewhere:
            entry = optimizer._table.of(param_at(optimizer, place))
            if entry is not None and not optimizer.state.get(entry.param):
                optimizer._begin_rows(entry)
        self._let_chosen_rows_differ()
        for place in elsewhere:
            require_plain(optimizer, param_at(optimizer, place), self._rounding[0], called_at(optimizer, place))
        return Elsewhere(optimizer, self._undo, self._max_grad_norm, self._chosen).step(elsewhere)

    def _retype(self, places: list[GroupPlace]) -> None:
        """Keep moments in what is declared for them."""
        optimizer = self._optimizer
        again = next((place for place in places if place in self._retyped), None)
        if again is not None:
            raise_for_unkept(optimizer, again)
        self._retyped.update(places)
        for place in places:
            self._undo.remember_entry(param_at(optimizer, place))
            optimizer._retype_state(param_at(optimizer, place))
        optimizer._roster = []  # what the walk was told may be of a shape that was another one
        optimizer._sync()

    def _create(self, place: GroupPlace) -> None:
        group, param = self._optimizer.param_groups[place[0]], param_at(self._optimizer, place)
        self._undo.remember_entry(param)
        state = self._optimizer.state[param]
        kind, compensated = self._optimizer._kept_as(param), is_compensated(param, self._rounding[0])
        if not state:
            state.update(initial_state(param, group, kind, compensated=compensated))
            self._begin_state(param)
            return
        lacking = [key for key in ("step", *MOMENTS[:2]) if key not in state]
        if lacking:
            raise KeyError(
                f"parameter {called_at(self._optimizer, place)}: its state lacks {lacking[0]!r}; put it there, or call "
                "opt.reset(...) to start afresh"
            )
        if group["amsgrad"]:  # a parameter that is listed twice comes here again, with all it needs
            state.setdefault("max_exp_avg_sq", torch.zeros_like(state["exp_avg_sq"]))
        if compensated:
            state.setdefault(COMPENSATION, zeros(param, COMPENSATION, None))

    def _complete(self, elsewhere: list[GroupPlace]) -> bool:
        """Repair what torch's function does not take as it is in a client's state; returns whether there was any."""
        repaired = False
        for place in elsewhere:
            group, param = self._optimizer.param_groups[place[0]], param_at(self._optimizer, place)
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

    def _number(self, place: GroupPlace, step: object) -> float:
        try:
            return float(step)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise TypeError(
                f"parameter {called_at(self._optimizer, place)}: its state 'step' must be a tensor or a number, got "
                f"{type(step).__name__}; put one there, or call opt.reset(...) to start afresh"
            ) from None


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
