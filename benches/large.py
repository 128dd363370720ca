"""GPT-2's parameters: a step is bound by memory, and what counts is how often the memory is read."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import correctness
import shapes
import sides
from bandwidth import loops
from outcome import Outcome
from timing import Action, Contestant, Spread, fastest, measure, ratios

FLOAT = 4
STEP_STREAMS = 7  # value, gradient and two moments read; value and two moments written
NORM_STREAMS = 1  # the gradient read once more
MAX_NORM = 1.0  # about a tenth of the norm of the random gradients, so the clip binds
LIMIT = 0.04  # two standard deviations of the random values, so the clamp binds


@dataclass(frozen=True)
class Work:
    """What a training loop does besides the update."""

    max_grad_norm: float | None = None
    limit: float | None = None

    @property
    def streams(self) -> int:
        """How many floats per parameter paramstate reads or writes for it."""
        return STEP_STREAMS + (NORM_STREAMS if self.max_grad_norm is not None else 0)


def clamp_each(parameters: list[nn.Parameter], limit: float) -> None:
    """Clamp with one call for each parameter."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.clamp_(-limit, limit)


def clamp_foreach(parameters: list[nn.Parameter], limit: float) -> None:
    """Clamp with two calls for all."""
    tensors = list[Tensor](parameters)
    with torch.no_grad():
        torch._foreach_clamp_min_(tensors, -limit)
        torch._foreach_clamp_max_(tensors, limit)


def ways_of_torch(side: sides.Side, work: Work) -> dict[str, Action]:
    """Name the ways in which a torch user writes this work."""
    parameters = side.parameters
    step = side.optimizer.step

    def way(*, foreach: bool, clamp: Action) -> Action:
        def run() -> None:
            if work.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, work.max_grad_norm, foreach=foreach)
            step()
            clamp()

        return run

    if work.max_grad_norm is None:
        return {"fused": step}
    clamps: dict[str, Action] = {"": lambda: None}
    if work.limit is not None:
        limit = work.limit
        clamps = {
            ", clamp_ of each": lambda: clamp_each(parameters, limit),
            ", foreach clamp": lambda: clamp_foreach(parameters, limit),
        }
    return {
        f"fused, clip {'foreach' if foreach else 'one by one'}{name}": way(foreach=foreach, clamp=clamp)
        for foreach in (True, False)
        for name, clamp in clamps.items()
    }


def check(mine: sides.Side, other: sides.Side, run_other: Action, work: Work) -> None:
    """Run both sides and the reference for some steps and compare."""
    right = correctness.Reference(mine.parameters, work.max_grad_norm, work.limit)
    for _ in range(correctness.STEPS):
        right.step(mine.gradients)
        mine.optimizer.step()
        run_other()
    right.check("paramstate", mine.parameters)
    right.check("torch", other.parameters)
    correctness.check_all_elements(mine, other)


def run(work: Work) -> Outcome:
    """Measure one kind of work against torch and against the machine."""
    all_shapes = shapes.gpt2()
    mine = sides.ours(
        sides.make_model(all_shapes, limit=work.limit), max_grad_norm=work.max_grad_norm, limit=work.limit
    )
    other = sides.theirs(sides.make_model(all_shapes, limit=work.limit))
    for side in (mine, other):
        sides.give_gradients(side.model)
    ways = ways_of_torch(other, work)
    check(mine, other, next(iter(ways.values())), work)
    setting = fastest(ways)
    total_bytes = work.streams * FLOAT * sum(parameter.numel() for parameter in mine.parameters)
    plain = loops(total_bytes)
    times = measure(
        {"paramstate": Contestant(mine.optimizer.step), "torch": Contestant(ways[setting]), **plain},
    )
    yardstick = min(plain, key=lambda name: statistics.median(times[name]))
    rate = total_bytes / statistics.median(times[yardstick]) / 1e9
    return Outcome(
        number=ratios(times["torch"], times["paramstate"]),
        ours=Spread.of(times["paramstate"]),
        theirs=Spread.of(times["torch"]),
        setting=setting,
        bandwidth=ratios(times[yardstick], times["paramstate"]),
        bytes_moved=total_bytes,
        notes=(f"the machine's fastest plain loop is `{yardstick}`: {rate:.1f} GB/s",),
        times=times,
    )


def step() -> Outcome:
    """Measure the update alone."""
    return run(Work())


def clip_step() -> Outcome:
    """Measure a clip by global norm, then the update."""
    return run(Work(max_grad_norm=MAX_NORM))


def clip_step_clamp() -> Outcome:
    """Measure a clip by global norm, the update, and a clamp of the values."""
    return run(Work(max_grad_norm=MAX_NORM, limit=LIMIT))
