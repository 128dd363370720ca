"""Where torch's own classes fail and these do not.

Each test runs the same code with both classes: ours holds, and torch's fails in the way that is stated. Where a release
of torch has repaired one, its half is skipped, with the reason.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import paramstate
from layouts import Make
from small_models import Net, set_gradients, state_by_name, train

Optimizer = torch.optim.Optimizer
Class = type[Any]
OURS, TORCHS = paramstate.Adam, torch.optim.Adam


def torchs_fails(fails: bool, how: str) -> None:
    """The second half of each test."""
    if not fails:
        pytest.skip(f"torch {torch.__version__} has repaired it: no longer {how}")


def raised(action: Callable[[], object], error: type[BaseException], text: str) -> bool:
    """Whether it raises that."""
    try:
        action()
    except error as caught:
        return text in str(caught)
    return False


# ---- the step -------------------------------------------------------------------------------------------------------

STRIDES: dict[str, tuple[Make, Make]] = {
    "parameter channels_last": (
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(2, 3, 4, 5),
    ),
    "gradient transposed": (lambda: torch.randn(5, 4), lambda: torch.randn(4, 5).t()),
    "parameter not dense": (lambda: torch.randn(5, 8)[:, ::2], lambda: torch.randn(5, 4)),
    "gradient not dense": (lambda: torch.randn(5, 4), lambda: torch.randn(5, 8)[:, ::2]),
    "gradient expanded": (lambda: torch.randn(3, 4), lambda: torch.linspace(1, -2, 12)[:4].expand(3, 4)),
}


@pytest.mark.parametrize(("make_value", "make_grad"), STRIDES.values(), ids=STRIDES.keys())
def test_fused_with_different_strides_gives_the_right_values(make_value: Make, make_grad: Make) -> None:
    """torch's fused step on the CPU pairs the wrong elements where strides differ, or reads past the gradient."""

    def error(cls: Class) -> float:
        torch.manual_seed(5)
        value, grad = make_value(), make_grad()
        exact = value.detach().double() - 0.1 * grad.double().sign()  # the first step of Adam, for gradients above eps
        parameter = nn.Parameter(value)
        parameter.grad = grad
        cls([parameter], lr=0.1, fused=True).step()
        return float((parameter.detach().double() - exact).abs().max())

    assert error(OURS) < 1e-5
    wrong = error(TORCHS)
    torchs_fails(not wrong < 1e-3, "silently wrong by up to twice the rate")


