"""Every configuration of torch's optim_db: numbers, refusals, options."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

from optim_db_cases import (
    CLASSES,
    FOR_LOOP,
    INFOS,
    TOLERANCES,
    Case,
    assert_near,
    assert_states_near,
    each,
    leaf,
    refusal,
    refused,
    taken,
)

STEPS = 7
HALVES = (torch.bfloat16, torch.float16)

TAKEN = taken()
PLAIN = [case for case in TAKEN if not case["differentiable"]]
FUSED = [case for case in PLAIN if case["fused"]]

LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "weight": lambda dtype: torch.randn(4, 3, dtype=dtype),
    "bias": lambda dtype: torch.randn(4, dtype=dtype),
    "0-dim": lambda dtype: torch.randn((), dtype=dtype),
    "zero-size": lambda dtype: torch.randn(0, dtype=dtype),
    "zero-size matrix": lambda dtype: torch.randn(3, 0, dtype=dtype),
    "channels_last": lambda dtype: torch.randn(2, 3, 2, 2, dtype=dtype).contiguous(memory_format=torch.channels_last),
    "sliced weight": lambda dtype: torch.randn(4, 3, 2, dtype=dtype)[..., 0],
    "sliced bias": lambda dtype: torch.randn(4, 2, dtype=dtype)[..., 0],
    "transposed": lambda dtype: torch.randn(3, 4, dtype=dtype).t(),
}


# ---- numbers --------------------------------------------------------------------------------------------------------


def small_params(case: Case) -> Iterator[Tensor]:
    """Of small values, so that an update shows in half precision."""
    torch.manual_seed(1)
    for make in LAYOUTS.values():
        yield case.trainable(make(case.dtype).mul_(0.05))


def has_gradient(number: int, step: int) -> bool:
    """One step is without gradients, and in two that follow half of the parameters is frozen."""
    return step != 2 and (step not in {3, 4} or number % 2 == 0)


def adopt(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Put torch's bits into our tensors."""
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other)
            for key, tensor in ours.state.get(mine, {}).items():
                tensor.copy_(theirs.state[other][key])


@each([case for dtype in TOLERANCES for case in taken(dtype)])
def test_every_configuration_gives_the_numbers_of_torchs_for_loop(case: Case) -> None:
    """Whatever the flags, dtype and layout, values and state are those of torch's for-loop, to rounding."""
    mine, other = (list(small_params(case)) for _ in range(2))
    ours, theirs = case.ours(mine, **case.options()), case.theirs(other, **case.for_loop())
    pairs = list(zip(mine, other, strict=True))
    for step in range(STEPS):
        for number, pair in enumerate(pairs):
            grad = torch.randn(pair[1].shape, dtype=case.dtype)
            for parameter in pair:
                parameter.grad = grad.clone() if has_gradient(number, step) else None
        ours.step()
        theirs.step()
        assert_states_near(ours, theirs, pairs)
        if case.dtype in HALVES:  # each rounding is judged alone: one that falls the other way would be carried along
            adopt(ours, theirs, pairs)


@each([case for dtype in TOLERANCES for case in refused(dtype)])
def test_what_torch_refuses_is_refused_in_the_same_words(case: Case) -> None:
    """A configuration that torch refuses for the host or a dtype raises torch's error, and writes nothing."""
    expected = refusal(case)
    assert expected is not None
    parameter = case.trainable(torch.ones(2, dtype=case.dtype))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(type(expected), match=re.escape(str(expected)) or None):
        case.ours([parameter], **case.options()).step()
    assert torch.equal(parameter.detach(), torch.ones(2, dtype=case.dtype))


