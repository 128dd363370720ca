"""torchtitan's layout: a container of optimizers over parts of a model, with state under flat names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

import paramstate
from reference import Settings, adam, same_bits
from same_training import OPTIMIZERS, Training, assert_same_run, assert_same_to_rounding, whose

WIDTH = 8
GROUPS: Sequence[tuple[str, dict[str, Any]]] = (
    (r"norm|bias", {"lr": 3e-3, "weight_decay": 0.0}),
    (r".*", {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}),
)
IMPLEMENTATIONS = {
    "fused": {"fused": True, "foreach": False},
    "foreach": {"fused": False, "foreach": True},
    "for-loop": {"fused": False, "foreach": False},
}
AdamWClass = type[torch.optim.AdamW]
Flat = dict[str, Any]


class Part(nn.Module):
    """One stage of a pipeline: some of the layers, under the names that they have in the whole model."""

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__()
        blocks = {str(i): nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()) for i in layers}
        self.layers = nn.ModuleDict(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = x + layer(x)
        return x


def parts_of(*stages: Sequence[int], seed: int = 0) -> list[Part]:
    """The same model for any split: each layer's values depend on its number alone."""
    parts = [Part(stage) for stage in stages]
    for part in parts:
        for name, param in part.named_parameters():
            draw = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            nn.init.normal_(param, std=0.3, generator=draw)
    return parts


