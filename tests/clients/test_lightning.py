"""Lightning: Trainer with its callbacks and precisions, and Fabric."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    LearningRateMonitor,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import paramstate
from side_by_side import as_with_torch, same_bits
from small_models import state_by_name

OptimizerClass = type[torch.optim.Optimizer]
HALF = {"rtol": 2e-2, "atol": 1e-3}
"""What two runs in a half precision may differ by, some units of bfloat16: one on the border rounds either way."""


@pytest.fixture(autouse=True)
def lightning_is_quiet() -> Iterator[None]:
    """Its notes on the number of devices and workers are switched off."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def data(batches: int = 4) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(8 * batches, 4, generator=draw)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).tanh()), batch_size=8)


class Regression(pl.LightningModule):
    """A backbone, a head, and the losses of each step; how the optimizer is built is the test's."""

    def __init__(self, optimizer_class: OptimizerClass, given: str = "parameters", **options: Any) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.head = nn.Linear(8, 1)
        known = {"model": self} if given == "named_parameters and model" else {}
        self.optimizer_class, self.given, self.options = optimizer_class, given, {"lr": 1e-2, **known, **options}
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.losses.append(loss.item())
        return loss

    def given_parameters(self) -> Any:
        trained = [(name, param) for name, param in self.named_parameters() if param.requires_grad]
        return {
            "parameters": [param for _, param in trained],
            "named_parameters": trained,
            "named_parameters and model": trained,
            "model": self,
            "groups": [
                {"params": [p for _, p in trained if p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for _, p in trained if p.dim() == 1], "weight_decay": 0.0},
            ],
        }[self.given]

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_class(self.given_parameters(), **self.options)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": 3, **quiet, **options})


def fitted(model: Regression, ckpt_path: str | None = None, **options: Any) -> tuple[pl.Trainer, Any]:
    fit = trainer(**options)
    fit.fit(model, data(), ckpt_path=ckpt_path)
    return fit, (model.losses, state_by_name(model, fit.optimizers[0]))


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("given", ["parameters", "named_parameters", "groups"])
def test_fit_trains_as_with_torch(name: str, given: str) -> None:
    """`Trainer.fit` with a schedule trains as with torch, given bare or named parameters or groups."""
    as_with_torch(lambda optimizer_class: fitted(Regression(optimizer_class, given))[1], name)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping_and_accumulation_by_the_trainer_are_as_with_torch(algorithm: str, accumulate: int) -> None:
    """Gradient clipping by norm and by value, and accumulation, done by the Trainer, are as with torch."""
    options = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": accumulate}
    as_with_torch(lambda optimizer_class: fitted(Regression(optimizer_class), **options)[1])


def test_clipping_inside_the_step_equals_the_trainers() -> None:
    """`max_grad_norm=` in the constructor gives what `gradient_clip_val=` of the Trainer gives."""
    torch.manual_seed(0)
    _, by_trainer = fitted(Regression(paramstate.AdamW), gradient_clip_val=0.05)
    torch.manual_seed(0)
    _, by_step = fitted(Regression(paramstate.AdamW, max_grad_norm=0.05))
    torch.testing.assert_close(by_step, by_trainer, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("precision", "fused"),
    [("bf16-mixed", None), ("bf16-mixed", True), ("bf16-true", True), ("16-mixed", None), ("16-mixed", True)],
)
def test_half_precisions_train_as_with_torch(precision: str, fused: bool | None) -> None:
    """The Trainer's `bf16-mixed`, `bf16-true` and `16-mixed` train as with torch, also with `fused=True`."""

    def script(optimizer_class: OptimizerClass) -> Any:
        return fitted(Regression(optimizer_class, fused=fused), precision=precision)[1]

    _, state = as_with_torch(script, **HALF)
    assert state["head.weight"]["exp_avg"].dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


@pytest.mark.parametrize("fused", [None, True])
def test_a_fused_optimizer_is_refused_clipping_under_amp_as_with_torch(fused: bool | None) -> None:
    """Clipping with `16-mixed` works, except with `fused=True`, where Lightning refuses both classes alike."""

    def script(optimizer_class: OptimizerClass) -> Any:
        try:
            return fitted(Regression(optimizer_class, fused=fused), precision="16-mixed", gradient_clip_val=0.05)[1]
        except RuntimeError as error:
            return "does not allow for gradient clipping" in str(error)

    result = as_with_torch(script, **HALF)
    assert (result is True) == bool(fused)


