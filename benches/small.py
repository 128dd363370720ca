"""Many small parameters: a step is bound by what happens once per parameter, whatever its size.

Gradients come from a real `backward()` before every step, so they are new tensors and caches are as cold as they are
in training. Only the step is timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import correctness
import shapes
import sides
from outcome import OURS, Outcome, compared
from scale import SLOW_EVERY, SMALLER
from timing import Action, Contestant, Spread, least_times, measure


def make_inputs(all_shapes: Sequence[shapes.Shape]) -> list[Tensor]:
    """Random inputs, one for each parameter."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for shape in all_shapes]


def backward_of(side: sides.Side, inputs: Sequence[Tensor]) -> Action:
    """Give what a training loop does before it steps."""

    def run() -> None:
        side.optimizer.zero_grad(set_to_none=True)
        terms = [(parameter * data).square().sum() for parameter, data in zip(side.parameters, inputs, strict=True)]
        torch.stack(terms).sum().backward()

    return run


def contest(entered: Mapping[str, sides.Side], inputs: Sequence[Tensor]) -> Outcome:
    """Check all sides, then measure those that are right, against the best of torch's settings."""
    befores = {id(side): backward_of(side, inputs) for side in entered.values()}
    reference = correctness.Reference(entered[OURS].parameters)
    runs = {name: (side, side.optimizer.step) for name, side in entered.items()}
    wrong = correctness.check(reference, runs, correctness.FP32, before=lambda side: befores[id(side)]())
    torchs = [name for name in entered if name.startswith("torch ")]
    for name in (OURS, *torchs):
        correctness.require(name, wrong.get(name, ""))
    contestants = {
        name: Contestant(side.optimizer.step, befores[id(side)]) for name, side in entered.items() if name not in wrong
    }
    least = least_times({name: contestants[name] for name in torchs})
    best = min(torchs, key=lambda name: least[name])
    for name in torchs:
        contestants[name] = replace(contestants[name], every=1 if name == best else SLOW_EVERY)
    times = measure(contestants)
    each = Spread.of(times[OURS].values()).median / len(inputs)
    notes = (f"torch's best is {best.removeprefix('torch ')}", f"{each * 1e6:.2f} µs a parameter")
    return compared(times, best, notes=notes, missing=wrong)


def run(count: int, length: int) -> Outcome:
    """Measure the step over so many parameters of one length."""
    all_shapes = shapes.vectors(count // SMALLER, length)
    entered = {OURS: sides.ours(sides.make_model(all_shapes))}
    entered |= {f"torch {setting}": sides.torchs(sides.make_model(all_shapes), setting) for setting in sides.SETTINGS}
    return contest(entered, make_inputs(all_shapes))


def thousand() -> Outcome:
    """Measure 1,000 parameters of 1,024 elements."""
    return run(1_000, 1_024)


def five_thousand() -> Outcome:
    """Measure 5,000 parameters of 64 elements."""
    return run(5_000, 64)
