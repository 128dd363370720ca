"""Dtypes, layouts, shapes and kinds of tensors.

Ours and torch's classes run the same code wherever torch is right; where it is not, `test_better_than_stock.py` tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import paramstate
from layouts import LAYOUTS, Make

Optimizer = torch.optim.Optimizer
OURS_AND_TORCHS = (paramstate.Adam, torch.optim.Adam)
PAIRS = [(paramstate.Adam, torch.optim.Adam), (paramstate.AdamW, torch.optim.AdamW)]
REFUSED_BY_FUSED = "`fused=True` requires all the params to be floating point Tensors of supported devices"
SPARSE = "Adam does not support sparse gradients, please consider SparseAdam instead"

Found = dict[str, torch.Tensor]


def held(opt: Optimizer, parameter: torch.Tensor) -> Found:
    return {"value": parameter.detach(), **opt.state[parameter]}


def steps(cls: type[Optimizer], value: torch.Tensor, grads: list[torch.Tensor], **options: Any) -> Found:
    """Value and state of one parameter after a step for each gradient."""
    parameter = nn.Parameter(value)
    opt = cls([parameter], **options)
    for grad in grads:
        parameter.grad = grad
        opt.step()
    return held(opt, parameter)


# ---- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [
        (torch.float64, 1e-7, 1e-7),
        (torch.float32, 1.3e-6, 1e-5),
        (torch.bfloat16, 5e-3, 5e-3),
        (torch.float16, 5e-3, 5e-3),
    ],
)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_every_floating_dtype_is_torchs_fused(
    ours: type, theirs: type, dtype: torch.dtype, rtol: float, atol: float, amsgrad: bool
) -> None:
    """float64, float32, bfloat16 and float16 give torch's fused values and moments, in the value's dtype."""
    value = torch.randn(5, 7).to(dtype)
    grads = [torch.randn(5, 7).to(dtype) for _ in range(7)]
    options: dict[str, Any] = {"amsgrad": amsgrad, "weight_decay": 0.1, "maximize": True}
    found = steps(ours, value.clone(), grads, **options)
    torch.testing.assert_close(found, steps(theirs, value.clone(), grads, fused=True, **options), rtol=rtol, atol=atol)
    assert {key: tensor.dtype for key, tensor in found.items() if key != "step"}.keys() > {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_are_torchs(dtype: torch.dtype, foreach: bool | None, amsgrad: bool) -> None:
    """A complex parameter steps as torch steps it: real and imaginary part each for itself."""
    value = torch.randn(4, dtype=dtype)
    grads = [torch.randn(4, dtype=dtype) for _ in range(3)]
    runs = [steps(cls, value.clone(), grads, lr=0.1, foreach=foreach, amsgrad=amsgrad) for cls in OURS_AND_TORCHS]
    torch.testing.assert_close(runs[0], runs[1])
    assert runs[0]["exp_avg"].dtype == dtype


def test_complex_parameters_under_fused_give_torchs_text() -> None:
    """A complex parameter in a group with `fused=True` raises torch's error, before anything is written."""
    for cls in OURS_AND_TORCHS:
        parameter = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        opt = cls([parameter], fused=True)
        parameter.grad = torch.ones_like(parameter)
        with pytest.raises(RuntimeError, match=REFUSED_BY_FUSED):
            opt.step()
        assert torch.equal(parameter.detach(), torch.ones(3, dtype=torch.complex64))


