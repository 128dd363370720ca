"""timm: its optimizer factory, schedulers, scaler, Lookahead and checkpoints around tiny image models."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from timm.models import model_parameters, resume_checkpoint
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import Lookahead, OptimInfo, create_optimizer_v2, optimizer_kwargs
from timm.optim._optim_factory import default_registry
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch import nn

import paramstate
from same_training import Training, assert_same_run, assert_same_to_rounding
from small_models import assert_same_bits, state_by_name

NAMES = ("adamw", "paramstate")  # timm's names of torch's class and of ours
CLASSES, UPDATES = 4, 3


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """What a user writes once: ours in timm's registry, under a name without an underscore."""
    default_registry.register(OptimInfo(name="paramstate", opt_class="paramstate.AdamW", has_betas=True))
    yield
    del default_registry._optimizers["paramstate"]


def tiny_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=16,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=CLASSES,
        qkv_bias=False,
    )


def tiny_resnet() -> nn.Module:
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=CLASSES, stem_width=8, channels=(8, 16, 16, 16))


MODELS = {"vit": tiny_vit, "resnet": tiny_resnet}


def pictures() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(7)
    return [
        (torch.randn(8, 3, 32, 32, generator=draw), torch.randint(0, CLASSES, (8,), generator=draw))
        for _ in range(UPDATES)
    ]


class Script:
    """timm's training script in small: names and numbers go in as its command line gives them."""

    def __init__(self, opt: str, *, model: str = "vit", seed: int = 0, clip_mode: str = "norm", **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = MODELS[model]()
        config = argparse.Namespace(
            model=model,
            opt=opt,
            lr=2e-3,
            weight_decay=0.1,
            momentum=0.9,
            opt_eps=1e-6,
            opt_betas=(0.9, 0.98),
            **options,
        )
        self.optimizer = create_optimizer_v2(self.model, **optimizer_kwargs(config))
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer,
            sched="cosine",
            num_epochs=4,
            warmup_epochs=1,
            warmup_lr=1e-4,
            step_on_epochs=False,
            updates_per_epoch=UPDATES,
        )
        self.scaler = NativeScaler(device="cpu")
        self.clip_mode = clip_mode
        self.ema = ModelEmaV3(self.model, decay=0.9)
        self.saver = CheckpointSaver(
            self.model, self.optimizer, args=config, model_ema=self.ema, amp_scaler=self.scaler, checkpoint_dir="."
        )
        self.losses: list[float] = []

    def run(self, first: int = 0, last: int = 4) -> Script:
        updates = first * UPDATES
        for epoch in range(first, last):
            for picture, label in pictures():
                loss = nn.functional.cross_entropy(self.model(picture), label)
                self.scaler(
                    loss,
                    self.optimizer,
                    clip_grad=0.1,
                    clip_mode=self.clip_mode,
                    parameters=model_parameters(self.model, exclude_head="agc" in self.clip_mode),
                )
                self.optimizer.zero_grad()
                self.ema.update(self.model)
                updates += 1
                self.scheduler.step_update(num_updates=updates, metric=float(loss))
                self.losses.append(float(loss.detach()))
            self.scheduler.step(epoch + 1, float(loss))
            self.saver.save_checkpoint(epoch, metric=1.0 / (epoch + 1))
        return self

    def resume(self, path: str) -> int:
        first = resume_checkpoint(self.model, path, self.optimizer, self.scaler)
        assert first is not None
        self.scheduler.step_update(num_updates=first * UPDATES)
        return first

    def training(self) -> Training:
        base = self.optimizer._base_optimizer if isinstance(self.optimizer, Lookahead) else self.optimizer
        return Training.of(self.losses, self.model, base)


def both(**options: Any) -> tuple[Script, Script]:
    """The same script with torch's optimizer and with ours; the name is all that changes."""
    lookahead = "lookahead_" if options.pop("lookahead", False) else ""
    torchs, ours = (Script(lookahead + name, **options).run() for name in NAMES)
    return torchs, ours


