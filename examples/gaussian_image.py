"""Fit 2-D Gaussians to a photograph while they come and go: surgery on Adam's state by hand, and by `edit_rows`.

The photograph is one that scikit-learn carries. Every 50 steps Gaussians that hardly show are pruned and those that the
loss pulls at most are densified. Both fits share image, first values, schedule and random numbers; only the optimizer
and the surgery differ. Run it with `make demo-rows`; the picture goes to `examples/output/`.
"""

from __future__ import annotations

import argparse
import ast
import math
import statistics
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import densify_by_hand
import densify_by_rows
import paramstate
from densification import Plan, new_statistics, observe, plan
from gaussian_pictures import draw_fits
from gaussians import LOG_SCALES, initial_gaussians, psnr, render
from photograph import load_photograph
from row_movement import FIRST, Movement

RATES = {"means": 0.05, "log_scales": 0.01, "rotations": 0.015, "colours": 0.005, "opacities": 0.005}
BOUNDS = {"log_scales": LOG_SCALES, "opacities": (0.0, 1.0)}
SIZE = (108, 160)  # height and width in pixels
PICTURE = Path(__file__).parent / "output" / "gaussian_image.png"

Bounds = Mapping[str, tuple[float, float]]
Optimizer = torch.optim.Optimizer


def groups_of(params: nn.ParameterDict, rates: Mapping[str, float]) -> list[dict[str, object]]:
    """One group for each attribute, with its own learning rate."""
    return [{"params": [param], "lr": rates[name], "name": name} for name, param in params.items()]


def torch_adam(params: nn.ParameterDict, rates: Mapping[str, float], bounds: Bounds) -> Optimizer:
    """Make torch's optimizer; the bounds are held by a hook after each step."""
    optimizer = torch.optim.Adam(groups_of(params, rates), eps=1e-15)

    def clamp(*_: object) -> None:
        with torch.no_grad():
            for name, (low, high) in bounds.items():
                params[name].clamp_(low, high)

    optimizer.register_step_post_hook(clamp)
    return optimizer


def paramstate_adam(params: nn.ParameterDict, rates: Mapping[str, float], bounds: Bounds) -> Optimizer:
    """Make ours; the bounds are declared, and hold for new rows too."""
    constraints = {name: paramstate.Box(*bound) for name, bound in bounds.items()}
    return paramstate.Adam(groups_of(params, rates), eps=1e-15, model=params, constraints=constraints)


@dataclass(frozen=True)
class Way:
    """One optimizer, and how rows of its parameters come and go."""

    name: str
    optimizer: Callable[[nn.ParameterDict, Mapping[str, float], Bounds], Optimizer]
    densify: Callable[[Plan, Any, nn.ParameterDict, MutableMapping[str, Tensor]], None]
    source: Path


WAYS = (
    Way("torch.optim.Adam, surgery by hand", torch_adam, densify_by_hand.densify, Path(densify_by_hand.__file__)),
    Way("paramstate.Adam, edit_rows", paramstate_adam, densify_by_rows.densify, Path(densify_by_rows.__file__)),
)


@dataclass(frozen=True)
class Schedule:
    """How many Gaussians there are when."""

    steps: int = 600
    every: int = 50
    first: int = 800
    last: int = 3000
    seed: int = 0
    rates: float = 1.0  # factor of all learning rates

    @property
    def until(self) -> int:
        """The last step after which rows come and go: the last quarter only refines."""
        return self.steps * 3 // 4

    def target(self, step: int) -> int | None:
        """How many there are to be after this step; ``None`` where their number is left alone."""
        if step % self.every or step > self.until:
            return None
        return round(self.first * math.pow(self.last / self.first, step / self.until))


@dataclass
class Fit:
    """What one run gave."""

    gaussians: nn.ParameterDict
    optimizer: Optimizer
    side: dict[str, Tensor]
    movement: Movement
    losses: list[float] = field(default_factory=list)  # mean squared error before each step, and after the last
    counts: list[int] = field(default_factory=list)  # of Gaussians in each of these
    image: Tensor = field(default_factory=lambda: torch.empty(0))
    pruned: int = 0
    seconds: float = 0.0
    surgery_seconds: float = 0.0


def fit(way: Way, image: Tensor, schedule: Schedule, tick: Callable[[], None]) -> Fit:
    """Fit one way."""
    gaussians = initial_gaussians(schedule.first, image, torch.Generator().manual_seed(schedule.seed))
    rates = {name: schedule.rates * rate for name, rate in RATES.items()}
    optimizer = way.optimizer(gaussians, rates, BOUNDS)
    side = new_statistics(schedule.first)
    side["born"] -= FIRST  # the first ones are not new rows
    result = Fit(gaussians, optimizer, side, Movement(rates))
    start = time.perf_counter()
    for step in range(1, schedule.steps + 1):
        optimizer.zero_grad()
        loss = (render(gaussians, *image.shape[1:]) - image).square().mean()
        loss.backward()
        result.losses.append(loss.item())
        result.counts.append(len(side["born"]))
        observe(side, gaussians["means"])
        result.movement.watch(gaussians, step - side["born"], optimizer.step)
        target = schedule.target(step)
        if target is not None:
            chosen = plan(gaussians, side, target)
            began = time.perf_counter()
            way.densify(chosen, optimizer, gaussians, side)
            result.surgery_seconds += time.perf_counter() - began
            result.pruned += chosen.pruned
            side["born"][int(chosen.keep.sum()) :] = step
        tick()
    result.seconds = time.perf_counter() - start
    with torch.no_grad():
        result.image = render(gaussians, *image.shape[1:])
    result.losses.append((result.image - image).square().mean().item())
    result.counts.append(len(side["born"]))
    return result


