"""GPT-2's parameters: a step is bound by memory, and what counts is how often the memory is read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import correctness
import shapes
import sides
from bandwidth import loops
from outcome import OURS, Outcome, compared
from scale import SLOW_EVERY
from timing import Action, Contestant, Spread, Times, least_times, measure, ratios, rest

MAX_NORM = 1.0  # about a tenth of the norm of the random gradients, so the clip binds
LIMIT = 0.04  # two standard deviations of the random values, so the clamp binds
AGED = slice(8, None, 10)  # 14 of the 148 parameters, 12 % of the elements


@dataclass(frozen=True)
class Work:
    """What a training loop does, and in what precision."""

    shapes: Sequence[shapes.Shape] = field(default_factory=shapes.gpt2)
    max_grad_norm: float | None = None
    limit: float | None = None
    dtype: torch.dtype = torch.float32
    moment_bytes: float = 4.0  # of one element of one moment of ours
    options: dict[str, Any] = field(default_factory=dict)  # AdamW's
    tolerance: correctness.Tolerance = correctness.FP32

    @property
    def bytes_per_element(self) -> float:
        """What paramstate has to move: value and moments read and written, the gradient read; for a norm, once more."""
        gradient = 1 if self.max_grad_norm is None else 2
        return (2 + gradient) * self.dtype.itemsize + 4 * self.moment_bytes

    def model(self) -> nn.ParameterList:
        """The parameters with gradients."""
        model = sides.make_model(self.shapes, self.limit, self.dtype)
        sides.give_gradients(model)
        return model

    def ours(self) -> sides.Side:
        """Paramstate's side."""
        options = dict(self.options)
        if self.max_grad_norm is not None:
            options["max_grad_norm"] = self.max_grad_norm
        return sides.ours(self.model(), limit=self.limit, **options)


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


def way(side: sides.Side, work: Work, *, foreach: bool) -> Action:
    """What a torch user writes for this work, with calls for all parameters or for each."""
    parameters, step = side.parameters, side.optimizer.step
    clamp = clamp_foreach if foreach else clamp_each

    def run() -> None:
        if work.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, work.max_grad_norm, foreach=foreach)
        step()
        if work.limit is not None:
            clamp(parameters, work.limit)

    return run if work.max_grad_norm is not None else step


@dataclass(frozen=True)
class Rival:
    """Torch in one of its settings, and the ways of writing the rest that are worth trying with it."""

    side: sides.Side
    ways: dict[str, Action]

    def fastest(self) -> tuple[str, float]:
        """The fastest way and its seconds."""
        least = least_times({name: Contestant(run) for name, run in self.ways.items()})
        chosen = min(least, key=lambda name: least[name])
        return chosen, least[chosen]


def rivals_of(work: Work) -> dict[str, Rival]:
    """Torch's three settings; beside the fused step, a clip and a clamp may be written in two ways."""
    styles = {"for-loop": [False], "foreach": [True], "fused": [True, False]}

    def rival(setting: sides.Setting) -> Rival:
        side = sides.torchs(work.model(), setting)
        tried = styles[setting] if work.max_grad_norm is not None else [False]
        return Rival(side, {("foreach" if each else "one by one"): way(side, work, foreach=each) for each in tried})

    return {f"torch {setting}": rival(setting) for setting in sides.SETTINGS}


def share_of_machine(times: Times, plain: list[str], total_bytes: int) -> tuple[Spread, str]:
    """Our time against the fastest plain loop's, and a note on that loop."""
    best = min(plain, key=lambda name: statistics.median(times[name].values()))
    rate = total_bytes / statistics.median(times[best].values()) / 1e9
    return ratios(times[best], times[OURS]), f"the machine's fastest plain loop is `{best}`: {rate:.1f} GB/s"


def measured(contestants: dict[str, Contestant], against: str, total_bytes: int, notes: tuple[str, ...]) -> Outcome:
    """Time contestants and plain loops together."""
    plain = loops(total_bytes)
    times = measure({**contestants, **plain})
    bandwidth, note = share_of_machine(times, list(plain), total_bytes)
    shown = compared({name: times[name] for name in contestants}, against, notes=(*notes, note))
    return Outcome(**{**vars(shown), "bandwidth": bandwidth, "bytes_moved": total_bytes, "times": times})


def share_memory(first: sides.Side, other: sides.Side) -> None:
    """Let a side step the values, gradients and moments of the first: where memory lies decides how fast it is.

    On a machine with several banks of memory two sides with memory of their own differ by more than their code does.
    Moments of another dtype stay apart.
    """
    for ours, theirs in zip(first.parameters, other.parameters, strict=True):
        theirs.data, theirs.grad = ours.data, ours.grad
        held, state = first.optimizer.state[ours], other.optimizer.state[theirs]
        for key in ("exp_avg", "exp_avg_sq"):
            if type(held[key]) is type(state[key]) and held[key].dtype == state[key].dtype:
                state[key] = held[key]


