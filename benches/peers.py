"""The optimizers of others on the CPU, where they are installed: `make bench-peers` makes an environment that has them.

None of them is a dependency of the project. Each is given the same AdamW; one that is missing, fails or computes
something else is not timed, and the table says why.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import correctness
import shapes
import sides
import small
from outcome import OURS, NotMeasuredError, Outcome, compared
from scale import SMALLER
from sides import LEARNING_RATE, WEIGHT_DECAY
from timing import Contestant, measure

NOT_INSTALLED = Path(sys.prefix) / "not-installed.json"
FUSED = "torch fused"
SETTINGS: dict[str, Any] = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "betas": (0.9, 0.999), "eps": 1e-8}
EIGHT_BIT_SPEED_UP = "bitsandbytes AdamW8bit"

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def made(module: str, name: str, parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """An optimizer by the names of its module and its class; the module is not known to this project's checks."""
    optimizer: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(parameters, **SETTINGS, **options)
    return optimizer


def deepspeed(parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """DeepSpeed's step for the CPU, which it compiles when it is first used, with what lies beside this Python."""
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([beside, os.environ["PATH"]])
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch-extensions"))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return made("deepspeed.ops.adam", "DeepSpeedCPUAdam", parameters, adamw_mode=True, **options)


@dataclass(frozen=True)
class Peer:
    """One optimizer of others: the package that it comes in, and how it is made."""

    package: str
    make: Make


def installed_version(package: str) -> str:
    """The version of a package; nothing where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


OPTIMI, TORCHAO, BITSANDBYTES, DEEPSPEED = "torch-optimi", "torchao", "bitsandbytes", "deepspeed"
PACKAGES = (OPTIMI, TORCHAO, BITSANDBYTES, DEEPSPEED)

OPTIMI_ADAMW = partial(made, "optimi", "AdamW")
TORCHAO_ADAMW = partial(made, "torchao.optim", "_AdamW")  # as its documents name it
BITSANDBYTES_ADAMW = partial(made, "bitsandbytes.optim", "AdamW")

PLAIN = {
    "optimi AdamW": Peer(OPTIMI, OPTIMI_ADAMW),
    "torchao _AdamW": Peer(TORCHAO, TORCHAO_ADAMW),
    "bitsandbytes AdamW": Peer(BITSANDBYTES, BITSANDBYTES_ADAMW),
    "DeepSpeedCPUAdam": Peer(DEEPSPEED, deepspeed),
}
BF16 = {
    "DeepSpeedCPUAdam, bf16 states": Peer(DEEPSPEED, partial(deepspeed, fp32_optimizer_states=False)),
    "bitsandbytes AdamW, fp32 states": Peer(BITSANDBYTES, BITSANDBYTES_ADAMW),
}
STOCHASTIC = {"torchao _AdamW, stochastic": Peer(TORCHAO, partial(TORCHAO_ADAMW, bf16_stochastic_round=True))}
KAHAN = {"optimi AdamW, Kahan sum": Peer(OPTIMI, partial(OPTIMI_ADAMW, kahan_sum=True))}
EIGHT_BITS = {
    EIGHT_BIT_SPEED_UP: Peer(BITSANDBYTES, partial(made, "bitsandbytes.optim", "AdamW8bit")),
    "torchao AdamW8bit": Peer(TORCHAO, partial(made, "torchao.optim", "AdamW8bit")),
}


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {package: installed_version(package) for package in PACKAGES}
    return {package: version for package, version in found.items() if version}


def why_not_installed(package: str) -> str:
    """What was in the way when it was to be installed."""
    reasons = json.loads(NOT_INSTALLED.read_text(encoding="utf-8")) if NOT_INSTALLED.exists() else {}
    return f"not installed: {reasons[package]}" if package in reasons else "not installed"


def brief(error: Exception) -> str:
    """The first line of an error, without anything that names this machine."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text.replace(str(Path.home()), "~").replace(sys.prefix, "…")[:160]


@dataclass
class Field:
    """Those who take part in a row, and why others do not."""

    entered: dict[str, sides.Side]
    missing: dict[str, str]

    def enter(self, name: str, make: Callable[[], sides.Side]) -> None:
        """Add a side, and have it take a step, in which some find that they cannot."""
        try:
            side = make()
            side.optimizer.step()
        except Exception as error:  # noqa: BLE001  # whatever a package of others raises, the others run
            self.missing[name] = brief(error)
        else:
            self.entered[name] = make()


def enter_all(field: Field, peers: Mapping[str, Peer], model: Callable[[], nn.ParameterList]) -> None:
    """Add those that are installed and run."""
    for name, peer in peers.items():
        if not installed_version(peer.package):
            field.missing[name] = why_not_installed(peer.package)
            continue

        def make(peer: Peer = peer) -> sides.Side:
            parameters = model()
            return sides.Side(parameters, peer.make(list(parameters.parameters())))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            field.enter(name, make)
    if not any(name in field.entered for name in peers):
        raise NotMeasuredError("; ".join(f"{name}: {field.missing[name]}" for name in peers))


def run(
    peers: Mapping[str, Peer],
    tolerance: correctness.Tolerance,
    against: str,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Outcome:
    """Measure the update of eight matrices by us, by torch's fused step and by others."""

    def model() -> nn.ParameterList:
        model = sides.make_model(shapes.square_matrices(), dtype=dtype)
        sides.give_gradients(model)
        return model

    field = Field({OURS: sides.ours(model(), **options), FUSED: sides.torchs(model(), "fused")}, {})
    enter_all(field, peers, model)
    runs = {name: (side, side.optimizer.step) for name, side in field.entered.items()}
    wrong = correctness.check(correctness.Reference(field.entered[OURS].parameters), runs, tolerance)
    for name in (OURS, FUSED):
        correctness.require(name, wrong.get(name, ""))
    times = measure({name: Contestant(run) for name, (_, run) in runs.items() if name not in wrong})
    return compared(times, against, missing={**field.missing, **wrong})


def plain() -> Outcome:
    """Measure the update in float32."""
    return run(PLAIN, correctness.FP32, FUSED)


def bf16() -> Outcome:
    """Measure the update with values and moments in bfloat16."""
    return run(BF16, correctness.BF16, FUSED, torch.bfloat16)


def bf16_stochastic() -> Outcome:
    """Measure the same, values rounded at random."""
    (only,) = STOCHASTIC
    return run(STOCHASTIC, correctness.BF16_STOCHASTIC, only, torch.bfloat16, rounding="stochastic")


def bf16_kahan() -> Outcome:
    """Measure the same, with what rounding takes from a value kept and given back."""
    (only,) = KAHAN
    return run(KAHAN, correctness.BF16_STOCHASTIC, only, torch.bfloat16, rounding="kahan")


def eight_bits() -> Outcome:
    """Measure the update with moments in 8 bits."""
    return run(EIGHT_BITS, correctness.EIGHT_BITS, EIGHT_BIT_SPEED_UP, state_dtype="8bit")


def thousand() -> Outcome:
    """Measure 1,000 parameters of 1,024 elements whose gradients come from a real backward."""
    all_shapes = shapes.vectors(1_000 // SMALLER, 1_024)
    inputs = small.make_inputs(all_shapes)

    def model() -> nn.ParameterList:
        model = sides.make_model(all_shapes)
        sides.give_gradients(model)
        return model

    field = Field({OURS: sides.ours(model()), FUSED: sides.torchs(model(), "fused")}, {})
    enter_all(field, PLAIN, model)
    found = small.contest(field.entered, inputs)
    return Outcome(**{**vars(found), "missing": {**field.missing, **found.missing}})