def test_all_dtypes_and_devices_mix_in_one_group() -> None:
    """Real, half, double, complex and meta parameters in one group are each stepped as torch steps them."""
    dtypes = [torch.float32, torch.bfloat16, torch.complex64, torch.float64, torch.float16]
    runs = []
    for cls in OURS_AND_TORCHS:
        params = [nn.Parameter(torch.linspace(0, 1, 3).to(dtype)) for dtype in dtypes]
        meta = nn.Parameter(torch.empty(3, device="meta"))
        opt = cls([*params[:2], meta, *params[2:]], lr=0.1)
        for seed in range(3):
            for number, parameter in enumerate(params):
                drawn = torch.randn(3, generator=torch.Generator().manual_seed(10 * seed + number))
                parameter.grad = drawn.to(parameter.dtype)
            meta.grad = torch.empty(3, device="meta")
            opt.step()
        assert opt.state[meta]["exp_avg"].is_meta
        assert float(opt.state[meta]["step"]) == 3
        runs.append([held(opt, parameter) for parameter in params])
    for ours, theirs in zip(*runs, strict=True):
        tolerance = 5e-3 if ours["value"].dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_dtype_without_arithmetic_is_refused_as_torch_refuses_it() -> None:
    """Integer and float8 parameters raise torch's errors and leave no state behind."""
    for dtype, error in ((torch.int64, RuntimeError), (torch.float8_e4m3fn, NotImplementedError)):
        texts = []
        for cls in OURS_AND_TORCHS:
            tensor = torch.ones(3).to(dtype)
            opt = cls([tensor])
            tensor.grad = torch.ones(3).to(dtype)
            with pytest.raises(error) as caught:
                opt.step()
            texts.append(str(caught.value))
            if cls is paramstate.Adam:
                assert not opt.state
        assert texts[0] == texts[1]


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make_value", "make_grad"), LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_every_layout_is_stepped_as_torchs_loop_steps_it(
    ours: type, theirs: type, make_value: Make, make_grad: Make
) -> None:
    """Whatever the strides of value and gradient, values and moments are those of torch's own loop."""
    runs = []
    for cls in (ours, theirs):
        torch.manual_seed(5)
        value = make_value()
        runs.append(steps(cls, value, [make_grad() for _ in range(3)], lr=0.1, foreach=False, amsgrad=True))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("make_value", "make_grad"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_moments_have_the_strides_that_torch_gives_them(make_value: Make, make_grad: Make) -> None:
    """Moments take the strides of a dense parameter (channels_last stays so); a slice gets contiguous ones."""
    ours, theirs = (steps(cls, make_value(), [make_grad()]) for cls in OURS_AND_TORCHS)
    for key, moment in theirs.items():
        assert ours[key].stride() == moment.stride(), key


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_empty_and_0_dim_parameters_have_state_and_age(shape: tuple[int, ...], amsgrad: bool) -> None:
    """A parameter without elements, as a shard may be, or without dimensions has state, and its step counts."""
    ours, theirs = (
        steps(cls, torch.ones(shape), [torch.full(shape, 2.0)] * 2, lr=0.1, amsgrad=amsgrad) for cls in OURS_AND_TORCHS
    )
    assert ours.keys() == theirs.keys()
    assert float(ours["step"]) == 2
    torch.testing.assert_close(ours, theirs)


def test_one_object_listed_twice_warns_and_steps_twice() -> None:
    """One parameter that is listed twice in a group warns, and steps twice, as in torch."""
    runs = []
    for cls in OURS_AND_TORCHS:
        parameter = nn.Parameter(torch.ones(5))
        with pytest.warns(UserWarning, match="duplicate"):
            opt = cls([parameter, parameter], lr=0.1)
        for _ in range(2):
            parameter.grad = torch.linspace(-1, 1, 5)
            opt.step()
        assert float(opt.state[parameter]["step"]) == 4
        runs.append(held(opt, parameter))
    torch.testing.assert_close(*runs)


def test_two_objects_that_share_elements_are_refused() -> None:
    """Two different parameters over the same elements are refused at construction; interleaved ones pass."""
    base = torch.zeros(6, 4)
    with pytest.raises(paramstate.OverlapError, match="share memory"):
        paramstate.Adam([nn.Parameter(base[:4]), nn.Parameter(base[3:])])
    runs = []
    for cls in OURS_AND_TORCHS:
        room = base.clone()
        params = [nn.Parameter(room[:, ::2]), nn.Parameter(room[:, 1::2])]
        opt = cls(params, lr=0.1)
        for parameter in params:
            parameter.grad = torch.linspace(1, 2, 12).reshape(6, 2)
        opt.step()
        runs.append(room)
    torch.testing.assert_close(*runs)
    assert bool(runs[0].ne(0).all())


# ---- gradients that are not plain numbers in memory -----------------------------------------------------------------


def sparse_coo() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (4, 2), check_invariants=True)