class Container(torch.optim.Optimizer):
    """Several optimizers that look like one; the class that they are made of is all that changes."""

    def __init__(self, adamw: AdamWClass, parts: Sequence[nn.Module], implementation: str = "fused") -> None:
        self.parts = parts
        self.optimizers = [adamw(self._groups(part, IMPLEMENTATIONS[implementation])) for part in parts]
        super().__init__([param for part in parts for param in part.parameters()], {})
        self.schedules = [LambdaLR(optimizer, lambda step: 1.0 / (1 + 0.1 * step)) for optimizer in self.optimizers]

    @staticmethod
    def _groups(part: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
        """Bare tensors under ``params``, their names beside them, and every option in the group."""
        groups: list[dict[str, Any]] = [{"params": [], "param_names": [], **options, **own} for _, own in GROUPS]
        for name, param in part.named_parameters():
            group = next(g for g, (pattern, _) in zip(groups, GROUPS, strict=True) if re.search(pattern, name))
            group["params"].append(param)
            group["param_names"].append(name)
        return groups

    def step(self, closure: None = None) -> None:
        assert closure is None
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> Flat:
        flat: Flat = {}
        for optimizer in self.optimizers:
            create_state(optimizer)
            flat.update(flattened(optimizer))
        return flat

    def load_state_dict(self, flat: Flat) -> None:
        for optimizer in self.optimizers:
            create_state(optimizer)
            optimizer.load_state_dict(unflattened(optimizer, flat))


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """One step with zero gradients at zero rate, as checkpointing code takes it where there is no state yet."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


def flattened(optimizer: torch.optim.Optimizer) -> Flat:
    """``state.<name>.<key>`` and ``param_groups.<name>.<option>``, from the state dict and its ``param_names``."""
    saved, flat = optimizer.state_dict(), {}
    for group in saved["param_groups"]:
        for position, name in zip(group["params"], group["param_names"], strict=True):
            flat |= {f"state.{name}.{key}": value for key, value in saved["state"][position].items()}
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            flat |= {f"param_groups.{name}.{key}": value for key, value in options.items()}
    return flat


def unflattened(optimizer: torch.optim.Optimizer, flat: Flat) -> dict[str, Any]:
    """A state dict by position, without names, of what the optimizer holds now."""
    state, groups, position = {}, [], 0
    for group in optimizer.param_groups:
        first = group["param_names"][0]
        options = [key for key in group if key not in ("params", "param_names")]
        positions = range(position, position + len(group["params"]))
        for number, name, param in zip(positions, group["param_names"], group["params"], strict=True):
            state[number] = {key: flat[f"state.{name}.{key}"] for key in optimizer.state[param]}
        groups.append({"params": list(positions), **{key: flat[f"param_groups.{first}.{key}"] for key in options}})
        position += len(positions)
    return {"state": state, "param_groups": groups}


def train(parts: Sequence[nn.Module], container: Container, steps: int, *, first: int = 0) -> list[float]:
    losses = []
    for schedule in container.schedules:
        schedule.last_epoch = first
    for number in range(first, first + steps):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))
        out = x
        for part in parts:
            out = part(out)
        loss = (out - x.flip(-1)).square().mean()
        loss.backward()
        container.step()
        container.zero_grad()
        for schedule in container.schedules:
            schedule.step()
        losses.append(float(loss.detach()))
    return losses


def result(parts: Sequence[nn.Module], container: Container, losses: list[float]) -> Training:
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for part, optimizer in zip(parts, container.optimizers, strict=True):
        tensors |= Training.of(losses, part, optimizer).tensors
    return Training(losses, tensors)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_container_over_pipeline_parts_trains_as_torchs(implementation: str) -> None:
    """Groups of bare tensors with `param_names`, `fused` and `foreach` inside train as with torch's AdamW."""
    runs = []
    for adamw in OPTIMIZERS:
        parts = parts_of([0, 1], [2])
        container = Container(adamw, parts, implementation)
        runs.append(result(parts, container, train(parts, container, 8)))
    assert_same_to_rounding(runs[1], runs[0])
    names = [name for optimizer in container.optimizers for name in optimizer.ids]
    assert sorted(names) == sorted(name for part in parts for name, _ in part.named_parameters())


def by_own_names(container: Container) -> tuple[Flat, Callable[[Container, Flat], None]]:
    return container.state_dict(), Container.load_state_dict


def by_torch(container: Container) -> tuple[Flat, Callable[[Container, Flat], None]]:
    """The way of torchtitan's earlier releases: torch flattens."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat: Flat = {}
    for part, optimizer in zip(container.parts, container.optimizers, strict=True):
        flat |= get_optimizer_state_dict(part, optimizer, options=options)

    def load(other: Container, flat: Flat) -> None:
        for part, optimizer in zip(other.parts, other.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, flat, options=options)

    return flat, load


@pytest.mark.parametrize("way", [by_own_names, by_torch])
@pytest.mark.parametrize("then", OPTIMIZERS, ids=whose)
@pytest.mark.parametrize("first", OPTIMIZERS, ids=whose)
def test_flat_names_carry_state_to_another_split(first: AdamWClass, then: AdamWClass, way: Callable[..., Any]) -> None:
    """State under flat names moves from two pipeline parts to one, and between torch's AdamW and ours."""
    parts = parts_of([0, 1], [2])
    container = Container(first, parts)
    train(parts, container, 4)
    flat, load = way(container)
    flat = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in flat.items()}
    other_parts = parts_of([0, 1, 2], seed=99)
    values = {name: param for part in parts for name, param in part.state_dict().items()}
    other_parts[0].load_state_dict(values)
    other = Container(then, other_parts)
    load(other, flat)
    assert torch.equal(other_parts[0].layers["0"][1].weight, parts[0].layers["0"][1].weight)
    expected = result(parts, container, train(parts, container, 4, first=4))
    resumed = result(other_parts, other, train(other_parts, other, 4, first=4))
    if first is then:
        assert_same_run(resumed, expected)
    else:
        assert_same_to_rounding(resumed, expected)


@pytest.mark.parametrize("then", OPTIMIZERS, ids=whose)
@pytest.mark.parametrize("first", OPTIMIZERS, ids=whose)
def test_a_distributed_checkpoint_of_the_container_resumes(first: AdamWClass, then: AdamWClass) -> None:
    """A container saved by `torch.distributed.checkpoint` loads into a fresh one, from and to torch's AdamW."""
    parts = parts_of([0], [1])
    container = Container(first, parts)
    train(parts, container, 3)
    dcp.save({"optimizer": container, "model": nn.ModuleList(parts)}, checkpoint_id="checkpoint", no_dist=True)
    expected = result(parts, container, train(parts, container, 3, first=3))
    parts = parts_of([0], [1], seed=99)
    container = Container(then, parts)
    dcp.load({"optimizer": container, "model": nn.ModuleList(parts)}, checkpoint_id="checkpoint", no_dist=True)
    resumed = result(parts, container, train(parts, container, 3, first=3))
    if first is then:
        assert_same_run(resumed, expected)
    else:
        assert_same_to_rounding(resumed, expected)


