"""torch.nn.utils.prune, and lottery tickets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import paramstate
from side_by_side import as_with_torch, same_bits
from small_models import state_by_name

OptimizerClass = type[torch.optim.Optimizer]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(16, 4, generator=draw)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def prune_by_size(model: nn.Module) -> None:
    for module in linears(model):
        prune.l1_unstructured(module, "weight", amount=0.4)


def prune_whole_rows(model: nn.Module) -> None:
    for module in linears(model):
        prune.ln_structured(module, "weight", amount=0.25, n=2, dim=0)


def prune_globally(model: nn.Module) -> None:
    prune.global_unstructured(
        [(module, "weight") for module in linears(model)], pruning_method=prune.L1Unstructured, amount=0.5
    )


def prune_at_random_twice(model: nn.Module) -> None:
    for module in linears(model):
        prune.random_unstructured(module, "weight", amount=0.3)
        prune.l1_unstructured(module, "weight", amount=0.3)


PRUNINGS = [prune_by_size, prune_whole_rows, prune_globally, prune_at_random_twice]


@pytest.mark.parametrize("cut", PRUNINGS)
def test_a_model_that_is_pruned_before_trains_as_with_torch(cut: Callable[[nn.Module], None]) -> None:
    """A model that was pruned before its optimizer was built trains as with torch, masked weights included."""

    def script(optimizer_class: OptimizerClass) -> Any:
        model = network()
        cut(model)
        optimizer = optimizer_class(model.parameters(), lr=1e-2)
        return train(model, optimizer, range(8)), state_by_name(model, optimizer)

    as_with_torch(script, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cut", PRUNINGS)
def test_a_model_that_is_pruned_midway_trains_as_with_torch(cut: Callable[[nn.Module], None]) -> None:
    """Pruning under a living optimizer of bare parameters, where torch goes on, goes on as with torch."""

    def script(optimizer_class: OptimizerClass) -> Any:
        model = network()
        optimizer = optimizer_class(model.parameters(), lr=1e-2)
        losses = train(model, optimizer, range(4))
        cut(model)
        losses += train(model, optimizer, range(4, 8))
        return losses, state_by_name(model, optimizer)

    as_with_torch(script, rtol=1e-4, atol=1e-6)


def test_an_optimizer_that_knows_the_model_names_what_pruning_did() -> None:
    """Where the model is known pruning is raised with both names; after `rebind` all goes on as with torch."""

    def script(optimizer_class: OptimizerClass) -> Any:
        model = network()
        given = model if issubclass(optimizer_class, paramstate.AdamW) else model.parameters()
        optimizer = optimizer_class(given, lr=1e-2)
        losses = train(model, optimizer, range(4))
        prune_by_size(model)
        if isinstance(optimizer, paramstate.AdamW):
            with pytest.raises(paramstate.ReplacedParameterError, match=r"0\.weight.*0\.weight_orig"):
                train(model, optimizer, range(4, 5))
            report = optimizer.rebind(model)
            assert {"0.weight_orig", "2.weight_orig"} <= set(report.kept)
        losses += train(model, optimizer, range(4, 8))
        return losses, state_by_name(model, optimizer)

    as_with_torch(script, rtol=1e-4, atol=1e-6)


def pruned_for_good(optimizer_class: OptimizerClass) -> tuple[nn.Sequential, torch.optim.Optimizer, list[float]]:
    """Pruned midway, trained, and made permanent."""
    model = network()
    optimizer = optimizer_class(model.named_parameters(), lr=1e-2)
    losses = train(model, optimizer, range(4))
    prune_by_size(model)
    losses += train(model, optimizer, range(4, 6))
    for module in linears(model):
        prune.remove(module, "weight")
    return model, optimizer, losses + train(model, optimizer, range(6, 8))


def test_a_pruning_that_is_made_permanent_goes_on_as_with_torch() -> None:
    """Pruned midway, trained, made permanent by `prune.remove`, and trained on: all as with torch."""

    def script(optimizer_class: OptimizerClass) -> Any:
        model, optimizer, losses = pruned_for_good(optimizer_class)
        return losses, state_by_name(model, optimizer)

    _, state = as_with_torch(script, rtol=1e-4, atol=1e-6)
    assert state["0.weight"]["step"] == 8


def test_a_run_resumes_though_pruning_changed_the_order_of_the_parameters() -> None:
    """`prune.remove` puts a weight behind its bias: ours resumes by name, bit-equal; torch mixes the two up."""

    def resumed(optimizer_class: OptimizerClass) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model, optimizer, _ = pruned_for_good(optimizer_class)
        twin = copy.deepcopy(model)
        again = optimizer_class(twin.named_parameters(), lr=1e-2)
        again.load_state_dict(optimizer.state_dict())
        train(model, optimizer, range(8, 10))
        train(twin, again, range(8, 10))
        return state_by_name(twin, again), state_by_name(model, optimizer)

    same_bits(*resumed(paramstate.AdamW))
    with pytest.raises(RuntimeError, match="must match the size"):
        resumed(torch.optim.AdamW)


def lottery(optimizer_class: OptimizerClass, rewind: Callable[..., torch.optim.Optimizer]) -> Any:
    """Train, keep the largest weights, rewind them to where they began, train again: three rounds."""
    model = network()
    first = copy.deepcopy(model.state_dict())
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    masks = {name: torch.ones_like(param) for name, param in model.named_parameters() if param.dim() > 1}
    losses: list[float] = []
    for level in range(3):
        for step in range(6):
            losses += train(model, optimizer, range(10 * level + step, 10 * level + step + 1))
            with torch.no_grad():
                for name, mask in masks.items():
                    model.get_parameter(name).mul_(mask)
        for name, mask in masks.items():
            left = (model.get_parameter(name).detach().abs() * mask).flatten()
            mask.mul_((left >= left.quantile(0.3 * (level + 1))).view_as(mask))
        ticket = {name: value * masks.get(name, torch.ones(())) for name, value in first.items()}
        optimizer = rewind(model, optimizer, ticket)
    return losses, masks, state_by_name(model, optimizer)


def rewind_in_place(model: nn.Module, optimizer: torch.optim.Optimizer, ticket: dict[str, torch.Tensor]) -> Any:
    """Values back in place, and an optimizer made anew."""
    model.load_state_dict(ticket)
    return type(optimizer)(model.parameters(), lr=1e-2)


def rewind_data(model: nn.Module, optimizer: torch.optim.Optimizer, ticket: dict[str, torch.Tensor]) -> Any:
    """Values back by `.data`, the state emptied by hand."""
    for name, param in model.named_parameters():
        param.data = ticket[name].clone()
    optimizer.state.clear()
    return optimizer


def rewind_values_alone(model: nn.Module, optimizer: torch.optim.Optimizer, ticket: dict[str, torch.Tensor]) -> Any:
    """Values back, and the moments of the round before kept."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(ticket[name])
    return optimizer


