"""scenarios.md, section C: clipping values with the state kept, and constraints that hold after every step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import paramstate
from fsrs import FSRS, ceiling, fsrs_adam, fsrs_bounds, largest_error
from reference import same_bits
from small_models import Net, give_gradient, state_by_name, train

LOW, HIGH = torch.tensor([-1.0, 0.0, 1.0, 2.0]), torch.tensor(3.0)


def test_two_steps_of_a_real_trainer_with_its_bounds_between_and_the_state_kept() -> None:
    parameter = nn.Parameter(torch.tensor(FSRS["w0"]))
    opt = fsrs_adam(paramstate.Adam, parameter)
    for grad, expected in (("grad1", "w1"), ("grad2", "w2")):
        parameter.grad = torch.tensor(FSRS[grad])
        opt.step()
        assert paramstate.clip_(parameter, fsrs_bounds(1)) is parameter
        assert largest_error(parameter, FSRS[expected]) <= 1e-6
    assert float(opt.state[parameter]["step"]) == 2


def test_two_steps_of_a_real_trainer_by_replacement_with_the_state_kept() -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.tensor(FSRS["w0"]))
    opt = fsrs_adam(paramstate.Adam, module.w)
    for grad, expected in (("grad1", "w1"), ("grad2", "w2")):
        module.w.grad = torch.tensor(FSRS[grad])
        opt.step()
        module.w = nn.Parameter(fsrs_bounds(1)(module.w.detach()))
        assert largest_error(module.w, FSRS[expected]) <= 1e-6


def test_the_state_lost_shows_in_the_trainers_second_step() -> None:
    """So that the tests above can fail: what a new parameter in a new optimizer gives."""
    parameter = nn.Parameter(torch.tensor(FSRS["w1"]))
    opt = fsrs_adam(torch.optim.Adam, parameter)
    parameter.grad = torch.tensor(FSRS["grad2"])
    opt.step()
    assert largest_error(parameter, FSRS["w2"]) == pytest.approx(5.4e-2, rel=0.02)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_binding_case(dtype: torch.dtype, tolerance: float) -> None:
    case = FSRS["binding_case"]
    parameter = nn.Parameter(torch.tensor(case["values"], dtype=dtype))
    fsrs_adam(paramstate.Adam, parameter)
    paramstate.clip_(parameter, fsrs_bounds(case["n"]))
    expected = torch.tensor(case["clipped"], dtype=dtype)
    assert float((parameter.detach() - expected).abs().max()) <= tolerance
    assert ceiling(parameter.detach().double(), case["n"]) == pytest.approx(case["ceiling"], abs=1e-6)


def stepped(dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, paramstate.Adam]:
    parameter = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).to(dtype).reshape(3, 4))
    opt = paramstate.Adam([("scales", parameter)], lr=0.01)
    give_gradient(parameter, "c")
    opt.step()
    return parameter, opt


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "bounds",
    [
        (-0.5, 0.5),
        (None, 0.25),
        (0.0, None),
        (torch.tensor(-0.5), torch.tensor(0.5)),
        (torch.linspace(-1, 0, 4), None),
        (None, torch.tensor([[0.5], [0.0], [-0.5]])),
        (-0.5, torch.linspace(0, 1, 12).reshape(3, 4)),
    ],
    ids=["both", "max", "min", "0-dim", "row of min", "column of max", "number and tensor"],
)
def test_clip_clamps_in_place_and_keeps_id_moments_and_step(bounds: tuple, dtype: torch.dtype) -> None:
    parameter, opt = stepped(dtype)
    low, high = (b.to(dtype) if isinstance(b, torch.Tensor) else b for b in bounds)
    wanted = parameter.detach()
    wanted = wanted if low is None else wanted.clamp(min=low)
    wanted = wanted if high is None else wanted.clamp(max=high)
    id_before, address, version = opt.id_of(parameter), parameter.data_ptr(), parameter._version
    state = {key: tensor.clone() for key, tensor in opt.state[parameter].items()}
    assert paramstate.clip_(parameter, *bounds) is parameter
    assert same_bits(parameter, wanted)
    assert parameter._version > version
    assert parameter.data_ptr() == address
    assert opt.id_of(parameter) == id_before
    assert all(same_bits(state[key], opt.state[parameter][key]) for key in state)


def test_clip_by_name_of_arguments_and_without_an_optimizer() -> None:
    parameter = nn.Parameter(torch.tensor([-2.0, 0.0, 2.0]))
    paramstate.clip_(parameter, max=1.0)
    paramstate.clip_(parameter, min=-1.0)
    assert parameter.tolist() == [-1.0, 0.0, 1.0]
    assert parameter.requires_grad
    assert parameter.is_leaf


def test_clip_of_a_strided_a_zero_size_and_a_0_dim_parameter() -> None:
    base = torch.linspace(-2, 2, 12).reshape(3, 4)
    strided = nn.Parameter(base[:, ::2])
    paramstate.clip_(strided, -1.0, 1.0)
    assert float(strided.detach().abs().max()) <= 1
    assert float(base[0, 1]) < -1, "what lies between the elements is left alone"
    assert paramstate.clip_(nn.Parameter(torch.zeros(0, 3)), -1.0, 1.0).shape == (0, 3)
    assert paramstate.clip_(nn.Parameter(torch.tensor(3.0)), -1.0, 1.0).item() == 1.0


def test_clip_keeps_nan_as_torch_does() -> None:
    parameter = nn.Parameter(torch.tensor([math.nan, 3.0]))
    paramstate.clip_(parameter, -1.0, 1.0)
    assert math.isnan(parameter[0].item())
    assert parameter[1].item() == 1.0


def test_backward_through_a_value_that_was_clipped_since_raises() -> None:
    parameter, _ = stepped()
    loss = (parameter * parameter).sum()
    paramstate.clip_(parameter, -0.1, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def refused(parameter: nn.Parameter, *arguments: object, says: list[str]) -> None:
    before = parameter.detach().clone()
    with pytest.raises(paramstate.ConstraintError) as caught:
        paramstate.clip_(parameter, *arguments)
    for part in ["'scales'", *says]:
        assert part in str(caught.value), str(caught.value)
    assert same_bits(parameter, before)


def by_clip(parameter: nn.Parameter, opt: paramstate.Adam, low: object, high: object) -> None:  # noqa: ARG001
    paramstate.clip_(parameter, low, high)


def by_constrain(parameter: nn.Parameter, opt: paramstate.Adam, low: object, high: object) -> None:  # noqa: ARG001
    opt.constrain("scales", paramstate.Box(low, high))


def by_constructor(parameter: nn.Parameter, opt: paramstate.Adam, low: object, high: object) -> None:  # noqa: ARG001
    paramstate.Adam([("scales", parameter)], constraints={"scales": paramstate.Box(low, high)})


def by_constructor_for_all(parameter: nn.Parameter, opt: paramstate.Adam, low: object, high: object) -> None:  # noqa: ARG001
    paramstate.Adam([("scales", parameter)], constraints=paramstate.Box(low, high))


every_way_to_bound = pytest.mark.parametrize(
    "bound", [by_clip, by_constrain, by_constructor, by_constructor_for_all], ids=lambda way: way.__name__
)
Bounding = Callable[[nn.Parameter, paramstate.Adam, object, object], None]


def with_element(index: tuple[int, int], value: float) -> torch.Tensor:
    bound = torch.ones(3, 4)
    bound[index] = value
    return bound


@every_way_to_bound
@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (torch.zeros(4), with_element((1, 2), -3.0), r"'scales': min 0\.0 is above max -3\.0 at index \[1, 2\]"),
        (2.0, with_element((0, 3), 9.0), r"'scales': min 2\.0 is above max 1\.0 at index \[0, 0\]"),
        (torch.tensor(0.5), -0.5, r"'scales': min 0\.5 is above max -0\.5$"),
    ],
    ids=["two tensors", "number and tensor", "0-dim"],
)
def test_min_above_max_is_refused_by_name_index_and_values(
    bound: Bounding, low: object, high: object, message: str
) -> None:
    assert_refused(bound, low, high, message)


@every_way_to_bound
@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (with_element((2, 1), math.nan), None, r"'scales': min is nan at index \[2, 1\]"),
        (0.0, torch.tensor([1.0, math.nan, 1.0, 1.0]), r"'scales': max is nan at index \[1\]"),
        (None, torch.tensor(math.nan), r"'scales': max is nan$"),
    ],
    ids=["min", "max", "0-dim"],
)
def test_nan_bound_is_refused_by_name_and_index(bound: Bounding, low: object, high: object, message: str) -> None:
    assert_refused(bound, low, high, message)


@every_way_to_bound
@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (torch.zeros(5), None, r"'scales': min has shape \[5\], which does not broadcast to \[3, 4\]"),
        (None, torch.zeros(2, 3, 4), r"'scales': max has shape \[2, 3, 4\], which does not broadcast to \[3, 4\]"),
    ],
    ids=["another length", "more dimensions"],
)
def test_bound_that_does_not_broadcast_is_refused_by_name_and_shapes(
    bound: Bounding, low: object, high: object, message: str
) -> None:
    assert_refused(bound, low, high, message)


def assert_refused(bound: Bounding, low: object, high: object, message: str) -> None:
    parameter, opt = stepped()
    before = parameter.detach().clone()
    with pytest.raises(paramstate.ConstraintError, match=message):
        bound(parameter, opt, low, high)
    assert same_bits(parameter, before)
    assert opt._find("scales").constraint is None


def test_numbers_in_the_wrong_order_and_nan_are_refused_with_or_without_a_name() -> None:
    parameter, _opt = stepped()
    refused(parameter, 0.5, -0.5, says=["min 0.5 is above max -0.5"])
    refused(parameter, math.nan, None, says=["min is nan"])
    with pytest.raises(paramstate.ConstraintError, match=r"parameter of shape \[2\]: min 1\.0 is above max 0\.0"):
        paramstate.clip_(nn.Parameter(torch.zeros(2)), 1.0, 0.0)


def test_a_name_is_no_parameter_to_be_clipped() -> None:
    with pytest.raises(TypeError, match=r"clip_ takes the parameter itself, got str; opt\.param\(opt\.ids\[name\]\)"):
        paramstate.clip_("weight", 0.0, 1.0)


def test_a_bound_that_is_no_real_number_is_refused() -> None:
    parameter, _opt = stepped()
    refused(parameter, "0", None, says=["min must be a real number or a tensor of such, got str"])
    refused(parameter, None, 1j, says=["max must be a real number or a tensor of such, got a complex one"])
    refused(parameter, torch.zeros(4) * 1j, says=["min must be", "got a complex one"])


def test_a_function_beside_a_bound_is_refused() -> None:
    parameter, _opt = stepped()
    for arguments in ((torch.tanh, 0.5), (0.5, torch.tanh), (None, torch.tanh)):
        refused(parameter, *arguments, says=["a function takes the place of both bounds; give it as the only one"])


def test_clip_of_a_complex_parameter_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    _opt = paramstate.Adam([("scales", weight)])
    refused(weight, 0.0, 1.0, says=["is complex, and complex numbers have no order"])


def test_clip_of_a_parameter_without_values_is_refused() -> None:
    layer = nn.Linear(3, 2, device="meta")
    opt = paramstate.Adam(layer)
    for arguments in ((0.0, 1.0), (torch.zeros(2, 3, device="cpu"),), (torch.tril,)):
        with pytest.raises(paramstate.UnsupportedError, match=r"'weight' is on the meta device.*materialize"):
            paramstate.clip_(layer.weight, *arguments)
    with pytest.raises(paramstate.ConstraintError, match=r"min 1\.0 is above max 0\.0"):
        paramstate.clip_(layer.weight, 1.0, 0.0)
    assert opt.state == {}


def test_a_callback_that_gives_another_shape_is_refused() -> None:
    parameter, _opt = stepped()
    refused(parameter, lambda values: values[0], says=["[4]", "[3, 4]"])


@pytest.mark.parametrize(
    ("declared", "wanted"),
    [
        (paramstate.Box(-0.5, 0.5), lambda values: values.clamp(-0.5, 0.5)),
        (paramstate.Box(max=0.5), lambda values: values.clamp(max=0.5)),
        (paramstate.Box(LOW, 3.0), lambda values: values.clamp(LOW, HIGH)),
        (paramstate.NonNegative(), torch.relu),
        (paramstate.MaxNorm(0.5), lambda values: values * (0.5 / values.norm())),
        (paramstate.MaxNorm(0.5, dim=1), lambda values: values * (0.5 / values.norm(dim=1, keepdim=True))),
        (paramstate.UnitNorm(dim=0), lambda values: values / values.norm(dim=0, keepdim=True)),
        (torch.tanh, torch.tanh),
    ],
    ids=["box", "one side", "per element", "non-negative", "max norm", "max norm of rows", "unit norm", "function"],
)
def test_clip_without_bounds_applies_what_was_declared(
    declared: object, wanted: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    parameter, opt = stepped()
    opt.constrain("scales", declared)
    with torch.no_grad():
        parameter.copy_(torch.linspace(-7, 7, 12).reshape(3, 4))
    id_before, version = opt.id_of(parameter), parameter._version
    state = {key: tensor.clone() for key, tensor in opt.state[parameter].items()}
    expected = wanted(parameter.detach().clone())
    assert paramstate.clip_(parameter) is parameter
    torch.testing.assert_close(parameter.detach(), expected)
    assert parameter._version > version
    assert opt.id_of(parameter) == id_before
    assert all(same_bits(state[key], opt.state[parameter][key]) for key in state)


def test_clip_without_bounds_and_without_a_declaration_raises() -> None:
    parameter, _opt = stepped()
    refused(parameter, says=["no bound is given and no optimizer declared a constraint", "opt.constrain(...)"])


@pytest.mark.parametrize("cls", [paramstate.Adam, paramstate.AdamW])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_declared_constraints_hold_at_once_and_after_every_step(cls: type, dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    opt = cls(net, lr=0.1, constraints={"first.weight": paramstate.Box(-0.25, 0.25)})
    assert float(net.first.weight.detach().abs().max()) <= 0.25, "declaring projects at once"
    opt.constrain("second.weight", paramstate.NonNegative())
    assert float(net.second.weight.detach().min()) >= 0
    for seed in range(5):
        train(net, opt, [seed])
        assert float(net.first.weight.detach().abs().max()) <= 0.25
        assert float(net.second.weight.detach().min()) >= 0
    assert float(net.third.weight.detach().abs().max()) > 0.25


def test_one_constraint_for_all_parameters() -> None:
    net = Net()
    opt = paramstate.Adam(net, lr=0.1, constraints=paramstate.Box(max=0.1))
    train(net, opt, range(2))
    assert all(float(p.detach().max()) <= 0.1 + 1e-7 for p in net.parameters())


def test_a_constraint_in_the_step_is_the_clamp_after_it_bit_for_bit() -> None:
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    opt = paramstate.AdamW(net, lr=0.1, constraints={"first.weight": paramstate.Box(-0.25, 0.25)})
    plain = paramstate.AdamW(twin, lr=0.1)
    paramstate.clip_(twin.first.weight, -0.25, 0.25)
    for seed in range(4):
        train(net, opt, [seed])
        train(twin, plain, [seed])
        paramstate.clip_(twin.first.weight, -0.25, 0.25)
        ours, theirs = state_by_name(net, opt), state_by_name(twin, plain)
        assert all(same_bits(ours[name][key], theirs[name][key]) for name in ours for key in ours[name])


def test_constraints_follow_a_replaced_parameter() -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1, constraints={"first.weight": paramstate.Box(-0.25, 0.25)})
    net.first.weight = nn.Parameter(torch.randn(2, 3))
    train(net, opt, [0])
    assert float(net.first.weight.detach().abs().max()) <= 0.25


def test_a_constraint_that_cannot_hold_is_refused() -> None:
    with pytest.raises(paramstate.ConstraintError, match=r"1\.0.*0\.0|min.*max"):
        paramstate.Box(1.0, 0.0)
    with pytest.raises(paramstate.ConstraintError, match=r"NaN|nan"):
        paramstate.Box(math.nan, None)
    with pytest.raises(paramstate.UnknownParameterError, match=r"first\.wieght"):
        paramstate.AdamW(Net(), constraints={"first.wieght": paramstate.Box(0.0, 1.0)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bound", [0.1, 1e30, 2**60 + 1])
def test_a_number_as_bound_is_rounded_once_to_the_parameters_dtype(bound: float, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.full((3,), math.inf, dtype=dtype))
    paramstate.clip_(parameter, max=bound)
    assert parameter.tolist() == [torch.tensor(bound, dtype=torch.float64).to(dtype).item()] * 3
