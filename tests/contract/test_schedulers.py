"""Learning-rate schedulers (torch.optim.lr_scheduler, SWALR).

Every scheduler writes into the groups, `lr` or also `betas`, and the next step must use what stands there.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

import paramstate
from small_models import Net, assert_same_bits, give_gradient, state_by_name, train

Optimizer = torch.optim.Optimizer
PAIRS = [(paramstate.Adam, torch.optim.Adam), (paramstate.AdamW, torch.optim.AdamW)]
STEPS = 9


def warmup_then_cosine(opt: Optimizer) -> lr_scheduler.SequentialLR:
    parts = [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(opt, 5)]
    return lr_scheduler.SequentialLR(opt, parts, milestones=[3])


def chained(opt: Optimizer) -> lr_scheduler.ChainedScheduler:
    return lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(opt, 0.5), lr_scheduler.ExponentialLR(opt, 0.9)])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 1 / (1 + epoch)),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.25, total_iters=3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.7),
    "SequentialLR": warmup_then_cosine,
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=1),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=3, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=STEPS + 1),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 6, power=2.0),
    "SWALR": lambda opt: SWALR(opt, swa_lr=0.001, anneal_epochs=4),
}


def advance(scheduler: Any) -> None:
    """One scheduler step; the loss that a plateau is read from never falls."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def run(opt: Optimizer, net: Net, scheduler: Any, seeds: range) -> list[tuple[float, Any]]:
    """Train; returns the rate and the betas that each step used."""
    used = []
    for seed in seeds:
        used.append((float(opt.param_groups[0]["lr"]), opt.param_groups[0]["betas"]))
        train(net, opt, [seed])
        advance(scheduler)
    return used


def begin(cls: type[Optimizer], name: str, lr: float | torch.Tensor = 0.05) -> tuple[Net, Optimizer, Any]:
    torch.manual_seed(5)
    net = Net()
    opt = cls(net.parameters(), lr=lr)
    return net, opt, SCHEDULERS[name](opt)


