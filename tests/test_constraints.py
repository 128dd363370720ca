"""Declared constraints hold after every step, whatever they are and wherever the parameter is stepped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from paramstate import Box, ConstraintError, MaxNorm, NonNegative, Projection, UnitNorm
from small_models import Net, give_gradient, set_gradients, train

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def one(values: torch.Tensor, constraint: object = None, **options: object) -> tuple[nn.Parameter, paramstate.Adam]:
    weight = nn.Parameter(values)
    return weight, paramstate.Adam([("weight", weight)], lr=0.5, constraints=constraint, **options)


def steps(weight: nn.Parameter, opt: torch.optim.Optimizer, count: int = 5) -> None:
    for seed in range(count):
        give_gradient(weight, f"g:{seed}", scale=3.0)
        opt.step()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_box_of_tensors_equals_clamping_after_each_step(dtype: torch.dtype, decay: float) -> None:
    low, high = -torch.rand(4, 1), torch.rand(3)
    weight, opt = one(torch.randn(4, 3, dtype=dtype), Box(low, high), weight_decay=decay)
    twin = nn.Parameter(weight.detach().clone())
    stock = paramstate.Adam([twin], lr=0.5, weight_decay=decay)
    for seed in range(6):
        for param, optimizer in ((weight, opt), (twin, stock)):
            give_gradient(param, f"g:{seed}", scale=3.0)
            optimizer.step()
        with torch.no_grad():
            twin.clamp_(low.to(dtype), high.to(dtype))
        assert torch.equal(weight, twin)


@pytest.mark.parametrize("bounds", [Box(min=-0.1), Box(max=0.1), Box(min=torch.zeros(3)), Box(max=torch.tensor(0.2))])
def test_a_box_may_have_one_side_only(bounds: Box) -> None:
    weight, opt = one(torch.randn(4, 3), bounds)
    steps(weight, opt)
    low, high = bounds.bounds_for(weight)
    assert low is None or bool((weight >= low).all())
    assert high is None or bool((weight <= high).all())
    assert (weight.abs() > 0.25).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [None, 0, 1, -1, (0, 2)])
def test_norms_stay_at_or_below_their_maximum(dtype: torch.dtype, dim: int | tuple[int, ...] | None) -> None:
    weight, opt = one(torch.randn(3, 4, 2, dtype=dtype), MaxNorm(0.7, dim=dim))
    slack = 1.0 + 4.0 * torch.finfo(dtype).eps
    for seed in range(5):
        norms = torch.linalg.vector_norm(weight.detach().double(), dim=dim)
        assert bool((norms <= 0.7 * slack).all())
        give_gradient(weight, f"g:{seed}", scale=3.0)
        opt.step()


def test_what_is_short_enough_is_not_scaled() -> None:
    weight, opt = one(torch.full((2, 3), 1e-3), MaxNorm(100.0, dim=1))
    twin, stock = one(torch.full((2, 3), 1e-3))
    steps(weight, opt)
    steps(twin, stock)
    assert torch.equal(weight, twin)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_norms_stay_one_and_zero_stays_zero(dtype: torch.dtype) -> None:
    values = torch.randn(3, 4, dtype=dtype)
    values[1] = 0.0
    weight, opt = one(values, UnitNorm(dim=1))
    steps(weight, opt, 0)
    assert bool((weight[1] == 0.0).all())
    for seed in range(4):
        give_gradient(weight, f"g:{seed}")
        opt.step()
        norms = torch.linalg.vector_norm(weight.detach().double(), dim=1)
        assert torch.allclose(norms, torch.ones(3, dtype=torch.float64), atol=4 * torch.finfo(dtype).eps)


def test_a_function_is_applied_after_each_step() -> None:
    weight, opt = one(torch.randn(4, 4), torch.tril)
    twin, stock = one(weight.detach().clone())
    for seed in range(4):
        for param, optimizer in ((weight, opt), (twin, stock)):
            give_gradient(param, f"g:{seed}")
            optimizer.step()
        with torch.no_grad():
            twin.copy_(twin.tril())
        assert torch.equal(weight, twin)


def test_a_function_that_fails_after_the_update_says_that_the_step_was_taken() -> None:
    calls = []

    def fragile(values: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise ZeroDivisionError("no such luck")
        return values.clamp(-1.0, 1.0)

    weight, opt = one(torch.randn(3), fragile)
    give_gradient(weight, "g")
    calls.extend([1, 1, 1])
    with pytest.raises(ConstraintError, match=r"'weight'.*the step was taken.*no such luck"):
        opt.step()
    assert opt.state_of("weight")["step"] == 1


@pytest.mark.parametrize(
    "constraint", [Box(-0.1, 0.1), Box(torch.full((3,), -0.1), 0.1), MaxNorm(0.1), UnitNorm(), torch.relu]
)
def test_declaring_projects_at_once_and_a_learning_rate_of_0_suspends_nothing(constraint: object) -> None:
    weight, opt = one(torch.randn(3) - 2.0)
    before = weight._version
    opt.constrain("weight", constraint)
    expected = weight.detach().clone()
    assert weight._version > before
    opt.param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        weight.sub_(5.0)
    give_gradient(weight, "g")
    opt.step()
    declared = opt._find("weight").constraint
    assert declared.holds(weight)
    assert weight.shape == expected.shape


@pytest.mark.parametrize("constraint", [Box(torch.full((3,), -0.1), 0.1), MaxNorm(0.1), torch.relu])
def test_a_parameter_without_gradient_is_held_too(constraint: object) -> None:
    weight, opt = one(torch.randn(3), constraint)
    with torch.no_grad():
        weight.sub_(5.0)
    opt.step()
    assert opt._find("weight").constraint.holds(weight)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (Box(torch.tensor([0.0, 2.0, 0.0]), 1.0), r"'weight'.*min 2\.0 is above max 1\.0 at index \[1\]"),
        (Box(torch.tensor([0.0, float("nan"), 0.0])), r"'weight'.*min is nan at index \[1\]"),
        (Box(max=torch.zeros(4)), r"'weight'.*max has shape \[4\], which does not broadcast to \[3\]"),
        (MaxNorm(1.0, dim=2), r"'weight' has shape \[3\], the norm is to be taken over dim 2"),
        (lambda values: values[:1], r"'weight'.*must return a tensor of shape \[3\], got shape \[1\]"),
        (lambda _: 3.0, r"'weight'.*must return a tensor of shape \[3\], got float"),
    ],
)
def test_constraints_that_cannot_hold_are_refused_by_name_and_nothing_changes(bounds: object, message: str) -> None:
    weight, opt = one(torch.randn(3))
    before = weight.detach().clone()
    with pytest.raises(ConstraintError, match=message):
        opt.constrain("weight", bounds)
    assert torch.equal(weight, before)
    assert opt._find("weight").constraint is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(1.0, 0.0), r"min 1\.0 is above max 0\.0"),
        (lambda: Box(float("nan"), 0.0), "min is nan"),
        (Box, "neither min nor max"),
        (lambda: Box("0"), "must be a number, a tensor or None, got str"),
        (lambda: Box(1j), "must be a number, a tensor or None, got complex"),
        (lambda: MaxNorm("1"), "must be a number, at least 0 and finite, got '1'"),
        (lambda: MaxNorm(-1.0), r"at least 0 and finite, got -1\.0"),
        (lambda: MaxNorm(float("nan")), "at least 0 and finite, got nan"),
    ],
)
def test_constraints_that_make_no_sense_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        make()


def test_what_is_no_constraint_is_a_type_error() -> None:
    weight, opt = one(torch.randn(3))
    with pytest.raises(TypeError, match=r"must be a Box, NonNegative.* got int"):
        opt.constrain("weight", 3)
    with pytest.raises(TypeError, match=r"must be a Box, NonNegative.* got list"):
        paramstate.Adam([weight], constraints=[Box(0.0, 1.0)])


@pytest.mark.parametrize("kind", [NonNegative, MaxNorm, UnitNorm, Box])
def test_a_constraint_that_was_not_called_is_refused_with_what_to_do(kind: Any) -> None:
    weight, opt = one(torch.randn(3), Box(-9.0))
    with pytest.raises(TypeError, match=rf"is what {kind.__name__}\(...\) gives, got {kind.__name__} itself: call it"):
        opt.constrain("weight", kind)
    assert weight.shape == (3,)


@pytest.mark.parametrize("dim", ["a", (), (0, "b"), 1.5])
def test_dimensions_that_are_none_are_refused_by_name(dim: Any) -> None:
    _, opt = one(torch.randn(3, 2), Box(-9.0))
    with pytest.raises(ConstraintError, match="'weight': dim must be a dimension, or several, got"):
        opt.constrain("weight", MaxNorm(1.0, dim=dim))


def test_a_function_that_fails_at_its_declaration_is_not_declared_and_names_the_parameter() -> None:
    weight, opt = one(torch.randn(3), Box(-9.0))
    before = weight.detach().clone()
    with pytest.raises(ConstraintError, match="'weight': the function fails: ZeroDivisionError: division by zero"):
        opt.constrain("weight", lambda values: values + 1 / 0)
    give_gradient(weight, "g")
    opt.step()
    assert not torch.equal(weight, before)


def test_what_fails_while_it_projects_leaves_all_values_and_what_was_declared_before() -> None:
    class Fragile(paramstate.Constraint):
        def require_fits(self, param: torch.Tensor, called: str) -> None:
            pass

        def project_(self, param: torch.Tensor, called: str) -> None:  # noqa: ARG002
            param.mul_(2.0)
            raise ZeroDivisionError

        def holds(self, param: torch.Tensor) -> bool:  # noqa: ARG002
            return False

        def as_data(self) -> dict[str, Any]:
            return {"kind": "fragile"}

    net = Net(["first", "second"])
    opt = paramstate.AdamW(net, lr=0.1, constraints={"first": Box(-9.0, 9.0)})
    before = copy.deepcopy(net.state_dict())
    for declare in (
        lambda: opt.constrain("*.weight", Fragile()),
        lambda: paramstate.AdamW(net, constraints={"first": Box(0.0, 0.01), "second.bias": Fragile()}),
    ):
        with pytest.raises(ZeroDivisionError):
            declare()
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert opt.at_bounds() == {"first.weight": 0, "first.bias": 0}
    set_gradients(net, 1)
    opt.step()


def test_of_several_constraints_none_is_declared_where_one_cannot_hold() -> None:
    net = Net(["first"])
    before = copy.deepcopy(net.state_dict())
    bounds = {"first.weight": Box(0.0, 0.1), "first.bias": Box(max=torch.zeros(5))}
    with pytest.raises(ConstraintError, match=r"'first\.bias': max has shape \[5\]"):
        paramstate.AdamW(net, constraints=bounds)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_parameter_on_the_meta_device_may_have_any_constraint() -> None:
    with torch.device("meta"):
        net = Net(["first"])
    bounds = Box(torch.zeros(2, 3, device="cpu"), 0.1)
    opt = paramstate.AdamW(net, lr=0.5, constraints={"first.weight": bounds, "first.bias": UnitNorm()})
    with pytest.raises(ConstraintError, match=r"'first\.weight': min 2\.0 is above max 1\.0 at index \[0, 0\]"):
        opt.constrain("first.weight", Box(torch.full((2, 3), 2.0, device="cpu"), 1.0))
    net.to_empty(device="cpu")
    with torch.no_grad():
        net.first.weight.fill_(-3.0)
        net.first.bias.fill_(3.0)
    opt.rebind(net)
    train(net, opt, range(2))
    assert net.first.weight.min() >= 0.0
    assert net.first.bias.norm().item() == pytest.approx(1.0)


def test_a_constraint_is_taken_off_with_none() -> None:
    weight, opt = one(torch.randn(3), Box(-0.1, 0.1))
    opt.constrain("weight", None)
    steps(weight, opt)
    assert weight.abs().max() > 0.1


def test_how_many_values_are_at_their_bound_is_told() -> None:
    _, opt = one(torch.tensor([-3.0, 0.0, 0.5, 3.0]), Box(-1.0, torch.tensor([1.0, 0.0, 1.0, 2.0])))
    assert opt.at_bounds() == {"weight": 3}
    opt.constrain("weight", MaxNorm(1.0))
    assert opt.at_bounds() == {}


def test_values_that_are_not_there_are_at_no_bound_and_that_is_said() -> None:
    opt = paramstate.Adam(nn.Linear(3, 2, device="meta"), constraints={"bias": Box(torch.zeros(2), 1.0)})
    with pytest.raises(paramstate.UnsupportedError, match=r"'bias' is on the meta device.*materialize"):
        opt.at_bounds()
    assert opt.at_bounds("weight") == {}


class Halved(paramstate.Constraint):
    """A constraint of a user's own."""

    def require_fits(self, param: torch.Tensor, called: str) -> None:
        """It fits all."""

    def project_(self, param: torch.Tensor, called: str) -> None:  # noqa: ARG002  the signature is given
        param.mul_(0.5)

    def holds(self, param: torch.Tensor) -> bool:
        return bool((param == 0.0).all())

    def as_data(self) -> dict[str, object]:
        return {"kind": "halved"}


