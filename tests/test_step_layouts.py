"""How tensors lie in memory: every layout gives the same bits, and an error has changed nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import paramstate
from layouts import LAYOUTS, Make
from reference import same_bits
from small_models import Net, assert_same_bits, set_gradients, state_by_name, train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make_value", "make_grad"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_gives_the_bits_of_contiguous_memory(
    make_value: Make, make_grad: Make, dtype: torch.dtype
) -> None:
    value = make_value()
    strided = nn.Parameter(value.to(dtype) if value.dtype != dtype else value)
    if dtype != value.dtype and not value.is_contiguous():  # `to` makes a slice dense; slice again
        room = torch.zeros([2 * n for n in value.shape], dtype=dtype)
        strided = nn.Parameter(room[tuple(slice(None, None, 2) for _ in value.shape)].copy_(value))
    plain = nn.Parameter(strided.detach().contiguous().clone(memory_format=torch.contiguous_format))
    opt, other = paramstate.AdamW([strided], amsgrad=True, lr=0.1), paramstate.AdamW([plain], amsgrad=True, lr=0.1)
    for _ in range(3):
        grad = make_grad().to(dtype)
        strided.grad = grad
        plain.grad = grad.clone(memory_format=torch.contiguous_format)
        opt.step()
        other.step()
    assert same_bits(strided, plain)
    for key, moment in other.state[plain].items():
        assert same_bits(opt.state[strided][key], moment), key


def test_what_lies_between_a_slices_elements_is_left_alone() -> None:
    base = torch.randn(6, 8)
    before = base.clone()
    parameter = nn.Parameter(base[1:5, ::2])
    opt = paramstate.Adam([parameter], lr=0.1)
    parameter.grad = torch.ones(4, 4)
    opt.step()
    assert torch.equal(base[:, 1::2], before[:, 1::2])
    assert torch.equal(base[0], before[0])
    assert torch.equal(base[5], before[5])
    assert not (base[1:5, ::2] == before[1:5, ::2]).any()


def test_moments_of_a_client_with_other_strides_are_used_where_they_are() -> None:
    a, b = nn.Parameter(torch.arange(12.0).reshape(3, 4)), nn.Parameter(torch.arange(12.0).reshape(3, 4))
    odd = torch.zeros(4, 3).t()
    opt, other = paramstate.Adam([a], lr=0.1), paramstate.Adam([b], lr=0.1)
    opt.state[a] = {"step": torch.tensor(0.0), "exp_avg": odd, "exp_avg_sq": torch.zeros(6, 8)[::2, ::2]}
    for _ in range(2):
        a.grad = torch.randn(3, 4)
        b.grad = a.grad.clone()
        opt.step()
        other.step()
    assert same_bits(a, b)
    assert opt.state[a]["exp_avg"] is odd
    assert same_bits(odd, other.state[b]["exp_avg"])


def snapshot(net: Net, opt: paramstate.Adam) -> dict[str, dict[str, torch.Tensor]]:
    """Values, gradients, state and version counters."""
    found = state_by_name(net, opt)
    for name, parameter in net.named_parameters():
        found[name]["version"] = torch.tensor(float(parameter._version))
        found[name]["grad"] = parameter.grad.clone()
    return found


def break_state_shape(net: Net, opt: paramstate.Adam) -> None:
    opt.state[net.third.weight]["exp_avg_sq"] = torch.zeros(4, 4)


def break_by_overlap(net: Net, _opt: paramstate.Adam) -> None:
    net.third.weight.data = net.second.weight.data


def break_by_expanding(net: Net, _opt: paramstate.Adam) -> None:
    net.third.weight.data = torch.ones(2, 1).expand(2, 3)


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (break_state_shape, paramstate.StateShapeError),
        (break_by_overlap, paramstate.OverlapError),
        (break_by_expanding, paramstate.OverlapError),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_nothing_is_half_changed_after_an_error(
    break_it: Callable[[Net, paramstate.Adam], None], error: type[Exception], max_grad_norm: float | None
) -> None:
    net = Net()
    opt = paramstate.AdamW(net, max_grad_norm=max_grad_norm)
    train(net, opt, range(2))
    opt.zero_grad()
    set_gradients(net, 5)
    break_it(net, opt)
    before = snapshot(net, opt)
    with pytest.raises(error, match=r"third\.weight"):
        opt.step()
    assert_same_bits(snapshot(net, opt), before)


def test_a_moment_of_another_shape_says_both_shapes_and_what_to_call() -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    train(net, opt, [0])
    set_gradients(net, 5)
    break_state_shape(net, opt)
    with pytest.raises(paramstate.StateShapeError) as caught:
        opt.step()
    for part in ("'third.weight'", "exp_avg_sq", "[4, 4]", "[2, 3]", "replace_"):
        assert part in str(caught.value)
