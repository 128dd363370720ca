"""Accelerate: an `Accelerator` prepares model, optimizer, loader and scheduler, saves and loads them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, skip_first_batches
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import paramstate
from same_training import OPTIMIZERS, Training, assert_same_run, assert_same_to_rounding, whose

BATCHES = 6
Prepare = Callable[[Accelerator, tuple[Any, ...]], tuple[Any, ...]]


@pytest.fixture(autouse=True)
def no_accelerator_before_and_after() -> Iterator[None]:
    """Accelerate keeps one state a process, and refuses another precision in it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def tiny_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 2))


def tiny_loader() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(4 * BATCHES, 6, generator=draw)
    y = torch.stack([x[:, 0] * x[:, 1], x.sum(1)], 1)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def together(accelerator: Accelerator, objects: tuple[Any, ...]) -> tuple[Any, ...]:
    return accelerator.prepare(*objects)


def optimizer_first(accelerator: Accelerator, objects: tuple[Any, ...]) -> tuple[Any, ...]:
    model, optimizer, loader, scheduler = objects
    optimizer, loader, scheduler, model = accelerator.prepare(optimizer, loader, scheduler, model)
    return model, optimizer, loader, scheduler


def one_by_one(accelerator: Accelerator, objects: tuple[Any, ...]) -> tuple[Any, ...]:
    model, optimizer, loader, scheduler = objects
    optimizer = accelerator.prepare(optimizer)
    return accelerator.prepare(model), optimizer, accelerator.prepare(loader), accelerator.prepare(scheduler)


class Script:
    """A training script as Accelerate's documentation writes it; the optimizer's class is all that changes."""

    def __init__(
        self,
        adamw: type[torch.optim.AdamW],
        *,
        prepare: Prepare = together,
        seed: int = 0,
        scaler: torch.amp.GradScaler | None = None,
        accumulate: int = 2,
        fused: bool | None = None,
        mixed_precision: str = "no",
    ) -> None:
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=mixed_precision
        )
        if scaler is not None:
            self.accelerator.scaler = scaler  # Accelerate makes one only for fp16 on a device
        model = tiny_model(seed)
        optimizer = adamw(model.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)
        scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=100)
        objects = (model, optimizer, tiny_loader(), scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepare(self.accelerator, objects)
        self.losses: list[float] = []
        self.skipped: list[bool] = []

    def epoch(self, *, first: int = 0, last: int = BATCHES, overflow_at: int | None = None) -> None:
        loader = skip_first_batches(self.loader, first) if first else self.loader
        for number, (x, y) in enumerate(loader, first):
            if number == last:
                break
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.mse_loss(self.model(x), y)
                self.accelerator.backward(loss * (torch.inf if number == overflow_at else 1.0))
                if self.accelerator.sync_gradients and self.accelerator.scaler is None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)
                self.optimizer.step()
                self.skipped.append(self.optimizer.step_was_skipped)
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.losses.append(float(loss.detach()))

    def training(self) -> Training:
        return Training.of(self.losses, self.model, self.optimizer)


@pytest.mark.parametrize("prepare", [together, optimizer_first, one_by_one])
def test_a_prepared_optimizer_trains_as_torchs(prepare: Prepare) -> None:
    """With accumulation, clipping and OneCycleLR it trains as torch's AdamW, in any order of `prepare`."""
    runs = []
    for adamw in OPTIMIZERS:
        script = Script(adamw, prepare=prepare)
        script.epoch()
        script.epoch()
        runs.append(script.training())
    assert_same_to_rounding(runs[1], runs[0])
    assert isinstance(script.optimizer, AcceleratedOptimizer)
    assert type(script.optimizer.optimizer) is paramstate.AdamW
    assert {float(held["step"]) for held in runs[1].tensors.values()} == {BATCHES}  # two batches a step, two epochs


