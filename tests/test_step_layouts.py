"""torch-contract.md 1.10: layouts, shapes, sharing and devices, and that an error has changed nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import paramstate
from reference import same_bits
from small_models import Net, assert_same_bits, set_gradients, state_by_name, train

Make = Callable[[], torch.Tensor]

LAYOUTS: dict[str, tuple[Make, Make]] = {
    "parameter channels_last, gradient contiguous": (
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(2, 3, 4, 5),
    ),
    "both channels_last": (
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    ),
    "both transposed": (lambda: torch.randn(4, 5).t(), lambda: torch.randn(4, 5).t()),
    "gradient transposed": (lambda: torch.randn(5, 4), lambda: torch.randn(4, 5).t()),
    "parameter transposed": (lambda: torch.randn(4, 5).t(), lambda: torch.randn(5, 4)),
    "parameter sliced": (lambda: torch.randn(5, 8)[:, ::2], lambda: torch.randn(5, 4)),
    "parameter a slice of rows": (lambda: torch.randn(9, 4)[2:7], lambda: torch.randn(5, 4)),
    "gradient sliced": (lambda: torch.randn(5, 4), lambda: torch.randn(10, 9)[::2, 1:5]),
    "gradient expanded": (lambda: torch.randn(5, 4), lambda: torch.randn(5, 1).expand(5, 4)),
    "gradient expanded from a number": (lambda: torch.randn(5, 4), lambda: torch.tensor(0.5).expand(5, 4)),
    "gradient flipped and copied": (lambda: torch.randn(5, 4), lambda: torch.randn(5, 4).flip(0)),
    "dimensions of size one": (lambda: torch.randn(1, 5, 1), lambda: torch.randn(5, 1, 1).permute(1, 0, 2)),
    "large and sliced": (lambda: torch.randn(300, 800)[:, ::2], lambda: torch.randn(400, 300).t()),
    "5 dimensions permuted": (
        lambda: torch.randn(2, 3, 2, 3, 2).permute(4, 1, 0, 3, 2),
        lambda: torch.randn(2, 3, 2, 3, 2),
    ),
}


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


def test_moments_take_the_strides_of_a_dense_parameter() -> None:
    parameter = nn.Parameter(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    opt = paramstate.Adam([parameter])
    parameter.grad = torch.randn(2, 3, 4, 5)
    opt.step()
    assert opt.state[parameter]["exp_avg"].stride() == parameter.stride()


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


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,)])
def test_zero_size_and_0_dim_parameters_have_state_and_their_step_advances(shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(torch.ones(shape))
    opt = paramstate.Adam([parameter], lr=0.1)
    for count in (1, 2):
        parameter.grad = torch.ones(shape)
        opt.step()
        assert float(opt.state[parameter]["step"]) == count
    assert opt.state[parameter]["exp_avg"].shape == shape
    assert parameter.numel() == 0 or float(parameter.detach()) == pytest.approx(0.8)


def test_a_neg_view_as_gradient_is_read_with_its_sign() -> None:
    imaginary = torch.complex(torch.ones(4), torch.arange(1.0, 5.0)).conj().imag
    assert imaginary.is_neg()
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = imaginary
    opt = paramstate.Adam([parameter], lr=0.1)
    opt.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4,), 0.1))


def test_backward_through_a_value_that_was_stepped_since_raises() -> None:
    parameter = nn.Parameter(torch.randn(3))
    opt = paramstate.Adam([parameter])
    loss = (parameter * parameter).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_version_counters_grow_for_what_was_written_and_for_nothing_else() -> None:
    stepped, idle = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    opt = paramstate.Adam([stepped, idle])
    stepped.grad = torch.ones(3)
    versions = stepped._version, idle._version, stepped.grad._version
    opt.step()
    assert stepped._version > versions[0]
    assert idle._version == versions[1]
    assert stepped.grad._version == versions[2], "the gradient is only read"


def test_one_object_listed_twice_warns_and_steps_twice_as_in_torch() -> None:
    pair = []
    for cls in (paramstate.Adam, torch.optim.Adam):
        parameter = nn.Parameter(torch.ones(5))
        with pytest.warns(UserWarning, match="duplicate"):
            opt = cls([parameter, parameter], lr=0.1)
        for _ in range(2):
            parameter.grad = torch.linspace(-1, 1, 5)
            opt.step()
        assert float(opt.state[parameter]["step"]) == 4
        pair.append(parameter)
    torch.testing.assert_close(*pair)


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


def test_sparse_gradients_are_refused_with_torchs_text() -> None:
    parameter = nn.Parameter(torch.ones(4, 2))
    opt = paramstate.Adam([parameter])
    parameter.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients, please consider SparseAdam"):
        opt.step()
    assert torch.equal(parameter.detach(), torch.ones(4, 2))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_complex_parameters_are_torchs(amsgrad: bool) -> None:
    pair = []
    for cls in (paramstate.Adam, torch.optim.Adam):
        complex_one = nn.Parameter(torch.complex(torch.ones(3), torch.arange(3.0)))
        real_one = nn.Parameter(torch.ones(3))
        opt = cls([complex_one, real_one], lr=0.1, amsgrad=amsgrad)
        for _ in range(3):
            complex_one.grad = torch.complex(torch.ones(3), torch.full((3,), -2.0))
            real_one.grad = torch.ones(3)
            opt.step()
        pair.append((complex_one, real_one))
    for ours, theirs in zip(*pair, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_meta_parameters_step_without_touching_memory_and_as_real_ones_later() -> None:
    module = nn.Linear(3, 2, device="meta")
    opt = paramstate.Adam(module.parameters(), lr=0.1)
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter)
    opt.step()
    assert opt.state[module.weight]["exp_avg"].device.type == "meta"


def test_meta_parameters_made_real_before_the_first_step_are_trained() -> None:
    module = nn.Linear(3, 2, device="meta")
    opt = paramstate.Adam(module, lr=0.1, fused=True)
    module.to_empty(device="cpu")  # makes new parameters, and no hook tells
    nn.init.ones_(module.weight)
    opt.zero_grad()
    module.weight.grad = torch.ones(2, 3)
    opt.step()
    torch.testing.assert_close(module.weight.detach(), torch.full((2, 3), 0.9))


def test_fused_on_meta_gives_torchs_text() -> None:
    module = nn.Linear(3, 2, device="meta")
    opt = paramstate.Adam(module.parameters(), fused=True)
    module.weight.grad = torch.empty_like(module.weight)
    with pytest.raises(RuntimeError, match="requires all the params to be floating point Tensors of supported devices"):
        opt.step()


@pytest.mark.parametrize(
    ("options", "feature"),
    [({"constraints": paramstate.Box(0.0, 1.0)}, "constraints"), ({"max_grad_norm": 1.0}, "max_grad_norm")],
)
@pytest.mark.parametrize("fallback", ["differentiable", "capturable"])
def test_what_a_fallback_cannot_honour_is_named(options: dict[str, object], feature: str, fallback: str) -> None:
    module = nn.Linear(3, 2)
    opt = paramstate.Adam(module, **options, **{fallback: True})
    before = module.weight.detach().clone()
    module.weight.grad = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=feature):
        opt.step()
    assert torch.equal(module.weight.detach(), before)


def test_host_and_other_parameters_step_together() -> None:
    host, elsewhere = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    opt = paramstate.Adam([host, elsewhere], lr=0.1, max_grad_norm=1.0)
    host.grad, elsewhere.grad = torch.full((3,), 3.0), torch.full((3,), 4.0 + 0j)
    opt.step()
    assert float(opt.grad_norm) == pytest.approx((3 * 9 + 3 * 16) ** 0.5)
    assert float(opt.state[host]["step"]) == float(opt.state[elsewhere]["step"]) == 1
    torch.testing.assert_close(elsewhere.detach().real, torch.full((3,), 0.9))