def test_a_constraint_of_a_users_own_is_applied_after_each_step() -> None:
    weight, opt = one(torch.tensor([8.0, -8.0]), Halved())
    assert weight.tolist() == [4.0, -4.0], "at once"
    opt.param_groups[0]["lr"] = 0.0
    opt.param_groups[0]["weight_decay"] = 0.0
    steps(weight, opt)
    assert weight.abs().max() < 4.0


def test_kept_momentum_holds_a_value_at_its_bound_and_zeroed_momentum_lets_it_go() -> None:
    def steps_until_it_leaves(constraint: Box) -> int:
        weight, opt = one(torch.zeros(1), constraint)
        opt.param_groups[0]["lr"] = 0.1
        for _ in range(20):
            weight.grad = torch.full((1,), -1.0)
            opt.step()
        assert weight.item() == 0.5
        for count in range(1, 100):
            weight.grad = torch.full((1,), 1.0)
            opt.step()
            if weight.item() < 0.5:
                return count
        raise AssertionError("it never left")

    assert steps_until_it_leaves(Box(-0.5, 0.5)) > 5
    assert steps_until_it_leaves(Box(-0.5, 0.5, zero_exp_avg=True)) == 1
    assert steps_until_it_leaves(Box(-0.5, torch.tensor([0.5]), zero_exp_avg=True)) == 1


