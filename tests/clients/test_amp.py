"""torch.amp: autocast and GradScaler on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from side_by_side import as_with_torch
from small_models import state_by_name


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))


def batches(count: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=draw), torch.randint(0, 3, (8,), generator=draw)) for _ in range(count)]


@pytest.mark.parametrize("fused", [None, True])
def test_autocast_to_bfloat16_trains_as_with_torch(fused: bool | None) -> None:
    """A bfloat16 autocast loop trains as with torch, with and without `fused=True`."""

    def script(optimizer_class: type[torch.optim.Optimizer]) -> Any:
        model = classifier()
        optimizer = optimizer_class(model.parameters(), lr=1e-2, fused=fused)
        losses = []
        for x, y in batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, state_by_name(model, optimizer)

    # An activation that falls on the border of two bfloat16 numbers may round the other way: 2**-8.
    as_with_torch(script, rtol=4e-3, atol=1e-4)


@pytest.mark.parametrize("clip", [False, True], ids=["whole gradients", "unscaled and clipped"])
@pytest.mark.parametrize("fused", [None, True])
def test_a_gradient_scaler_with_float16_autocast_trains_as_with_torch(fused: bool | None, clip: bool) -> None:
    """`GradScaler` with float16 autocast: the same losses, scales and skipped steps, clipped or not, fused or not."""

    def script(optimizer_class: type[torch.optim.Optimizer]) -> Any:
        model = classifier()
        optimizer = optimizer_class(model.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
        losses, scales = [], []
        for x, y in batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            scales.append(scaler.get_scale())
        return losses, scales, state_by_name(model, optimizer)

    _, scales, state = as_with_torch(script, rtol=2e-3, atol=1e-4)
    backed_off = sum(after < before for before, after in zip([2.0**20, *scales], scales, strict=False))
    assert backed_off > 0, "no step overflowed, so this shows nothing about skipped ones"
    assert state["0.weight"]["step"] == len(scales) - backed_off


@pytest.mark.parametrize("fused", [None, True])
def test_a_skipped_step_leaves_everything_as_it_was(fused: bool | None) -> None:
    """A step that the scaler skips for an infinite gradient changes no value, no moment and no step count."""

    def script(optimizer_class: type[torch.optim.Optimizer]) -> Any:
        model = classifier()
        optimizer = optimizer_class(model.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        seen = []
        for number, (x, y) in enumerate(batches(4)):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            if number == 2:
                model[0].weight.grad[0, 0] = float("inf")
            before = state_by_name(model, optimizer)
            scaler.step(optimizer)
            scaler.update()
            after = state_by_name(model, optimizer)
            unchanged = all(torch.equal(after[name][key], before[name][key]) for name in before for key in before[name])
            seen.append((unchanged, scaler.get_scale()))
        return seen, state_by_name(model, optimizer)

    seen, state = as_with_torch(script)
    assert seen == [(False, 8.0), (False, 8.0), (True, 4.0), (False, 4.0)]
    assert state["0.weight"]["step"] == 3


def test_a_scaler_and_its_optimizer_resume_bit_equal() -> None:
    """Scaler and optimizer, saved and loaded midway, go on bit-equal to the run that was not interrupted."""

    def script(optimizer_class: type[torch.optim.Optimizer]) -> Any:
        def made() -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
            model = classifier()
            return model, optimizer_class(model.parameters(), lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**18)

        def train(run: Any, data: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
            model, optimizer, scaler = run
            losses = []
            for x, y in data:
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = nn.functional.cross_entropy(model(x), y)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                losses.append(loss.item())
            return losses

        data = batches()
        run = made()
        train(run, data[:6])
        torch.save([part.state_dict() for part in run], "midway.pt")
        whole = train(run, data[6:])
        resumed = made()
        for part, saved in zip(resumed, torch.load("midway.pt", weights_only=True), strict=True):
            part.load_state_dict(saved)
        assert train(resumed, data[6:]) == whole
        return whole

    as_with_torch(script, rtol=2e-3, atol=1e-4)
