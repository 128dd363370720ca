"""Kahan: what the rounding of a 16-bit value leaves over is kept as state, and follows float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramstate import Adam, AdamW, Box
from precision_models import KINDS, SHORT, floats, step, two_layers
from reference import same_bits


def trained(dtype: torch.dtype, rounding: Any, steps: int, **options: Any) -> tuple[nn.Parameter, AdamW]:
    """From numbers that bfloat16 has, by gradients that bfloat16 has."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(64, 64).bfloat16().to(dtype))
    opt = AdamW([("p", param)], lr=1e-4, rounding=rounding, state_dtype="float32", **options)
    target = torch.randn(64, 64).bfloat16()
    for number in range(steps):
        noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(number)).bfloat16()
        param.grad = (target + noise).to(dtype)
        opt.step()
    return param, opt


@pytest.mark.parametrize("steps", [1, 50, 400])
@pytest.mark.parametrize("dtype", SHORT)
def test_value_and_compensation_together_follow_float32(dtype: torch.dtype, steps: int) -> None:
    exact = trained(torch.float32, "nearest", steps)[0].detach().double()
    param, opt = trained(dtype, "kahan", steps)
    value, left = param.detach().double(), opt.state[param]["compensation"].double()
    eps = torch.finfo(dtype).eps
    # Each step rounds the compensation once, to half of its last place: eps/2 of at most eps/2 of the value.
    bound = steps * (eps / 2) ** 2 * (value.abs() + 2**-10) + 1e-6
    assert bool(((value + left - exact).abs() <= bound).all())
    assert bool((left.abs() <= eps * (value.abs() + 2**-10)).all())
    plain = trained(dtype, "nearest", steps)[0].detach().double()
    if steps == 400:
        assert (value - exact).norm() < 0.5 * (plain - exact).norm()