def test_the_list_covers_what_the_contract_speaks_of() -> None:
    """Torch's list holds tensor lr and betas, capturable, amsgrad, maximize and each of the three flags."""
    for name in CLASSES:
        options = [case for case in [*TAKEN, *refused()] if case.name == name]
        for option in ("amsgrad", "maximize", "capturable", "foreach", "fused", "differentiable"):
            assert any(case[option] for case in options), option
        assert any(isinstance(case["lr"], Tensor) for case in options if case in TAKEN)
        assert any(isinstance(case["betas"][0], Tensor) for case in options if case in TAKEN and case["betas"])


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(name, number, id=f"{name}: {error.optimizer_error_input.desc}")
        for name, info in INFOS.items()
        for number, error in enumerate(info.optim_error_inputs_func("cpu", torch.float32))
    ],
)
def test_error_inputs_raise_what_torch_lists_for_them(name: str, number: int) -> None:
    """Each error input of torch's list raises or warns with the class and the message that the list gives."""
    error = INFOS[name].optim_error_inputs_func("cpu", torch.float32)[number]
    given, warns = error.optimizer_error_input, issubclass(error.error_type, Warning)

    def provoke(cls: type[torch.optim.Optimizer]) -> str:
        with (pytest.warns if warns else pytest.raises)(error.error_type, match=error.error_regex) as caught:
            optimizer = cls(copy.copy(given.params), **copy.deepcopy(given.kwargs))
            if error.error_on is OptimizerErrorEnum.STEP_ERROR:
                optimizer.step()
        return str(caught[0].message if warns else caught.value)

    assert provoke(CLASSES[name]) == provoke(INFOS[name].optim_cls)


# ---- direction, schedulers, groups ----------------------------------------------------------------------------------


class Problem:
    """A little regression with a weight, a bias and a fixed input."""

    def __init__(self, *, contiguous: bool = True) -> None:
        torch.manual_seed(2)
        weight, bias = torch.randn(6, 4, 2), torch.randn(6, 2)
        if contiguous:
            weight, bias = weight[..., 0].contiguous(), bias[..., 0].contiguous()
        else:
            weight, bias = weight[..., 0], bias[..., 0]
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.input = torch.randn(4)

    @property
    def params(self) -> list[Tensor]:
        return [self.weight, self.bias]

    def loss(self) -> Tensor:
        return (self.weight.mv(self.input) + self.bias).pow(2).sum()

    def losses(
        self,
        optimizer: torch.optim.Optimizer,
        schedulers: list[LRScheduler] | None = None,
        *,
        steps: int = 20,
        before_step: Callable[[], None] = lambda: None,
    ) -> list[float]:
        """The loss before each step and after the last."""

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            before_step()
            return loss

        found = []
        for _ in range(steps):
            loss = optimizer.step(closure).detach()
            found.append(float(loss))
            for scheduler in schedulers or ():
                scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))
        return [*found, float(self.loss().detach())]


def assert_same_losses_in_the_right_direction(ours: list[float], theirs: list[float], *, rises: bool) -> None:
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] > ours[0] if rises else ours[-1] < ours[0]


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "sliced"])
@each(PLAIN)
def test_the_loss_goes_in_the_right_direction(case: Case, contiguous: bool) -> None:
    """Each configuration lowers the loss, or raises it under `maximize`, along torch's own losses."""
    mine, other = Problem(contiguous=contiguous), Problem(contiguous=contiguous)
    assert_same_losses_in_the_right_direction(
        mine.losses(case.ours(mine.params, **case.options())),
        other.losses(case.theirs(other.params, **case.for_loop())),
        rises=bool(case["maximize"]),
    )


def scheduler_sets() -> Iterator[Any]:
    """Each set of schedulers that torch lists for a class, under the names of their types."""
    for name, info in INFOS.items():
        for makers in info.scheduler_inputs:
            opt = torch.optim.SGD([torch.ones(1)], lr=0.1)
            called = " and ".join(type(make(opt)).__name__ for make in makers)
            yield pytest.param(name, makers, id=f"{name}: {called}")


@pytest.mark.parametrize("with_tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(("name", "makers"), [*scheduler_sets()])
def test_schedulers_drive_every_configuration(
    name: str, makers: list[Callable[[torch.optim.Optimizer], LRScheduler]], with_tensor_lr: bool
) -> None:
    """Under each of torch's sets of schedulers losses and rates are torch's, be lr a number or a tensor."""
    for case in PLAIN:
        if case.name != name or case["foreach"]:
            continue
        lr = float(case["lr"] or 1e-3)
        found = []
        for cls, flags in ((case.ours, {}), (case.theirs, FOR_LOOP)):
            problem = Problem()
            opt = cls(problem.params, **case.options(**flags, lr=torch.tensor(lr) if with_tensor_lr else lr))
            losses = problem.losses(opt, [make(opt) for make in makers], steps=12)
            found.append((losses, float(opt.param_groups[0]["lr"])))
        assert_same_losses_in_the_right_direction(found[0][0], found[1][0], rises=bool(case["maximize"]))
        assert found[0][1] == pytest.approx(found[1][1])


@pytest.mark.parametrize(("name", "makers"), [*scheduler_sets()])
def test_schedulers_drive_groups_of_different_rates(
    name: str, makers: list[Callable[[torch.optim.Optimizer], LRScheduler]]
) -> None:
    """Schedulers move the rates of two groups apart from each other, as with torch's class."""
    found = []
    for cls in (CLASSES[name], INFOS[name].optim_cls):
        problem = Problem()
        opt = cls([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}])
        losses = problem.losses(opt, [make(opt) for make in makers])
        found.append((losses, [group["lr"] for group in opt.param_groups]))
    assert_same_losses_in_the_right_direction(found[0][0], found[1][0], rises=False)
    assert found[0][1] == pytest.approx(found[1][1])


