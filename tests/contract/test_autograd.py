"""Bookkeeping of autograd: version counters, leaves and graphs around a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from reference import same_bits
from small_models import Net, set_gradients

MODIFIED = "modified by an inplace operation"


OPTIONS: list[dict[str, Any]] = [
    {}, {"fused": True}, {"max_grad_norm": 0.5}, {"constraints": paramstate.Box(0, 1)},
]  # fmt: skip
CASES = [(dtype, options) for dtype in (torch.float32, torch.bfloat16) for options in OPTIONS]
CASES += [(torch.complex64, {}), (torch.complex64, {"max_grad_norm": 0.5})]


@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_backward_through_a_value_that_was_stepped_since_raises(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """A backward through a weight that a step has changed since raises, never uses the new value in silence."""
    parameter = nn.Parameter(torch.full((3,), 0.5).to(dtype))
    opt = paramstate.Adam([parameter], **options)
    loss = (parameter * parameter).abs().sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.backward()


def test_versions_of_parameters_grow_where_these_were_stepped() -> None:
    """The version counter of every stepped parameter grows; that of an idle or frozen one stays."""
    stepped, sliced, idle = (nn.Parameter(torch.randn(4, 6)[:, ::n]) for n in (1, 2, 3))
    frozen = nn.Parameter(torch.randn(3), requires_grad=False)
    opt = paramstate.Adam([stepped, sliced, idle, frozen])
    for parameter in (stepped, sliced):
        parameter.grad = torch.ones_like(parameter)
    before = [p._version for p in (stepped, sliced, idle, frozen)]
    opt.step()
    grown = [p._version > version for p, version in zip((stepped, sliced, idle, frozen), before, strict=True)]
    assert grown == [True, True, False, False]


def test_versions_of_gradients_grow_only_where_the_step_writes_them() -> None:
    """A gradient is only read, and its version stays, unless the step unscales it for a gradient scaler."""
    parameter = nn.Parameter(torch.randn(3))
    opt = paramstate.Adam([parameter], fused=True, max_grad_norm=0.1)
    parameter.grad = torch.ones(3)
    version = parameter.grad._version
    opt.step()
    assert parameter.grad._version == version
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    opt.step()
    assert parameter.grad._version > version


def test_backward_through_a_gradient_that_was_unscaled_since_raises() -> None:
    """A graph that saved a gradient raises after the step has unscaled that gradient in place."""
    parameter = nn.Parameter(torch.randn(3))
    opt = paramstate.Adam([parameter], fused=True)
    parameter.grad = torch.ones(3)
    other = torch.ones(3, requires_grad=True)
    loss = (other * parameter.grad).sum()
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    opt.step()
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.backward()


def test_versions_of_parameters_grow_where_a_clip_writes_them() -> None:
    """`clip_` and a declared constraint that binds an idle parameter grow its version counter."""
    parameter = nn.Parameter(torch.full((3,), 2.0))
    version = parameter._version
    paramstate.clip_(parameter, -1.0, 1.0)
    assert parameter._version > version
    moved, idle = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    opt = paramstate.Adam([("moved", moved), ("idle", idle)], constraints=paramstate.Box(-1.0, 1.0))
    with torch.no_grad():
        idle.fill_(5.0)
    moved.grad = torch.ones(3)
    version = idle._version
    opt.step()
    assert torch.equal(idle.detach(), torch.ones(3))
    assert idle._version > version


def test_an_error_leaves_the_versions_as_they_were() -> None:
    """A step that raises has written nothing, so no version counter has grown."""
    net = Net()
    opt = paramstate.Adam(net, max_grad_norm=0.1)
    set_gradients(net, 0)
    opt.step()
    opt.state[net.third.weight]["exp_avg"] = torch.zeros(7)
    before = [(p._version, p.grad._version) for p in net.parameters()]
    with pytest.raises(paramstate.StateShapeError):
        opt.step()
    assert [(p._version, p.grad._version) for p in net.parameters()] == before


def test_parameters_stay_leaves_and_nothing_is_recorded() -> None:
    """After steps in any grad mode parameters are leaves, and moments and steps belong to no graph."""
    net = Net()
    opt = paramstate.AdamW(net, amsgrad=True)
    for enabled in (True, False):
        set_gradients(net, 0)
        with torch.set_grad_enabled(enabled):
            opt.step()
            assert torch.is_grad_enabled() is enabled
    for parameter in net.parameters():
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert not any(tensor.requires_grad for tensor in opt.state[parameter].values())


def test_a_step_in_inference_mode_is_the_same_step() -> None:
    """A first step in inference mode gives the same bits, and training outside it goes on with its moments."""
    runs = []
    for inference in (False, True):
        parameter = nn.Parameter(torch.linspace(-1, 1, 5))
        opt = paramstate.AdamW([parameter], lr=0.1)
        parameter.grad = torch.ones(5)
        with torch.inference_mode(mode=inference):
            opt.step()
        parameter.grad = torch.linspace(1, 2, 5)
        opt.step()
        runs.append([parameter, *opt.state[parameter].values()])
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))


def test_a_gradient_with_a_graph_of_its_own_is_read() -> None:
    """A gradient from `backward(create_graph=True)` is read as a value; its graph stays usable."""
    parameter = nn.Parameter(torch.full((3,), 2.0))
    opt = paramstate.Adam([parameter], lr=0.1)
    x = torch.ones(3, requires_grad=True)
    with pytest.warns(UserWarning, match="create_graph"):
        (parameter * x * x).sum().backward(create_graph=True)
    assert parameter.grad.requires_grad
    opt.step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 1.9))
    (second,) = torch.autograd.grad(parameter.grad.sum(), x)
    assert torch.equal(second, torch.full((3,), 2.0))


def test_post_accumulate_hooks_may_step_in_backward() -> None:
    """An optimizer for each parameter, stepped in its post-accumulate hook, gives the bits of steps afterwards."""
    runs = []
    for in_backward in (False, True):
        torch.manual_seed(5)
        net = Net()
        opts = {parameter: paramstate.AdamW([parameter], lr=0.1) for parameter in net.parameters()}

        def step_now(parameter: torch.Tensor, opts: dict[Any, paramstate.AdamW] = opts) -> None:
            opts[parameter].step()
            opts[parameter].zero_grad()

        if in_backward:
            for parameter in net.parameters():
                parameter.register_post_accumulate_grad_hook(step_now)
        for _ in range(3):
            sum((p * p).sum() for p in net.parameters()).backward()
            if not in_backward:
                for parameter in net.parameters():
                    step_now(parameter)
        runs.append(list(net.parameters()))
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))