@pytest.mark.parametrize(
    "constraint", [Box(-0.3, 0.2, zero_exp_avg=True), Box(torch.tensor([-0.3, -0.2, 0.0]), 0.2), MaxNorm(0.3)]
)
def test_constraints_survive_deepcopy_save_load_and_replacement(constraint: paramstate.Constraint) -> None:
    torch.manual_seed(0)
    net = Net(["first"])
    opt = paramstate.AdamW(net, lr=0.1)
    opt.constrain("first.weight", constraint)
    train(net, opt, range(2))
    twin, twin_opt = copy.deepcopy((net, opt))
    other = Net(["first"])
    other_opt = paramstate.AdamW(other, lr=0.1)
    other_opt.load_state_dict(opt.state_dict())
    for model, optimizer in ((net, opt), (twin, twin_opt), (other, other_opt)):
        model.first.weight = nn.Parameter(model.first.weight.detach() + 3.0)
        train(model, optimizer, [5])
        assert optimizer._find("first.weight").constraint == constraint
        assert constraint.holds(model.first.weight)


def test_per_element_bounds_go_through_the_map_that_carries_a_value() -> None:
    low = torch.tensor([[-0.1, -0.2, -0.3], [-0.4, -0.5, -0.6]])
    net = Net(["first"])
    opt = paramstate.AdamW(net, lr=0.5, constraints={"first.weight": Box(min=low)})
    opt.replace_("first.weight", net.first.weight.T, state=lambda t: t.T)
    for seed in range(3):
        give_gradient(net.first.weight, f"g:{seed}")
        opt.step()
    assert bool((net.first.weight >= low.T).all())
    assert torch.equal(opt._find("first.weight").constraint.min, low.T)