@pytest.mark.parametrize("clip_mode", ["norm", "value", "agc"])
@pytest.mark.parametrize("model", MODELS)
def test_a_registered_optimizer_trains_as_torchs(model: str, clip_mode: str) -> None:
    """From timm's registry, with its decay groups, warmup, scaler and clipping, it trains as torch's AdamW."""
    torchs, ours = both(model=model, clip_mode=clip_mode)
    assert type(ours.optimizer) is paramstate.AdamW
    assert_same_to_rounding(ours.training(), torchs.training())
    assert [group["weight_decay"] for group in ours.optimizer.param_groups] == [0.0, 0.1]
    assert all(group["initial_lr"] == 2e-3 for group in ours.optimizer.param_groups)


def test_layer_decay_groups_train_as_torchs() -> None:
    """With layer decay each group has its `lr_scale`, which timm's scheduler multiplies in, as with torch's."""
    torchs, ours = both(layer_decay=0.5)
    assert_same_to_rounding(ours.training(), torchs.training())
    scales = [group["lr_scale"] for group in ours.optimizer.param_groups]
    assert len(set(scales)) > 2
    assert [group["lr"] for group in ours.optimizer.param_groups] == [
        group["lr"] for group in torchs.optimizer.param_groups
    ]


def test_lookahead_around_ours_trains_as_around_torchs() -> None:
    """timm's Lookahead shares groups and state with ours, puts its slow weights there, and trains as with torch's."""
    torchs, ours = both(lookahead=True)
    assert isinstance(ours.optimizer, Lookahead)
    assert_same_to_rounding(ours.training(), torchs.training())
    assert all("lookahead_slow_buff" in held for held in ours.training().tensors.values())


@pytest.mark.parametrize("lookahead", ["", "lookahead_"])
@pytest.mark.parametrize("then", NAMES)
@pytest.mark.parametrize("first", NAMES)
def test_a_checkpoint_resumes_across_torchs_and_ours(first: str, then: str, lookahead: str) -> None:
    """A timm checkpoint of torch's AdamW resumes with ours and back; of ours with ours bit for bit."""
    whole = Script(lookahead + first).run(0, 2)
    whole.losses.clear()
    whole.run(2, 4)
    resumed = Script(lookahead + then, seed=1)
    resumed.run(resumed.resume("checkpoint-1.pth.tar"), 4)
    if first == then:
        assert_same_run(resumed.training(), whole.training())
    else:
        assert_same_to_rounding(resumed.training(), whole.training())


def test_a_head_that_timm_resets_is_trained() -> None:
    """`reset_classifier` mid-training: the new head is trained, where torch's AdamW goes on with the old one."""
    moved = {}
    for name in NAMES:
        script = Script(name).run(0, 2)
        script.model.reset_classifier(CLASSES)
        before = script.model.head.weight.detach().clone()
        script.run(2, 3)
        moved[name] = not torch.equal(before, script.model.head.weight)
    assert moved == {"adamw": False, "paramstate": True}


def test_a_head_of_another_size_is_named_and_started_afresh() -> None:
    """A head of another size is named by `step()`; after `reset` it trains, and the rest keeps its state."""
    model = tiny_vit()
    optimizer = create_optimizer_v2(model, "paramstate", lr=1e-3, param_group_fn=lambda model: model)
    scaler = NativeScaler(device="cpu")

    def update() -> None:
        picture, label = pictures()[0]
        scaler(nn.functional.cross_entropy(model(picture), label), optimizer)
        optimizer.zero_grad()

    update()
    model.reset_classifier(CLASSES + 3)
    model(pictures()[0][0]).sum().backward()
    before = state_by_name(model, optimizer)
    with pytest.raises(paramstate.StateShapeError, match=r"'head\.weight'.*\[4, 16\].*\[7, 16\]"):
        optimizer.step()
    assert_same_bits(state_by_name(model, optimizer), before)
    optimizer.zero_grad()
    optimizer.reset(["head.weight", "head.bias"])
    update()
    after = state_by_name(model, optimizer)
    assert {name for name, held in after.items() if held["step"] == 1} == {"head.weight", "head.bias"}
    assert {float(held["step"]) for held in after.values()} == {1, 2}
    assert not torch.equal(after["head.weight"]["value"], before["head.weight"]["value"])
