"""nanoGPT: a training loop written out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from side_by_side import as_with_torch, same_bits
from small_models import state_by_name
from tiny_gpt import GPT

TEXT = "the state of a parameter belongs to the parameter, and not to the object that happens to hold it today. "
LETTERS = sorted(set(TEXT))
TOKENS = torch.tensor([LETTERS.index(letter) for letter in TEXT * 4])
CONTEXT = 16
STEPS = 30


def batch(step: int, part: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1000 * step + part)
    starts = torch.randint(len(TOKENS) - CONTEXT - 1, (4,), generator=draw).tolist()
    return tuple(torch.stack([TOKENS[s + shift : s + shift + CONTEXT] for s in starts]) for shift in (0, 1))


def cosine(step: int, peak: float = 1e-2, warmup: int = 5) -> float:
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    ratio = (step - warmup) / (STEPS - warmup)
    return peak / 10 + 0.5 * (1 + math.cos(math.pi * ratio)) * (peak - peak / 10)


class Run:
    """A model, its optimizer and a scaler, trained from any step on, saved and resumed."""

    def __init__(self, optimizer_class: type[torch.optim.Optimizer], dropout: float = 0.0) -> None:
        self.model = GPT(len(LETTERS), CONTEXT, dropout=dropout)
        self.optimizer = self.model.configure_optimizers(optimizer_class, 0.1, 1e-2, (0.9, 0.95))
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def train(self, steps: range, *, accumulate: int = 2) -> list[float]:
        losses = []
        for step in steps:
            lr = cosine(step)
            for param_group in self.optimizer.param_groups:
                param_group["lr"] = lr
            total = 0.0
            for part in range(accumulate):
                loss = self.model(*batch(step, part)) / accumulate
                self.scaler.scale(loss).backward()
                total += loss.item()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(total)
        return losses

    def save(self) -> None:
        saved = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**saved, "rng": torch.get_rng_state()}, "ckpt.pt")

    def resume(self) -> None:
        checkpoint = torch.load("ckpt.pt", weights_only=True)
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"])

    def state(self) -> Any:
        return state_by_name(self.model, self.optimizer)


def test_thirty_steps_follow_torchs_trajectory() -> None:
    """Thirty steps of a tiny GPT (warm-up, cosine, clip, accumulation, decay groups) go as with torch."""

    def script(optimizer_class: type[torch.optim.Optimizer]) -> Any:
        run = Run(optimizer_class)
        return run.train(range(STEPS)), run.state()

    losses, state = as_with_torch(script, rtol=1e-3, atol=2e-5)
    assert losses[-1] < 0.9 * losses[0]
    assert state["wte.weight"]["step"] == STEPS


def test_fused_is_found_by_inspection_of_the_signature() -> None:
    """`inspect.signature(AdamW).parameters` has `fused`, and giving it is recorded in the groups as with torch."""
    assert [group["fused"] for group in Run(paramstate.AdamW).optimizer.param_groups] == [True, True]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_is_bit_equal(dropout: float) -> None:
    """A run that was saved, torn down and resumed is bit-equal to one that was not, with dropout as well."""

    def script(optimizer_class: type[torch.optim.Optimizer]) -> Any:
        run = Run(optimizer_class, dropout)
        run.train(range(12))
        run.save()
        whole = (run.train(range(12, 20)), run.state())
        resumed = Run(optimizer_class, dropout)
        resumed.resume()
        same_bits((resumed.train(range(12, 20)), resumed.state()), whole)
        return whole

    as_with_torch(script, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("first", "second"), [(torch.optim.AdamW, paramstate.AdamW), (paramstate.AdamW, torch.optim.AdamW)]
)
def test_a_checkpoint_moves_between_torch_and_ours(
    first: type[torch.optim.Optimizer], second: type[torch.optim.Optimizer]
) -> None:
    """A run begun with one of torch's AdamW and ours is resumed from its checkpoint with the other."""
    run = Run(first)
    run.train(range(12))
    run.save()
    resumed = Run(second)
    resumed.resume()
    losses, others = run.train(range(12, 20)), resumed.train(range(12, 20))
    torch.testing.assert_close(others, losses, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(resumed.state(), run.state(), rtol=1e-3, atol=2e-5)


def test_the_context_is_cropped_between_runs() -> None:
    """A model cropped to a shorter context goes on from the checkpoint; only the positions start afresh."""
    run = Run(paramstate.AdamW)
    run.train(range(6))
    resumed = Run(paramstate.AdamW)
    resumed.model.load_state_dict(run.model.state_dict())
    resumed.model.wpe.weight = nn.Parameter(resumed.model.wpe.weight[: CONTEXT // 2])
    with pytest.raises(paramstate.LoadError, match="exp_avg' has shape"):
        resumed.optimizer.load_state_dict(run.optimizer.state_dict())
    report = resumed.optimizer.load_state_dict(run.optimizer.state_dict(), strict=False)
    assert len(report.reshaped) == 1
    tokens, targets = batch(6, 0)
    resumed.model(tokens[:, : CONTEXT // 2], targets[:, : CONTEXT // 2]).backward()
    resumed.optimizer.step()
    steps = {name: state["step"].item() for name, state in state_by_name(resumed.model, resumed.optimizer).items()}
    assert {name for name, step in steps.items() if step == 1} == {"wpe.weight"}
    assert {step for name, step in steps.items() if name != "wpe.weight"} == {7.0}
