"""Gradient scaling (torch.amp.GradScaler).

A scaler knows two kinds of optimizers. Without `_step_supports_amp_scaling` it unscales the gradients itself and does
not call `step` after an overflow. With it, which means `fused=True`, the step is handed `grad_scale` and `found_inf`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import paramstate
from reference import same_bits
from small_models import Net, assert_same_bits, state_by_name

Optimizer = torch.optim.Optimizer
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
BOTH_KINDS = pytest.mark.parametrize("fused", [None, True], ids=["unscaled by the scaler", "unscaled by the step"])


def backward(scaler: GradScaler, net: nn.Module, *, overflow: bool = False) -> None:
    loss = net(X).square().mean() * (math.inf if overflow else 1.0)
    scaler.scale(loss).backward()


def begin(cls: type[Optimizer], **options: Any) -> tuple[Net, Any]:
    torch.manual_seed(5)
    net = Net()
    return net, cls(net.parameters(), lr=0.05, **options)


def amp_steps(
    net: nn.Module,
    opt: Optimizer,
    scaler: GradScaler,
    overflows: Iterable[bool],
    between: Callable[[GradScaler, nn.Module, Optimizer], None] | None = None,
) -> list[float]:
    """Steps as a training loop takes them; returns the scale after each."""
    scales = []
    for overflow in overflows:
        opt.zero_grad()
        backward(scaler, net, overflow=overflow)
        if between is not None:
            between(scaler, net, opt)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def test_only_fused_true_asks_the_scaler_to_leave_unscaling_to_the_step() -> None:
    """`_step_supports_amp_scaling` is set by `fused=True` alone, and not by loading the groups of such a one."""
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        for fused in (None, False):
            _, opt = begin(cls, fused=fused)
            assert not hasattr(opt, "_step_supports_amp_scaling")
        _, flagged = begin(cls, fused=True)
        assert flagged._step_supports_amp_scaling is True
        opt.load_state_dict(flagged.state_dict())
        assert opt.param_groups[0]["fused"] is True
        assert not hasattr(opt, "_step_supports_amp_scaling")


@BOTH_KINDS
@pytest.mark.parametrize(
    ("ours", "theirs"), [(paramstate.Adam, torch.optim.Adam), (paramstate.AdamW, torch.optim.AdamW)]
)
def test_scaled_training_with_an_overflow_is_torchs(ours: type, theirs: type, fused: bool | None) -> None:
    """Scaled training gives torch's values, moments, gradients and scales, an overflow in its midst included."""
    runs = []
    for cls in (ours, theirs):
        net, opt = begin(cls, fused=fused, weight_decay=0.1)
        scaler = GradScaler("cpu", init_scale=256.0, growth_interval=2)
        scales = amp_steps(net, opt, scaler, [False, False, True, False, False])
        runs.append((scales, gradients(net), state_by_name(net, opt)))
    assert runs[0][0] == runs[1][0] == [256.0, 512.0, 256.0, 256.0, 512.0]
    torch.testing.assert_close(runs[0][1:], runs[1][1:], rtol=1e-5, atol=1e-7)
    assert all(float(state["step"]) == 4 for state in runs[0][2].values()), "the overflow does not count"


@BOTH_KINDS
def test_an_overflow_changes_no_bit(fused: bool | None) -> None:
    """After an overflow values, moments and step counts are what they were before that step, bit for bit."""
    net, opt = begin(paramstate.AdamW, fused=fused, amsgrad=True)
    scaler = GradScaler("cpu", init_scale=8.0)
    amp_steps(net, opt, scaler, [False, False])
    before = state_by_name(net, opt)
    versions = [parameter._version for parameter in net.parameters()]
    assert amp_steps(net, opt, scaler, [True]) == [4.0]
    assert_same_bits(state_by_name(net, opt), before)
    assert [parameter._version for parameter in net.parameters()] == versions


@BOTH_KINDS
def test_an_overflow_in_the_first_step_leaves_the_next_one_the_first(fused: bool | None) -> None:
    """Training that begins with overflows, while the scale falls, goes on as if these steps had not been."""
    net, opt = begin(paramstate.AdamW, fused=fused)
    amp_steps(net, opt, GradScaler("cpu", init_scale=8.0), [True, True, False])
    twin, other = begin(paramstate.AdamW, fused=fused)
    amp_steps(twin, other, GradScaler("cpu", init_scale=2.0), [False])
    assert_same_bits(state_by_name(net, opt), state_by_name(twin, other))


