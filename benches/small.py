"""Many small parameters: a step is bound by what happens once per parameter, whatever its size.

Gradients come from a real `backward()` before every step, so they are new tensors and caches are as cold as they are
in training. Only the step is timed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import correctness
import shapes
import sides
from outcome import Outcome
from timing import Action, Contestant, Spread, measure, ratios


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


def check(mine: sides.Side, other: sides.Side, inputs: Sequence[Tensor]) -> None:
    """Run both sides and the reference for some steps and compare; each side has gradients of its own values."""
    right = correctness.Reference(mine.parameters, None, None)
    for _ in range(correctness.STEPS):
        for side in (mine, other):
            backward_of(side, inputs)()
        right.step(mine.gradients)
        for side in (mine, other):
            side.optimizer.step()
    right.check("paramstate", mine.parameters)
    right.check("torch", other.parameters)
    correctness.check_all_elements(mine, other)


def run(count: int, length: int) -> Outcome:
    """Measure the step over so many parameters of one length."""
    all_shapes = shapes.vectors(count, length)
    inputs = make_inputs(all_shapes)
    contestants = {
        "paramstate": sides.ours(sides.make_model(all_shapes)),
        "torch": sides.theirs(sides.make_model(all_shapes)),
        "torch, for-loop": sides.theirs(sides.make_model(all_shapes), fused=False),
    }
    check(contestants["paramstate"], contestants["torch"], inputs)
    times = measure(
        {name: Contestant(side.optimizer.step, backward_of(side, inputs)) for name, side in contestants.items()}
    )
    loop = ratios(times["torch, for-loop"], times["paramstate"])
    each = Spread.of(times["paramstate"]).median / count
    return Outcome(
        number=ratios(times["torch"], times["paramstate"]),
        ours=Spread.of(times["paramstate"]),
        theirs=Spread.of(times["torch"]),
        setting="fused",
        notes=(
            f"torch's default, the for-loop, takes {loop.median:.1f} times as long as paramstate",
            f"{each * 1e6:.2f} µs a parameter",
        ),
        times=times,
    )


def thousand() -> Outcome:
    """Measure 1,000 parameters of 1,024 elements."""
    return run(1_000, 1_024)


def five_thousand() -> Outcome:
    """Measure 5,000 parameters of 64 elements."""
    return run(5_000, 64)
