"""What is paid once, and what is kept: making an optimizer, importing the package, memory.

The import is measured as users have it, with the bytecode of all sources written: every process keeps it in one
temporary folder, and the first ones, which write it there, are not counted. With ``PYTHONDONTWRITEBYTECODE`` set, each
import would compile all sources anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import memory
import paramstate
import shapes
import sides
from outcome import OURS, NotMeasuredError, Outcome, compared
from scale import ROUNDS, SMALLER, WARM_UPS
from timing import Contestant, Spread, measure, ratios

PARAMETERS = 1_000 // SMALLER
MIB = 1 << 20
FLOAT = 4
IMPORT = """
import time
import torch
start = time.perf_counter()
import paramstate
paramstate.AdamW
print(time.perf_counter() - start)
"""


def construction() -> Outcome:
    """Measure how long it takes to make an optimizer over a model."""
    model = sides.make_model(shapes.vectors(PARAMETERS, 64))
    times = measure(
        {
            OURS: Contestant(lambda: paramstate.AdamW(model, lr=1e-3)),
            "torch": Contestant(lambda: torch.optim.AdamW(model.parameters(), lr=1e-3)),
        }
    )
    found = compared(times, "torch", notes=("here the number is our time over torch's: less is better",))
    return Outcome(**{**vars(found), "number": ratios(times[OURS], times["torch"])})


def import_time() -> Outcome:
    """Measure the import in new processes that have imported torch already."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = folder
        for turn in range(WARM_UPS + ROUNDS):
            command = [sys.executable, "-c", IMPORT]
            shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            if turn >= WARM_UPS:
                seconds.append(float(shown.stdout))
    return Outcome(
        number=Spread.of([1e3 * value for value in seconds]),
        ours=Spread.of(seconds),
        notes=("measured in new processes after `import torch`, `paramstate.AdamW` included, bytecode written before",),
        times={OURS: dict(enumerate(seconds))},
    )


def steps_in_memory(**options: str | float) -> memory.Steps:
    """What two steps of GPT-2's parameters need, in a process of its own."""
    if not memory.is_supported():
        raise NotMeasuredError("only Linux counts resident pages and forgets their peak")
    sides.require_options(options)
    program = [sys.executable, str(Path(memory.__file__)), json.dumps(options)]
    shown = subprocess.run(program, capture_output=True, text=True, check=True)
    return memory.Steps(**json.loads(shown.stdout))


def elements() -> int:
    """How many elements GPT-2's parameters have."""
    return sum(torch.Size(shape).numel() for shape in shapes.gpt2())


def state_of_eight_bit_moments() -> Outcome:
    """Measure how many bytes the first step keeps, an element."""
    kept = steps_in_memory(state_dtype="8bit").kept_by_first / elements()
    return Outcome(number=Spread.of([kept]), notes=("resident pages that the first step adds; torch keeps 8 B",))


def peak() -> Outcome:
    """Measure how many bytes a step with a clip has at worst beyond what it keeps."""
    found = steps_in_memory(max_grad_norm=1.0)
    beyond = max(found.peak_of_first - 2 * FLOAT * elements(), found.peak_of_second)
    return Outcome(
        number=Spread.of([beyond / MIB]),
        notes=("most resident pages of two steps with a clip by norm, beyond parameters, gradients and state",),
    )
