"""torch.optim.swa_utils: averaged weights beside an optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

import paramstate
from side_by_side import as_with_torch
from small_models import state_by_name


def network() -> nn.Module:
    # No bias before the normalisation: its gradient would be rounding alone, which Adam makes steps of a full lr from.
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(2)
    inputs = [torch.randn(8, 4, generator=draw) for _ in range(count)]
    return [(x, x.square().sum(1, keepdim=True)) for x in inputs]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_an_exponential_average_follows_as_with_torch(decay: float) -> None:
    """`AveragedModel` with the EMA function holds the same weights as with torch, and `update_bn` works on it."""

    def script(optimizer_class: type[torch.optim.Optimizer]) -> Any:
        model = network()
        optimizer = optimizer_class(model.parameters(), lr=1e-2)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        losses = []
        for x, y in batches(15):
            losses.append(step(model, optimizer, x, y))
            average.update_parameters(model)
        update_bn([x for x, _ in batches(4)], average)
        return losses, state_by_name(model, optimizer), dict(average.module.state_dict())

    _, state, averaged = as_with_torch(script, rtol=1e-4, atol=1e-6)
    assert not torch.equal(averaged["0.weight"], state["0.weight"]["value"])


def test_stochastic_weight_averaging_with_its_schedule_runs_as_with_torch() -> None:
    """SWA with `CosineAnnealingLR`, then `SWALR`, then `update_bn`: rates, losses and averages as with torch."""

    def script(optimizer_class: type[torch.optim.Optimizer]) -> Any:
        model = network()
        optimizer = optimizer_class(model.parameters(), lr=1e-2)
        average = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
        before = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
        during = SWALR(optimizer, swa_lr=5e-3, anneal_epochs=3)
        losses, rates = [], []
        for epoch in range(12):
            losses += [step(model, optimizer, x, y) for x, y in batches(3)]
            if epoch >= 6:
                average.update_parameters(model)
                during.step()
            else:
                before.step()
            rates.append(optimizer.param_groups[0]["lr"])
        update_bn(batches(4), average)
        return losses, rates, dict(average.module.state_dict())

    _, rates, averaged = as_with_torch(script, rtol=1e-4, atol=1e-6)
    assert rates[-1] == pytest.approx(5e-3)
    assert averaged["1.num_batches_tracked"] == 4


def test_weights_swapped_for_their_average_and_back_do_not_disturb_training() -> None:
    """Averages copied into the model for an evaluation, and the weights copied back: training goes on as with torch."""

    def script(optimizer_class: type[torch.optim.Optimizer]) -> Any:
        model = network()
        optimizer = optimizer_class(model.parameters(), lr=1e-2)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        losses, evaluated = [], []
        for x, y in batches(9):
            losses.append(step(model, optimizer, x, y))
            average.update_parameters(model)
            own = copy.deepcopy(model.state_dict())
            model.load_state_dict(average.module.state_dict())
            evaluated.append(nn.functional.mse_loss(model.eval()(x), y).item())
            model.train().load_state_dict(own)
        return losses, evaluated, state_by_name(model, optimizer)

    as_with_torch(script, rtol=1e-4, atol=1e-6)


def test_an_average_made_of_a_known_model_is_no_part_of_it() -> None:
    """An average beside a model that the optimizer knows is not mistaken for it: only the model is trained."""
    model = network()
    optimizer = paramstate.AdamW(model, lr=1e-2)
    average = AveragedModel(model)
    frozen = copy.deepcopy(average.state_dict())
    ids = dict(optimizer.ids)
    for x, y in batches(3):
        step(model, optimizer, x, y)
    assert optimizer.ids == ids
    assert all(torch.equal(value, frozen[name]) for name, value in average.state_dict().items())
    assert all(optimizer.state_of(param)["step"] == 3 for param in model.parameters())