def test_a_function_is_not_saved_and_the_load_says_so() -> None:
    net = Net(["first"])
    opt = paramstate.AdamW(net, constraints={"first.weight": torch.tanh})
    report = paramstate.AdamW(Net(["first"])).load_state_dict(opt.state_dict())
    assert report.undeclared == ["first.weight"]
    again = paramstate.AdamW(Net(["first"]), constraints={"first.weight": torch.tanh})
    assert again.load_state_dict(opt.state_dict()).undeclared == []
    assert isinstance(again._find("first.weight").constraint, Projection)


def test_constraints_hold_where_torch_takes_the_step() -> None:
    weight = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    opt = paramstate.Adam([("weight", weight)], lr=0.5, constraints={"weight": MaxNorm(0.4)})
    weight.grad = torch.randn(3, dtype=torch.complex64)
    opt.step()
    assert weight.detach().norm() <= 0.4 * (1 + 1e-5)
    with pytest.raises(ConstraintError, match=r"'weight' is complex"):
        opt.constrain("weight", NonNegative())


@pytest.mark.parametrize("constraint", [MaxNorm(0.2, dim=1), UnitNorm(dim=(-1,)), MaxNorm(0.2)])
def test_norms_are_of_the_same_elements_behind_the_map_that_carries_a_value(constraint: paramstate.Constraint) -> None:
    weight, opt = one(torch.randn(4, 3), constraint)
    steps(weight, opt)
    moved = opt.replace_("weight", weight.detach().T.clone(), state=lambda t: t.T)
    steps(moved, opt)
    assert constraint.holds(moved.T)