@each(PLAIN)
def test_groups_have_a_weight_decay_of_their_own(case: Case) -> None:
    """Options given in the group dicts alone are honoured, and one group's weight decay is not the other's."""
    found = []
    for cls, flags in ((case.ours, {}), (case.theirs, FOR_LOOP)):
        problem = Problem()
        groups = [
            {"params": [problem.weight], **case.options(**flags)},
            {"params": [problem.bias], **case.options(**flags, weight_decay=0.5)},
        ]
        found.append((problem.losses(cls(groups)), problem.bias))
    assert_same_losses_in_the_right_direction(found[0][0], found[1][0], rises=bool(case["maximize"]))
    assert_near(found[0][1], found[1][1], "bias")


@each(PLAIN)
def test_groups_have_a_rate_of_their_own(case: Case) -> None:
    """A group whose rate is next to nothing stays where it is, while the other one trains."""
    problem, idle = Problem(), nn.Parameter(torch.randn(2))
    before = idle.detach().clone()
    options = {"lr": 1e-3, **case.options()}
    opt = case.ours([{"params": problem.params, **options}, {"params": [idle]}], lr=1e-28)

    def push() -> None:
        idle.grad = torch.ones_like(idle)

    losses = problem.losses(opt, before_step=push)
    assert losses[-1] > losses[0] if case["maximize"] else losses[-1] < losses[0]
    assert torch.equal(idle.detach(), before)
    assert float(opt.state[idle]["step"]) == 20


@pytest.mark.parametrize("dimensions", [0, 1, 2])
@each([case for case in PLAIN if not case["foreach"]])
def test_a_tensor_lr_of_any_1_element_shape_steps_as_the_number(case: Case, dimensions: int) -> None:
    """A tensor lr with no, one or two dimensions gives the very bits that the number gives."""
    found = []
    lr = torch.full((1,) * dimensions, 1e-3)
    for given in (lr.item(), lr):
        problem = Problem()
        problem.losses(case.ours(problem.params, **case.options(lr=given)), steps=5)
        found.append(problem)
    for one, two in zip(found[0].params, found[1].params, strict=True):
        assert torch.equal(one, two)


# ---- complex, mixed, without gradients ------------------------------------------------------------------------------


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@each([case for case in PLAIN if not case["fused"]])
def test_complex_parameters_step_as_their_real_and_imaginary_parts(case: Case) -> None:
    """A complex parameter beside a real one moves as a real parameter of its pairs does."""
    values = [torch.randn(5, 3, dtype=torch.complex64), torch.randn(5, dtype=torch.complex64), torch.randn(5, 3)]
    mixed = [leaf(value.clone()) for value in values]
    real = [leaf((torch.view_as_real(v) if v.is_complex() else v).clone()) for v in values]
    opt, twin = case.ours(mixed, **case.options()), case.ours(real, **case.options())
    for _ in range(3):
        for one, two in zip(mixed, real, strict=True):
            one.grad = torch.randn_like(one)
            two.grad = (torch.view_as_real(one.grad) if one.is_complex() else one.grad).clone()
        opt.step()
        twin.step()
        for one, two in zip(mixed, real, strict=True):
            pairs = torch.view_as_real(one.detach()) if one.is_complex() else one.detach()
            assert_near(pairs, two.detach(), "value")


@each([case for case in PLAIN if not case["fused"]])
def test_a_complex_parameter_descends_as_two_real_ones(case: Case) -> None:
    """Through a real backward a complex parameter and its two parts as parameters take the same path."""
    start = torch.randn(2, dtype=torch.complex64)
    whole, parts = leaf(start.clone()), [leaf(start.real.clone()), leaf(start.imag.clone())]
    opt, twin = case.ours([whole], **case.options()), case.ours(parts, **case.options())
    for _ in range(3):
        for optimizer, value in ((opt, whole), (twin, torch.complex(*parts))):
            optimizer.zero_grad()
            rosenbrock(*value).abs().backward()
            optimizer.step()
        assert_near(whole.detach().real.clone(), parts[0].detach(), "real part")
        assert_near(whole.detach().imag.clone(), parts[1].detach(), "imaginary part")