@pytest.mark.parametrize("fused", [None, True])
def test_sparse_gradients_are_refused_with_torchs_text(fused: bool | None) -> None:
    """A sparse gradient raises torch's sentence, and no parameter of the optimizer has moved."""
    for cls in OURS_AND_TORCHS:
        dense, embedding = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 2))
        opt = cls([embedding, dense], fused=fused)
        dense.grad, embedding.grad = torch.ones(3), sparse_coo()
        with pytest.raises(RuntimeError, match=SPARSE):
            opt.step()
        assert torch.equal(dense.detach(), torch.ones(3))
        assert torch.equal(embedding.detach(), torch.ones(4, 2))


def strided_imaginary(n: int) -> torch.Tensor:
    return torch.complex(torch.ones(n), torch.arange(1.0, n + 1)).conj().imag


NEGATED: dict[str, Callable[[], torch.Tensor]] = {
    "imaginary part": lambda: strided_imaginary(4),
    "imaginary part, one element": lambda: strided_imaginary(1),
    "imaginary part, 0-dim": lambda: strided_imaginary(1)[0],
    "imaginary part, permuted": lambda: strided_imaginary(6).view(2, 3).t(),
}


@pytest.mark.parametrize("make", NEGATED.values(), ids=NEGATED.keys())
def test_a_gradient_with_a_pending_negation_is_read_with_its_sign(make: Callable[[], torch.Tensor]) -> None:
    """The imaginary part of a conjugate, whose memory holds the negated numbers, is read with its sign."""
    grad = make()
    assert grad.is_neg()
    plain = grad.clone()
    assert not plain.is_neg()
    runs = [steps(cls, torch.zeros(grad.shape), [plain, grad, plain, grad], lr=0.1) for cls in OURS_AND_TORCHS]
    torch.testing.assert_close(runs[0], runs[1])


# ---- kinds of tensors -----------------------------------------------------------------------------------------------


def test_meta_parameters_step_without_memory() -> None:
    """Parameters on the meta device step as torch's: their state is on meta, and the step counts."""
    for cls in OURS_AND_TORCHS:
        module = nn.Linear(3, 2, device="meta")
        opt = cls(module.parameters(), lr=0.1)
        for _ in range(2):
            for parameter in module.parameters():
                parameter.grad = torch.empty_like(parameter)
            opt.step()
        assert opt.state[module.weight]["exp_avg"].is_meta
        assert float(opt.state[module.weight]["step"]) == 2


def test_meta_parameters_under_fused_give_torchs_text_and_train_once_real() -> None:
    """`fused=True` on meta raises torch's error; after `to_empty` the same optimizer trains the real ones."""
    for cls in OURS_AND_TORCHS:
        module = nn.Linear(3, 2, device="meta")
        opt = cls(module.parameters(), lr=0.1, fused=True)
        module.weight.grad = torch.empty_like(module.weight)
        with pytest.raises(RuntimeError, match=REFUSED_BY_FUSED):
            opt.step()
        opt.zero_grad()
        parameter = opt.param_groups[0]["params"][0]
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.ones(2, 3)))
        parameter.grad = torch.ones(2, 3)
        opt.step()
        torch.testing.assert_close(module.weight.detach(), torch.full((2, 3), 0.9))


def test_meta_parameters_of_a_known_model_are_followed_through_to_empty() -> None:
    """`to_empty` makes new parameters and tells no one: where the model is known, they are trained."""
    module = nn.Linear(3, 2, device="meta")
    opt = paramstate.Adam(module, lr=0.1, fused=True)
    module.to_empty(device="cpu")
    nn.init.ones_(module.weight)
    opt.zero_grad()
    module.weight.grad = torch.ones(2, 3)
    opt.step()
    torch.testing.assert_close(module.weight.detach(), torch.full((2, 3), 0.9))


