"""scenarios.md, section A: another object, another memory or another dtype in a parameter's slot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import paramstate
from small_models import Net, assert_same_bits, assert_trains, set_gradients, state_by_name, train

LOW, HIGH = -0.2, 0.2
Build = Callable[[Net], paramstate.Adam]

BUILDERS: dict[str, Build] = {
    "model": lambda net: paramstate.AdamW(net, lr=0.01),
    "named": lambda net: paramstate.AdamW(net.named_parameters(), lr=0.01),
    "bare": lambda net: paramstate.AdamW(net.parameters(), lr=0.01),
    "bare with model": lambda net: paramstate.AdamW(net.parameters(), lr=0.01, model=net),
}
every_way_to_build = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


def trained(build: Build = BUILDERS["model"]) -> tuple[Net, paramstate.Adam]:
    torch.manual_seed(5)
    net = Net()
    opt = build(net)
    train(net, opt, range(3))
    return net, opt


def clamped(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clamp(LOW, HIGH))


def clamped_in_place_and_trained(build: Build = BUILDERS["model"]) -> dict[str, dict[str, torch.Tensor]]:
    """What every kind of replacement must equal: the same run, with the values clamped where they are."""
    net, opt = trained(build)
    with torch.no_grad():
        net.first.weight.clamp_(LOW, HIGH)
    train(net, opt, [10, 11])
    return state_by_name(net, opt)


def only_parameter_of_its_name(net: Net, opt: paramstate.Adam) -> None:
    """The groups hold the model's parameters and no other; no state is left under a dead one."""
    listed = [p for group in opt.param_groups for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in net.parameters()}
    assert {id(p) for p in opt.state} <= {id(p) for p in net.parameters()}


@every_way_to_build
def test_replace_param(build: Build) -> None:
    net, opt = trained(build)
    id_before, state_before = opt.id_of(net.first.weight), dict(opt.state[net.first.weight])
    net.first.weight = clamped(net.first.weight)
    assert opt.id_of(net.first.weight) == id_before
    assert opt.param(id_before) is net.first.weight
    for key, tensor in state_before.items():
        assert opt.state[net.first.weight][key] is tensor
    only_parameter_of_its_name(net, opt)
    train(net, opt, [10, 11])
    assert_same_bits(state_by_name(net, opt), clamped_in_place_and_trained(build))
    assert_trains(net, opt)


def test_replace_param_is_lost_by_torch() -> None:
    """So that the tests of this file can fail: torch's own class trains the dead tensor and says nothing."""
    net = Net()
    opt = torch.optim.AdamW(net.parameters(), lr=0.01)
    train(net, opt, range(3))
    net.first.weight = clamped(net.first.weight)
    with pytest.raises(AssertionError, match=r"first\.weight did not move"):
        assert_trains(net, opt)


@every_way_to_build
def test_replace_between_backward_and_step(build: Build) -> None:
    net, opt = trained(build)
    opt.zero_grad()
    set_gradients(net, 10)
    wanted = net.first.weight.grad.clone()
    net.first.weight = clamped(net.first.weight)
    torch.testing.assert_close(net.first.weight.grad, wanted, rtol=0, atol=0)
    opt.step()
    train(net, opt, [11])
    assert_same_bits(state_by_name(net, opt), clamped_in_place_and_trained(build))


def test_a_gradient_that_the_new_parameter_has_already_is_kept() -> None:
    net, opt = trained()
    opt.zero_grad()
    set_gradients(net, 10)
    new = clamped(net.first.weight)
    new.grad = torch.ones_like(new)
    net.first.weight = new
    assert torch.equal(net.first.weight.grad, torch.ones(2, 3))
    opt.step()
    only_parameter_of_its_name(net, opt)


