"""What is paid once: making an optimizer, and importing the package."""

from __future__ import annotations

import subprocess
import sys

import torch

import paramstate
import shapes
import sides
from outcome import Outcome
from timing import ROUNDS, WARM_UPS, Contestant, Spread, measure, ratios

PARAMETERS = 1_000
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
            "paramstate": Contestant(lambda: paramstate.AdamW(model, lr=1e-3)),
            "torch": Contestant(lambda: torch.optim.AdamW(model.parameters(), lr=1e-3)),
        }
    )
    return Outcome(
        number=ratios(times["paramstate"], times["torch"]),
        ours=Spread.of(times["paramstate"]),
        theirs=Spread.of(times["torch"]),
        setting="default",
        notes=("here the number is paramstate's time over torch's: less is better",),
        times=times,
    )


def import_time() -> Outcome:
    """Measure the import in new processes that have imported torch already."""
    seconds = []
    for turn in range(WARM_UPS + ROUNDS):
        shown = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        if turn >= WARM_UPS:
            seconds.append(float(shown.stdout))
    return Outcome(
        number=Spread.of([1e3 * value for value in seconds]),
        ours=Spread.of(seconds),
        theirs=None,
        setting="",
        notes=("measured in new processes after `import torch`, `paramstate.AdamW` included",),
        times={"paramstate": seconds},
    )
