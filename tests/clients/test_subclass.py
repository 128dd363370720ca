"""A user's own subclass of Adam or AdamW."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from side_by_side import as_with_torch, same_bits
from small_models import Net, state_by_name, train

OptimizerClass = type[torch.optim.Optimizer]
Maker = Callable[[OptimizerClass], OptimizerClass]


def with_step_of_its_own(base: OptimizerClass) -> OptimizerClass:
    """Overrides `step`, keeps entries of its own in the state, and counts."""

    class Averaging(base):
        def __init__(self, params: Any, lr: float = 1e-2, *, decay: float = 0.9, **options: Any) -> None:
            super().__init__(params, lr=lr, **options)
            self.decay = decay
            self.calls = 0

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = super().step(closure)
            self.calls += 1
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        average = self.state[p].setdefault("average", p.detach().clone())
                        average.lerp_(p, 1 - self.decay)
                        self.state[p]["norm"] = p.norm().item()
            return loss

    return Averaging


def with_options_of_its_own(base: OptimizerClass) -> OptimizerClass:
    """Adds an option to the groups and to `defaults`, and warms up in `step`."""

    class WarmingUp(base):
        def __init__(self, params: Any, lr: float = 1e-2, warmup: int = 3) -> None:
            super().__init__(params, lr)
            self.defaults["warmup"] = warmup
            for group in self.param_groups:
                group.setdefault("warmup", warmup)
                group.setdefault("taken", 0)

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            param_group.setdefault("peak", param_group.get("lr", self.defaults["lr"]))
            super().add_param_group(param_group)

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            for group in self.param_groups:
                group["taken"] += 1
                group["lr"] = group["peak"] * min(1.0, group["taken"] / group["warmup"])
            return super().step(closure=closure)

    return WarmingUp


def with_gradients_centralized(base: OptimizerClass) -> OptimizerClass:
    """Changes gradients before the step, and zeroes them in a way of its own."""

    class Centralizing(base):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None and p.dim() > 1:
                        p.grad.sub_(p.grad.mean(dim=1, keepdim=True))
            return super().step(closure)

        def zero_grad(self, set_to_none: bool = False) -> None:
            super().zero_grad(set_to_none=set_to_none)

    return Centralizing


def with_state_created_by_itself(base: OptimizerClass) -> OptimizerClass:
    """Overrides torch's `_init_group`: the first moment begins at the first gradient."""

    class Primed(base):
        def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
            fresh = [p for p in group["params"] if p.grad is not None and not self.state[p]]
            result = super()._init_group(group, *lists)
            for p in fresh:
                self.state[p]["exp_avg"].copy_(p.grad)
            return result

    return Primed