@each(PLAIN)
def test_parameters_of_different_dtypes_step_in_one_group(case: Case) -> None:
    """One group of float64, float32, float16, bfloat16 and an idle integer steps each in its own precision."""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    values = [torch.rand(2, 3, dtype=dtype) for dtype in dtypes]
    whole = torch.arange(6)
    mine, other = ([*(leaf(value.clone()) for value in values), whole] for _ in range(2))
    eps = 0.1  # the default is zero in float16
    ours, theirs = case.ours(mine, **case.options(eps=eps)), case.theirs(other, **case.for_loop() | {"eps": eps})
    pairs = list(zip(mine, other, strict=True))[:-1]
    for _ in range(3):
        for one, two in pairs:
            one.grad = torch.rand_like(one)
            two.grad = one.grad.clone()
        ours.step()
        theirs.step()
        assert_states_near(ours, theirs, pairs)
        adopt(ours, theirs, pairs)
    assert torch.equal(whole, torch.arange(6))
    assert whole not in ours.state


@each(TAKEN)
def test_a_step_without_gradients_does_nothing(case: Case) -> None:
    """Parameters without gradients keep their values and get no state; the closure's loss is returned."""
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [param.clone() for param in params]
    opt = case.ours(params, **case.options())
    assert float(opt.step(lambda: torch.tensor([1.0]))) == 1
    assert not opt.state
    for param, value in zip(params, before, strict=True):
        assert torch.equal(param, value)


@each([case for case in TAKEN if not case["weight_decay"]])
def test_a_step_with_zero_gradients_moves_nothing_but_decay(case: Case) -> None:
    """Zero gradients leave the values alone without decay; AdamW's own decay shrinks them by lr times decay."""
    value = torch.randn(5, 1)
    param = case.trainable(value.clone())
    opt = case.ours([param], **case.options())
    param.grad = torch.zeros_like(param)
    opt.step()
    decay = 1 - float(case["lr"] or 1e-3) * opt.defaults["weight_decay"]
    torch.testing.assert_close(param.detach(), value * decay, rtol=1e-6, atol=0)
    assert float(opt.state[param]["step"]) == 1


@each(TAKEN)
def test_zero_grad_drops_gradients_or_zeroes_them_in_place(case: Case) -> None:
    """`zero_grad()` drops gradients; with `set_to_none=False` the same tensors hold zeros, without a graph."""
    param = case.trainable(torch.ones(2))
    opt = case.ours([param], **case.options())
    param.grad = grad = torch.ones(2, requires_grad=True) * 2
    opt.zero_grad(set_to_none=False)
    assert param.grad is grad
    assert grad.tolist() == [0.0, 0.0]
    assert grad.grad_fn is None
    opt.zero_grad()
    assert param.grad is None


@each(TAKEN)
def test_every_parameter_that_stepped_has_a_state(case: Case) -> None:
    """After a step no entry of the state is empty, and the optimizer can be printed with its options."""
    params = [case.trainable(torch.randn(n)) for n in (3, 5)]
    opt = case.ours(params, **case.options())
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    assert all(len(opt.state[param]) >= 3 for param in params)
    shown, expected = repr(opt), repr(case.theirs(params, **case.options()))
    assert shown == expected


@pytest.mark.parametrize("default", [torch.float64, torch.float32, torch.float16], ids=str)
@each(TAKEN)
def test_the_dtype_of_step_follows_torchs_rule(case: Case, default: torch.dtype) -> None:
    """`step` is float32, but float64 where that is the default dtype and the group is not fused, as in torch."""
    torch.set_default_dtype(default)
    found = []
    for cls in (case.ours, case.theirs):
        param = case.trainable(torch.ones(2, dtype=torch.float32))
        param.grad = torch.ones_like(param)
        opt = cls([param], **case.options())
        opt.step()
        found.append(opt.state[param]["step"])
    assert found[0].dtype == found[1].dtype
    assert found[0].device == found[1].device


