"""What a client writes into state of a declared dtype: the next step begins with it, and stores it as declared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramstate import AdamW, StateShapeError, UnsupportedError
from precision_models import KINDS, floats, kept, step, two_layers
from reference import same_bits
from small_models import give_gradient


def stepped(kind: Any, **options: Any) -> tuple[nn.Sequential, AdamW]:
    model = two_layers()
    opt = AdamW(model, state_dtype=kind, **options)
    step(model, opt, 1, 2)
    return model, opt


def value_after_a_step(model: nn.Sequential, opt: AdamW) -> Tensor:
    step(model, opt, 9)
    return model[0].weight.detach().clone()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_in_the_place_of_a_moment_is_used_and_then_stored_as_declared(kind: Any, dtype: torch.dtype) -> None:
    given = torch.rand(80, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    ends = []
    for state_dtype in (kind, torch.float32):
        model, opt = stepped(state_dtype)
        held = opt.state[model[0].weight]
        held["exp_avg"], held["exp_avg_sq"] = given.clone(), given.square()
        ends.append(value_after_a_step(model, opt))
        if kind is not None and state_dtype == kind:
            assert kept(opt, "0.weight") == {torch.float32: "float32", torch.bfloat16: "bfloat16"}.get(kind, "8bit")
    reach = {None: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-7, "8bit": 2**-2}[kind]
    assert torch.allclose(ends[0], ends[1], rtol=0, atol=1e-6 + reach * 1e-2)


def test_one_of_two_moments_may_be_exchanged() -> None:
    for key in ("exp_avg", "exp_avg_sq"):
        model, opt = stepped("8bit", amsgrad=True)
        opt.state[model[0].weight][key] = torch.full((80, 64), 0.25)
        step(model, opt, 3)
        assert {kept(opt, "0.weight", each) for each in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")} == {"8bit"}


@pytest.mark.parametrize("kind", KINDS)
def test_moments_written_in_place_are_used(kind: Any) -> None:
    for write in (torch.zero_, lambda held: held.mul_(0.0), lambda held: held.copy_(torch.zeros(80, 64))):
        model, opt = stepped(kind, lr=1.0, eps=1e-30)
        weight = model[0].weight
        write(opt.state[weight]["exp_avg"])
        before = weight.detach().clone()
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        opt.param_groups[0]["weight_decay"] = 0.0
        opt.step()
        assert same_bits(weight.detach(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_splats_are_pruned_and_cloned_as_gsplat_does_it(kind: Any) -> None:
    means = nn.Parameter(torch.randn(200, 48))
    opt = AdamW([{"params": [means], "name": "means"}], state_dtype=kind)
    for number in range(3):
        give_gradient(means, f"{number}")
        opt.step()
    how = type(opt.state[means]["exp_avg"])
    keep = torch.arange(200) % 4 != 0
    for change in (
        lambda held: held[keep],
        lambda held: torch.cat([held, torch.zeros(60, 48)]),
    ):
        (group,) = opt.param_groups
        (old,) = group["params"]
        state = opt.state.pop(old)
        for key in state:
            if key != "step":
                state[key] = change(state[key])
        new = nn.Parameter(change(old.detach()))
        group["params"] = [new]
        opt.state[new] = state
        expected = floats(state["exp_avg"])
        give_gradient(new, "more")
        opt.step()
        assert type(opt.state[new]["exp_avg"]) is how
        assert not torch.equal(floats(opt.state[new]["exp_avg"]), expected)
    assert opt.state[new]["step"] == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_is_cut_in_place_goes_on_also_where_it_becomes_small(kind: Any) -> None:
    model, opt = stepped(kind)
    weight = model[0].weight
    for rows in (70, 9):
        weight.data = weight.data[:rows].clone()
        held = opt.state[weight]
        for key in ("exp_avg", "exp_avg_sq"):
            held[key] = held[key][:rows].clone()
        weight.grad = torch.ones_like(weight)
        opt.step()
    expected = {None: "float32", torch.float32: "float32", torch.bfloat16: "bfloat16", "8bit": "float32"}
    assert kept(opt, "0.weight") == expected[kind]
    assert opt.state[weight]["step"] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_another_shape_is_refused_and_nothing_is_written(kind: Any) -> None:
    model, opt = stepped(kind)
    before = model[0].weight.detach().clone()
    opt.state[model[0].weight]["exp_avg"] = torch.zeros(3, 64)
    with pytest.raises(StateShapeError, match=r"'0\.weight'"):
        step(model, opt, 3)
    assert same_bits(model[0].weight.detach(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_another_optimizer_s_state_dict_entries_may_be_put_in(kind: Any) -> None:
    model, opt = stepped(kind)
    stock_model = two_layers()
    stock = torch.optim.AdamW(stock_model.parameters())
    step(stock_model, stock, 1, 2)
    for ours, theirs in zip(model.parameters(), stock_model.parameters(), strict=True):
        opt.state[ours] = {key: held.clone() for key, held in stock.state[theirs].items()}
        ours.data.copy_(theirs.data)
    step(model, opt, 3)
    step(stock_model, stock, 3)
    assert torch.allclose(model[0].weight, stock_model[0].weight, rtol=0, atol=2e-4 if kind == "8bit" else 3e-5)
    assert opt.state_of("0.weight")["step"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_moving_all_state_as_clients_do_changes_nothing(kind: Any) -> None:
    """``optimizer_to(device)``, as it stands in many projects."""
    model, opt = stepped(kind)
    before = floats(opt.state_of("0.weight")["exp_avg"])
    for held in opt.state.values():
        for key, tensor in held.items():
            tensor.data = tensor.data.to("cpu")
            held[key] = tensor.to("cpu", non_blocking=True)
    assert torch.equal(floats(opt.state_of("0.weight")["exp_avg"]), before)
    step(model, opt, 3)
    assert opt.state_of("0.weight")["step"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_the_step_puts_back_what_was_converted(kind: Any) -> None:
    model, opt = stepped(kind)
    weight = model[0].weight
    written = torch.full((80, 64), 0.5)
    opt.state[weight]["exp_avg"] = written
    opt.state[model[1].weight]["exp_avg_sq"] = torch.zeros(2, 2)
    before = weight.detach().clone()
    with pytest.raises(StateShapeError):
        step(model, opt, 3)
    assert opt.state[weight]["exp_avg"] is written
    assert same_bits(weight.detach(), before)


@pytest.mark.parametrize("kind", ["bfloat16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_what_holds_no_moments_is_refused_by_name_and_nothing_is_written(dtype: torch.dtype, kind: Any) -> None:
    model, opt = stepped(kind)
    before = model[0].weight.detach().clone()
    opt.state[model[0].weight]["exp_avg"] = torch.zeros(80, 64, dtype=dtype)
    with pytest.raises(UnsupportedError, match=r"'0\.weight'"):
        step(model, opt, 3)
    assert same_bits(model[0].weight.detach(), before)