def test_replace_then_unscale() -> None:
    net, opt = trained()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt.zero_grad()
    scaler.scale(sum((p * 0.5).sum() for p in net.parameters())).backward()
    net.first.weight = clamped(net.first.weight)
    assert torch.equal(net.first.weight.grad, torch.full((2, 3), 512.0))
    scaler.unscale_(opt)
    assert torch.equal(net.first.weight.grad, torch.full((2, 3), 0.5))
    before = net.first.weight.detach().clone()
    scaler.step(opt)
    scaler.update()
    assert float(opt.state[net.first.weight]["step"]) == 4
    assert not torch.equal(before, net.first.weight)


def test_replaced_unseen_with_a_scaled_gradient_is_raised() -> None:
    net, opt = trained()
    opt.zero_grad()
    net.first._parameters["weight"] = clamped(net.first.weight)
    set_gradients(net, 10)
    before = state_by_name(net, opt)
    with pytest.raises(paramstate.ReplacedParameterError, match=r"first\.weight.*rebind"):
        opt.step()
    assert_same_bits(state_by_name(net, opt), before)


def test_replaced_unseen_with_no_gradient_is_followed() -> None:
    net, opt = trained()
    id_before = opt.ids["first.weight"]
    net.first._parameters["weight"] = clamped(net.first.weight)
    opt.zero_grad()
    only_parameter_of_its_name(net, opt)
    assert opt.id_of(net.first.weight) == id_before
    train(net, opt, [10, 11])
    assert_same_bits(state_by_name(net, opt), clamped_in_place_and_trained())


@every_way_to_build
def test_assign_true(build: Build) -> None:
    net, opt = trained(build)
    ids = {name: opt.id_of(p) for name, p in net.named_parameters()}
    new = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    new["first.weight"].clamp_(LOW, HIGH)
    net.load_state_dict(new, assign=True)
    assert {name: opt.id_of(p) for name, p in net.named_parameters()} == ids
    only_parameter_of_its_name(net, opt)
    train(net, opt, [10, 11])
    assert_same_bits(state_by_name(net, opt), clamped_in_place_and_trained(build))


@contextmanager
def future_flag(setter: Callable[[bool], None]) -> Iterator[None]:
    setter(True)
    try:
        yield
    finally:
        setter(False)


def test_overwrite_on_conversion() -> None:
    net, opt = trained()
    ids = dict(opt.ids)
    opt.zero_grad()
    with future_flag(torch.__future__.set_overwrite_module_params_on_conversion):
        net.double()
    train(net, opt, [10])
    only_parameter_of_its_name(net, opt)
    assert {name: opt.id_of(p) for name, p in net.named_parameters()} == ids
    assert all(float(opt.state[p]["step"]) == 4 for p in net.parameters())
    assert_trains(net, opt)


@pytest.mark.parametrize("policy", ["error", "reset"])
def test_overwrite_on_conversion_under_another_policy(policy: str) -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.01, on_replace=policy)
    train(net, opt, range(3))
    with future_flag(torch.__future__.set_overwrite_module_params_on_conversion):
        net.double()
    if policy == "error":
        with pytest.raises(paramstate.ReplacedParameterError, match=r"first\.weight.*on_replace='error'"):
            opt.zero_grad()
    else:
        train(net, opt, [10])
        assert all(float(opt.state[p]["step"]) == 1 for p in net.parameters())


def test_swap_on_conversion() -> None:
    net, opt = trained()
    objects, ids = list(net.parameters()), dict(opt.ids)
    with future_flag(torch.__future__.set_swap_module_params_on_conversion):
        net.double()
    assert all(a is b for a, b in zip(objects, net.parameters(), strict=True))
    train(net, opt, [10])
    assert {name: opt.id_of(p) for name, p in net.named_parameters()} == ids
    assert all(p.dtype == torch.float64 and float(opt.state[p]["step"]) == 4 for p in net.parameters())


def test_swap_tensors() -> None:
    net, opt = trained()
    held = net.first.weight
    torch.utils.swap_tensors(held, clamped(held))
    assert net.first.weight is held
    train(net, opt, [10, 11])
    assert_same_bits(state_by_name(net, opt), clamped_in_place_and_trained())


