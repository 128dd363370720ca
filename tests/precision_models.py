"""What the tests of state dtypes and rounding train: two layers whose weights are large enough for eight bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paramstate import AdamW
from paramstate.precision.blockwise import BlockwiseTensor
from small_models import give_gradient

KINDS = [None, torch.float32, torch.bfloat16, "8bit"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHORT = [torch.bfloat16, torch.float16]
MOMENTS = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]


def two_layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The weights have more than 4,096 elements, in blocks that end within a row; the biases stay in float32."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 64)).to(dtype)


def step(model: nn.Module, opt: torch.optim.Optimizer, *seeds: int, scale: float = 1.0) -> None:
    """One step for each seed, with gradients that depend on it and on the parameter's name alone."""
    for seed in seeds:
        for name, parameter in model.named_parameters():
            give_gradient(parameter, f"{name}:{seed}", scale)
        opt.step()


def kept(opt: AdamW, name: str, key: str = "exp_avg") -> str:
    """In what a moment is kept: ``"8bit"``, or the name of a dtype."""
    moment = opt.state_of(name)[key]
    return "8bit" if isinstance(moment, BlockwiseTensor) else str(moment.dtype).removeprefix("torch.")


def floats(held: object) -> Tensor:
    """A copy of a state tensor as ordinary floats."""
    assert isinstance(held, Tensor)
    return held.dense() if isinstance(held, BlockwiseTensor) else held.detach().clone()
