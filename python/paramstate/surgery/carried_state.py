"""The state of a parameter whose elements come from elsewhere: its own in another layout, or several parameters'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paramstate.declared.rows import Rows
from paramstate.errors import StateShapeError, UnsupportedError
from paramstate.identity.membership import Membership
from paramstate.identity.table import Entry
from paramstate.precision.state_dtype import COMPENSATION

from .relayout import Sources


class CarriedState:
    """What becomes of moments, steps, rows and gradient: made at once, and put in place later.

    Args:
        optimizer: whose state it is.
        entries: the parameters that the elements come from.
        sources: where each element comes from.
        move: brings tensors of the shapes of ``entries`` to the new one.
        called: how a message names what is carried.

    Raises:
        StateShapeError: an entry of the state that is not shaped like the parameter differs between the sources.
        UnsupportedError: elements are of different ages, or frozen and not, in a way that rows cannot say.
    """

    def __init__(
        self,
        optimizer: Membership,
        entries: Sequence[Entry],
        sources: Sources,
        move: Callable[[Sequence[Tensor]], Tensor],
        called: str,
    ) -> None:
        self._optimizer = optimizer
        self._entries = entries
        self._held = [optimizer.state.get(entry.param) or {} for entry in entries]
        self._called = called
        self._rows = [optimizer._rows_of(entry) for entry in entries]
        self._step, self.rows = self._aged(sources)
        self._shaped = {key: move(self._everywhere(key)) for key in self._shaped_keys()}
        self._others = self._alike()
        grads = [entry.param.grad for entry in entries]
        self.grad = None if any(grad is None for grad in grads) else move([grad for grad in grads if grad is not None])

    def place(self, param: Tensor) -> None:
        """Let it be the state of ``param``, and its gradient where it has none of its own."""
        state = self._optimizer.state
        if self._step is None and not self._shaped and not self._others:
            state.pop(param, None)
        else:
            shaped = {key: _laid_like(param, tensor) for key, tensor in self._shaped.items()}
            held = {**self._stepped(param), **shaped, **self._others}
            state[param].clear()
            state[param].update(held)
            if self._optimizer._is_retyped or COMPENSATION in held:
                self._optimizer._retype_state(param)
        if param.grad is None and self.grad is not None:
            param.grad = _laid_like(param, self.grad, dtype=param.dtype)

    # ---- what is shaped like the parameter --------------------------------------------------------------------------

    def _is_shaped(self, entry: Entry, key: str, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape == entry.param.shape and key != "step"

    def _shaped_keys(self) -> list[str]:
        pairs = zip(self._entries, self._held, strict=True)
        return list(
            dict.fromkeys(key for entry, held in pairs for key in held if self._is_shaped(entry, key, held[key]))
        )

    def _everywhere(self, key: str) -> list[Tensor]:
        """One state tensor of every source; zeros of one that was never stepped."""
        kinds = [held[key] for held in self._held if key in held]
        found = [
            held[key] if key in held else torch.zeros_like(entry.param, dtype=kinds[0].dtype)
            for entry, held in zip(self._entries, self._held, strict=True)
        ]
        for entry, tensor in zip(self._entries, found, strict=True):
            if not self._is_shaped(entry, key, tensor):
                raise StateShapeError(
                    f"{self._called}: its state {key!r} has shape {list(tensor.shape)} where the parameter that it "
                    f"comes from has {list(entry.param.shape)}; opt.reset(...) that one first"
                )
        return found

    def _alike(self) -> dict[str, Any]:
        """What is not shaped like the parameter: the same for every source."""
        others = [
            {k: v for k, v in held.items() if k != "step" and not self._is_shaped(entry, k, v)}
            for entry, held in zip(self._entries, self._held, strict=True)
        ]
        for other in others[1:]:
            unlike = [key for key in {**others[0], **other} if not _same(others[0].get(key), other.get(key))]
            if unlike:
                raise StateShapeError(
                    f"{self._called}: the state {unlike[0]!r} of the parameters that it comes from is not shaped like "
                    "them, and differs; opt.reset(...) them first"
                )
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in others[0].items()}

    # ---- age --------------------------------------------------------------------------------------------------------

    def _aged(self, sources: Sources) -> tuple[float | None, Rows | None]:
        """The step, and what its rows have of their own: the ages of all elements, as rows along one dimension."""
        steps = [float(held.get("step", 0.0)) for held in self._held]
        latest = max(steps) if any("step" in held for held in self._held) else None
        if len(set(steps)) == 1 and all(rows is None for rows in self._rows):
            return latest, None
        each = zip(self._entries, self._rows, steps, strict=True)
        marks = sources.of([_marks(entry, rows, max(steps) - step) for entry, rows, step in each])
        dim, rows = self._along_one_dim(marks)
        frozen = (rows % 2).bool()
        found = Rows(dim, rows // 2, frozen if bool(frozen.any()) else None)
        common = found.common_offset
        if common is None:
            return latest, found
        return None if latest is None else latest - common, None

    def _along_one_dim(self, marks: Tensor) -> tuple[int, Tensor]:
        for dim in range(marks.dim()):
            rows = marks.movedim(dim, 0).unsqueeze(-1).flatten(1)  # a vector's rows are its elements
            if bool((rows == rows[:, :1]).all()):
                return dim, rows[:, 0] if rows.shape[1] else rows.new_zeros(len(rows))
        if marks.dim() == 0:
            return 0, marks.reshape(1)
        raise UnsupportedError(
            f"{self._called}: its elements would be of different ages, or some of them frozen, along more than one "
            "dimension, which is not kept; opt.reset(...) or opt.unfreeze_rows(...) what it comes from first"
        )

    def _stepped(self, param: Tensor) -> dict[str, Any]:
        if self._step is None:
            return {}
        known = (
            (entry.param, held["step"]) for entry, held in zip(self._entries, self._held, strict=True) if "step" in held
        )
        source, step = next(known)
        if not isinstance(step, Tensor):
            return {"step": type(step)(self._step)}
        device = param.device if step.device == source.device else step.device
        return {"step": torch.full_like(step, self._step, device=device)}


def _marks(entry: Entry, rows: Rows | None, late: float) -> Tensor:
    """For each element how many steps it has missed, doubled, and one more where it is frozen."""
    behind = torch.zeros(entry.param.shape, dtype=torch.int64) + 2 * int(late)
    if rows is None:
        return behind
    own = 2 * rows.offsets if rows.frozen is None else 2 * rows.offsets + rows.frozen
    shape = [1] * behind.dim()
    shape[rows.dim] = -1
    return behind + own.reshape(shape)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _laid_like(param: Tensor, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on the parameter's device, in its memory layout, and as wide as it at least."""
    if type(tensor) is not Tensor or param.layout is not torch.strided or not tensor.is_floating_point():
        return tensor.to(param.device)
    wider = param.dtype if param.dtype.itemsize > tensor.dtype.itemsize else tensor.dtype
    like = torch.empty_like(param, dtype=dtype or wider, memory_format=torch.preserve_format, requires_grad=False)
    return like.copy_(tensor)
