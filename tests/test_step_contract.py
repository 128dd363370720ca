"""torch-contract.md: what surrounds the numbers of a step: hooks, closures, schedulers, scalers, fallbacks."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import paramstate
from small_models import Net, give_gradient, set_gradients, train

CLASSES = [(paramstate.Adam, torch.optim.Adam), (paramstate.AdamW, torch.optim.AdamW)]


@pytest.mark.parametrize(("ours", "theirs"), CLASSES)
def test_the_classes_are_torchs_classes(ours: type, theirs: type) -> None:
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__
    opt, stock = ours(Net().parameters()), theirs(Net().parameters())
    assert opt.defaults == stock.defaults
    assert opt.param_groups[0].keys() == stock.param_groups[0].keys(), "no new keys in a group"
    assert not opt.state
    assert not hasattr(opt, "train")
    assert not hasattr(opt, "eval")


@pytest.mark.parametrize(("ours", "theirs"), CLASSES)
def test_the_constructors_begin_with_torchs_signature(ours: type, theirs: type) -> None:
    mine, stock = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    positional = [p.name for p in stock.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in mine.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:] == positional[1:]
    for name, parameter in stock.items():
        if name != "params":
            assert mine[name].default == parameter.default
            assert mine[name].kind == parameter.kind


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0"),
        ({"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
        ({"betas": (1.0, 0.0)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        (
            {"lr": torch.tensor(0.1), "foreach": True},
            ValueError,
            "lr as a Tensor is not supported for capturable",
        ),
        ({"betas": (0.9, torch.tensor(0.99))}, ValueError, "betas must be either both floats or both Tensors"),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together."),
    ],
)
def test_errors_of_the_constructor_are_torchs(options: dict[str, Any], error: type[Exception], text: str) -> None:
    for cls in (paramstate.Adam, torch.optim.Adam):
        with pytest.raises(error, match=text):
            cls([nn.Parameter(torch.ones(2))], **options)


def test_a_tensor_lr_is_stored_as_it_is_and_read_on_every_step() -> None:
    lr = torch.tensor(0.1)
    parameter = nn.Parameter(torch.zeros(1))
    opt = paramstate.Adam([parameter], lr=lr)
    assert opt.param_groups[0]["lr"] is lr
    parameter.grad = torch.ones(1)
    opt.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.1]))
    lr.fill_(0.5)
    opt.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.6]))


def test_tensor_betas_are_read() -> None:
    pair = []
    for cls in (paramstate.Adam, torch.optim.Adam):
        parameter = nn.Parameter(torch.zeros(3))
        opt = cls([parameter], lr=0.1, betas=(torch.tensor([0.5]), torch.tensor(0.6)), foreach=False)
        for seed in range(3):
            give_gradient(parameter, str(seed))
            opt.step()
        pair.append(parameter)
    torch.testing.assert_close(*pair)


def test_closure_runs_under_grad_and_before_gradients_are_read() -> None:
    parameter = nn.Parameter(torch.ones(2))
    opt = paramstate.Adam([parameter], lr=0.1)

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = parameter.sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(opt.step(closure).detach()) == 2.0
    assert float(opt.step(closure=closure).detach()) == pytest.approx(1.8)
    assert opt.step(closure=None) is None


def test_hooks_fire_once_and_in_torchs_order() -> None:
    fired: list[str] = []
    parameter = nn.Parameter(torch.ones(2))
    opt = paramstate.Adam([parameter])
    parameter.grad = torch.ones(2)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: fired.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: fired.append("global post")),
        opt.register_step_pre_hook(lambda *_: fired.append("pre")),
        opt.register_step_post_hook(lambda *_: fired.append("post")),
    ]
    try:
        opt.step()
    finally:
        for handle in handles:
            handle.remove()
    assert fired == ["global pre", "pre", "post", "global post"]


def test_a_pre_hook_may_make_the_state_itself_in_bfloat16() -> None:
    """torchtitan's way."""
    parameter = nn.Parameter(torch.randn(5))
    opt = paramstate.AdamW([parameter])

    def make(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not optimizer.state[parameter]:
            moments = {key: torch.zeros(5, dtype=torch.bfloat16) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter].update(step=torch.tensor(0.0), **moments)

    opt.register_step_pre_hook(make)
    for seed in range(2):
        give_gradient(parameter, str(seed))
        opt.step()
    assert opt.state[parameter]["exp_avg"].dtype == torch.bfloat16
    assert float(opt.state[parameter]["step"]) == 2
    assert float(opt.state[parameter]["exp_avg"].abs().min()) > 0


@pytest.mark.parametrize("name", ["LambdaLR", "StepLR", "OneCycleLR", "CosineAnnealingLR", "CyclicLR"])
def test_schedulers_drive_it_as_they_drive_torchs(name: str) -> None:
    arguments: dict[str, dict[str, Any]] = {
        "LambdaLR": {"lr_lambda": lambda epoch: 0.5**epoch},
        "StepLR": {"step_size": 2},
        "OneCycleLR": {"max_lr": 0.1, "total_steps": 10},
        "CosineAnnealingLR": {"T_max": 5},
        "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "cycle_momentum": True},
    }
    pair = []
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        torch.manual_seed(5)
        net = Net()
        opt = cls(net.parameters(), lr=0.05)
        scheduler = getattr(torch.optim.lr_scheduler, name)(opt, **arguments[name])
        for seed in range(6):
            train(net, opt, [seed])
            scheduler.step()
        pair.append(net)
    for a, b in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def scaled(opt: torch.optim.Optimizer, net: Net, inf: bool, scaler: torch.amp.GradScaler) -> None:
    opt.zero_grad()
    set_gradients(net, 3)
    for parameter in net.parameters():
        parameter.grad *= scaler.get_scale()
    scaler.scale(torch.ones(1))  # makes the scale tensor
    if inf:
        net.first.weight.grad[0, 0] = float("inf")
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("fused", [None, True])
def test_gradscaler_steps_unscaled_and_skips_on_overflow(fused: bool | None) -> None:
    pair = []
    for cls in (paramstate.Adam, torch.optim.Adam):
        torch.manual_seed(5)
        net = Net()
        opt = cls(net.parameters(), lr=0.1, fused=fused)
        assert getattr(opt, "_step_supports_amp_scaling", False) == bool(fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(torch.ones(1))
        for inf in (False, True, False):
            scaled(opt, net, inf, scaler)
        assert float(opt.state[net.first.weight]["step"]) == 2, "the overflow was skipped"
        pair.append(net)
    for a, b in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a.grad, b.grad)


def test_fused_writes_the_unscaled_gradient_back_unclipped() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    opt = paramstate.Adam([parameter], lr=0.1, fused=True, max_grad_norm=0.5)
    parameter.grad = torch.full((4,), 64.0)
    version = parameter.grad._version
    opt.grad_scale, opt.found_inf = torch.tensor(32.0), torch.tensor(0.0)
    opt.step()
    assert parameter.grad.tolist() == [2.0] * 4
    assert parameter.grad._version > version
    assert float(opt.grad_norm) == pytest.approx(4.0)
    torch.testing.assert_close(opt.state[parameter]["exp_avg"], torch.full((4,), 0.1 * 2.0 * 0.5 / 4.0))


@pytest.mark.parametrize("found", [1.0, 2.0])
def test_fused_skips_whatever_number_of_devices_overflowed(found: float) -> None:
    """Torch compares with 1, so two devices that both overflow leave NaN and a step of -1."""
    parameter = nn.Parameter(torch.zeros(4))
    opt = paramstate.Adam([parameter], lr=0.1, fused=True)
    parameter.grad = torch.ones(4)
    opt.step()
    before = parameter.detach().clone()
    parameter.grad = torch.full((4,), float("inf"))
    opt.grad_scale, opt.found_inf = torch.tensor(32.0), torch.tensor(found)
    opt.step()
    assert torch.equal(parameter.detach(), before)
    assert float(opt.state[parameter]["step"]) == 1


def test_differentiable_takes_torchs_path() -> None:
    pair = []
    for cls in (paramstate.Adam, torch.optim.Adam):
        leaf = torch.ones(3, requires_grad=True)
        parameter = leaf.clone()
        opt = cls([parameter], lr=0.1, differentiable=True)
        parameter.grad = leaf * 2
        opt.step()
        parameter.sum().backward()
        pair.append((parameter.detach(), leaf.grad))
    for ours, theirs in zip(*pair, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_capturable_on_the_host_gives_torchs_text() -> None:
    parameter = nn.Parameter(torch.ones(3))
    opt = paramstate.Adam([parameter], capturable=True)
    parameter.grad = torch.ones(3)
    with pytest.raises(AssertionError, match="capturable=True, params and state_steps must be on supported devices"):
        opt.step()


def test_a_compiled_step_is_torchs() -> None:
    torch._dynamo.reset()
    parameter, twin = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt, stock = paramstate.Adam([parameter], lr=0.1), torch.optim.Adam([twin], lr=0.1)
    step = torch.compile(opt.step, backend="eager")
    for seed in range(2):
        for tensor in (parameter, twin):
            tensor.grad = torch.full((3,), 1.0 + seed)
        step()
        stock.step()
    torch.testing.assert_close(parameter, twin)


def test_fake_tensors_are_not_read() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        parameter = nn.Parameter(torch.ones(3))
        opt = paramstate.Adam([parameter])
        parameter.grad = torch.ones(3)
        opt.step()
        assert opt.state[parameter]["exp_avg"].shape == (3,)


def test_gradients_that_are_none_are_skipped_and_do_not_age() -> None:
    stepped, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = paramstate.AdamW([stepped, idle], weight_decay=0.5)
    stepped.grad = torch.ones(3)
    opt.step()
    assert idle not in opt.state
    assert torch.equal(idle.detach(), torch.ones(3))
    opt.zero_grad()
    opt.step()
    assert float(opt.state[stepped]["step"]) == 1


def test_a_parameter_appended_to_a_group_by_hand_is_trained() -> None:
    first, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = paramstate.Adam([first], lr=0.1)
    opt.param_groups[0]["params"].append(late)
    first.grad, late.grad = torch.ones(3), torch.ones(3)
    opt.step()
    torch.testing.assert_close(late.detach(), torch.full((3,), 0.9))
    assert opt.id_of(late) != opt.id_of(first)
    assert len(opt.state_dict()["state"]) == 2


def test_amsgrad_switched_on_after_a_step_makes_its_buffer() -> None:
    parameter = nn.Parameter(torch.ones(3))
    opt = paramstate.Adam([parameter])
    parameter.grad = torch.ones(3)
    opt.step()
    opt.param_groups[0]["amsgrad"] = True
    opt.step()
    assert opt.state[parameter]["max_exp_avg_sq"].shape == (3,)
    assert float(opt.state[parameter]["step"]) == 2


def test_a_plain_dict_as_state_is_used_where_it_is_complete() -> None:
    parameter = nn.Parameter(torch.ones(3))
    opt = paramstate.Adam([parameter])
    parameter.grad = torch.ones(3)
    opt.step()
    opt.state = {parameter: {key: tensor.clone() for key, tensor in opt.state[parameter].items()}}
    opt.step()
    assert float(opt.state[parameter]["step"]) == 2


@pytest.mark.parametrize("value", [0.0, -3.0, 1e30, float("nan"), float("inf")])
def test_a_step_count_that_means_nothing_never_crashes(value: float) -> None:
    parameter = nn.Parameter(torch.ones(3))
    opt = paramstate.Adam([parameter])
    parameter.grad = torch.ones(3)
    opt.step()
    opt.state[parameter]["step"] = torch.tensor(value)
    opt.step()
    assert parameter.shape == (3,)


def test_materialize_state_makes_what_a_first_step_would_make() -> None:
    net = Net()
    opt = paramstate.AdamW(net, amsgrad=True)
    opt.materialize_state()
    for parameter in net.parameters():
        state = opt.state[parameter]
        assert sorted(state) == ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"]
        assert float(state["step"]) == 0
        assert state["exp_avg"].shape == parameter.shape
    twin = copy.deepcopy(net)
    other = paramstate.AdamW(twin, amsgrad=True)
    train(net, opt, [1])
    train(twin, other, [1])
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_step_is_float64_where_that_is_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    parameter = nn.Parameter(torch.ones(3))
    opt = paramstate.Adam([parameter])
    parameter.grad = torch.ones(3)
    opt.step()
    assert opt.state[parameter]["step"].dtype == torch.float64


def test_leaf_tensors_that_are_no_parameters_are_legal() -> None:
    tensor = torch.ones(3, requires_grad=True)
    opt = paramstate.Adam([tensor], lr=0.1)
    tensor.grad = torch.ones(3)
    opt.step()
    torch.testing.assert_close(tensor.detach(), torch.full((3,), 0.9))