def test_swap_tensors_of_another_shape_is_named() -> None:
    net, opt = trained()
    opt.zero_grad()
    torch.utils.swap_tensors(net.first.weight, nn.Parameter(torch.randn(5, 3)))
    set_gradients(net, 10)
    before = state_by_name(net, opt)
    with pytest.raises(paramstate.StateShapeError, match=r"first\.weight") as caught:
        opt.step()
    assert "[2, 3]" in str(caught.value)
    assert "[5, 3]" in str(caught.value)
    assert_same_bits(state_by_name(net, opt), before)


def test_data_assign() -> None:
    net, opt = trained()
    net.first.weight.data = net.first.weight.detach().clamp(LOW, HIGH)
    train(net, opt, [10, 11])
    assert_same_bits(state_by_name(net, opt), clamped_in_place_and_trained())


def test_data_assign_other_shape() -> None:
    net, opt = trained()
    opt.zero_grad()
    net.second.weight.data = torch.randn(4, 3)
    set_gradients(net, 10)
    before = state_by_name(net, opt)
    with pytest.raises(paramstate.StateShapeError, match=r"second\.weight") as caught:
        opt.step()
    message = str(caught.value)
    assert "[2, 3]" in message
    assert "[4, 3]" in message
    assert "replace_" in message
    assert_same_bits(state_by_name(net, opt), before)
    opt.reset("second.weight")
    opt.step()
    assert opt.state[net.second.weight]["exp_avg"].shape == (4, 3)
    assert float(opt.state[net.second.weight]["step"]) == 1
    assert float(opt.state[net.first.weight]["step"]) == 4


def test_another_shape_in_the_slot_and_back_is_harmless() -> None:
    net, opt = trained()
    held, id_before = net.first.weight, opt.ids["first.weight"]
    net.first.weight = nn.Parameter(torch.randn(7, 3))
    net.first.weight = held
    assert opt.id_of(held) == id_before
    with torch.no_grad():
        net.first.weight.clamp_(LOW, HIGH)
    train(net, opt, [10, 11])
    assert_same_bits(state_by_name(net, opt), clamped_in_place_and_trained())


def test_another_shape_in_the_slot_is_raised_by_step() -> None:
    net, opt = trained()
    id_before = opt.ids["first.weight"]
    opt.zero_grad()
    net.first.weight = nn.Parameter(torch.randn(7, 3))
    set_gradients(net, 10)
    before = state_by_name(net, opt)
    with pytest.raises(paramstate.StateShapeError, match=r"first\.weight") as caught:
        opt.step()
    assert "[2, 3]" in str(caught.value)
    assert "[7, 3]" in str(caught.value)
    assert "replace_" in str(caught.value)
    assert_same_bits(state_by_name(net, opt), before)
    opt.reset("first.weight")
    opt.step()
    assert opt.ids["first.weight"] == opt.id_of(net.first.weight) == id_before
    assert_trains(net, opt)


def test_on_replace_error_refuses_the_assignment_or_the_step() -> None:
    net = Net()
    opt = paramstate.AdamW(net, on_replace="error")
    train(net, opt, [0])
    with pytest.raises(paramstate.ReplacedParameterError, match=r"first\.weight"):  # noqa: PT012
        net.first.weight = clamped(net.first.weight)
        train(net, opt, [1])


def test_on_replace_reset_keeps_the_id_and_starts_the_state_anew() -> None:
    net = Net()
    opt = paramstate.AdamW(net, on_replace="reset")
    train(net, opt, range(3))
    id_before = opt.ids["first.weight"]
    net.first.weight = clamped(net.first.weight)
    train(net, opt, [10])
    assert opt.id_of(net.first.weight) == id_before
    assert float(opt.state[net.first.weight]["step"]) == 1
    assert float(opt.state[net.first.bias]["step"]) == 4


def test_dtype_move_after_step() -> None:
    net, opt = trained()
    ids = dict(opt.ids)
    net.double()
    train(net, opt, [10])
    for parameter in net.parameters():
        assert parameter.dtype == torch.float64
        assert opt.state[parameter]["exp_avg"].dtype == torch.float64, "widened when the value widens"
        assert float(opt.state[parameter]["step"]) == 4
    assert {name: opt.id_of(p) for name, p in net.named_parameters()} == ids


