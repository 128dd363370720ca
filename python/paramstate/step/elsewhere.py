"""The part of a step on the host that torch takes: the tensors that the kernels do not take."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from paramstate import _core
from paramstate.clip import clip_coefficient
from paramstate.declared.rows import Rows
from paramstate.errors import UnsupportedError
from paramstate.identified import IdentifiedOptimizer

from .fresh_state import MOMENTS
from .functional import Gathered, Undo, adam_step, gather, require_supported, sum_of_squares
from .functional_rows import adam_step_of_rows
from .places_in_groups import GroupPlace, called_at, grad_at, param_at


class Elsewhere:
    """Steps parameters by torch operations, before the kernels write, so that torch's errors come first.

    Args:
        optimizer: an Adam whose identity is settled.
        undo: is told of all that is about to change.
        max_grad_norm: clip the global norm of all gradients of the optimizer to this.
        chosen: by ID the rows that are stepped this time, for parameters of which not all are.
    """

    def __init__(
        self,
        optimizer: IdentifiedOptimizer,
        undo: Undo,
        max_grad_norm: float | None,
        chosen: Mapping[int, Tensor],
    ) -> None:
        self._optimizer = optimizer
        self._undo = undo
        self._max_grad_norm = max_grad_norm
        self._chosen = chosen

    def step(self, elsewhere: list[GroupPlace]) -> float:
        """Let torch step what the kernels do not take; returns the sum of squares of those gradients, if it is needed.

        All that torch refuses by looking at a group is found out for all groups before the first is written. Where its
        arithmetic may still raise midway, the values are remembered.
        """
        optimizer = self._optimizer
        assert isinstance(optimizer, torch.optim.Adam)
        by_group: dict[int, list[Tensor]] = {}
        by_rows: list[tuple[int, Tensor, Rows, Tensor]] = []
        for place in elsewhere:
            group, param = optimizer.param_groups[place[0]], param_at(self._optimizer, place)
            self._undo.remember_entry(param)
            differing = self._differing_rows(param)
            if differing is None:
                by_group.setdefault(place[0], []).append(param)
            else:
                self._require_unscaled(place)
                by_rows.append((place[0], param, *differing))
            if not grad_at(self._optimizer, place).is_sparse:  # a sparse gradient is refused first, as torch does
                require_supported(optimizer, group, param, called_at(self._optimizer, place))
        gathered = {
            number: gather(optimizer, optimizer.param_groups[number], params) for number, params in by_group.items()
        }
        for number, param, rows, _ in by_rows:
            gather(optimizer, optimizer.param_groups[number], [param])  # creates state, refuses gradients
            state = optimizer.state[param]
            held = [state[key] for key in ("step", *MOMENTS) if key in state]
            self._undo.remember_values([param, rows.offsets, *held])
        squares, coefficient = self._clipping(elsewhere)
        if not all(self._is_safe(group, lists) for group, lists in gathered.items()):
            for lists in gathered.values():
                self._undo.remember_values(lists.written())
                self._undo.remember_values(lists.grads if hasattr(optimizer, "grad_scale") else ())
        for number, lists in gathered.items():
            adam_step(optimizer, optimizer.param_groups[number], lists, coefficient=coefficient)
        for number, param, rows, active in by_rows:
            group = optimizer.param_groups[number]
            adam_step_of_rows(param, optimizer.state[param], group, rows, active, coefficient)
        return squares

    def _require_unscaled(self, place: GroupPlace) -> None:
        if getattr(self._optimizer, "grad_scale", None) is not None:
            raise UnsupportedError(
                f"parameter {called_at(self._optimizer, place)}: its rows differ, and torch's part of a step does not "
                "unscale such a gradient; call scaler.unscale_(optimizer) before step()"
            )

    def _differing_rows(self, param: Tensor) -> tuple[Rows, Tensor] | None:
        """A parameter's rows and which of them are stepped; ``None`` where all are, alike."""
        entry = self._optimizer._table.of(param)
        if entry is None or entry.rows is None:
            return None
        active = torch.ones(len(entry.rows), dtype=torch.bool)
        if entry.id in self._chosen:
            active &= self._chosen[entry.id]
        if entry.rows.frozen is not None:
            active &= ~entry.rows.frozen
        return entry.rows, active

    def _counted_grad(self, place: GroupPlace) -> Tensor:
        """The part of a gradient that the global norm is of: rows that are not stepped are left out."""
        differing = self._differing_rows(param_at(self._optimizer, place))
        if differing is None:
            return grad_at(self._optimizer, place)
        rows, active = differing
        grad = grad_at(self._optimizer, place)
        return grad.index_select(rows.dim, active.nonzero().flatten().to(grad.device))

    def _is_frozen(self, param: Tensor) -> bool:
        entry = self._optimizer._table.of(param)
        return entry is not None and entry.frozen

    def _is_safe(self, group: int, lists: Gathered) -> bool:
        return lists.is_ordinary() and not any(
            isinstance(beta, Tensor) for beta in self._optimizer.param_groups[group]["betas"]
        )

    def _clipping(self, elsewhere: list[GroupPlace]) -> tuple[float, float]:
        """The sum of squares of the gradients elsewhere, and what these are multiplied with."""
        if self._max_grad_norm is None:
            return 0.0, 1.0
        squares = sum_of_squares([self._counted_grad(place) for place in elsewhere])
        others = set(elsewhere)
        on_host = [
            self._counted_grad((number, index))
            for number, group in enumerate(self._optimizer.param_groups)
            for index, param in enumerate(group["params"])
            if param.grad is not None and (number, index) not in others and not self._is_frozen(param)
        ]
        host_squares, left = _core.sum_of_squares(on_host, threads=torch.get_num_threads())
        assert not left, "the walk takes what the sum takes"
        scale = getattr(self._optimizer, "grad_scale", None)
        norm = math.sqrt(squares + host_squares) / (1.0 if scale is None else float(scale))
        return squares, clip_coefficient(norm, self._max_grad_norm)