def with_a_step_that_is_its_own_alone(base: OptimizerClass) -> OptimizerClass:
    """Replaces `step` altogether: only rows of the gradient that are not zero are updated."""

    class Selective(base):
        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> None:
            del closure
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                    beta1, beta2 = group["betas"]
                    state["step"] += 1
                    rows = p.grad > 0
                    state["exp_avg"][rows] = torch.lerp(state["exp_avg"], p.grad, 1 - beta1)[rows]
                    state["exp_avg_sq"][rows] = torch.lerp(state["exp_avg_sq"], p.grad.square(), 1 - beta2)[rows]
                    p[rows] -= (group["lr"] * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"]))[rows]

    return Selective


MAKERS = [
    with_step_of_its_own,
    with_options_of_its_own,
    with_gradients_centralized,
    with_state_created_by_itself,
    with_a_step_that_is_its_own_alone,
]


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("make", MAKERS)
def test_a_subclass_does_over_ours_what_it_does_over_torchs(make: Maker, name: str) -> None:
    """Own steps, options, state entries, `_init_group`, gradient edits: a subclass does over ours as over torch's."""

    def script(optimizer_class: OptimizerClass) -> Any:
        model = Net()
        optimizer = make(optimizer_class)(model.parameters(), lr=1e-2)
        train(model, optimizer, range(6))
        torch.save(optimizer.state_dict(), "own.pt")
        resumed_model = copy.deepcopy(model)
        resumed = make(optimizer_class)(resumed_model.parameters(), lr=1e-2)
        resumed.load_state_dict(torch.load("own.pt", weights_only=True))
        train(model, optimizer, range(6, 9))
        train(resumed_model, resumed, range(6, 9))
        same_bits(state_by_name(resumed_model, resumed), state_by_name(model, optimizer))
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return state_by_name(model, optimizer), groups, optimizer.defaults, getattr(optimizer, "calls", None)

    as_with_torch(script, name)


@pytest.mark.parametrize("make", MAKERS)
def test_a_subclass_follows_a_replaced_parameter(make: Maker) -> None:
    """A subclass over ours follows a replaced parameter, its own state entries included, as if it was set in place."""

    def run(replace: bool) -> Any:
        torch.manual_seed(0)
        model = Net()
        optimizer = make(paramstate.AdamW)(model.parameters(), lr=1e-2)
        for seed in range(6):
            train(model, optimizer, [seed])
            clipped = model.first.weight.detach().clamp(-0.5, 0.5)
            if replace:
                model.first.weight = nn.Parameter(clipped)
            else:
                model.first.weight.data.copy_(clipped)
        optimizer.zero_grad()
        return state_by_name(model, optimizer)

    same_bits(run(replace=True), run(replace=False))


def test_a_subclass_may_override_saving_and_loading() -> None:
    """`state_dict` and `load_state_dict` of a subclass, with keys of its own, run over ours as over torch's."""

    def script(optimizer_class: OptimizerClass) -> Any:
        class Versioned(optimizer_class):
            epoch = 0

            def state_dict(self) -> dict[str, Any]:
                return {"inner": super().state_dict(), "epoch": self.epoch}

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                self.epoch = state_dict["epoch"]
                super().load_state_dict(state_dict["inner"])

            def __setstate__(self, state: dict[str, Any]) -> None:
                super().__setstate__(state)
                for group in self.param_groups:
                    group.setdefault("tag", "old")

        model = Net()
        optimizer = Versioned(model.parameters(), lr=1e-2)
        train(model, optimizer, range(3))
        optimizer.epoch = 7
        torch.save(optimizer.state_dict(), "versioned.pt")
        resumed = Versioned(model.parameters(), lr=1.0)
        resumed.load_state_dict(torch.load("versioned.pt", weights_only=True))
        train(model, resumed, range(3, 6))
        assert resumed.param_groups[0]["tag"] == "old"
        return (
            resumed.epoch,
            resumed.param_groups[0]["lr"],
            state_by_name(model, resumed),
        )

    epoch, lr, state = as_with_torch(script)
    assert (epoch, lr) == (7, 1e-2)
    assert state["first.weight"]["step"] == 6


class Plain(paramstate.AdamW):
    """At module level, so that it pickles."""

    scale = 2.0


def test_a_subclass_is_copied_and_pickled_as_its_own_class() -> None:
    """`copy.deepcopy` and `pickle` of model and optimizer give the subclass back, which goes on bit-equal."""
    model = Net()
    optimizer = Plain(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, range(3, 6))
    for twin_model, twin in copies:
        assert type(twin) is Plain
        train(twin_model, twin, range(3, 6))
        same_bits(state_by_name(twin_model, twin), state_by_name(model, optimizer))


class Imitation:
    """What Lightning and Fabric do: take on the optimizer's class, and look its attributes up in it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.__class__ = type("Imitation" + type(optimizer).__name__, (Imitation, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.optimizer.step(closure=closure)


def test_a_wrapper_that_imitates_the_class_trains_as_over_torchs() -> None:
    """A wrapper of a class made on the fly (`__class__ = type(...)`) trains and schedules as over torch's class."""

    def script(optimizer_class: OptimizerClass) -> Any:
        model = Net()
        optimizer = optimizer_class(model.parameters(), lr=1e-2)
        wrapper = Imitation(optimizer)
        assert isinstance(wrapper, optimizer_class)
        schedule = torch.optim.lr_scheduler.StepLR(wrapper, 2, gamma=0.5)
        for seed in range(6):
            train(model, wrapper, [seed])
            schedule.step()
        return state_by_name(model, wrapper), [group["lr"] for group in wrapper.param_groups]

    as_with_torch(script)


def test_a_wrapper_that_imitates_the_class_has_no_state_of_its_own() -> None:
    """Replacing, rebinding, constraining and loading through such a wrapper change the optimizer and nothing else."""
    model = nn.Linear(3, 1)
    optimizer = paramstate.AdamW(model, lr=0.1, max_grad_norm=1.0)
    wrapper = Imitation(optimizer)
    wrapper.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    wrapper.step()
    saved = copy.deepcopy(wrapper.state_dict())
    assert wrapper.grad_norm == optimizer.grad_norm == 2.0
    wrapper.constrain("weight", paramstate.Box(-0.1, 0.1))
    rebuilt = nn.Linear(3, 1)
    assert wrapper.rebind(rebuilt).followed == ["weight", "bias"]
    wrapper.reset("weight")
    assert wrapper.load_state_dict(saved).loaded == ["weight", "bias"]
    assert optimizer.state_of("weight")["step"] == 1
    rebuilt._parameters["weight"] = nn.Parameter(torch.ones(1, 3))  # which only the check of the slots sees
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.param_groups[0]["params"][0] is rebuilt.weight
    assert rebuilt.weight.abs().max() <= 0.1
    assert set(vars(wrapper)) == {"optimizer"}


def test_what_a_gathering_of_its_own_cannot_honour_is_refused() -> None:
    """With an `_init_group` of its own a subclass is stepped by torch: inner clipping and constraints raise there."""
    for options in ({"max_grad_norm": 1.0}, {"constraints": paramstate.Box(-1.0, 1.0)}):
        model = Net()
        optimizer = with_state_created_by_itself(paramstate.AdamW)(model, **options)
        with pytest.raises(paramstate.UnsupportedError, match="a subclass's own _init_group"):
            train(model, optimizer, [0])
