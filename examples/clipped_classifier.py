"""Train one classifier four ways, its weights clipped after every step, and see which way really trains.

The model is a small network on scikit-learn's handwritten digits (1,797 real images that the package carries). Weights
are held in [-0.15, 0.15], as in a weight-clipped critic. All four runs share seed, batches and learning rate; only the
optimizer and the way of clipping differ. Run it with `make demo`; the picture goes to `examples/output/`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import paramstate
from digits import Digits, load
from pictures import draw_curves

LIMIT = 0.15
LEARNING_RATE = 1e-3
BATCH = 64
SEED = 0
PICTURE = Path(__file__).parent / "output" / "clipped_classifier.png"

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Clip = Callable[[nn.Module], None]


def clip_in_place(model: nn.Module) -> None:
    """Write into the tensors that the optimizer knows: right, where one can write in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-LIMIT, LIMIT)


def clip_by_new_parameters(model: nn.Module) -> None:
    """Put a clipped `nn.Parameter` in the place of each old one: natural to write, and fatal under torch.optim."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clamp(-LIMIT, LIMIT)))


def clip_with_paramstate(model: nn.Module) -> None:
    """Clip in place and keep identity and state."""
    for parameter in model.parameters():
        paramstate.clip_(parameter, -LIMIT, LIMIT)


def torch_adam(model: nn.Module) -> torch.optim.Optimizer:
    """Make torch's optimizer with its default settings."""
    return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)


def paramstate_adam(model: nn.Module) -> torch.optim.Optimizer:
    """Make ours; it is given the model, so it knows names and slots."""
    return paramstate.Adam(model, lr=LEARNING_RATE)


@dataclass(frozen=True)
class Way:
    """One way to train and clip."""

    name: str
    optimizer: MakeOptimizer
    clip: Clip


WAYS = (
    Way("torch.optim.Adam, clipped in place", torch_adam, clip_in_place),
    Way("torch.optim.Adam, new Parameters", torch_adam, clip_by_new_parameters),
    Way("paramstate.Adam, new Parameters", paramstate_adam, clip_by_new_parameters),
    Way("paramstate.Adam, paramstate.clip_", paramstate_adam, clip_with_paramstate),
)


@dataclass
class Result:
    """What one run gave."""

    losses: list[float] = field(default_factory=list)  # mean training loss of each epoch
    accuracy: float = 0.0
    parameters: int = 0
    training: int = 0  # parameters that still moved in the last epoch
    with_state: int = 0  # parameters of the model whose moments have seen every step
    steps: int = 0
    step_us: float = 0.0
    clip_us: float = 0.0


def make_model() -> nn.Sequential:
    """Make the same network with the same first values each time."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def state_has_seen(optimizer: torch.optim.Optimizer, parameter: Tensor, steps: int) -> bool:
    """Whether the optimizer holds moments for this very parameter, and they are as old as the training."""
    return parameter in optimizer.state and float(optimizer.state[parameter]["step"]) == steps


def train(way: Way, digits: Digits, epochs: int, tick: Callable[[], None]) -> Result:
    """Train one model one way."""
    model = make_model()
    optimizer = way.optimizer(model)
    order = torch.Generator().manual_seed(SEED)
    result = Result(parameters=len(list(model.parameters())))
    step_seconds: list[float] = []
    clip_seconds: list[float] = []
    for _ in range(epochs):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        losses: list[float] = []
        for batch in torch.randperm(len(digits.train_labels), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
            loss.backward()
            start = time.perf_counter()
            optimizer.step()
            stepped = time.perf_counter()
            way.clip(model)
            step_seconds.append(stepped - start)
            clip_seconds.append(time.perf_counter() - stepped)
            losses.append(loss.item())
        result.losses.append(statistics.fmean(losses))
        result.training = sum(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        tick()
    with torch.no_grad():
        hits = model(digits.test_images).argmax(dim=1) == digits.test_labels
    result.accuracy = hits.double().mean().item()
    result.steps = len(step_seconds)
    result.with_state = sum(state_has_seen(optimizer, parameter, result.steps) for parameter in model.parameters())
    result.step_us = statistics.median(step_seconds) * 1e6
    result.clip_us = statistics.median(clip_seconds) * 1e6
    return result


def train_all(digits: Digits, epochs: int, console: Console) -> dict[str, Result]:
    """Train every way, with a progress bar for each."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    results: dict[str, Result] = {}
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = {way.name: progress.add_task(way.name, total=epochs, start=False) for way in WAYS}
        for way in WAYS:
            bar = bars[way.name]
            progress.start_task(bar)
            results[way.name] = train(way, digits, epochs, lambda bar=bar: progress.advance(bar))  # type: ignore[misc]
    return results


def table_of(results: dict[str, Result]) -> Table:
    """Set the four runs side by side."""
    table = Table(title=f"Digits, weights held in [-{LIMIT}, {LIMIT}]", title_justify="left")
    table.add_column("way", no_wrap=True)
    headers = ("train\nloss", "test\naccuracy", "still\ntraining", "state\nkept", "step", "clip")
    for header in headers:
        table.add_column(header, justify="right")
    for name, result in results.items():
        lost = result.training < result.parameters
        table.add_row(
            name.replace(", ", "\n"),
            f"{result.losses[-1]:.4f}",
            f"{result.accuracy:.1%}",
            f"{result.training}/{result.parameters}",
            f"{result.with_state}/{result.parameters}",
            f"{result.step_us:.0f} µs",
            f"{result.clip_us:.0f} µs",
            style="red" if lost else None,
        )
    return table


def main() -> None:
    """Train, show the table, draw the picture."""
    parser = argparse.ArgumentParser(description="Train a weight-clipped classifier four ways.")
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the network is too small to share, and a busy machine then disturbs less
    console = Console()
    results = train_all(load(), arguments.epochs, console)
    console.print(table_of(results))
    steps = next(iter(results.values())).steps
    console.print(
        "still training: parameters that moved in the last epoch. "
        f"state kept: parameters of the model whose moments have seen all {steps} steps. "
        "step, clip: median time of one call, torch.optim at its defaults.",
        style="dim",
    )
    draw_curves({name: result.losses for name, result in results.items()}, PICTURE)
    console.print("picture of the curves:")
    console.print(str(PICTURE), soft_wrap=True)


if __name__ == "__main__":
    main()
