"""What a step keeps and what it needs for a moment, as the system counts it: `memory.py OPTIONS ...`.

A process of its own, on Linux: trains GPT-2's parameters for two steps and reads how many of its pages are resident,
and how many were at worst. OPTIONS is JSON: `max_grad_norm`, `state_dtype`, `rounding` as `AdamW` takes them (a
`state_dtype` of torch's by its name), and `dtype`, that of the values. Prints a line of JSON for each.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import paramstate
import shapes

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
FORGET_THE_PEAK = "5"
BLOCK = 1 << 20


class Pages(NamedTuple):
    """Resident bytes of this process: now, and the most since the peak was forgotten."""

    now: int
    peak: int

    @classmethod
    def read(cls) -> Pages:
        """Ask the system."""
        lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
        now, peak = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        return cls(now, peak)


class Steps(NamedTuple):
    """Bytes that two steps kept and that they had at worst, beyond what was there before each."""

    kept_by_first: int
    peak_of_first: int
    kept_by_second: int
    peak_of_second: int


def is_supported() -> bool:
    """Whether this system counts and forgets as is needed here."""
    try:
        CLEAR.write_text(FORGET_THE_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def filled(shape: shapes.Shape, block: Tensor) -> Tensor:
    """Numbers of a block, the same ones over and over; all pages are written."""
    tensor = torch.empty(shape, dtype=block.dtype)
    for part in tensor.view(-1).split(len(block)):
        part.copy_(block[: len(part)])
    return tensor


def make_model(all_shapes: list[shapes.Shape], dtype: torch.dtype) -> nn.ParameterList:
    """Random parameters with gradients."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    values, gradients = block.mul(0.02).to(dtype), block.mul(1e-3).to(dtype)
    model = nn.ParameterList(nn.Parameter(filled(shape, values)) for shape in all_shapes)
    for parameter in model:
        parameter.grad = filled(tuple(parameter.shape), gradients)
    return model


def give_back() -> None:
    """Have the allocator return what is free, or a step would find room there that nobody counts."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def step_of(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes that one step keeps, and that it has at worst."""
    give_back()
    CLEAR.write_text(FORGET_THE_PEAK, encoding="ascii")
    before = Pages.read()
    optimizer.step()
    after = Pages.read()
    return after.now - before.now, after.peak - before.now


def steps_of(all_shapes: list[shapes.Shape], dtype: torch.dtype, options: dict[str, Any]) -> Steps:
    """Train for two steps."""
    optimizer = paramstate.AdamW(make_model(all_shapes, dtype), lr=1e-3, **options)
    return Steps(*step_of(optimizer), *step_of(optimizer))


def measure(options: dict[str, Any]) -> Steps:
    """Train for two steps with these options."""
    dtype = getattr(torch, options.pop("dtype", "float32"))
    if "state_dtype" in options:
        options["state_dtype"] = getattr(torch, options["state_dtype"], options["state_dtype"])
    # Code is loaded and threads are started by the first step of a process: that is not this one's.
    steps_of([(1 << 18,), (3, 5)], dtype, options)
    return steps_of(shapes.gpt2(), dtype, options)


def main() -> None:
    """Measure, and print what was found."""
    for text in sys.argv[1:]:
        print(json.dumps(measure(json.loads(text))._asdict()), flush=True)


if __name__ == "__main__":
    main()