@pytest.mark.parametrize("choice", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
def test_a_backward_through_a_value_that_was_stepped_since_raises(choice: dict[str, bool]) -> None:
    """After torch's fused step a backward through the old value gives a wrong gradient; here it raises."""

    def gradient(cls: Class) -> torch.Tensor | None:
        parameter = nn.Parameter(torch.ones(3))
        loss = (parameter * parameter).sum()
        parameter.grad = torch.ones(3)
        cls([parameter], lr=0.5, **choice).step()
        parameter.grad = None
        if not raised(loss.backward, RuntimeError, "modified by an inplace operation"):
            return parameter.grad
        return None

    assert gradient(OURS) is None
    if "fused" in choice:
        wrong = gradient(TORCHS)
        is_wrong = wrong is not None and torch.allclose(wrong, torch.ones(3))
        torchs_fails(is_wrong, "a silent 1.0 where the gradient is 2.0")


def test_an_overflow_on_two_devices_skips_the_step() -> None:
    """`found_inf` is 2 when two devices overflow: torch compares with 1, writes NaN and counts down to -1."""

    def after(cls: Class) -> tuple[bool, float]:
        parameter = nn.Parameter(torch.ones(3))
        opt = cls([parameter], lr=0.1, fused=True)
        parameter.grad = torch.full((3,), math.inf)
        opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(2.0)
        opt.step()
        return bool(parameter.isfinite().all()), float(opt.state[parameter].get("step", 0.0))

    assert after(OURS) == (True, 0.0)
    torchs_fails(after(TORCHS) == (False, -1.0), "NaN in the values and a step of -1")


MIXTURES = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize(("value", "moments"), MIXTURES, ids=str)
def test_value_and_moments_of_different_dtypes_are_stepped(
    value: torch.dtype, moments: torch.dtype, fused: bool | None
) -> None:
    """A value beside moments of another dtype is stepped, and both keep theirs; torch raises about dtypes."""

    def step(cls: Class) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        parameter = nn.Parameter(torch.ones(3).to(value))
        opt = cls([parameter], lr=0.5, fused=fused)
        state = {key: torch.zeros(3, dtype=moments) for key in ("exp_avg", "exp_avg_sq")}
        opt.state[parameter] = {"step": torch.tensor(0.0), **state}
        parameter.grad = torch.full((3,), 2.0).to(value)
        opt.step()
        return parameter.detach(), opt.state[parameter]

    parameter, state = step(OURS)
    torch.testing.assert_close(parameter, torch.full((3,), 0.5).to(value), rtol=1e-2, atol=0)
    assert parameter.dtype == value
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {moments}
    torch.testing.assert_close(state["exp_avg"], torch.full((3,), 0.2).to(moments))
    torchs_fails(raised(lambda: step(TORCHS), RuntimeError, "dtype") or raised_scalar_type(step), "an error of dtypes")


def raised_scalar_type(step: Callable[[Class], object]) -> bool:
    return raised(lambda: step(TORCHS), RuntimeError, "expected scalar type")


@pytest.mark.parametrize("fused", [None, True])
def test_a_bf16_value_with_an_fp32_gradient_is_stepped(fused: bool | None) -> None:
    """A bfloat16 parameter whose `grad_dtype` is float32 is stepped with the whole gradient; torch raises."""

    def step(cls: Class) -> tuple[torch.Tensor, torch.Tensor]:
        parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.full((3,), 1.0 + 2**-10)  # bfloat16 would round this to 1
        opt = cls([parameter], lr=0.5, betas=(0.0, 0.0), eps=1.0, fused=fused)
        opt.step()
        return parameter.detach(), parameter.grad

    parameter, grad = step(OURS)
    assert parameter.dtype == torch.bfloat16
    assert grad.dtype == torch.float32
    torch.testing.assert_close(parameter, torch.full((3,), 0.75, dtype=torch.bfloat16))
    torchs_fails(raised(lambda: step(TORCHS), RuntimeError, "dtype") or raised_scalar_type(step), "an error of dtypes")


def test_two_parameters_over_the_same_elements_are_refused() -> None:
    """Two parameters that share elements are refused; torch updates what they share twice, silently."""

    def shared(cls: Class) -> torch.Tensor:
        base = torch.zeros(6)
        params = [nn.Parameter(base[:4]), nn.Parameter(base[2:])]
        opt = cls(params, lr=0.1)
        for parameter in params:
            parameter.grad = torch.ones(4)
        opt.step()
        return base

    with pytest.raises(paramstate.OverlapError):
        shared(OURS)
    torchs_fails(bool(shared(TORCHS)[2] < -0.15), "a silent double update")


def test_amsgrad_can_be_switched_on_after_a_step() -> None:
    """`amsgrad` that is switched on in mid-training makes its buffer; torch raises a KeyError."""

    def train_on(cls: Class) -> Optimizer:
        net = Net()
        opt = cls(net.parameters())
        train(net, opt, [0])
        opt.param_groups[0]["amsgrad"] = True
        train(net, opt, [1])
        return opt

    assert all(float(state["step"]) == 2 for state in train_on(OURS).state.values())
    torchs_fails(raised(lambda: train_on(TORCHS), KeyError, "max_exp_avg_sq"), "KeyError: 'max_exp_avg_sq'")


def test_a_model_that_is_converted_after_a_step_goes_on() -> None:
    """`model.double()` after a step: the moments follow the value, and training goes on; torch raises."""

    def go_on(cls: Class) -> Optimizer:
        net = Net()
        opt = cls(net.parameters())
        train(net, opt, [0])
        net.double()
        train(net, opt, [1])
        return opt

    assert all(state["exp_avg"].dtype == torch.float64 for state in go_on(OURS).state.values())
    torchs_fails(raised(lambda: go_on(TORCHS), RuntimeError, "dtype"), "an error about dtypes")


# ---- loading --------------------------------------------------------------------------------------------------------


def stepped(cls: Class, parameter: nn.Parameter) -> Any:
    opt = cls([parameter])
    parameter.grad = torch.linspace(1, 2, parameter.numel()).reshape(parameter.shape).to(parameter.dtype)
    opt.step()
    return opt


def test_named_parameters_that_changed_order_get_their_own_moments() -> None:
    """Named parameters in another order get their own moments at load; torch's get each other's, silently."""

    def mixed_up(cls: Class) -> list[str]:
        torch.manual_seed(5)
        net = Net()
        opt = cls(net.named_parameters())
        train(net, opt, [0])
        other = cls(reversed(list(net.named_parameters())))
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        loaded, saved = state_by_name(net, other), state_by_name(net, opt)
        return [name for name in saved if not loaded[name]["exp_avg"].equal(saved[name]["exp_avg"])]

    assert mixed_up(OURS) == []
    torchs_fails(len(mixed_up(TORCHS)) == 6, "each parameter with another one's moments")


def test_loading_does_not_share_tensors_with_its_source() -> None:
    """An optimizer that loaded another's state is independent of it; torch's two share their moments."""

    def shares(cls: Class) -> bool:
        parameter, twin = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        opt = stepped(cls, parameter)
        other = cls([twin])
        other.load_state_dict(opt.state_dict())
        before = opt.state[parameter]["exp_avg"].clone()
        twin.grad = torch.full((3,), 100.0)
        other.step()
        return not opt.state[parameter]["exp_avg"].equal(before)

    assert not shares(OURS)
    torchs_fails(shares(TORCHS), "one optimizer's step in the other's moments")


def test_moments_keep_their_dtype_through_save_and_load() -> None:
    """float32 moments of a bfloat16 value are loaded bit for bit; torch rounds them to bfloat16."""

    def loaded(cls: Class) -> tuple[torch.Tensor, torch.Tensor]:
        wide = nn.Parameter(torch.ones(3))
        saved = copy.deepcopy(stepped(cls, wide).state_dict())
        narrow = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        opt = cls([narrow])
        opt.load_state_dict(saved)
        return saved["state"][0]["exp_avg"], opt.state[narrow]["exp_avg"]

    saved, held = loaded(OURS)
    assert held.dtype == torch.float32
    assert torch.equal(held, saved)
    torchs_fails(loaded(TORCHS)[1].dtype == torch.bfloat16, "a rounding of the moments")


def test_moments_of_another_shape_are_refused_at_load() -> None:
    """Moments of another shape are refused by `load_state_dict`; torch takes them and fails in a later step."""

    def load(cls: Class) -> torch.Tensor:
        saved = stepped(cls, nn.Parameter(torch.ones(3))).state_dict()
        other = nn.Parameter(torch.ones(4))
        opt = cls([other])
        opt.load_state_dict(saved)
        return opt.state[other]["exp_avg"]

    with pytest.raises(paramstate.LoadError, match=r"shape \[3\], the parameter has \[4\]"):
        load(OURS)
    torchs_fails(load(TORCHS).shape == (3,), "taken without a look")


def test_a_checkpoint_library_that_asks_for_state_leaves_no_trace() -> None:
    """Asked for state before the first step, torch's counts a step, and L2 decay puts values into its moments."""

    def trace(cls: Class) -> tuple[float, float]:
        net = Net()
        opt = cls(net.parameters(), weight_decay=0.5)
        state = get_optimizer_state_dict(net, opt)["state"]["first.weight"]
        return float(state["step"]), float(state["exp_avg"].abs().max())

    assert trace(OURS) == (0.0, 0.0)
    count, moment = trace(TORCHS)
    torchs_fails(count == 1.0 and moment > 0.0, "a step of 1 and moments that are not zero")


def test_a_first_step_after_a_checkpoint_library_asked_is_a_first_step() -> None:
    """Training after such a question equals training without it; torch's differs from its first step on."""

    def difference(cls: Class) -> float:
        values = []
        for asked in (False, True):
            torch.manual_seed(5)
            net = Net()
            opt = cls(net.parameters(), lr=0.1, weight_decay=0.5)
            if asked:
                get_optimizer_state_dict(net, opt)
            train(net, opt, [0])
            values.append(nn.utils.parameters_to_vector(net.parameters()).detach())
        return float((values[0] - values[1]).abs().max())

    assert difference(OURS) == 0.0
    torchs_fails(difference(TORCHS) > 0.01, "another first step")


# ---- parameters that are replaced -----------------------------------------------------------------------------------


def set_anew(net: Net) -> None:
    net.first.weight = nn.Parameter(net.first.weight.detach() / 2)


def load_by_assignment(net: Net) -> None:
    net.load_state_dict({key: value.clone() for key, value in net.state_dict().items()}, assign=True)


def replace_the_layer(net: Net) -> None:
    net.first = copy.deepcopy(net.first)


def convert_by_overwriting(net: Net) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        net.double()
        net.float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


REPLACEMENTS = [set_anew, load_by_assignment, replace_the_layer, convert_by_overwriting]


@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda function: function.__name__)
def test_a_replaced_parameter_is_trained_on(replace: Callable[[Net], None]) -> None:
    """A parameter that another object took the place of is trained on with its moments; torch trains the dead one."""

    def moves(cls: Class) -> bool:
        torch.manual_seed(5)
        net = Net()
        opt = cls(net) if cls is OURS else cls(net.parameters())
        train(net, opt, [0])
        replace(net)
        before = net.first.weight.detach().clone()
        opt.zero_grad()
        set_gradients(net, 1)
        opt.step()
        return not torch.equal(net.first.weight.detach(), before)

    assert moves(OURS)
    torchs_fails(not moves(TORCHS), "a parameter that never moves again")


@pytest.mark.parametrize("gradient", ["stale", "zero"])
def test_a_frozen_parameter_does_not_move_by_a_gradient_that_was_left(gradient: str) -> None:
    """A frozen parameter stays, whatever gradient is left; torch's moves by its momentum and its decay."""

    def moves(cls: Class) -> bool:
        torch.manual_seed(5)
        net = Net()
        opt = cls(net.parameters(), weight_decay=0.1)
        train(net, opt, [0, 1])
        if gradient == "zero":
            opt.zero_grad(set_to_none=False)
        if cls is OURS:
            opt.freeze(net.first.parameters())
        else:
            net.first.requires_grad_(False)
        before = net.first.weight.detach().clone()
        opt.step()
        return not torch.equal(net.first.weight.detach(), before)

    assert not moves(OURS)
    torchs_fails(moves(TORCHS), "a frozen parameter that moves")
