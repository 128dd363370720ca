"""How the cost of a step grows: with the number of tensors, and with the number of elements.

All who are compared step the same values, gradients and moments, so that a thousand million elements need them only
once; a count for which memory is too small is left out, and the result says so.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import shapes
import sides
from outcome import OURS
from scale import QUICK
from small import backward_of, make_inputs
from timing import Contestant, Spread, measure

LENGTH = 64  # elements of each of many tensors
COUNTS = [10**power for power in range(4 if QUICK else 6)]
ELEMENTS = [10**power for power in range(3, 6 if QUICK else 10)]
GREAT = 100_000  # tensors from which a round takes seconds
ROUNDS, ROUNDS_OF_GREAT, SHORT = 15, 5, 100
FLOAT = 4
MADE = 4  # value, gradient and two moments
TEMPORARIES = {OURS: 0, "torch fused": 0, "torch foreach": 3}  # of the size of a parameter
SPARE = 1.05
BLOCK = 1 << 22


@dataclass(frozen=True)
class Point:
    """Seconds of one step of everybody who can take it, at one count."""

    count: int
    rounds: int
    seconds: dict[str, Spread]
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Growth:
    """Both curves."""

    tensors: list[Point]
    elements: list[Point]


def optimizers(parameters: list[nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
    """One of each kind over the same parameters."""
    model = nn.ParameterList(parameters)
    return {
        OURS: sides.ours(model).optimizer,
        "torch fused": sides.torchs(model, "fused").optimizer,
        "torch foreach": sides.torchs(model, "foreach").optimizer,
    }


def share_state(made: dict[str, torch.optim.Optimizer], parameters: list[nn.Parameter]) -> None:
    """Give everybody the same moments, and a step of their own."""
    for parameter in parameters:
        moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        for optimizer in made.values():
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}


def at_tensors(count: int) -> Point:
    """So many tensors, whose gradients come from a real `backward()`."""
    all_shapes = shapes.vectors(count, LENGTH)
    inputs = make_inputs(all_shapes)
    rounds = ROUNDS_OF_GREAT if count >= GREAT else ROUNDS
    made = optimizers(list(sides.make_model(all_shapes).parameters()))
    contestants = {}
    for name, optimizer in made.items():
        parameters = nn.ParameterList(optimizer.param_groups[0]["params"])
        contestants[name] = Contestant(optimizer.step, backward_of(sides.Side(parameters, optimizer), inputs))
    times = measure(contestants, rounds)
    return Point(count, rounds, {name: Spread.of(found.values()) for name, found in times.items()})


def available() -> float:
    """Bytes of memory that are free to use; without end where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return float("inf")
    lines = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
    return float(lines["MemAvailable"].split()[0]) * 1024


def filled(count: int, scale: float) -> Tensor:
    """Random numbers; a large tensor repeats a block of them."""
    block = torch.randn(min(count, BLOCK), generator=torch.Generator().manual_seed(3)).mul_(scale)
    tensor = torch.empty(count)
    for part in tensor.split(len(block)):
        part.copy_(block[: len(part)])
    return tensor


def at_elements(count: int) -> Point:
    """One tensor of so many elements."""
    size = count * FLOAT * SPARE
    room = available()
    missing = {
        name: f"needs {size * (MADE + extra) / 1e9:.0f} GB of memory"
        for name, extra in TEMPORARIES.items()
        if size * (MADE + extra) > room
    }
    if OURS in missing:
        return Point(count, 0, {}, missing)
    parameter = nn.Parameter(filled(count, sides.VALUE_SCALE))
    parameter.grad = filled(count, sides.GRADIENT_SCALE)
    made = {name: optimizer for name, optimizer in optimizers([parameter]).items() if name not in missing}
    share_state(made, [parameter])
    rounds = ROUNDS if count > 100_000 else SHORT
    times = measure({name: Contestant(optimizer.step) for name, optimizer in made.items()}, rounds)
    return Point(count, rounds, {name: Spread.of(found.values()) for name, found in times.items()}, missing)


def points(kind: str) -> Iterator[tuple[str, Callable[[], Point]]]:
    """What to call for each point of a curve, and what to say meanwhile."""
    if kind == "tensors":
        yield from ((f"{count:,} tensors of {LENGTH}", lambda count=count: at_tensors(count)) for count in COUNTS)
    else:
        yield from ((f"{count:,} elements", lambda count=count: at_elements(count)) for count in ELEMENTS)


def run(say: Callable[[str], None]) -> Growth:
    """Measure both curves."""
    curves: dict[str, list[Point]] = {"tensors": [], "elements": []}
    for kind, curve in curves.items():
        for what, at in points(kind):
            say(what)
            curve.append(at())
            gc.collect()
    return Growth(**curves)
