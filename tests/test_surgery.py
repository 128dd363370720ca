"""Replacing, constraining and renaming: what is refused, and that a refusal has changed nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import paramstate
from reference import same_bits
from small_models import Net, assert_same_bits, state_by_name, train


def test_replacing_by_another_tracked_parameter_is_refused_by_both_names() -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    train(net, opt, range(2))
    before, ids = state_by_name(net, opt), opt.ids
    for state in ("keep", "reset"):
        with pytest.raises(ValueError, match=r"first\.weight.*second\.weight"):
            opt.replace_("first.weight", net.second.weight, state=state)
    assert_same_bits(state_by_name(net, opt), before)
    assert opt.ids == ids
    opt.replace_("first.weight", net.first.weight)  # itself, which changes nothing
    opt.replace_("first.weight", net.second.weight.detach())
    assert same_bits(net.first.weight, net.second.weight)
    assert net.first.weight is not net.second.weight


def test_a_square_weight_may_be_replaced_by_its_own_transpose() -> None:
    model = nn.Linear(3, 3)
    opt = paramstate.AdamW(model)
    train(model, opt, range(2))
    value, moment = model.weight.detach().T.clone(), opt.state_of("weight")["exp_avg"].T.clone()
    parameter = model.weight
    assert opt.replace_("weight", model.weight.T, state=lambda t: t.T) is parameter
    assert same_bits(parameter, value)
    assert same_bits(opt.state_of("weight")["exp_avg"], moment)


def test_renaming_two_to_one_name_is_refused() -> None:
    model = nn.Linear(2, 1)
    opt = paramstate.AdamW(model)
    ids = opt.ids
    with pytest.raises(ValueError, match=r"'weight' and 'bias' to 'x'"):
        opt.rename({"weight": "x", "bias": "x"})
    assert opt.ids == ids
    opt.rename({"weight": "bias", "bias": "weight"})
    assert opt.ids == {"bias": ids["weight"], "weight": ids["bias"]}


def test_a_constraint_for_a_complex_parameter_is_refused_before_any_is_declared() -> None:
    real, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    opt = paramstate.Adam([("real", real), ("other", other)])
    with pytest.raises(paramstate.ConstraintError, match="'other' is complex"):
        opt.constrain(["real", "other"], paramstate.Box(0.0, 0.5))
    assert torch.equal(real.detach(), torch.ones(2))


def test_a_constraint_holds_after_a_step_that_did_not_update_the_parameter() -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1, constraints={"first.weight": paramstate.Box(-0.25, 0.25)})
    train(net, opt, range(2))
    net.first.weight = nn.Parameter(torch.full((2, 3), 2.0))
    opt.zero_grad()
    net.second.weight.grad = torch.ones(2, 3)
    opt.step()
    assert torch.equal(net.first.weight.detach(), torch.full((2, 3), 0.25))
    version = net.first.weight._version
    opt.step()
    assert net.first.weight._version == version, "nothing was outside, so nothing was written"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_value_at_the_rounded_bound_is_inside(dtype: torch.dtype) -> None:
    idle, stepped = nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(3))
    opt = paramstate.Adam([("idle", idle), ("stepped", stepped)], constraints={"idle": paramstate.Box(max=0.1)})
    with torch.no_grad():
        idle[1] = float("nan")
    version = idle._version
    stepped.grad = torch.ones(3)
    opt.step()
    assert idle._version == version


def test_what_rows_have_of_their_own_goes_through_the_map() -> None:
    model = nn.Linear(3, 4, bias=False)
    opt = paramstate.AdamW(model, lr=0.1)
    for active in ([0, 1, 2, 3], [1, 3]):
        model.weight.sum().backward()
        opt.step(rows={"weight": active})
    opt.freeze_rows("weight", [3])
    frozen = model.weight[3].clone()
    opt.replace_("weight", model.weight.T, state=lambda t: t.T.contiguous())
    assert opt.row_steps("weight").tolist() == [1, 2, 1, 2]
    opt.zero_grad()
    model.weight.sum().backward()
    opt.step()
    assert opt.row_steps("weight").tolist() == [2, 3, 2, 2]
    assert torch.equal(model.weight[:, 3], frozen)
    before = model.weight
    with pytest.raises(paramstate.UnsupportedError, match=r"'weight'.*along more than one dimension"):
        opt.replace_("weight", model.weight.reshape(2, 6), state=lambda t: t.reshape(2, 6))
    assert model.weight is before


def test_a_norm_is_of_the_same_elements_behind_the_map() -> None:
    model = nn.Linear(3, 4, bias=False)
    opt = paramstate.AdamW(model, lr=0.1, constraints=paramstate.UnitNorm(dim=1))
    opt.replace_("weight", model.weight.T, state=lambda t: t.T.contiguous())
    model.weight.square().sum().backward()
    opt.step()
    assert torch.allclose(model.weight.norm(dim=0), torch.ones(4))
    with pytest.raises(paramstate.ConstraintError, match="no dimensions of the new layout"):
        opt.replace_("weight", model.weight.flatten(), state=torch.flatten)


def test_a_vectors_frozen_elements_go_through_the_map() -> None:
    model = nn.Linear(3, 4)
    opt = paramstate.AdamW(model, lr=0.1)
    opt.freeze_rows("bias", [0])
    frozen = model.bias[0].clone()
    opt.replace_("bias", model.bias.flip(0), state=lambda t: t.flip(0))
    model.bias.sum().backward()
    opt.step()
    assert torch.equal(model.bias[3], frozen)
    assert opt.row_steps("bias").tolist() == [1, 1, 1, 0]


def test_a_map_that_multiplies_by_a_matrix_of_the_models_dtype_is_judged_by_what_it_does() -> None:
    layer = nn.Linear(3, 2, bias=False)
    opt = paramstate.Adam(layer, lr=0.1)
    layer.weight.grad = torch.arange(6.0).reshape(2, 3) + 1.0
    opt.step()
    before = opt.state_of("weight")["exp_avg"].clone()
    order = torch.eye(3)[[2, 0, 1]]
    for matrix, message in (
        (torch.ones(3, 3) / 3.0, "it mixes or changes elements"),
        (2.0 * order, "it mixes or changes elements"),
        (order[:, :2], "it drops elements: 2 of 6, the first at \\[0, 0\\]"),
        (torch.ones(2, 2), "fails on shape .*mat1 and mat2 shapes"),
    ):
        value = layer.weight.detach() @ matrix if len(matrix) == 3 else layer.weight.detach()
        with pytest.raises(paramstate.StateShapeError, match=message):
            opt.replace_("weight", value, state=lambda moment, matrix=matrix: moment @ matrix)
    opt.replace_("weight", layer.weight.detach() @ order, state=lambda moment: moment @ order)
    assert torch.equal(opt.state_of("weight")["exp_avg"], before @ order)