def test_preparing_keeps_ids_names_and_groups() -> None:
    """`prepare` loads a fresh optimizer's own state dict into it: IDs, names and groups stay what they were."""
    model = tiny_model(0)
    optimizer = paramstate.AdamW(model, lr=1e-2, max_grad_norm=1.0)
    before, groups = dict(optimizer.ids), [dict(group) for group in optimizer.param_groups]
    model, prepared = Accelerator(cpu=True).prepare(model, optimizer)
    assert prepared.optimizer is optimizer
    assert optimizer.ids == before
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert all(optimizer.id_of(p) == before[name] for name, p in model.named_parameters())


def test_bf16_mixed_precision_trains_as_torchs() -> None:
    """With `mixed_precision="bf16"` the losses are those of torch's AdamW, to bfloat16's rounding."""
    runs = []
    for adamw, precision in ((OPTIMIZERS[0], "bf16"), (OPTIMIZERS[1], "bf16"), (OPTIMIZERS[1], "no")):
        AcceleratorState._reset_state()
        script = Script(adamw, mixed_precision=precision)
        for _ in range(4):
            script.epoch()
        runs.append(script.training())
    torchs, ours, full = runs
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(torchs.losses), rtol=1e-3, atol=0.0)
    assert ours.losses != full.losses, "autocast was off"


@pytest.mark.parametrize("then", OPTIMIZERS, ids=whose)
@pytest.mark.parametrize("first", OPTIMIZERS, ids=whose)
def test_save_state_and_load_state_resume_in_the_middle_of_an_epoch(
    first: type[torch.optim.AdamW], then: type[torch.optim.AdamW]
) -> None:
    """`load_state` goes on in the middle of an epoch bit-equal, and to rounding from and to torch's AdamW."""
    whole = Script(first)
    whole.epoch(last=4)
    whole.accelerator.save_state("checkpoint", safe_serialization=False)
    whole.losses.clear()
    whole.epoch(first=4)
    whole.epoch()
    resumed = Script(then, seed=1)
    resumed.accelerator.load_state("checkpoint")
    resumed.epoch(first=4)
    resumed.epoch()
    if first is then:
        assert_same_run(resumed.training(), whole.training())
    else:
        assert_same_to_rounding(resumed.training(), whole.training())


@pytest.mark.parametrize("adamw", OPTIMIZERS, ids=whose)
def test_an_overflow_skips_step_and_schedule(adamw: type[torch.optim.AdamW]) -> None:
    """On an overflow Accelerate sees a skipped step and holds the schedule; values and state are untouched."""
    script = Script(adamw, scaler=torch.amp.GradScaler("cpu", init_scale=8.0), accumulate=1)
    script.epoch(last=2)
    before, lr = script.training(), script.scheduler.get_last_lr()
    script.epoch(first=2, last=3, overflow_at=2)
    assert script.skipped == [False, False, True]
    after = script.training()
    assert_same_run(Training(before.losses[:1], after.tensors), Training(before.losses[:1], before.tensors))
    assert script.scheduler.get_last_lr() == lr
    script.epoch(first=3)
    assert script.skipped[3:] == [False] * 3
    assert {float(held["step"]) for held in script.training().tensors.values()} == {5}


@pytest.mark.parametrize("fused", [None, True])
def test_training_through_a_skipped_step_is_torchs(*, fused: bool | None) -> None:
    """A run with a gradient scaler and an overflow gives losses and state of torch's AdamW, also with `fused`."""
    runs, seen = [], []
    for adamw in OPTIMIZERS:
        script = Script(adamw, scaler=torch.amp.GradScaler("cpu", init_scale=8.0), accumulate=1, fused=fused)
        script.epoch(overflow_at=3)
        script.epoch()
        runs.append(script.training())
        seen.append(script.skipped)
    assert_same_to_rounding(runs[1], runs[0])
    assert seen[1] == seen[0]
    assert any(seen[1]) is not bool(fused)  # a fused step skips by itself, and Accelerate does not see it


