"""Frozen parameters: no update, no decay, no clip, no ageing of state, until they are trained again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import paramstate
from small_models import Net, assert_same_bits, give_gradient, set_gradients, state_by_name, train


def trained(optimizer_class: type[torch.optim.Optimizer] = paramstate.AdamW) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    optimizer = optimizer_class(net.named_parameters(), lr=0.1, weight_decay=0.1)
    train(net, optimizer, range(3))
    return net, optimizer


def assert_frozen_through_steps(net: Net, opt: paramstate.AdamW) -> None:
    opt.freeze("first", stop_gradient=False)
    before = state_by_name(net, opt)
    for _ in range(3):
        opt.step()
    assert_same_bits(state_by_name(net, opt), before, ["first.weight", "first.bias"])
    assert not torch.equal(before["second.weight"]["value"], net.second.weight)


def test_freeze_with_zero_grad_leaves_value_and_state_alone() -> None:
    net, opt = trained()
    opt.zero_grad(set_to_none=False)
    assert_frozen_through_steps(net, opt)


def test_freeze_with_stale_grad_leaves_value_and_state_alone() -> None:
    net, opt = trained()
    assert net.first.weight.grad.any(), "left by the last step"
    assert_frozen_through_steps(net, opt)


@pytest.mark.parametrize("gradient", ["stale", "zero"])
def test_in_torch_a_frozen_parameter_still_moves(gradient: str) -> None:
    net, opt = trained(torch.optim.AdamW)
    if gradient == "zero":
        opt.zero_grad(set_to_none=False)
    net.first.requires_grad_(False)
    before = net.first.weight.detach().clone()
    opt.step()
    assert not torch.equal(before, net.first.weight)


def test_frozen_parameters_keep_their_bits_through_1000_steps_with_decay() -> None:
    net, opt = trained()
    opt.freeze("second")
    before = state_by_name(net, opt)
    for seed in range(1000):
        opt.zero_grad()
        for name in ("first", "third"):
            give_gradient(getattr(net, name).weight, f"{name}:{seed}")
        opt.step()
    assert_same_bits(state_by_name(net, opt), before, ["second.weight", "second.bias"])


def test_unfreezing_resumes_exactly() -> None:
    net, opt = trained()
    straight, straight_opt = copy.deepcopy((net, opt))
    opt.freeze("first")
    for seed in range(5):
        opt.zero_grad()
        give_gradient(net.second.weight, f"other:{seed}")
        opt.step()
    opt.unfreeze("first")
    train(net, opt, [7, 8])
    train(straight, straight_opt, [7, 8])
    assert_same_bits(state_by_name(net, opt), state_by_name(straight, straight_opt), ["first.weight", "first.bias"])


def test_the_frozen_set_may_alternate_by_epoch() -> None:
    net, opt = trained()
    apart = {name: copy.deepcopy((net, opt)) for name in ("first", "second")}
    for epoch in range(6):
        on, off = ("first", "second") if epoch % 2 else ("second", "first")
        opt.freeze(off)
        opt.unfreeze(on)
        for seed in range(3):
            opt.zero_grad()
            give_gradient(getattr(net, on).weight, f"{on}:{epoch}:{seed}")
            opt.step()
        twin, twin_opt = apart[on]
        for seed in range(3):
            twin_opt.zero_grad()
            give_gradient(getattr(twin, on).weight, f"{on}:{epoch}:{seed}")
            twin_opt.step()
    for name, (twin, twin_opt) in apart.items():
        assert_same_bits(state_by_name(net, opt), state_by_name(twin, twin_opt), [f"{name}.weight"])


def test_freezing_stops_the_computation_of_gradients_unless_told_not_to() -> None:
    net, opt = trained()
    opt.freeze("first")
    opt.freeze("second", stop_gradient=False)
    opt.zero_grad()
    net(torch.randn(4, 3)).sum().backward()
    assert net.first.weight.grad is None
    assert net.second.weight.grad is not None
    assert opt.frozen == ["first.weight", "first.bias", "second.weight", "second.bias"]


def test_unfreezing_gives_requires_grad_back_as_it_was() -> None:
    net, opt = trained()
    net.first.bias.requires_grad_(False)
    opt.freeze("first")
    opt.freeze("first")  # a second time changes nothing
    opt.unfreeze("first")
    assert net.first.weight.requires_grad
    assert not net.first.bias.requires_grad


def test_frozen_gradients_are_not_in_the_norm_that_clips() -> None:
    torch.manual_seed(0)
    net = Net()
    opt = paramstate.AdamW(net, max_grad_norm=1.0)
    opt.freeze("first", stop_gradient=False)
    set_gradients(net, 0)
    counted = [p.grad for name, p in net.named_parameters() if not name.startswith("first")]
    opt.step()
    assert opt.grad_norm.item() == pytest.approx(torch.nn.utils.get_total_norm(counted).item())
    assert net.first.weight.grad is not None, "the gradient itself is left where it was"


def test_frozen_gradients_are_not_in_the_norm_where_torch_takes_a_part_of_the_step() -> None:
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3) * 1j)]
    opt = paramstate.AdamW(params, max_grad_norm=1.0)
    opt.freeze(params[0], stop_gradient=False)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    assert opt.grad_norm.item() == pytest.approx(6.0**0.5)
    torch.testing.assert_close(opt.state[params[2]]["exp_avg"], torch.full((3,), 0.1 / 6.0**0.5) * (1 + 0j))


def test_a_frozen_parameter_is_not_clipped_by_its_constraint() -> None:
    net, opt = trained()
    opt.freeze("first.weight")
    opt.constrain("first.weight", paramstate.Box(-1e-3, 1e-3))
    before = net.first.weight.detach().clone()
    opt.step()
    assert torch.equal(before, net.first.weight)
    opt.unfreeze("first.weight")
    train(net, opt, [10])
    assert net.first.weight.abs().max() <= 1e-3


def test_what_takes_the_place_of_a_frozen_parameter_is_frozen() -> None:
    net, opt = trained()
    opt.freeze("first.weight")
    net.first.weight = nn.Parameter(torch.ones(2, 3))
    assert not net.first.weight.requires_grad
    opt.step()
    assert torch.equal(net.first.weight, torch.ones(2, 3))


def test_freezing_survives_deepcopy_and_save_and_load() -> None:
    net, opt = trained()
    opt.freeze("third.weight")
    twin, twin_opt = copy.deepcopy((net, opt))
    assert twin_opt.frozen == ["third.weight"]
    other = Net()
    loaded = paramstate.AdamW(other)
    loaded.load_state_dict(opt.state_dict())
    assert loaded.frozen == ["third.weight"]
    assert not other.third.weight.requires_grad
    assert not twin.third.weight.requires_grad


def test_an_unknown_name_freezes_nothing_and_names_the_nearest() -> None:
    _, opt = trained()
    with pytest.raises(paramstate.UnknownParameterError, match=r"first\.weight"):
        opt.freeze(["second.weight", "fist.weight"])
    assert opt.frozen == []


def test_the_nearest_of_a_mistyped_module_is_the_module() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    opt = paramstate.AdamW(model)
    for which, near in (("hed", "'head'"), ("encodr", "'encoder', 'decoder'"), ("head.wait", "'head.weight'")):
        with pytest.raises(paramstate.UnknownParameterError, match=f"called '{which}'; the nearest names are {near}"):
            opt.freeze(which)
    assert opt.frozen == []


def test_a_module_stands_for_its_parameters() -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    opt.freeze(net.first)
    assert opt.frozen == ["first.weight", "first.bias"]
    opt.unfreeze(net)
    assert opt.frozen == []
    opt.freeze([net.first, "second.bias", net.third.weight])
    assert opt.frozen == ["first.weight", "first.bias", "second.bias", "third.weight"]


def test_a_module_stands_for_its_parameters_where_no_model_is_known() -> None:
    net = Net()
    opt = paramstate.AdamW(net.parameters())
    opt.freeze(net.first)
    assert opt.frozen == [opt.name_of(net.first.weight), opt.name_of(net.first.bias)]


def test_a_module_stands_for_its_parameters_wherever_a_selection_may_stand() -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1, weight_decay=0.0, constraints={net.first: paramstate.Box(-0.05, 0.05)})
    assert net.first.weight.abs().max() <= 0.05
    opt.constrain(net.first, None)
    set_gradients(net, 0)
    opt.step(rows={net.second: [0]})
    assert opt.row_steps("second.weight").tolist() == [1, *[0] * (len(net.second.weight) - 1)]
    opt.freeze_rows(net.third, [0])
    opt.reset(net.second)
    assert opt.state_of("second.weight") == {}
    with opt.edit_rows() as rows:
        rows.resize(net.first, 2)
    assert net.first.weight.shape[0] == net.first.bias.shape[0] == 2


def test_a_module_with_a_parameter_that_is_not_trained_is_refused_by_name() -> None:
    net = Net()
    opt = paramstate.AdamW(net.first.parameters(), model=net)
    with pytest.raises(paramstate.UnknownParameterError, match=r"'second\.weight' is selected, and it is in no group"):
        opt.freeze(net)
    with pytest.raises(paramstate.UnknownParameterError, match="no parameters"):
        opt.freeze(nn.ReLU())
    assert opt.frozen == []


def test_a_module_that_holds_a_tied_parameter_by_half_is_refused_as_its_selection_is() -> None:
    net = Net()
    net.second.weight = net.first.weight
    opt = paramstate.AdamW(net)
    with pytest.raises(paramstate.SelectionError, match=r"'first\.weight' is tied to 'second\.weight'"):
        opt.freeze(net.first)
    opt.freeze([net.first.weight, net.first.bias])
    assert opt.frozen == ["first.weight", "first.bias"]


def test_what_is_no_parameter_at_all_is_a_type_error() -> None:
    _, opt = trained()
    with pytest.raises(TypeError, match=r"given as tensors, names, patterns, modules, selections, or several.*got int"):
        opt.freeze(3)
    with pytest.raises(TypeError, match="got int"):
        opt.freeze([3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("constraint", [paramstate.MaxNorm(1.0), paramstate.UnitNorm()], ids=str)
def test_a_norm_over_frozen_and_free_rows_scales_the_free_ones_and_may_stay_off_its_limit(
    dtype: torch.dtype, constraint: paramstate.Constraint
) -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=dtype))
    opt = paramstate.Adam([("weight", weight)], lr=0.0)
    opt.freeze_rows("weight", [0])
    opt.constrain("weight", constraint)
    free = 4.0 / 5.0
    for _ in range(3):
        assert weight[0].tolist() == [3.0, 0.0]
        assert abs(weight[1, 1].item() - free) < 1e-6
        weight.grad = torch.ones_like(weight)
        opt.step()
        free /= (9.0 + free**2) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_a_norm_over_rows_that_a_step_leaves_out_scales_the_others_and_a_step_of_all_rows_holds_it(
    dtype: torch.dtype,
) -> None:
    weight = nn.Parameter(torch.tensor([[0.6, 0.0], [0.0, 0.8]], dtype=dtype))
    opt = paramstate.Adam([("weight", weight)], lr=1.0, constraints=paramstate.MaxNorm(1.0))
    weight.grad = -torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=dtype)
    opt.step(rows={"weight": [1]})
    moved, norm = 1.8, (0.6**2 + 1.8**2) ** 0.5
    assert weight[0].tolist() == torch.tensor([0.6, 0.0], dtype=dtype).tolist()
    assert abs(weight[1, 1].item() - moved / norm) < 1e-6
    assert weight.detach().norm() > 1.0
    weight.grad = torch.zeros_like(weight)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    assert abs(weight.detach().norm().item() - 1.0) < 1e-6


def test_a_norm_of_each_row_mixes_no_frozen_with_a_free_one() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    opt = paramstate.Adam([("weight", weight)])
    opt.freeze_rows("weight", [0])
    opt.constrain("weight", paramstate.MaxNorm(1.0, dim=1))
    assert weight.tolist() == [[3.0, 0.0], [0.0, 1.0]]


def test_requires_grad_that_was_set_by_hand_stays_through_a_replacement() -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    opt.freeze("first")
    net.first.weight.requires_grad_(True)  # as of one who wants to look at gradients, without a step
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        net.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    opt.zero_grad()
    assert net.first.weight.requires_grad
    assert not net.first.bias.requires_grad
    assert opt.frozen == ["first.weight", "first.bias"]


def test_another_optimizer_that_froze_a_parameter_does_not_freeze_what_this_one_trains() -> None:
    net = Net()
    former = paramstate.AdamW(net)
    former.freeze("first")
    opt = paramstate.AdamW(net)
    net.requires_grad_(True)
    net.load_state_dict(net.state_dict(), assign=True)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert (opt.frozen, former.frozen) == ([], ["first.weight", "first.bias"])
