"""Gradient clipping against torch's functions, and the norm that is fused into the step."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import paramstate
from reference import same_bits
from small_models import Net, assert_same_bits, set_gradients, state_by_name, train


def pair(dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Net, Net]:
    """Two models with the same gradients."""
    ours, theirs = Net().to(dtype), Net().to(dtype)
    for net in (ours, theirs):
        set_gradients(net, 1, scale)
    return ours, theirs


def gradients(net: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


def assert_close_gradients(ours: nn.Module, theirs: nn.Module, **tolerance: float) -> None:
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_type", [2, 2.0, 1, 3.0, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_clip_grad_norm_is_torchs(dtype: torch.dtype, norm_type: float, max_norm: float) -> None:
    ours, theirs = pair(dtype)
    wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm, norm_type)
    got = paramstate.clip_grad_norm_(ours.parameters(), max_norm, norm_type)
    assert isinstance(got, torch.Tensor)
    assert got.shape == ()
    assert got.dtype == wanted.dtype
    loose = {"rtol": 2e-2, "atol": 1e-3} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(got, wanted, **loose)
    assert_close_gradients(ours, theirs, **loose)


def test_clip_grad_norm_leaves_the_bits_where_it_does_not_clip() -> None:
    ours, _ = pair()
    before = [g.clone() for g in gradients(ours)]
    versions = [g._version for g in gradients(ours)]
    paramstate.clip_grad_norm_(ours.parameters(), 1e6)
    assert all(same_bits(a, b) for a, b in zip(gradients(ours), before, strict=True))
    paramstate.clip_grad_norm_(ours.parameters(), 0.1)
    assert all(g._version > version for g, version in zip(gradients(ours), versions, strict=True))


def test_clip_grad_norm_takes_a_tensor_a_generator_and_keywords_as_torch_does() -> None:
    ours, theirs = pair()
    paramstate.clip_grad_norm_(ours.first.weight, 0.1)
    torch.nn.utils.clip_grad_norm_(theirs.first.weight, 0.1)
    paramstate.clip_grad_norm_((p for p in ours.parameters()), max_norm=0.2, norm_type=2, foreach=None)
    torch.nn.utils.clip_grad_norm_((p for p in theirs.parameters()), max_norm=0.2, norm_type=2, foreach=None)
    assert_close_gradients(ours, theirs)


def test_clip_grad_norm_of_nothing_is_zero_as_in_torch() -> None:
    parameter = nn.Parameter(torch.ones(3))
    for params in ([], [parameter]):
        got, wanted = paramstate.clip_grad_norm_(params, 1.0), torch.nn.utils.clip_grad_norm_(params, 1.0)
        assert float(got) == 0.0
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape


def test_clip_grad_norm_of_an_empty_generator_warns_where_torch_warns() -> None:
    said = []
    for clip in (torch.nn.utils.clip_grad_norm_, paramstate.clip_grad_norm_):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert float(clip((p for p in ()), 1.0)) == 0.0
        said.append([(w.category, str(w.message)) for w in caught])
    assert said[0] == said[1]


def test_clip_grad_norm_of_mixed_dtypes() -> None:
    ours, theirs = pair()
    for net in (ours, theirs):
        net.first.double()
        net.second.bfloat16()
    got = paramstate.clip_grad_norm_(ours.parameters(), 0.5)
    wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=5e-3, atol=1e-4)
    assert_close_gradients(ours, theirs, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_clip_grad_norm_of_a_gradient_that_is_not_finite(bad: float) -> None:
    ours, theirs = pair()
    for net in (ours, theirs):
        net.first.weight.grad[0, 0] = bad
    before = [g.clone() for g in gradients(ours)]
    with pytest.raises(RuntimeError, match="non-finite, so it cannot be clipped"):
        paramstate.clip_grad_norm_(ours.parameters(), 1.0, error_if_nonfinite=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(gradients(ours), before, strict=True))
    got = paramstate.clip_grad_norm_(ours.parameters(), 1.0)
    wanted = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    torch.testing.assert_close(got, wanted, equal_nan=True)
    assert_close_gradients(ours, theirs, equal_nan=True)


def test_clip_grad_norm_of_a_strided_gradient() -> None:
    ours, theirs = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
    for parameter in (ours, theirs):
        parameter.grad = torch.arange(12.0).reshape(4, 3).t()
    torch.testing.assert_close(paramstate.clip_grad_norm_([ours], 1.0), torch.nn.utils.clip_grad_norm_([theirs], 1.0))
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clip_grad_value_is_torchs(dtype: torch.dtype) -> None:
    ours, theirs = pair(dtype)
    versions = [g._version for g in gradients(ours)]
    assert paramstate.clip_grad_value_(ours.parameters(), 0.5) is None
    torch.nn.utils.clip_grad_value_(theirs.parameters(), 0.5)
    assert all(same_bits(a, b) for a, b in zip(gradients(ours), gradients(theirs), strict=True))
    assert all(g._version > version for g, version in zip(gradients(ours), versions, strict=True))
    paramstate.clip_grad_value_(ours.first.weight, 0.1)
    assert float(ours.first.weight.grad.abs().max()) <= 0.1 + 1e-3


def test_the_norm_has_the_same_bits_for_any_number_of_threads() -> None:
    parameters = [nn.Parameter(torch.zeros(300_001)), nn.Parameter(torch.zeros(7, 11))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    norms = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        norms.append(paramstate.clip_grad_norm_(parameters, 1e9))
    assert same_bits(norms[0], norms[1])
    assert same_bits(norms[0], norms[2])


@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_max_grad_norm_is_clip_grad_norm_and_then_a_step(max_norm: float) -> None:
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    opt = paramstate.AdamW(ours, lr=0.01, max_grad_norm=max_norm)
    stock = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    for seed in range(5):
        opt.zero_grad()
        stock.zero_grad()
        set_gradients(ours, seed, 3.0)
        set_gradients(theirs, seed, 3.0)
        before = [g.clone() for g in gradients(ours)]
        opt.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        stock.step()
        assert opt.grad_norm.shape == ()
        torch.testing.assert_close(opt.grad_norm, norm, check_dtype=False)
        assert all(same_bits(a, b) for a, b in zip(gradients(ours), before, strict=True)), "left as they are"
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_max_grad_norm_that_does_not_bind_gives_the_bits_of_a_plain_step() -> None:
    ours, plain = Net(), Net()
    plain.load_state_dict(ours.state_dict())
    opt, other = paramstate.AdamW(ours, max_grad_norm=1e6), paramstate.AdamW(plain)
    assert opt.grad_norm is None
    train(ours, opt, range(3))
    train(plain, other, range(3))
    assert other.grad_norm is None
    assert_same_bits(state_by_name(ours, opt), state_by_name(plain, other))


def test_max_grad_norm_of_a_gradient_that_is_not_a_number_gives_nan_as_in_torch() -> None:
    net = Net()
    opt = paramstate.Adam(net, max_grad_norm=1.0)
    set_gradients(net, 1)
    net.first.weight.grad[0, 0] = math.nan
    opt.step()
    assert math.isnan(opt.grad_norm)
    assert all(bool(p.isnan().all()) for p in net.parameters())


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_a_max_grad_norm_that_means_nothing_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="max_grad_norm"):
        paramstate.Adam(Net(), max_grad_norm=bad)


def test_gradients_are_clipped_in_a_process_that_has_made_no_optimizer() -> None:
    code = (
        "import torch, paramstate\n"
        "p = torch.nn.Parameter(torch.zeros(2)); p.grad = torch.tensor([3.0, 4.0])\n"
        "assert float(paramstate.clip_grad_norm_([p], 1.0)) == 5.0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_free_function_counts_what_is_frozen_and_the_optimizers_own_norm_does_not() -> None:
    model = nn.ModuleDict({"free": nn.Linear(2, 1, bias=False), "frozen": nn.Linear(2, 2, bias=False)})
    opt = paramstate.AdamW(model, max_grad_norm=100.0)
    opt.freeze("frozen", stop_gradient=False)
    model["free"].weight.grad = torch.tensor([[3.0, 0.0]])
    model["frozen"].weight.grad = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    assert float(paramstate.clip_grad_norm_(model.parameters(), 100.0)) == 5.0
    assert "cannot know" in (paramstate.clip_grad_norm_.__doc__ or "")
    opt.step()
    assert opt.grad_norm is not None
    assert float(opt.grad_norm) == 3.0