def test_an_inf_in_one_gradient_skips_all_parameters() -> None:
    """One gradient that is not finite keeps every parameter of the optimizer from moving."""
    net, opt = begin(paramstate.Adam, fused=True)
    scaler = GradScaler("cpu", init_scale=8.0)
    before = state_by_name(net, opt)
    backward(scaler, net)
    net.third.bias.grad[0] = math.nan
    scaler.step(opt)
    assert all(same_bits(net.state_dict()[name], held["value"]) for name, held in before.items())


@BOTH_KINDS
def test_gradients_are_unscaled_after_the_step(fused: bool | None) -> None:
    """After the step `.grad` holds the gradients of the unscaled loss."""
    net, opt = begin(paramstate.AdamW, fused=fused)
    net(X).square().mean().backward()
    wanted = {name: grad.clone() for name, grad in gradients(net).items()}
    opt.zero_grad()
    scaler = GradScaler("cpu", init_scale=1024.0)
    backward(scaler, net)
    scaler.step(opt)
    torch.testing.assert_close(gradients(net), wanted)


def clip(scaler: GradScaler, net: nn.Module, opt: Optimizer) -> None:
    scaler.unscale_(opt)
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)


@BOTH_KINDS
def test_unscaling_before_clipping_is_torchs(fused: bool | None) -> None:
    """`unscale_`, clip, `step`: the step takes the clipped gradients as they are and is torch's."""
    runs = []
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        net, opt = begin(cls, fused=fused)
        scaler = GradScaler("cpu", init_scale=1024.0)
        amp_steps(net, opt, scaler, [False, True, False], clip)
        runs.append((gradients(net), state_by_name(net, opt)))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-7)
    assert torch.nn.utils.get_total_norm(list(runs[0][0].values())) <= 0.1001


@BOTH_KINDS
def test_unscaling_twice_is_the_scalers_error(fused: bool | None) -> None:
    """A second `unscale_` before `update` raises torch's error, and the step after it is still right."""
    net, opt = begin(paramstate.AdamW, fused=fused)
    scaler = GradScaler("cpu", init_scale=4.0)
    backward(scaler, net)
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(opt)
    scaler.step(opt)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(opt)
    assert all(float(opt.state[parameter]["step"]) == 1 for parameter in net.parameters())


def test_a_scale_that_the_user_set_before_is_multiplied_in() -> None:
    """A `grad_scale` that the user put on the optimizer is multiplied with the scaler's, as in torch."""
    runs = []
    for cls in (paramstate.Adam, torch.optim.Adam):
        net, opt = begin(cls, fused=True)
        scaler = GradScaler("cpu", init_scale=16.0)
        for _ in range(2):
            opt.zero_grad()
            opt.grad_scale = torch.tensor(3.0)
            scaler.scale(net(X).square().mean() * 3.0).backward()
            scaler.step(opt)
            scaler.update()
            assert not hasattr(opt, "grad_scale")
            assert not hasattr(opt, "found_inf")
        runs.append((gradients(net), state_by_name(net, opt)))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("found", [1.0, 2.0, 8.0])
def test_any_number_of_overflowing_devices_skips(found: float) -> None:
    """`found_inf` is a sum over devices: whatever it is above zero, the step changes nothing."""
    net, opt = begin(paramstate.Adam, fused=True)
    scaler = GradScaler("cpu", init_scale=8.0)
    amp_steps(net, opt, scaler, [False])
    before = state_by_name(net, opt)
    for parameter in net.parameters():
        parameter.grad.fill_(math.inf)
    opt.grad_scale, opt.found_inf = torch.tensor(32.0), torch.tensor(found)
    opt.step()
    assert_same_bits(state_by_name(net, opt), before)


def test_several_optimizers_share_a_scaler_and_skip_each_for_itself() -> None:
    """With one scaler over two optimizers an overflow in one skips that one, lowers the scale, and the other steps."""
    runs = []
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        pairs = [begin(cls, fused=fused) for fused in (True, None)]
        scaler = GradScaler("cpu", init_scale=64.0, growth_interval=100)
        for overflow in ((False, False), (True, False), (False, True), (False, False)):
            for (net, opt), inf in zip(pairs, overflow, strict=True):
                opt.zero_grad()
                backward(scaler, net, overflow=inf)
            for _, opt in pairs:
                scaler.step(opt)
            scaler.update()
        runs.append((scaler.get_scale(), [state_by_name(net, opt) for net, opt in pairs]))
    assert runs[0][0] == runs[1][0] == 16.0
    assert [float(net["first.weight"]["step"]) for net in runs[0][1]] == [3, 3]
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-5, atol=1e-7)