def rewind_by_replacing(model: nn.Module, optimizer: torch.optim.Optimizer, ticket: dict[str, torch.Tensor]) -> Any:
    """Values back as new parameters, and the moments of the round before kept."""
    model.load_state_dict({name: value.clone() for name, value in ticket.items()}, assign=True)
    return optimizer


@pytest.mark.parametrize("rewind", [rewind_in_place, rewind_data, rewind_values_alone])
def test_lottery_tickets_are_found_as_with_torch(rewind: Callable[..., torch.optim.Optimizer]) -> None:
    """Three rounds of train, prune and rewind find the tickets that torch finds, however the rewind is done."""
    _, masks, _ = as_with_torch(
        lambda optimizer_class: lottery(optimizer_class, rewind), name="Adam", rtol=1e-4, atol=1e-6
    )
    kept = {name: mask.mean().item() for name, mask in masks.items()}
    assert all(0.05 < share < 0.5 for share in kept.values()), kept


def test_a_rewind_by_replacing_equals_one_in_place() -> None:
    """A rewind by `load_state_dict(assign=True)` is bit-equal to one in place; under torch nothing trains any more."""
    torch.manual_seed(0)
    in_place = lottery(paramstate.Adam, rewind_values_alone)
    torch.manual_seed(0)
    same_bits(lottery(paramstate.Adam, rewind_by_replacing), in_place)
    torch.manual_seed(0)
    _, _, torchs = lottery(torch.optim.Adam, rewind_by_replacing)
    assert all(state.keys() == {"value"} for state in torchs.values()), "torch has state for a weight that was replaced"


def test_rewound_and_frozen_by_a_mask_of_gradients_as_with_torch() -> None:
    """Masks applied to gradients by hooks of the parameters hold pruned weights at zero as with torch."""

    def script(optimizer_class: OptimizerClass) -> Any:
        model = network()
        masks = {param: (torch.rand_like(param) > 0.5).float() for param in model.parameters() if param.dim() > 1}
        for param, mask in masks.items():
            param.data.mul_(mask)
            param.register_hook(lambda grad, mask=mask: grad * mask)
        optimizer = optimizer_class(model.parameters(), lr=1e-2)
        losses = train(model, optimizer, range(8))
        for param, mask in masks.items():
            assert not param[mask == 0].any()
        return losses, state_by_name(model, optimizer)

    as_with_torch(script, rtol=1e-4, atol=1e-6)
