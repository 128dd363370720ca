"""One training: a task, a setting and a seed give a curve of held-out losses and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import paramstate
from fidelity_tasks import DIGITS_TASK, GPT_TASK, LONG_GPT_TASK, Task

SEEDS = 5
LOOKS = 10  # at the held-out loss, the last after the last step

Rounding = Literal["nearest", "stochastic", "kahan"]
State = Literal["float32", "bfloat16", "8bit"]


@dataclass(frozen=True)
class Setting:
    """In what values and moments are kept, and how values are rounded; without a rounding it is torch's optimizer."""

    values: Literal["float32", "bfloat16"]
    state: State
    rounding: Rounding | None = "nearest"

    @property
    def name(self) -> str:
        """The row's name."""
        if self.rounding is None:
            return f"torch.optim.AdamW, {self.values}"
        how = f" {self.rounding}" if self.values == "bfloat16" else ""
        return f"values {self.values}{how}, state {self.state}"

    def optimizer(self, model: nn.Module, task: Task, seed: int) -> torch.optim.Optimizer:
        """Make what the row is about."""
        if self.rounding is None:
            return torch.optim.AdamW(model.parameters(), lr=task.lr, betas=task.betas, weight_decay=task.weight_decay)
        return paramstate.AdamW(
            model,
            lr=task.lr,
            betas=task.betas,
            weight_decay=task.weight_decay,
            max_grad_norm=task.max_grad_norm,
            state_dtype=self.state,
            rounding=self.rounding,
            rounding_seed=seed,
        )


BASELINE = Setting("float32", "float32")
WIDE = (Setting("float32", "float32", None), BASELINE, Setting("float32", "bfloat16"), Setting("float32", "8bit"))
NARROW = (
    Setting("bfloat16", "bfloat16", None),
    *(
        Setting("bfloat16", state, rounding)
        for rounding in ("nearest", "stochastic", "kahan")
        for state in ("bfloat16", "float32", "8bit")
    ),
)
ROWS: dict[Task, tuple[Setting, ...]] = {
    DIGITS_TASK: WIDE + NARROW,
    LONG_GPT_TASK: WIDE[1:],
    GPT_TASK: WIDE + NARROW,
}


@dataclass(frozen=True)
class Run:
    """What one training gave."""

    steps: tuple[int, ...]  # where the held-out loss was looked at
    losses: tuple[float, ...]
    bytes_a_parameter: float  # of values and all state but the step's number

    @property
    def final(self) -> float:
        """The held-out loss after the last step."""
        return self.losses[-1]


Results = dict[Task, dict[Setting, list[Run]]]
"""Runs in the order of their seeds."""


def run(task: Task, setting: Setting, seed: int) -> Run:
    """Train. A seed gives the same first values, batches and rounding in every process, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = task.make().to(getattr(torch, setting.values))
    optimizer = setting.optimizer(model, task, seed)
    looks = [round(task.steps * (look + 1) / LOOKS) for look in range(LOOKS)]
    held_out_loss = _held_out_loss(task, model)
    draw = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = task.rate(step)
        optimizer.zero_grad()
        _loss(model, *task.batch(draw)).backward()
        if setting.rounding is None:
            nn.utils.clip_grad_norm_(model.parameters(), task.max_grad_norm)
        optimizer.step()
        if step + 1 in looks:
            losses.append(held_out_loss())
    return Run(tuple(looks), tuple(losses), _bytes_a_parameter(model, optimizer))


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    dtype = next(model.parameters()).dtype
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    return cross_entropy(model(inputs).float(), targets)


def _held_out_loss(task: Task, model: nn.Module) -> Callable[[], float]:
    """The loss is taken in float32 with the values as they are: it judges them, not the arithmetic in between."""
    twin = task.make()
    batch = task.held_out()

    @torch.no_grad()
    def look() -> float:
        twin.load_state_dict(model.state_dict())
        return _loss(twin, *batch).item()

    return look


def _bytes_a_parameter(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    def kept() -> Iterator[Tensor]:
        yield from model.parameters()
        for held in optimizer.state.values():
            yield from (value for key, value in held.items() if key != "step")

    return sum(tensor.nbytes for tensor in kept()) / sum(value.numel() for value in model.parameters())