def test_max_grad_norm_over_meta_gradients_is_refused_by_name() -> None:
    """A norm needs values: `max_grad_norm` with a gradient on meta raises and names both."""
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    opt = paramstate.Adam([parameter], max_grad_norm=1.0)
    parameter.grad = torch.empty(3, device="meta")
    with pytest.raises(paramstate.UnsupportedError, match=r"max_grad_norm.*meta"):
        opt.step()


def test_inference_tensors_train_in_inference_mode() -> None:
    """Parameters that are inference tensors are trained in inference mode as torch trains them."""
    runs = []
    for cls in OURS_AND_TORCHS:
        with torch.inference_mode():
            found = steps(cls, torch.ones(3), [torch.linspace(-1, 1, 3)] * 3, lr=0.1)
            assert found["value"].is_inference()
            runs.append({key: tensor.tolist() for key, tensor in found.items()})
    assert runs[0].keys() == runs[1].keys()
    for key, wanted in runs[1].items():
        assert runs[0][key] == pytest.approx(wanted)


class Tagged(torch.Tensor):
    """A subclass without behaviour of its own."""


class TaggedParameter(nn.Parameter):
    """A subclass of the parameter class, as quantisation libraries have them."""


SUBCLASSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Tensor subclass": lambda t: t.as_subclass(Tagged),
    "Parameter subclass": TaggedParameter,
    "wrapper subclass": lambda t: nn.Parameter(TwoTensor(t, 2 * t)),
}