def test_a_disabled_scaler_changes_nothing() -> None:
    """A disabled scaler passes `step` and its closure through."""
    net, opt = begin(paramstate.AdamW, fused=True)
    twin, other = begin(paramstate.AdamW)
    amp_steps(net, opt, GradScaler("cpu", enabled=False), [False, False])
    for _ in range(2):
        other.zero_grad()
        twin(X).square().mean().backward()
        other.step()
    assert_same_bits(state_by_name(net, opt), state_by_name(twin, other))


@BOTH_KINDS
def test_max_grad_norm_clips_the_unscaled_gradients(fused: bool | None) -> None:
    """`max_grad_norm` with a scaler is `unscale_`, `clip_grad_norm_`, `step`; `grad_norm` is the unscaled norm."""
    net, opt = begin(paramstate.AdamW, fused=fused, max_grad_norm=0.1)
    amp_steps(net, opt, GradScaler("cpu", init_scale=1024.0), [False, True, False])
    twin, other = begin(torch.optim.AdamW)
    norms: list[torch.Tensor] = []

    def clip_and_tell(scaler: GradScaler, net: nn.Module, opt: Optimizer) -> None:
        scaler.unscale_(opt)
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1))

    amp_steps(twin, other, GradScaler("cpu", init_scale=1024.0), [False, True, False], clip_and_tell)
    torch.testing.assert_close(state_by_name(net, opt), state_by_name(twin, other), rtol=1e-5, atol=1e-7)
    assert opt.grad_norm is not None
    assert float(opt.grad_norm) == pytest.approx(float(norms[-1]))
    assert float(opt.grad_norm) > 0.1, "the clip was at work"


def test_max_grad_norm_leaves_the_gradient_unscaled_and_unclipped() -> None:
    """Where the step unscales and clips, `.grad` is left unscaled and not clipped."""
    parameter = nn.Parameter(torch.zeros(4))
    opt = paramstate.Adam([parameter], lr=0.1, fused=True, max_grad_norm=0.5)
    parameter.grad = torch.full((4,), 64.0)
    opt.grad_scale, opt.found_inf = torch.tensor(32.0), torch.tensor(0.0)
    opt.step()
    assert parameter.grad.tolist() == [2.0] * 4
    assert float(opt.grad_norm) == pytest.approx(4.0)
    torch.testing.assert_close(opt.state[parameter]["exp_avg"], torch.full((4,), 0.1 * 2.0 * 0.5 / 4.0))


@BOTH_KINDS
def test_an_overflow_leaves_grad_norm_as_it_was(fused: bool | None) -> None:
    """A skipped step tells nothing: `grad_norm` is still that of the last step that was taken."""
    net, opt = begin(paramstate.AdamW, fused=fused, max_grad_norm=0.1)
    scaler = GradScaler("cpu", init_scale=8.0)
    amp_steps(net, opt, scaler, [False])
    norm = opt.grad_norm
    amp_steps(net, opt, scaler, [True])
    assert opt.grad_norm is norm


@BOTH_KINDS
def test_a_scaled_step_holds_declared_constraints(fused: bool | None) -> None:
    """Declared constraints hold after a scaled step, and a skipped one leaves the values inside them."""
    net = Net()
    opt = paramstate.AdamW(net, lr=1.0, fused=fused, constraints=paramstate.Box(-0.25, 0.25))
    amp_steps(net, opt, GradScaler("cpu", init_scale=8.0), [False, True, False])
    assert all(float(parameter.detach().abs().max()) <= 0.25 for parameter in net.parameters())


def test_layouts_and_dtypes_are_unscaled_where_they_are() -> None:
    """A strided, a bfloat16 and an empty gradient are unscaled in place by the step, each as torch would."""
    grads = [torch.full((4, 6), 64.0)[:, ::2], torch.full((3,), 64.0, dtype=torch.bfloat16), torch.empty(0)]
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    opt = paramstate.Adam(params, lr=0.1, fused=True)
    for parameter, grad in zip(params, grads, strict=True):
        parameter.grad = grad
    opt.grad_scale, opt.found_inf = torch.tensor(32.0), torch.tensor(0.0)
    opt.step()
    for parameter, grad in zip(params, grads, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, torch.full_like(grad, 2.0))
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, -0.1).detach())