@pytest.mark.parametrize("name", [*(n for n in lr_scheduler.__all__ if n != "LRScheduler"), "SWALR"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_every_scheduler_drives_it_as_it_drives_torchs(
    ours: type[Optimizer], theirs: type[Optimizer], name: str
) -> None:
    """Each of torch's schedulers gives the same rates, betas, values and moments as with torch's class."""
    runs = []
    for cls in (ours, theirs):
        net, opt, scheduler = begin(cls, name)
        used = run(opt, net, scheduler, range(STEPS))
        runs.append((used, opt.param_groups[0].keys(), state_by_name(net, opt)))
    assert runs[0][0] == runs[1][0]
    assert len(set(runs[0][0])) > 1, "the scheduler changed something"
    assert runs[0][1] == runs[1][1]
    torch.testing.assert_close(runs[0][2], runs[1][2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_a_cycled_momentum_is_the_beta_of_the_next_step(name: str) -> None:
    """A beta that CyclicLR or OneCycleLR writes is the one with which the next step averages."""
    parameter = nn.Parameter(torch.zeros(3))
    opt = paramstate.Adam([parameter], lr=0.01)
    scheduler = SCHEDULERS[name](opt)
    averaged, betas = torch.zeros(3), set()
    for seed in range(4):
        give_gradient(parameter, str(seed))
        beta1 = opt.param_groups[0]["betas"][0]
        betas.add(beta1)
        averaged = beta1 * averaged + (1 - beta1) * parameter.grad
        opt.step()
        scheduler.step()
        torch.testing.assert_close(opt.state[parameter]["exp_avg"], averaged, rtol=1e-5, atol=1e-7)
    assert len(betas) == 4


@pytest.mark.parametrize("name", ["StepLR", "LambdaLR", "CosineAnnealingLR", "OneCycleLR", "SequentialLR"])
def test_a_tensor_rate_is_filled_in_place_and_steps_as_the_number_would(name: str) -> None:
    """A scheduler fills a tensor `lr` in place, the object stays, and the numbers are those of a float `lr`."""
    lr = torch.tensor(0.05, dtype=torch.float64)
    net, opt, scheduler = begin(paramstate.AdamW, name, lr)
    used = run(opt, net, scheduler, range(STEPS))
    assert opt.param_groups[0]["lr"] is lr
    twin, other, its_scheduler = begin(paramstate.AdamW, name)
    torch.testing.assert_close(used, run(other, twin, its_scheduler, range(STEPS)))
    torch.testing.assert_close(state_by_name(net, opt), state_by_name(twin, other), rtol=1e-5, atol=1e-7)


def test_step_is_wrapped_once_by_its_function_and_tells_that_it_was_called() -> None:
    """`step` can be wrapped through `step.__func__`, once for all schedulers, and sets `_opt_called`."""
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        net = Net()
        opt = cls(net.parameters())
        assert opt.step.__func__ is cls.step
        scheduler = lr_scheduler.StepLR(opt, 2)
        wrapped = opt.step
        assert wrapped._wrapped_by_lr_sched
        lr_scheduler.ExponentialLR(opt, 0.5)
        assert opt.step is wrapped
        assert not getattr(opt, "_opt_called", False)
        train(net, opt, [0])
        assert opt._opt_called
        scheduler.step()


def test_a_scheduler_that_steps_before_the_optimizer_warns() -> None:
    """A scheduler stepped before the optimizer gives torch's warning, and none where the order is right."""
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        _, _, scheduler = begin(cls, "StepLR")
        with pytest.warns(UserWarning, match=r"`lr_scheduler\.step\(\)` before `optimizer\.step\(\)`"):
            scheduler.step()


def test_a_closure_and_keywords_pass_through_the_wrapped_step() -> None:
    """A wrapped `step` takes a closure, by position or keyword, and returns its value."""
    parameter = nn.Parameter(torch.ones(2))
    opt = paramstate.Adam([parameter], lr=0.1)
    lr_scheduler.StepLR(opt, 1)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = parameter.sum()
        loss.backward()
        return loss

    assert float(opt.step(closure).detach()) == 2.0
    assert float(opt.step(closure=closure).detach()) == pytest.approx(1.8)
    assert opt.step(closure=None) is None


def test_a_scheduled_optimizer_is_freed_with_its_scheduler() -> None:
    """The wrapped `step` holds the optimizer weakly: it is collected when the scheduler goes."""
    _, opt, scheduler = begin(paramstate.AdamW, "StepLR")
    reference = weakref.ref(opt)
    del opt, scheduler
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in {"LambdaLR", "MultiplicativeLR"}])
def test_a_resumed_run_is_bit_identical(name: str, tmp_path: Path) -> None:
    """Optimizer and scheduler saved in mid-run and loaded into new ones continue bit for bit."""
    net, opt, scheduler = begin(paramstate.AdamW, name)
    run(opt, net, scheduler, range(4))
    saved = {"net": net.state_dict(), "opt": opt.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(saved, tmp_path / "run.pt")
    used = run(opt, net, scheduler, range(4, STEPS))

    twin, other, its_scheduler = begin(paramstate.AdamW, name)
    loaded = torch.load(tmp_path / "run.pt", weights_only=False)
    twin.load_state_dict(loaded["net"])
    other.load_state_dict(loaded["opt"])
    its_scheduler.load_state_dict(loaded["scheduler"])
    assert run(other, twin, its_scheduler, range(4, STEPS)) == used
    assert_same_bits(state_by_name(twin, other), state_by_name(net, opt))


def test_a_scheduler_may_start_from_a_loaded_optimizer() -> None:
    """A scheduler built with `last_epoch` over loaded groups finds `initial_lr` there and goes on from it."""
    runs = []
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        net, opt, scheduler = begin(cls, "StepLR")
        run(opt, net, scheduler, range(3))
        fresh = cls(net.parameters(), lr=0.05)
        fresh.load_state_dict(opt.state_dict())
        again = lr_scheduler.StepLR(fresh, 2, last_epoch=3)
        runs.append((again.base_lrs, run(fresh, net, again, range(3, 6)), state_by_name(net, fresh)))
    assert runs[0][:2] == runs[1][:2]
    torch.testing.assert_close(runs[0][2], runs[1][2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["gradients", "gradients of zero"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_warm_up_from_a_rate_of_zero_ages_the_moments(
    ours: type[Optimizer], theirs: type[Optimizer], scale: float
) -> None:
    """A first step at a rate of 0, as a warm-up takes, counts and ages the moments as in torch."""
    runs = []
    for cls in (ours, theirs):
        parameter = nn.Parameter(torch.linspace(-1, 1, 5))
        opt = cls([parameter], lr=0.1, weight_decay=0.1)
        scheduler = lr_scheduler.LambdaLR(opt, lambda epoch: epoch / 4)
        found = []
        for seed in range(4):
            give_gradient(parameter, str(seed), scale if seed == 0 else 1.0)
            opt.step(closure=None)
            scheduler.step()
            found.append({key: tensor.clone() for key, tensor in opt.state[parameter].items()})
        runs.append([parameter.detach(), *found])
    assert float(runs[0][1]["step"]) == 1
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-7)