@pytest.mark.parametrize("make", SUBCLASSES.values(), ids=SUBCLASSES.keys())
def test_subclasses_of_tensor_step_by_their_own_operations(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A tensor subclass is stepped through its own operations, with torch's values and kinds of moments."""
    runs = []
    for cls in OURS_AND_TORCHS:
        parameter = make(torch.linspace(0, 1, 4)).requires_grad_()
        opt = cls([parameter], lr=0.1)
        for seed in range(3):
            drawn = torch.randn(4, generator=torch.Generator().manual_seed(seed))
            parameter.grad = TwoTensor(drawn, -drawn) if type(parameter) is TwoTensor else drawn
            opt.step()
        runs.append((parameter, opt.state[parameter]))
    (ours, state), (theirs, its_state) = runs
    assert type(ours) is type(theirs)
    assert {key: type(tensor) for key, tensor in state.items()} == {key: type(t) for key, t in its_state.items()}
    for part in ("a", "b") if isinstance(ours, TwoTensor) else (None,):
        plain = [(p if part is None else getattr(p, part)).detach().as_subclass(torch.Tensor) for p in (ours, theirs)]
        torch.testing.assert_close(*plain)


@pytest.mark.parametrize("known_by", ["parameters", "model"])
def test_lazy_parameters_are_trained_once_they_have_a_shape(known_by: str) -> None:
    """An optimizer over uninitialised parameters trains them from the first forward pass on, as in torch."""
    runs = []
    for cls in OURS_AND_TORCHS:
        torch.manual_seed(5)
        module = nn.LazyLinear(2)
        given = module if cls is paramstate.Adam and known_by == "model" else module.parameters()
        opt = cls(given, lr=0.1)
        for _ in range(2):
            opt.zero_grad()
            module(torch.ones(1, 3)).sum().backward()
            opt.step()
        runs.append([held(opt, parameter) for parameter in module.parameters()])
    torch.testing.assert_close(runs[0], runs[1])
    assert float(runs[0][0]["step"]) == 2


# ---- options that are tensors, or that choose an implementation -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_tensor_rates_and_betas_give_the_numbers_of_floats(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A rate and betas given as tensors of one element give what torch gives, for every dtype of value."""
    value = torch.linspace(0, 1, 4).to(dtype)
    grads = [torch.linspace(1, 2, 4).to(dtype)] * 3
    options = {
        "lr": torch.full(shape, 0.1),
        "betas": (torch.full(shape, 0.5), torch.full(shape, 0.75)),
        "foreach": False,
    }
    runs = [steps(cls, value.clone(), grads, **options) for cls in OURS_AND_TORCHS]
    tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(runs[0], runs[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("choice", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_foreach_and_fused_choose_no_other_numbers(ours: type, theirs: type, choice: dict[str, bool]) -> None:
    """Whatever `foreach` and `fused` say, values and moments are those of torch with the same choice."""
    value, grads = torch.linspace(-1, 1, 6), [torch.linspace(0, 2, 6), torch.linspace(1, -1, 6)]
    runs = [steps(cls, value.clone(), grads, lr=0.1, weight_decay=0.1, **choice) for cls in (ours, theirs)]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("foreach", [None, True])
def test_capturable_on_the_host_asserts_as_torch_does(foreach: bool | None) -> None:
    """`capturable=True` with parameters on the host raises torch's assertion, and no parameter moves."""
    texts = []
    for cls in OURS_AND_TORCHS:
        parameter = nn.Parameter(torch.ones(3))
        opt = cls([parameter], capturable=True, foreach=foreach)
        parameter.grad = torch.ones(3)
        with pytest.raises(AssertionError, match="capturable=True, params and state_steps must be on sup") as caught:
            opt.step()
        texts.append(str(caught.value))
        assert torch.equal(parameter.detach(), torch.ones(3))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}], ids=str)
def test_differentiable_lets_gradients_through_several_steps(options: dict[str, Any]) -> None:
    """With `differentiable=True` a backward goes through the steps to value and gradient, as in torch."""
    runs = []
    for cls in OURS_AND_TORCHS:
        start = torch.linspace(1, 2, 3, requires_grad=True)
        slope = torch.linspace(-1, 3, 3, requires_grad=True)
        parameter = start.clone()
        opt = cls([parameter], lr=0.1, differentiable=True, **options)
        for count in range(1, 4):
            parameter.grad = slope * count
            opt.step()
        parameter.square().sum().backward()
        assert start.grad is not None
        assert slope.grad is not None
        runs.append((parameter.detach(), start.grad, slope.grad))
    torch.testing.assert_close(*runs)
    assert bool(runs[0][2].ne(0).all()), "the gradient came through the moments"


def test_differentiable_lets_gradients_reach_a_tensor_rate() -> None:
    """With `differentiable=True` and a rate that requires a gradient, the rate gets torch's gradient."""
    runs = []
    for cls in OURS_AND_TORCHS:
        lr = torch.tensor(0.1, requires_grad=True)
        parameter = torch.linspace(1, 2, 3, requires_grad=True).clone()
        opt = cls([parameter], lr=lr, differentiable=True)
        parameter.grad = torch.linspace(1, 3, 3)
        opt.step()
        parameter.sum().backward()
        runs.append(lr.grad)
    assert runs[0] is not None
    torch.testing.assert_close(*runs)
    assert float(runs[0]) == pytest.approx(-3.0, rel=1e-5)


def test_host_and_other_parameters_step_together() -> None:
    """`max_grad_norm` spans parameters of the kernels and those that torch steps: one norm over all."""
    host, elsewhere = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    opt = paramstate.Adam([host, elsewhere], lr=0.1, max_grad_norm=1.0)
    host.grad, elsewhere.grad = torch.full((3,), 3.0), torch.full((3,), 4.0 + 0j)
    opt.step()
    assert opt.grad_norm is not None
    assert float(opt.grad_norm) == pytest.approx((3 * 9 + 3 * 16) ** 0.5)
    assert float(opt.state[host]["step"]) == float(opt.state[elsewhere]["step"]) == 1
    torch.testing.assert_close(elsewhere.detach().real, torch.full((3,), 0.9))