def movement_under_constant_gradient(way: Way, steps: int = 1000) -> list[float]:
    """How far a row moves that comes after so many steps, where all gradients are one: the same surgery, no noise."""
    rates = {"rows": 0.01}
    params = nn.ParameterDict({"rows": torch.zeros(1)})
    optimizer = way.optimizer(params, rates, {})

    def step() -> None:
        params["rows"].grad = torch.ones_like(params["rows"])
        optimizer.step()

    for _ in range(steps):
        step()
    way.densify(Plan(torch.tensor([True]), {"rows": torch.zeros(1)}, pruned=0), optimizer, params, {})
    movement = Movement(rates)
    for age in range(1, FIRST + 1):
        movement.watch(params, torch.tensor([FIRST + 1, age]), step)
    return movement.by_age


def deepest_fall(fit: Fit) -> float:
    """By how many dB a fit got worse, at most, after rows had come."""
    curve = [psnr(loss) for loss in fit.losses]
    came = [step for step in range(1, len(curve)) if fit.counts[step] != fit.counts[step - 1]]
    return max(curve[step - 1] - min(curve[step : step + FIRST]) for step in came)


def lines_of_code(source: Path) -> int:
    """Lines of the functions of a file, without docstrings, comments and empty lines, each statement on one line."""
    functions = [node for node in ast.parse(source.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        if ast.get_docstring(function) is not None:
            del function.body[0]
    return sum(len(ast.unparse(function).splitlines()) for function in functions)


def fit_all(image: Tensor, schedule: Schedule, console: Console) -> dict[str, Fit]:
    """Fit every way, with a progress bar for each."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    fits: dict[str, Fit] = {}
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = {way.name: progress.add_task(way.name, total=schedule.steps, start=False) for way in WAYS}
        for way in WAYS:
            bar = bars[way.name]
            progress.start_task(bar)
            fits[way.name] = fit(way, image, schedule, lambda bar=bar: progress.advance(bar))  # type: ignore[misc]
    return fits


def table_of(fits: Mapping[str, Fit], constant: Mapping[str, list[float]]) -> Table:
    """Set the fits side by side."""
    table = Table(title="A photograph as a sum of 2-D Gaussians", title_justify="left")
    table.add_column("")
    for way in WAYS:
        table.add_column(way.name.replace(", ", "\n"), justify="right")

    def row(label: str, show: Callable[[Way, Fit], str]) -> None:
        table.add_row(label, *(show(way, fits[way.name]) for way in WAYS))

    row("mean squared error", lambda _, fit: f"{fit.losses[-1]:.3e}")
    row("PSNR", lambda _, fit: f"{psnr(fit.losses[-1]):.2f} dB")
    row("deepest fall after rows came", lambda _, fit: f"{deepest_fall(fit):.2f} dB")
    row("Gaussians, of them pruned before", lambda _, fit: f"{fit.counts[-1]}, {fit.pruned}")
    row("lines of code of the surgery", lambda way, _: str(lines_of_code(way.source)))
    row("seconds of the fit", lambda _, fit: f"{fit.seconds:.1f}")
    row("of them surgery", lambda _, fit: f"{fit.surgery_seconds:.2f}")
    table.add_section()
    row("new rows here: first step", lambda _, fit: f"{fit.movement.by_age[0]:.2f} lr")
    row(f"mean of {FIRST} steps", lambda _, fit: f"{fit.movement.mean:.2f} lr")
    row("constant gradient: first step", lambda way, _: f"{constant[way.name][0]:.2f} lr")
    row(f"mean of {FIRST} steps", lambda way, _: f"{statistics.fmean(constant[way.name]):.2f} lr")
    return table


def main() -> None:
    """Fit, show the table, draw the picture."""
    parser = argparse.ArgumentParser(description="Fit 2-D Gaussians to a photograph, with rows that come and go.")
    parser.add_argument("--steps", type=int, default=Schedule.steps, help="in the last quarter no rows come or go")
    parser.add_argument("--seed", type=int, default=Schedule.seed, help="of the first Gaussians")
    parser.add_argument("--rates", type=float, default=1.0, help="factor of all learning rates")
    arguments = parser.parse_args()
    if Schedule(arguments.steps).until < Schedule.every:
        parser.error("--steps: no rows come or go in so few; the least is 67")
    torch.set_num_threads(1)  # most of the work adds windows into one image, and that is not shared anyway
    console = Console()
    schedule = Schedule(arguments.steps, seed=arguments.seed, rates=arguments.rates)
    image = load_photograph(*SIZE)
    fits = fit_all(image, schedule, console)
    constant = {way.name: movement_under_constant_gradient(way) for way in WAYS}
    console.print(table_of(fits, constant))
    console.print(
        "new rows: mean change of an element in their first steps, in learning rates a step. Here: in this fit. "
        "Constant gradient: a row that comes after 1,000 steps, where all gradients are one; a fresh Adam moves 1.00.",
        style="dim",
    )
    draw_fits(image, fits, constant, schedule.every, PICTURE)
    console.print("picture of the fits:")
    console.print(str(PICTURE), soft_wrap=True)


if __name__ == "__main__":
    main()
