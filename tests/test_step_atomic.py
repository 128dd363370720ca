"""An error of a step has changed nothing, also where torch steps some of the parameters and the kernels the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from reference import same_bits

SPARSE = "Adam does not support sparse gradients, please consider SparseAdam"
FUSED = "requires all the params to be floating point Tensors of supported devices"


def mixed(**options: Any) -> tuple[paramstate.Adam, list[nn.Parameter]]:
    """A host parameter and a complex one before, and both after, in two groups."""
    dtypes = [torch.float32, torch.complex64, torch.complex64, torch.float32]
    params = [nn.Parameter(torch.ones(4, 2, dtype=dtype)) for dtype in dtypes]
    named = [(f"p{number}", param) for number, param in enumerate(params)]
    opt = paramstate.Adam([{"params": named[:2]}, {"params": named[2:]}], lr=0.1, **options)
    give(params)
    return opt, params


def give(params: list[nn.Parameter]) -> None:
    for param in params:
        param.grad = torch.full_like(param, 2.0)


def picture(opt: paramstate.Adam, params: list[nn.Parameter]) -> list[Any]:
    """Values, gradients and state: the objects, and copies of what they hold."""
    found: list[Any] = []
    for param in params:
        state = opt.state.get(param)
        held = {"value": param, "grad": param.grad, **(state or {})}
        objects = {key: id(one) for key, one in held.items()}
        found.append((state is None, objects, {key: copied(one) for key, one in held.items()}))
    return found


def copied(one: object) -> object:
    return one.detach().clone() if isinstance(one, torch.Tensor) else one


def alike(a: object, b: object) -> bool:
    if not isinstance(a, torch.Tensor):
        return a == b
    assert isinstance(b, torch.Tensor)
    return torch.equal(a.to_dense(), b.to_dense()) if a.is_sparse else bool(a.equal(b))


def refused(opt: paramstate.Adam, params: list[nn.Parameter], error: type[Exception], text: str) -> None:
    before = picture(opt, params)
    with pytest.raises(error, match=text):
        opt.step()
    for one, other in zip(before, picture(opt, params), strict=True):
        assert one[:2] == other[:2]
        assert all(alike(value, other[2][key]) for key, value in one[2].items())


def sparse(opt: paramstate.Adam, params: list[nn.Parameter]) -> None:
    del opt
    indices, values = torch.tensor([[1]]), torch.ones(1, 2)
    params[3].grad = torch.sparse_coo_tensor(indices, values, (4, 2), check_invariants=True)


def fused(opt: paramstate.Adam, params: list[nn.Parameter]) -> None:
    del params
    opt.param_groups[1]["fused"] = True


def foreach_with_tensor_lr(opt: paramstate.Adam, params: list[nn.Parameter]) -> None:
    del params
    opt.param_groups[1].update(foreach=True, lr=torch.tensor(0.1))


def tensor_betas(opt: paramstate.Adam, params: list[nn.Parameter]) -> None:
    del params
    opt.param_groups[1].update(foreach=True, betas=(torch.tensor(0.9), torch.tensor(0.99)))


def scaled(opt: paramstate.Adam, params: list[nn.Parameter]) -> None:
    del params
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)


def lacking_moment(opt: paramstate.Adam, params: list[nn.Parameter]) -> None:
    opt.state[params[2]] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(params[2])}


def moment_of_another_dtype(opt: paramstate.Adam, params: list[nn.Parameter]) -> None:
    moments = {key: torch.zeros(4, 2, dtype=torch.complex128) for key in ("exp_avg", "exp_avg_sq")}
    opt.state[params[2]] = {"step": torch.tensor(1.0), **moments}


def step_before_the_first(opt: paramstate.Adam, params: list[nn.Parameter]) -> None:
    moments = {key: torch.zeros_like(params[2]) for key in ("exp_avg", "exp_avg_sq")}
    opt.state[params[2]] = {"step": torch.tensor(-1.0), **moments}


def step_is_no_number(opt: paramstate.Adam, params: list[nn.Parameter]) -> None:
    moments = {key: torch.zeros_like(params[2]) for key in ("exp_avg", "exp_avg_sq")}
    opt.state[params[2]] = {"step": "one", **moments}


@pytest.mark.parametrize("stepped", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize(
    ("break_it", "error", "text"),
    [
        (sparse, RuntimeError, SPARSE),
        (fused, RuntimeError, FUSED),
        (foreach_with_tensor_lr, RuntimeError, "lr as a Tensor is not supported"),
        (tensor_betas, ValueError, "beta1 as a Tensor is not supported"),
        (scaled, RuntimeError, FUSED),
        (lacking_moment, KeyError, "'p2'.*lacks 'exp_avg_sq'"),
        (moment_of_another_dtype, RuntimeError, "dtype"),
        (step_before_the_first, ZeroDivisionError, "zero"),
        (step_is_no_number, TypeError, "'p2'.*must be a tensor or a number, got str"),
    ],
)
def test_what_torch_refuses_leaves_all_groups_as_they_were(
    break_it: Callable[[paramstate.Adam, list[nn.Parameter]], None],
    error: type[Exception],
    text: str,
    max_grad_norm: float | None,
    stepped: bool,
) -> None:
    opt, params = mixed(max_grad_norm=max_grad_norm)
    if stepped:
        opt.step()
        give(params)
    break_it(opt, params)
    refused(opt, params, error, text)


def test_what_an_all_torch_step_refuses_leaves_no_state() -> None:
    opt, params = mixed(capturable=True)
    refused(opt, params, AssertionError, "capturable")


def test_a_scaler_whose_gradient_torch_cannot_unscale_is_told_so() -> None:
    imaginary = torch.complex(torch.ones(4), torch.ones(4)).conj().imag
    params = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))]
    opt = paramstate.Adam([("plain", params[0]), ("negated", params[1])])
    params[0].grad, params[1].grad = torch.ones(4), imaginary
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    refused(opt, params, paramstate.UnsupportedError, "'negated'.*fused=True")


@pytest.mark.parametrize("index", [0, 1])
def test_a_step_that_is_a_number_becomes_a_tensor_as_torch_makes_it(index: int) -> None:
    opt, params = mixed()
    opt.step()
    opt.state[params[index]]["step"] = 1
    give(params)
    opt.step()
    assert all(float(opt.state[param]["step"]) == 2 for param in params)
    assert opt.state[params[index]]["step"].dtype == torch.float32
    assert same_bits(params[0], params[3])
    assert same_bits(torch.view_as_real(params[1].detach()), torch.view_as_real(params[2].detach()))


def test_a_number_as_step_stays_one_where_the_step_fails() -> None:
    opt, params = mixed()
    opt.step()
    opt.state[params[0]]["step"] = 1
    give(params)
    sparse(opt, params)
    refused(opt, params, RuntimeError, SPARSE)


def test_a_complex_parameters_missing_maximum_is_made() -> None:
    opt, params = mixed()
    opt.step()
    for group in opt.param_groups:
        group["amsgrad"] = True
    give(params)
    opt.step()
    assert all("max_exp_avg_sq" in opt.state[param] for param in params)


def test_the_norm_that_clips_elsewhere_is_the_one_of_all_gradients() -> None:
    opt, params = mixed(max_grad_norm=0.5)
    opt.step()
    norm = float(opt.grad_norm)
    assert norm == pytest.approx((4 * 8 * 4) ** 0.5)
    for param in params:
        torch.testing.assert_close(opt.state[param]["exp_avg"], torch.full_like(param, 0.1 * 2.0 * 0.5 / norm).detach())