def test_what_accelerate_assigns_is_what_the_optimizer_uses() -> None:
    """`state`, `param_groups` and `defaults` assigned through the wrapper are those that the next step uses."""
    script = Script(paramstate.AdamW, accumulate=1)
    script.epoch()
    wrapped, inner = script.optimizer, script.optimizer.optimizer
    ids = [inner.id_of(p) for p in script.model.parameters()]
    state = copy.copy(wrapped.state)
    for held in state.values():
        held["exp_avg"] = torch.zeros_like(held["exp_avg"])
    wrapped.state = state
    wrapped.param_groups = [{**wrapped.param_groups[0], "lr": 0.0, "initial_lr": 0.0, "weight_decay": 0.0}]
    wrapped.defaults = dict(wrapped.defaults)
    before = [p.detach().clone() for p in script.model.parameters()]
    loss = script.model(torch.ones(2, 6)).sum()
    script.accelerator.backward(loss)
    wrapped.step()
    for number, p in enumerate(script.model.parameters()):
        assert torch.equal(p, before[number])
        assert inner.id_of(p) == ids[number]
        torch.testing.assert_close(inner.state[p]["exp_avg"], (1 - inner.param_groups[0]["betas"][0]) * p.grad)
        assert float(inner.state[p]["step"]) == BATCHES + 1


def test_a_prepared_optimizer_pickles_and_trains_on() -> None:
    """A prepared optimizer and its model survive a pickle together, and train on with the same moments."""
    script = Script(paramstate.AdamW, accumulate=1)
    script.epoch()
    model, optimizer = pickle.loads(pickle.dumps((script.accelerator.unwrap_model(script.model), script.optimizer)))
    copied = Training.of(script.losses, model, optimizer)
    assert_same_run(copied, script.training())
    for net, opt in ((model, optimizer), (script.model, script.optimizer)):
        net(torch.ones(2, 6)).square().sum().backward()
        opt.step()
    assert_same_run(Training.of(script.losses, model, optimizer), script.training())


class Converted(nn.Linear):
    """Stands for TransformerEngine's layer, which needs a device."""


def convert(model: nn.Module) -> None:
    """What `accelerate.utils.convert_model` does: layers of another class, with parameters of their own."""
    for name, layer in list(model.named_children()):
        if type(layer) is nn.Linear:
            converted = Converted(layer.in_features, layer.out_features)
            converted.load_state_dict(layer.state_dict())
            setattr(model, name, converted)


def test_a_transformer_engine_conversion_comes_before_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert a model before the optimizer is made: Accelerate's own mapping of the groups comes after ours."""
    monkeypatch.setattr("accelerate.accelerator.is_transformer_engine_available", lambda: True)
    monkeypatch.setattr("accelerate.accelerator.convert_model", convert)
    accelerator = Accelerator(cpu=True)
    model = tiny_model(0)
    optimizer = paramstate.AdamW(model.parameters())
    with pytest.raises(KeyError):  # the new layers' parameters, which it looks up as old ones
        accelerator._prepare_te(model, optimizer)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    model = tiny_model(0)
    convert(model)
    optimizer = paramstate.AdamW(model.parameters())
    accelerator._prepare_te(model, optimizer)
    assert isinstance(model[0], Converted)
    before = model[0].weight.detach().clone()
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, which never leaves this process."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("through_meta", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_fsdp2_placeholders_in_the_groups_are_replaced_by_the_shards(*, known: bool, through_meta: bool) -> None:
    """FSDP2's `prepare` puts placeholders into the groups, then shards: these are trained, under the same IDs."""

    def run(adamw: type[torch.optim.AdamW]) -> tuple[AcceleratedOptimizer, Training]:
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=through_meta
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        # Accelerate shards on devices only; told to, it runs the same code on the host.
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        model = tiny_model(0)
        given = model if known and adamw is paramstate.AdamW else model.parameters()
        model, optimizer = accelerator.prepare(model, adamw(given, lr=1e-2))
        losses = []
        for x, y in tiny_loader():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            losses.append(float(loss.detach()))
        return optimizer, Training(losses, {})

    (_, torchs), (optimizer, ours) = (run(adamw) for adamw in OPTIMIZERS)
    assert_same_to_rounding(ours, torchs)
    assert all(isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"])
    fresh = paramstate.AdamW(tiny_model(0)).ids
    assert optimizer.optimizer.ids == (fresh if known else {})