@pytest.mark.parametrize("given", ["parameters", "named_parameters", "model", "groups"])
def test_a_resumed_fit_is_bit_equal(given: str) -> None:
    """A fit that is resumed from a checkpoint is bit-equal to one that was not interrupted."""
    _, (whole, state) = fitted(resumable(paramstate.AdamW, given), max_epochs=4)
    first, _ = fitted(resumable(paramstate.AdamW, given), max_epochs=2)
    first.save_checkpoint("midway.ckpt")
    _, (rest, resumed) = fitted(resumable(paramstate.AdamW, given), ckpt_path="midway.ckpt", max_epochs=4)
    assert rest == whole[len(whole) // 2 :]
    same_bits(resumed, state)


def resumable(optimizer_class: OptimizerClass, given: str = "parameters") -> Regression:
    torch.manual_seed(0)
    return Regression(optimizer_class, given)


@pytest.mark.parametrize(
    ("first", "second"), [(torch.optim.AdamW, paramstate.AdamW), (paramstate.AdamW, torch.optim.AdamW)]
)
def test_a_checkpoint_moves_between_torch_and_ours(first: OptimizerClass, second: OptimizerClass) -> None:
    """A fit that was begun with one of torch's AdamW and ours is resumed with the other."""
    _, (whole, state) = fitted(resumable(first), max_epochs=4)
    midway, _ = fitted(resumable(first), max_epochs=2)
    midway.save_checkpoint("midway.ckpt")
    _, (rest, resumed) = fitted(resumable(second), ckpt_path="midway.ckpt", max_epochs=4)
    torch.testing.assert_close(rest, whole[len(whole) // 2 :], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(resumed, state, rtol=1e-5, atol=1e-7)


def test_the_learning_rate_monitor_sees_what_it_sees_with_torch() -> None:
    """`LearningRateMonitor` logs rates, momenta and decays of every group under the names that torch's class gets."""

    def script(optimizer_class: OptimizerClass) -> Any:
        monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
        fitted(Regression(optimizer_class, "groups"), callbacks=[monitor], logger=CSVLogger("."), log_every_n_steps=1)
        return {name: torch.tensor(values) for name, values in (monitor.lrs | monitor.last_momentum_values).items()}

    logged = as_with_torch(script)
    assert {"lr-AdamW/pg1", "lr-AdamW/pg2", "lr-AdamW/pg1-momentum"} <= logged.keys()
    assert logged["lr-AdamW/pg1-momentum"] == 0.9


class Adversaries(pl.LightningModule):
    """Manual optimization of a generator and a discriminator, as Lightning's own documentation writes it."""

    def __init__(self, optimizer_class: OptimizerClass, *, by_closure: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizer_class, self.by_closure = optimizer_class, by_closure
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.losses: list[float] = []

    def generator_loss(self, noise: torch.Tensor) -> torch.Tensor:
        return nn.functional.softplus(-self.discriminator(self.generator(noise))).mean()

    def discriminator_loss(self, real: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        fake = self.generator(noise).detach()
        judged = nn.functional.softplus(-self.discriminator(real)) + nn.functional.softplus(self.discriminator(fake))
        return judged.mean()

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        real, noise = batch[0], batch[0][:, :2]
        for optimizer, loss in zip(
            self.optimizers(),
            (lambda: self.generator_loss(noise), lambda: self.discriminator_loss(real, noise)),
            strict=True,
        ):
            if self.by_closure:
                optimizer.step(closure=lambda loss=loss, optimizer=optimizer: self.backward_of(loss, optimizer))
            else:
                self.toggle_optimizer(optimizer)
                self.backward_of(loss, optimizer)
                self.clip_gradients(optimizer, gradient_clip_val=1.0)
                optimizer.step()
                self.untoggle_optimizer(optimizer)

    def backward_of(self, loss: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        value = loss()
        self.manual_backward(value)
        self.losses.append(value.item())

    def configure_optimizers(self) -> Any:
        networks = (self.generator, self.discriminator)
        return [self.optimizer_class(network.parameters(), lr=1e-2, betas=(0.5, 0.999)) for network in networks]


@pytest.mark.parametrize("by_closure", [False, True])
def test_manual_optimization_of_two_networks_is_as_with_torch(by_closure: bool) -> None:
    """Manual optimization with two optimizers, by closures or by toggling, trains as with torch."""

    def script(optimizer_class: OptimizerClass) -> Any:
        model = Adversaries(optimizer_class, by_closure=by_closure)
        fit = trainer()
        fit.fit(model, data())
        generator, discriminator = fit.optimizers
        return (
            model.losses,
            state_by_name(model.generator, generator),
            state_by_name(model.discriminator, discriminator),
        )

    as_with_torch(script, name="Adam", rtol=1e-4, atol=1e-6)


class Unfreezing(BaseFinetuning):
    """The backbone joins in the second epoch; Lightning resumes with it frozen, so later epochs unfreeze it as well."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch >= 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


def test_a_backbone_that_is_unfrozen_later_trains_as_with_torch() -> None:
    """`BaseFinetuning` and `BackboneFinetuning` add the backbone as a group, and it trains as with torch."""
    for callback in (Unfreezing, lambda: BackboneFinetuning(1, backbone_initial_ratio_lr=0.5)):

        def script(optimizer_class: OptimizerClass, callback: Any = callback) -> Any:
            fit, result = fitted(Regression(optimizer_class), callbacks=[callback()])
            return len(fit.optimizers[0].param_groups), result

        groups, (_, state) = as_with_torch(script)
        assert groups == 2
        assert state["backbone.0.weight"]["step"] == 8
        assert state["head.weight"]["step"] == 12


def test_an_optimizer_that_knows_the_model_takes_the_bare_group_of_a_finetuning_callback() -> None:
    """Named parameters and `model=`: the callback's bare group gets its names. Without `model=` it is refused."""

    def unfrozen(optimizer_class: OptimizerClass, given: str) -> Any:
        torch.manual_seed(0)
        fit, result = fitted(Regression(optimizer_class, given), callbacks=[Unfreezing()])
        return fit.optimizers[0], result

    for optimizer_class in (torch.optim.AdamW, paramstate.AdamW):
        with pytest.raises(ValueError, match="cannot add param group without names"):
            unfrozen(optimizer_class, "named_parameters")
    optimizer, ours = unfrozen(paramstate.AdamW, "named_parameters and model")
    _, bare = unfrozen(torch.optim.AdamW, "parameters")
    torch.testing.assert_close(ours, bare, rtol=1e-5, atol=1e-7)
    assert set(optimizer.ids) == {"head.weight", "head.bias", "backbone.0.weight", "backbone.0.bias"}


@pytest.mark.parametrize("given", ["parameters", "named_parameters and model"])
def test_a_fit_with_an_unfrozen_backbone_resumes_bit_equal(given: str) -> None:
    """A fit whose backbone was unfrozen before the checkpoint resumes bit-equal, both groups with their state."""

    def run(**options: Any) -> tuple[pl.Trainer, Any]:
        return fitted(resumable(paramstate.AdamW, given), callbacks=[Unfreezing()], **options)

    _, (whole, state) = run(max_epochs=4)
    midway, _ = run(max_epochs=2)
    midway.save_checkpoint("midway.ckpt")
    _, (rest, resumed) = run(max_epochs=4, ckpt_path="midway.ckpt")
    assert rest == whole[len(whole) // 2 :]
    same_bits(resumed, state)


def test_averaging_callbacks_average_as_with_torch() -> None:
    """`StochasticWeightAveraging` and `WeightAveraging` leave the averages in the model that they leave with torch."""

    def script(optimizer_class: OptimizerClass, callback: Any) -> Any:
        model = Regression(optimizer_class)
        fit = trainer(max_epochs=5, callbacks=[callback()])
        fit.fit(model, data())
        return model.losses, dict(model.state_dict())

    for callback in (
        lambda: StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=2),
        lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.9)),
    ):
        as_with_torch(lambda optimizer_class, callback=callback: script(optimizer_class, callback))


def test_the_wrapper_of_an_optimizer_is_the_optimizer() -> None:
    """What is called on Lightning's and Fabric's wrappers (rebind, constrain, load, norm) reaches the optimizer."""
    for wrap in (pl.core.optimizer.LightningOptimizer, fabric_wrapper):
        model = nn.Linear(3, 1)
        optimizer = paramstate.AdamW(model, lr=0.1, max_grad_norm=1.0)
        wrapper = wrap(optimizer)
        own = set(vars(wrapper))
        wrapper.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert wrapper.grad_norm == optimizer.grad_norm == 2.0
        saved = wrapper.state_dict()
        wrapper.constrain("weight", paramstate.Box(-0.1, 0.1))
        rebuilt = nn.Linear(3, 1)
        assert wrapper.rebind(rebuilt).followed == ["weight", "bias"]
        optimizer.state.clear()
        wrapper.load_state_dict(saved)
        assert optimizer.state_of("weight")["step"] == 1
        rebuilt._parameters["weight"] = nn.Parameter(torch.ones(1, 3))  # seen by the check of the slots alone
        optimizer.zero_grad()
        optimizer.step()
        assert optimizer.param_groups[0]["params"][0] is rebuilt.weight
        assert rebuilt.weight.abs().max() <= 0.1
        assert set(vars(wrapper)) == own


def fabric_wrapper(optimizer: torch.optim.Optimizer) -> Any:
    return Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", {}), ("bf16-mixed", HALF), ("bf16-true", HALF)])
def test_fabric_trains_saves_and_loads_as_with_torch(precision: Any, tolerance: dict[str, float]) -> None:
    """Fabric's setup, backward, clip, step, save and load run as with torch, and resume bit-equal."""

    def script(optimizer_class: OptimizerClass) -> Any:
        def made() -> tuple[Fabric, Any, Any]:
            torch.manual_seed(0)
            fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
            model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
            model, optimizer = fabric.setup(model, optimizer_class(model.parameters(), lr=1e-2))
            return fabric, model, optimizer

        def train(run: tuple[Fabric, Any, Any]) -> Any:
            fabric, model, optimizer = run
            losses = []
            for x, y in fabric.setup_dataloaders(data(5)):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(x), y)
                fabric.backward(loss)
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                losses.append(loss.item())
            return losses, state_by_name(model.module, optimizer.optimizer)

        run = made()
        train(run)
        run[0].save("midway.ckpt", {"model": run[1], "optimizer": run[2]})
        whole = train(run)
        resumed = made()
        resumed[0].load("midway.ckpt", {"model": resumed[1], "optimizer": resumed[2]})
        same_bits(train(resumed), whole)
        return whole

    as_with_torch(script, **tolerance)