def run(work: Work) -> Outcome:
    """Measure one kind of work against torch and against the machine."""
    mine = work.ours()
    rivals = rivals_of(work)
    runs: dict[str, tuple[sides.Side, Action]] = {OURS: (mine, mine.optimizer.step)}
    runs |= {name: (rival.side, next(iter(rival.ways.values()))) for name, rival in rivals.items()}
    reference = correctness.Reference(mine.parameters, work.max_grad_norm, work.limit)
    for name, complaint in correctness.check(reference, runs, work.tolerance).items():
        correctness.require(name, complaint)
    for rival in rivals.values():
        share_memory(mine, rival.side)
    chosen = {name: rival.fastest() for name, rival in rivals.items()}
    best = min(chosen, key=lambda name: chosen[name][1])
    contestants = {OURS: Contestant(mine.optimizer.step)}
    for name, (style, _) in chosen.items():
        contestants[name] = Contestant(rivals[name].ways[style], every=1 if name == best else SLOW_EVERY)
    styled = f" with clip and clamp {chosen[best][0]}" if len(rivals[best].ways) > 1 else ""
    elements = sum(parameter.numel() for parameter in mine.parameters)
    note = f"torch's best is {best.removeprefix('torch ')}{styled}"
    return measured(contestants, best, int(work.bytes_per_element * elements), (note,))


def age(side: sides.Side, chosen: list[int], reference: correctness.Reference) -> None:
    """Reset a tenth of the rows of some parameters, at random."""
    masks = {index: tenth(side.parameters[index], seed=index) for index in chosen}
    with side.optimizer.edit_rows() as rows:  # type: ignore[attr-defined]
        for index, mask in masks.items():
            rows.reset(str(index), mask)
    for index, mask in masks.items():
        parameter = side.parameters[index]
        reference.restart(index, mask.reshape([-1] + [1] * (parameter.dim() - 1)).expand(parameter.shape))


def tenth(parameter: nn.Parameter, seed: int) -> Tensor:
    """A tenth of the rows, at random."""
    numbers = torch.rand(parameter.shape[0], generator=torch.Generator().manual_seed(seed))
    return numbers < 0.1


def aged_rows(work: Work, chosen: list[int]) -> Outcome:
    """Measure a step in which some parameters have rows of two ages, against one in which none has."""
    aged, plain = work.ours(), work.ours()
    reference = correctness.Reference(aged.parameters)
    runs = {OURS: (aged, aged.optimizer.step)}
    correctness.require(OURS, correctness.check(reference, runs, work.tolerance).get(OURS, ""))
    age(aged, chosen, reference)
    correctness.require(OURS, correctness.check(reference, runs, work.tolerance).get(OURS, ""))
    sizes = [parameter.numel() for parameter in aged.parameters]
    share = sum(sizes[index] for index in chosen) / sum(sizes)
    without = f"{OURS}, no row steps"
    runs_of = {OURS: aged.optimizer.step, without: plain.optimizer.step}
    contestants = {name: Contestant(run, before=rest) for name, run in runs_of.items()}
    which = f"{len(chosen)} of {len(sizes)} parameters, {share:.0%} of the elements,"
    notes = (
        "here the number is our time with row steps over our time without: less is better",
        f"{which} have a tenth of their rows, at random, {correctness.STEPS} steps younger",
    )
    plain.optimizer.step()  # it has moments then
    share_memory(aged, plain)
    found = measured(contestants, without, int(work.bytes_per_element * sum(sizes)), notes)
    return Outcome(**{**vars(found), "number": ratios(found.times[OURS], found.times[without])})


def row_steps() -> Outcome:
    """Measure a step over GPT-2 in which a tenth of the parameters have rows of two ages."""
    return aged_rows(Work(), list(range(len(shapes.gpt2())))[AGED])


def row_steps_alone(row: int) -> Callable[[], Outcome]:
    """Measure a step over one parameter whose rows, of so many elements, are of two ages."""
    return lambda: aged_rows(Work(shapes=(shapes.rows_of(row),)), [0])


def step() -> Outcome:
    """Measure the update alone."""
    return run(Work())


def clip_step() -> Outcome:
    """Measure a clip by global norm, then the update."""
    return run(Work(max_grad_norm=MAX_NORM))


def clip_step_clamp() -> Outcome:
    """Measure a clip by global norm, the update, and a clamp of the values."""
    return run(Work(max_grad_norm=MAX_NORM, limit=LIMIT))


def bf16() -> Outcome:
    """Measure the update with values and moments in bfloat16."""
    return run(Work(dtype=torch.bfloat16, moment_bytes=2, tolerance=correctness.BF16))


def bf16_stochastic() -> Outcome:
    """Measure the same with values that are rounded at random, without bias; torch's are rounded to the nearest."""
    options = {"rounding": "stochastic"}
    return run(Work(dtype=torch.bfloat16, moment_bytes=2, options=options, tolerance=correctness.BF16_STOCHASTIC))


def bf16_moments() -> Outcome:
    """Measure the update with values in float32 and moments in bfloat16; torch's are in float32."""
    return run(Work(moment_bytes=2, options={"state_dtype": torch.bfloat16}, tolerance=correctness.BF16_MOMENTS))


def eight_bit_moments() -> Outcome:
    """Measure the update with values in float32 and moments in 8 bits; torch's are in float32."""
    return run(Work(moment_bytes=1, options={"state_dtype": "8bit"}, tolerance=correctness.EIGHT_BITS))