def test_loading_without_names_keeps_names_and_ids() -> None:
    """A state dict without `param_names`, as torchtitan builds it, leaves names, IDs and `param_names` in place."""
    (part,) = parts = parts_of([0, 1])
    container = Container(paramstate.AdamW, parts)
    train(parts, container, 2)
    (optimizer,) = container.optimizers
    ids, given = dict(optimizer.ids), [list(group["param_names"]) for group in optimizer.param_groups]
    assert [optimizer.name_of(param) for param in part.parameters()] == [name for name, _ in part.named_parameters()]
    report = optimizer.load_state_dict(unflattened(optimizer, flattened(optimizer)))
    assert report.matched_by == "position"
    assert optimizer.ids == ids
    assert [group["param_names"] for group in optimizer.param_groups] == given


def bfloat16_state(optimizer: torch.optim.Optimizer, _: Any, __: Any) -> None:
    """A step pre-hook that creates the moments in bfloat16, before the optimizer creates them."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and not optimizer.state[param]:
                optimizer.state[param]["step"] = torch.zeros(())
                for key in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[param][key] = torch.zeros_like(param, dtype=torch.bfloat16)


def test_a_pre_hook_that_creates_bfloat16_moments_is_honoured() -> None:
    """Moments that a pre-hook creates in bfloat16 stay so, and float32 values are stepped by the documented update."""
    parts = parts_of([0])
    container = Container(paramstate.AdamW, parts)
    (optimizer,) = container.optimizers
    optimizer.register_step_pre_hook(bfloat16_state)
    param, settings = parts[0].layers["0"][1].weight, Settings(1e-2, beta2=0.95, weight_decay=0.1, decoupled=True)
    value = param.detach().clone()
    moments = {key: torch.zeros_like(value, dtype=torch.bfloat16) for key in ("exp_avg", "exp_avg_sq")}
    for step in range(1, 5):
        parts[0](torch.full((2, WIDTH), 0.1 * step)).square().sum().backward()
        value, moments = adam(value, param.grad.clone(), moments, float(step), settings)
        container.step()
        container.zero_grad()
        held = optimizer.state[param]
        assert same_bits(param, value)
        for key, moment in moments.items():  # rounded at random, each to one of its two neighbours
            assert held[key].dtype == torch.bfloat16
            assert (held[key].view(torch.int16).int() - moment.view(torch.int16).int()).abs().max() <= 1
        moments = {key: held[key].clone() for key in moments}
    assert held["exp_avg"].dtype == torch.bfloat16


def test_a_step_in_backward_for_each_parameter_trains_as_torchs() -> None:
    """One optimizer for each parameter, stepped by a hook inside `backward()`, trains as torch's AdamW does."""

    def run(adamw: AdamWClass) -> Training:
        (part,) = parts_of([0, 1])
        optimizers = {param: adamw([param], lr=1e-2, fused=True) for param in part.parameters()}

        def step(param: torch.Tensor) -> None:
            optimizers[param].step()
            optimizers[param].zero_grad()

        for param in part.parameters():
            param.register_post_accumulate_grad_hook(step)
        losses = []
        for number in range(6):
            x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))
            loss = (part(x) - x.flip(-1)).square().mean()
            loss.backward()
            losses.append(float(loss.detach()))
        assert all(param.grad is None for param in part.parameters())
        return Training(
            losses, {name: {"value": p.detach(), **optimizers[p].state[p]} for name, p in part.named_parameters()}
        )

    torchs, ours = (run(adamw) for adamw in OPTIMIZERS)
    assert_same_to_rounding(ours, torchs)