@pytest.mark.parametrize("dtype", SHORT)
def test_the_value_is_the_nearest_to_that_of_float32(dtype: torch.dtype) -> None:
    exact = trained(torch.float32, "nearest", 200)[0].detach()
    param, _ = trained(dtype, "kahan", 200)
    off = (param.detach().double() - exact.double()).abs()
    assert bool((off <= 0.6 * torch.finfo(dtype).eps * exact.double().abs() + 1e-5).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", SHORT)
def test_what_is_left_over_is_state_of_the_value_s_dtype_and_shape(dtype: torch.dtype, kind: Any) -> None:
    model = two_layers(dtype)
    opt = AdamW(model, rounding="kahan", state_dtype=kind)
    step(model, opt, 1)
    for name, param in model.named_parameters():
        left = opt.state_of(name)["compensation"]
        assert (left.dtype, left.shape, left.stride()) == (param.dtype, param.shape, param.stride())
        assert bool(left.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_values_keep_nothing_and_step_as_ever(dtype: torch.dtype) -> None:
    ends = []
    for rounding in ("nearest", "kahan", "stochastic"):
        model = two_layers(dtype)
        opt = AdamW(model, rounding=rounding)
        step(model, opt, 1, 2, 3)
        assert "compensation" not in opt.state_of("0.weight")
        ends.append(model[0].weight.detach())
    assert same_bits(ends[0], ends[1])
    assert same_bits(ends[0], ends[2])


def halfway() -> tuple[nn.Parameter, Adam]:
    """A parameter of ones whose compensation is about two fifths of the distance to the next number below."""
    param = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    opt = Adam([("p", param)], lr=2**-9 * 0.8, rounding="kahan", eps=1e-30)
    param.grad = torch.ones_like(param)
    opt.step()
    left: Tensor = opt.state[param]["compensation"]
    assert bool((param == 1).all())
    assert left.float().mean().item() == pytest.approx(-(2**-9) * 0.8, rel=0.01)
    return param, opt


@pytest.mark.parametrize("number", [5.0, 0.0, -1.0, 0.25, 1.0078125])
def test_a_value_that_somebody_writes_is_where_the_next_step_begins(number: float) -> None:
    param, opt = halfway()
    with torch.no_grad():
        param.copy_(torch.full((4, 4), number))
    opt.param_groups[0]["lr"] = 0.0
    param.grad = torch.ones_like(param)
    opt.step()
    assert bool((param == number).all())
    opt.param_groups[0]["lr"] = 2**-3
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    opt.step()
    expected = before.float() - 2**-3
    assert bool(((param.float() - expected).abs() <= 2**-8 * expected.abs().clamp(min=2**-3)).all())


def test_only_the_elements_that_were_written_forget_what_was_left_over() -> None:
    param, opt = halfway()
    with torch.no_grad():
        param[0] = 0.25
    param.grad = torch.ones_like(param)
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    left = opt.state[param]["compensation"].float()
    assert bool((param[0] == 0.25).all())
    assert bool((param[1:] == 1).all())
    assert left[1:].mean().item() == pytest.approx(-(2**-9) * 0.8, rel=0.01)
    assert not left[0].any()


def test_a_compensation_that_a_client_drops_begins_anew() -> None:
    param, opt = halfway()
    del opt.state[param]["compensation"]
    param.grad = torch.ones_like(param)
    opt.step()
    assert opt.state[param]["compensation"].dtype == torch.bfloat16
    assert opt.state[param]["step"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_turned_on_in_the_middle_of_a_run_and_off_again(kind: Any) -> None:
    model = two_layers(torch.bfloat16)
    plain = AdamW(model, state_dtype=kind)
    step(model, plain, 1, 2)
    kahan = AdamW(model, rounding="kahan", state_dtype=kind)
    kahan.load_state_dict(plain.state_dict())
    before = floats(kahan.state_of("0.weight")["exp_avg"])
    assert torch.equal(before, floats(plain.state_of("0.weight")["exp_avg"]))
    step(model, kahan, 3)
    assert bool(kahan.state_of("0.weight")["compensation"].any())
    again = AdamW(model, state_dtype=kind)
    again.load_state_dict(kahan.state_dict())
    step(model, again, 4)
    assert again.state_of("0.weight")["step"] == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", SHORT)
def test_the_model_may_be_widened_and_narrowed_in_between(dtype: torch.dtype, kind: Any) -> None:
    model = two_layers(dtype)
    opt = AdamW(model, lr=1e-4, rounding="kahan", state_dtype=kind)
    step(model, opt, 1, 2)
    model.to(torch.float32)
    step(model, opt, 3)
    model.to(dtype)
    step(model, opt, 4, 5)
    left, value = opt.state_of("0.weight")["compensation"], model[0].weight
    assert left.dtype == dtype
    assert bool((left.double().abs() <= torch.finfo(dtype).eps * (value.double().abs() + 2**-10)).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", SHORT)
def test_a_value_that_was_widened_keeps_nothing_of_what_was_left_over(dtype: torch.dtype, kind: Any) -> None:
    model = two_layers(dtype)
    opt = AdamW(model, rounding="kahan", state_dtype=kind)
    step(model, opt, 1)
    model.to(torch.float32)
    step(model, opt, 2)
    assert all("compensation" not in opt.state_of(name) for name in opt.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_short_value_left_over_does_not_go_into_a_wider_one_in_another_layout(kind: Any) -> None:
    model = two_layers(torch.bfloat16)
    opt = AdamW(model, rounding="kahan", state_dtype=kind)
    step(model, opt, 1)
    model.to(torch.float64)
    opt.replace_("0.bias", model[0].bias.detach().flip(0), state=lambda values: values.flip(0))
    assert "compensation" not in opt.state_of("0.bias")
    model.to(torch.bfloat16)
    step(model, opt, 2)
    assert opt.state_of("0.bias")["compensation"].dtype == torch.bfloat16


def test_a_wider_value_does_not_load_what_a_short_one_left_over() -> None:
    model = two_layers(torch.bfloat16)
    opt = AdamW(model, rounding="kahan")
    step(model, opt, 1)
    for dtype in (torch.float32, torch.float16):
        other = AdamW(two_layers(dtype), rounding="kahan")
        other.load_state_dict(opt.state_dict())
        left = other.state_of("0.weight").get("compensation")
        assert left is None if dtype == torch.float32 else left.dtype == torch.float16


def test_values_that_are_not_finite_leave_nothing_over() -> None:
    param, opt = halfway()
    param.grad = torch.ones_like(param)
    param.grad[0, 0] = float("nan")
    opt.step()
    assert param[0, 0].isnan()
    with torch.no_grad():
        param[0, 0] = 2.0
    opt.state[param]["exp_avg"][0, 0] = opt.state[param]["exp_avg_sq"][0, 0] = 0.0
    param.grad = torch.ones_like(param)
    opt.step()
    assert param.isfinite().all()
    assert opt.state[param]["compensation"].isfinite().all()


def test_what_a_bound_cuts_off_is_not_left_over() -> None:
    param = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    opt = Adam([("p", param)], lr=2**-9 * 0.8, rounding="kahan", constraints=Box(1.0, 2.0))
    for _ in range(5):
        param.grad = torch.ones_like(param)
        opt.step()
        assert bool((param == 1).all())
    assert not opt.state[param]["compensation"].any()
    param.grad = torch.full_like(param, -1e6)
    for _ in range(10):
        opt.step()
    assert bool((param > 1).all())