def test_norms_that_a_map_tears_apart_are_refused() -> None:
    weight, opt = one(torch.randn(4, 3), MaxNorm(0.2, dim=1))
    with pytest.raises(ConstraintError, match=r"'weight'.*no dimensions of the new layout"):
        opt.replace_("weight", weight.detach().reshape(2, 6), state=lambda t: t.reshape(2, 6))
    assert opt.param(opt.id_of("weight")) is weight


def test_a_norm_over_a_dimension_twice_is_refused_and_not_declared() -> None:
    weight, opt = one(torch.randn(4, 3))
    with pytest.raises(ConstraintError, match=r"'weight'.*twice"):
        opt.constrain("weight", MaxNorm(0.2, dim=(0, -2)))
    steps(weight, opt, 1)


def test_a_function_may_mend_what_is_no_number() -> None:
    weight, opt = one(torch.tensor([1.0, 2.0]), lambda values: values.nan_to_num(0.0))
    with torch.no_grad():
        weight[0] = float("nan")
    opt.step()
    assert weight.tolist() == [0.0, 2.0]


class FailsLater:
    """A constraint that holds where it is declared, and fails when it is applied."""

    def __init__(self) -> None:
        self.is_on = False

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        if self.is_on:
            raise ZeroDivisionError("by the user")
        return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_function_that_fails_keeps_no_other_constraint_from_holding(dtype: torch.dtype, has_gradient: bool) -> None:
    first, second, third = FailsLater(), FailsLater(), lambda values: values * 0.0
    params = {name: nn.Parameter(torch.randn(2, dtype=dtype)) for name in "abc"}
    opt = paramstate.Adam(params.items(), lr=0.5, max_grad_norm=1.0, constraints={"a": first, "b": second, "c": third})
    first.is_on = second.is_on = True
    for param in params.values() if has_gradient else [params["c"]]:
        param.grad = torch.ones_like(param)
    with pytest.raises(ConstraintError, match=r"'a': the step was taken.*ZeroDivisionError: by the user; .*'b'"):
        opt.step()
    assert not params["c"].any()
    assert opt.state_of("c")["step"] == 1
    assert opt.grad_norm is not None


@pytest.mark.parametrize("constraint", [Box(torch.zeros(3), 1.0), NonNegative(), MaxNorm(1.0, dim=1), torch.tanh])
def test_a_constraint_may_be_declared_before_a_model_has_memory(constraint: object) -> None:
    layer = nn.Linear(3, 2, device="meta")
    opt = paramstate.Adam(layer, constraints={"weight": constraint})
    layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.fill_(-3.0)
    opt.step()
    assert bool((layer.weight >= -1.0).all())
    with pytest.raises(ConstraintError, match="nan"):
        paramstate.Adam(nn.Linear(3, 2, device="meta"), constraints={"weight": Box(torch.full((3,), float("nan")))})


@pytest.mark.parametrize("low", [torch.tensor([0, 1, 2]), torch.tensor([True, False, True])])
def test_bounds_may_be_whole_numbers(low: torch.Tensor) -> None:
    weight, opt = one(torch.randn(4, 3), Box(min=low))
    steps(weight, opt)
    assert bool((weight >= low).all())
    with pytest.raises(ConstraintError, match="real numbers"):
        Box(min=torch.zeros(3, dtype=torch.complex64))


def test_a_bound_is_a_value_of_its_own() -> None:
    weight = nn.Parameter(torch.ones(3))
    opt = paramstate.Adam([weight], lr=0.5, constraints=Box(max=weight.detach()))
    weight.grad = -torch.ones(3)
    opt.step()
    assert weight.tolist() == [1.0, 1.0, 1.0]
    weight.grad = 9.0 * torch.ones(3)
    opt.step()
    weight.grad = -99.0 * torch.ones(3)
    opt.step()
    opt.step()
    assert weight.tolist() == [1.0, 1.0, 1.0]