# ---- hooks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pre", "post"])
@each(TAKEN)
def test_a_step_hook_runs_on_each_step_until_it_is_removed(case: Case, kind: str) -> None:
    """A hook before or after the step runs once a step, is given the optimizer, and stops when removed."""
    calls: list[tuple[Any, ...]] = []
    opt = case.ours([torch.ones(2)], **case.options())
    handle = getattr(opt, f"register_step_{kind}_hook")(lambda *given: calls.append(given))
    opt.step()
    opt.step(None)
    assert [given[0] for given in calls] == [opt, opt]
    handle.remove()
    opt.step()
    assert len(calls) == 2


@each(TAKEN)
def test_global_and_own_hooks_interleave_over_two_optimizers(case: Case) -> None:
    """Global hooks enclose the own ones, for ours and for torch's SGD in turn, until they are removed."""
    params = [torch.ones(2)]
    opt, sgd = case.ours(params, **case.options()), torch.optim.SGD(params, lr=0.1)
    calls: list[str] = []
    registered = {
        "global pre": [register_optimizer_step_pre_hook],
        "pre": [opt.register_step_pre_hook, sgd.register_step_pre_hook],
        "post": [opt.register_step_post_hook, sgd.register_step_post_hook],
        "global post": [register_optimizer_step_post_hook],
    }
    handles = [
        register(lambda *_, name=name: calls.append(name)) for name, many in registered.items() for register in many
    ]
    try:
        for count, optimizer in enumerate((opt, sgd, opt), start=1):
            optimizer.step()
            assert calls == [*registered] * count
    finally:
        for handle in handles:
            handle.remove()
    opt.step()
    sgd.step()
    assert len(calls) == 12


# ---- fused: the gradient scaler and the meta device -----------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 1.0, 8.0])
@each(FUSED)
def test_a_fused_step_that_found_inf_changes_nothing(case: Case, scale: float | None) -> None:
    """With `found_inf` set values, state and step stay, whether or not a scale is given."""
    params = [torch.ones(1) for _ in range(3)]
    opt = case.ours(params, **case.options())
    for found_inf in (0.0, 1.0):
        before = [param.clone() for param in params]
        for param in params:
            param.grad = torch.ones_like(param)
        opt.grad_scale = None if scale is None else torch.tensor([scale])
        opt.found_inf = torch.tensor(found_inf)
        opt.step()
    for param, value in zip(params, before, strict=True):
        assert torch.equal(param, value)
        assert float(opt.state[param]["step"]) == 1
        assert not torch.equal(param, torch.ones(1)), "the step before it was taken"


def scaled_run(opt: torch.optim.Optimizer, problem: Problem, *, scaled: bool, unscale: bool) -> list[float]:
    """Four steps of which the third overflows, with a scaler that is on or off; the scale after each."""
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=1, enabled=scaled)
    scales = []
    for number in range(4):
        opt.zero_grad()
        scaler.scale(problem.loss()).backward()
        overflows = number == 2
        if overflows:
            problem.weight.grad[0, 0] = float("inf")
        if unscale:
            scaler.unscale_(opt)
        if scaled or not overflows:
            scaler.step(opt)
            scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("unscale", [False, True], ids=["unscaled in the step", "unscaled before it"])
@each(FUSED)
def test_a_scaler_over_a_fused_step_gives_the_numbers_without_one(case: Case, unscale: bool) -> None:
    """A scaler that grows, overflows and backs off over a fused step ends where torch's for-loop ends without one."""
    mine, other = Problem(), Problem()
    ours, theirs = case.ours(mine.params, **case.options()), case.theirs(other.params, **case.for_loop())
    scales = scaled_run(ours, mine, scaled=True, unscale=unscale)
    scaled_run(theirs, other, scaled=False, unscale=False)
    assert scales == [256.0, 512.0, 256.0, 512.0]
    assert float(ours.state[mine.weight]["step"]) == 3
    for one, two in zip(mine.params, other.params, strict=True):
        assert_near(one, two, "value")
        assert_near(one.grad, two.grad, "gradient, written back unscaled")


@pytest.mark.parametrize("name", CLASSES)
def test_fused_on_the_meta_device_is_refused_and_nothing_is_left_behind(name: str) -> None:
    """A fused step on meta raises torch's text; once the module is real the same optimizer steps."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1)).to("meta")
    opt = CLASSES[name](module.parameters(), fused=True)
    for param in module.parameters():
        param.grad = torch.empty_like(param)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        opt.step()
    assert not opt.state
    opt.zero_grad(set_to_none=True)
    module.to_empty(device="cpu")
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