def test_dtype_move_to_bfloat16_keeps_the_moments_as_they_are() -> None:
    net, opt = trained()
    moments = {name: opt.state[p]["exp_avg_sq"].clone() for name, p in net.named_parameters()}
    net.bfloat16()
    for name, parameter in net.named_parameters():
        assert torch.equal(opt.state[parameter]["exp_avg_sq"], moments[name])
    train(net, opt, [10])
    for parameter in net.parameters():
        assert parameter.dtype == torch.bfloat16
        assert opt.state[parameter]["exp_avg_sq"].dtype == torch.float32, "never narrowed"
    assert_trains(net, opt)


def test_swap_in_group_then_state_dict() -> None:
    """Gaussian splatting's way: a client moves the state to a new object in the group, then puts it into the model."""
    net, opt = trained()
    old, id_before = net.first.weight, opt.ids["first.weight"]
    new = clamped(old)
    state = opt.state.pop(old)
    opt.state[new] = {key: tensor.clone() for key, tensor in state.items()}
    group = opt.param_groups[0]
    group["params"] = [new if p is old else p for p in group["params"]]
    saved = opt.state_dict()
    assert len(saved["state"]) == 6
    net.first.weight = new
    train(net, opt, [10, 11])
    assert opt.id_of(new) == id_before
    assert_same_bits(state_by_name(net, opt), clamped_in_place_and_trained())


def test_swap_in_group_without_the_state_is_a_clear_error_while_the_model_holds_the_old_object() -> None:
    net, opt = trained()
    opt.param_groups[0]["params"][0] = clamped(net.first.weight)
    with pytest.raises(KeyError, match=r"state of a parameter '.*first\.weight' that is in no group; put it into"):
        opt.state_dict()


def test_swap_in_group_without_the_state_moves_it_where_no_model_is_known() -> None:
    net, opt = trained(BUILDERS["bare"])
    held, id_before = opt.state[net.first.weight], opt.id_of(net.first.weight)
    new = clamped(net.first.weight)
    opt.param_groups[0]["params"][0] = new
    assert len(opt.state_dict()["state"]) == 6
    assert opt.state[new] is held
    assert opt.id_of(new) == id_before


def test_replace_of_a_value_and_of_an_object_keeps_the_id() -> None:
    net, opt = trained()
    id_before = opt.ids["first.weight"]
    assert opt.replace_("first.weight", net.first.weight.detach().clamp(LOW, HIGH)) is net.first.weight
    twin_net, twin = trained()
    new = clamped(twin_net.first.weight)
    assert twin.replace_(twin_net.first.weight, new) is twin_net.first.weight
    for model, optimizer in ((net, opt), (twin_net, twin)):
        train(model, optimizer, [10, 11])
        assert optimizer.ids["first.weight"] == optimizer.id_of(model.first.weight) == id_before
        assert_same_bits(state_by_name(model, optimizer), clamped_in_place_and_trained())


def test_replace_with_the_map_that_carried_the_value_carries_the_moments() -> None:
    net, opt = trained()
    before = copy.deepcopy(opt.state_of("first.weight"))
    opt.replace_("first.weight", net.first.weight.detach().t().contiguous(), state=lambda moment: moment.t())
    assert opt.state_of("first.weight")["exp_avg"].shape == (3, 2)
    assert torch.equal(opt.state_of("first.weight")["exp_avg"], before["exp_avg"].t())
    assert float(opt.state_of("first.weight")["step"]) == 3
    train_shape = opt.param(opt.ids["first.weight"]).shape
    assert train_shape == net.first.weight.shape == (3, 2)


def test_replace_with_reset_starts_the_state_anew() -> None:
    net, opt = trained()
    opt.replace_("first.weight", torch.randn(5, 3), state="reset")
    opt.zero_grad()
    set_gradients(net, 10)
    opt.step()
    assert net.first.weight.shape == (5, 3)
    assert float(opt.state_of("first.weight")["step"]) == 1
