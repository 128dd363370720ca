"""Steps over moments in eight bits, beside their twin over the same moments as floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from paramstate import Adam, AdamW
from paramstate.precision.blockwise import BlockwiseTensor
from precision_models import FLOATS, MOMENTS, floats, step, two_layers
from reference import same_bits
from test_blockwise_format import spacing

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda flat: flat.reshape(66, 70),
    "transposed": lambda flat: flat.reshape(70, 66).t(),
    "channels_last": lambda flat: flat.reshape(10, 11, 6, 7).contiguous(memory_format=torch.channels_last),
    "permuted": lambda flat: flat.reshape(6, 7, 110).permute(2, 0, 1),
    "every other column": lambda flat: flat.reshape(66, 70).repeat_interleave(2, dim=1)[:, ::2],
    "a part of the rows": lambda flat: torch.cat([flat, flat]).reshape(132, 70)[30:96],
    "padded rows": lambda flat: nn.functional.pad(flat.reshape(66, 70), (0, 3))[:, :70],
}


def laid(values: Tensor, layout: str) -> Tensor:
    """The numbers in another layout, in the same logical shape."""
    like = LAYOUTS[layout](torch.zeros(66 * 70, dtype=values.dtype))
    return like.copy_(values.reshape(like.shape))


def pair(values: list[Tensor], state: dict[str, Tensor], **options: Any) -> list[tuple[nn.Parameter, AdamW]]:
    """One parameter with its moments in eight bits, and one with what these read as, in float32."""
    made = []
    for value, compact in zip(values, (True, False), strict=True):
        param = nn.Parameter(value)
        opt = AdamW([("p", param)], state_dtype="8bit" if compact else torch.float32, **options)
        held = {key: BlockwiseTensor.of(moment, signed=key == "exp_avg") for key, moment in state.items()}
        opt.state[param] = {"step": torch.tensor(5.0), **(held if compact else {k: v.dense() for k, v in held.items()})}
        made.append((param, opt))
    return made


@settings(max_examples=60)
@given(
    value_layout=st.sampled_from(sorted(LAYOUTS)),
    grad_layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(FLOATS),
    rounding=st.sampled_from(["nearest", "stochastic", "kahan"]),
    amsgrad=st.booleans(),
    orders=st.integers(0, 12),
    max_grad_norm=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_step_reads_the_moments_exactly_and_stores_them_within_the_error_bound(
    value_layout: str,
    grad_layout: str,
    dtype: torch.dtype,
    rounding: Any,
    amsgrad: bool,
    orders: int,
    max_grad_norm: float | None,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    numbers_of_value = torch.randn(66 * 70, generator=draw).to(dtype)
    values = [laid(numbers_of_value, value_layout) for _ in range(2)]
    shape, strides = values[0].shape, values[0].stride()

    def numbers() -> Tensor:
        return torch.randn(shape, generator=draw) * 10.0 ** (-orders * torch.rand(shape, generator=draw))

    squares = numbers().square()
    state = {"exp_avg": numbers(), "exp_avg_sq": squares, "max_exp_avg_sq": squares * 2}
    state = {key: state[key] for key in MOMENTS[: 3 if amsgrad else 2]}
    options = {"rounding": rounding, "amsgrad": amsgrad, "max_grad_norm": max_grad_norm}
    gradient = numbers().to(dtype)
    (compact, ours), (twin, theirs) = pair(values, state, **options)
    for param, opt in ((compact, ours), (twin, theirs)):
        grad = laid(torch.zeros(66 * 70, dtype=dtype), grad_layout)
        param.grad = grad.reshape(shape).copy_(gradient) if grad.shape != shape else grad.copy_(gradient)
        opt.step()
    assert same_bits(compact.detach(), twin.detach())
    assert compact.stride() == strides
    for key in state:
        found, exact = ours.state[compact][key], theirs.state[twin][key]
        assert isinstance(found, BlockwiseTensor)
        off = (found.dense() - exact).abs()
        assert bool((off <= spacing(exact, signed=key == "exp_avg")).all())
        assert torch.equal(found.dense() > 0, exact > 0) or key == "exp_avg"


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_moments_are_right_on_average(dtype: torch.dtype, amsgrad: bool) -> None:
    """A moment that decays from one number is, over many elements, as large as its exact twin."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.zeros(256, 128, dtype=dtype))
    opt = AdamW([("p", param)], lr=0.0, state_dtype="8bit", amsgrad=amsgrad)
    exact_m = exact_v = 0.0
    for _ in range(200):
        param.grad = torch.full_like(param, 0.0137)
        opt.step()
        gradient = float(param.grad[0, 0])
        exact_m += 0.1 * (gradient - exact_m)
        exact_v += 0.001 * (gradient**2 - exact_v)
    assert floats(opt.state[param]["exp_avg"]).mean().item() == pytest.approx(exact_m, rel=2e-3)
    assert floats(opt.state[param]["exp_avg_sq"]).mean().item() == pytest.approx(exact_v, rel=2e-3)


def test_rounding_moments_to_the_nearest_would_lose_what_rounding_at_random_keeps() -> None:
    """The second moment grows by a thousandth of the square: from a number on, the nearest is the number itself."""
    param = nn.Parameter(torch.zeros(256, 128))
    opt = AdamW([("p", param)], lr=0.0, state_dtype="8bit")
    for _ in range(500):
        param.grad = torch.ones_like(param)
        opt.step()
    exact = 1 - 0.999**500
    assert opt.state[param]["exp_avg_sq"].mean().item() == pytest.approx(exact, rel=2e-3)
    nearest = torch.zeros(1)
    for _ in range(500):
        nearest = BlockwiseTensor.of(0.999 * nearest + 0.001, signed=False).dense()
    assert nearest.item() < 0.1 * exact


def test_gradients_that_are_not_finite_make_nan_of_their_own_elements_alone() -> None:
    ends = []
    for spoilt in ([], [3, 200, 4000]):
        model = two_layers()
        opt = AdamW(model, state_dtype="8bit", amsgrad=True)
        step(model, opt, 1, 2)
        weight = model[0].weight
        weight.grad = torch.ones_like(weight)
        weight.grad.view(-1)[spoilt] = torch.tensor([float("nan"), float("inf"), -float("inf")])[: len(spoilt)]
        opt.step()
        ends.append([weight.detach(), *(opt.state[weight][key].dense() for key in MOMENTS)])
    clean, dirty = ends
    for one, other in zip(clean, dirty, strict=True):
        assert other.flatten().isfinite().logical_not().nonzero().flatten().tolist() == [3, 200, 4000]
        keep = other.isfinite()
        assert torch.equal(one[keep], other[keep])


def test_gradients_of_zero_keep_moments_of_zero_and_values() -> None:
    model = two_layers()
    before = model[0].weight.detach().clone()
    opt = Adam(model, state_dtype="8bit", amsgrad=True)
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        opt.step()
    assert torch.equal(model[0].weight, before)
    assert all(not opt.state_of("0.weight")[key].codes.any() for key in MOMENTS)


SCALES = 10.0 ** (-9 * torch.rand(64, 80, generator=torch.Generator().manual_seed(0)))
GRADIENTS: dict[str, Callable[[int, Tensor], Tensor]] = {
    "of nine orders of magnitude side by side": lambda _, noise: noise * SCALES,
    "with spikes": lambda t, noise: noise * SCALES * (1e6 if t % 20 == 19 else 1.0),
    "that vanish together": lambda t, noise: noise * SCALES * 10.0 ** (-t / 5),
    "of which most vanish beside large ones": lambda t, noise: torch.cat(
        [noise[:, :8], noise[:, 8:] * (1.0 if t < 5 else 1e-7)], 1
    ),
    "that are sparse": lambda t, noise: noise * SCALES * (noise.roll(t).abs() < 0.06),
}


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
@pytest.mark.parametrize("gradients", GRADIENTS.values(), ids=GRADIENTS)
def test_no_element_moves_twice_as_far_as_torch_s_furthest(
    gradients: Callable[[int, Tensor], Tensor], betas: tuple[float, float]
) -> None:
    draw = torch.Generator().manual_seed(1)
    ours, theirs = (nn.Parameter(torch.zeros(64, 80)) for _ in range(2))
    optimizers = {
        ours: Adam([("p", ours)], lr=1.0, betas=betas, eps=1e-30, state_dtype="8bit"),
        theirs: torch.optim.Adam([theirs], lr=1.0, betas=betas, eps=1e-30),
    }
    furthest = dict.fromkeys(optimizers, 0.0)
    for t in range(60):
        gradient = gradients(t, torch.randn(64, 80, generator=draw))
        for param, opt in optimizers.items():
            before = param.detach().clone()
            param.grad = gradient.clone()
            opt.step()
            furthest[param] = max(furthest[param], (param.detach() - before).abs().max().item())
    assert furthest[ours] < 2 * furthest[theirs]


def test_what_a_scaler_leaves_to_the_step_is_unscaled_there() -> None:
    ends = []
    for scale in (None, 1024.0):
        model = two_layers()
        opt = AdamW(model, state_dtype="8bit", fused=True, max_grad_norm=0.5)
        for seed in (1, 2, 3):
            if scale is not None:
                opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(0.0)  # type: ignore[attr-defined]
            step(model, opt, seed, scale=1.0 if scale is None else scale)
        ends.append((model[0].weight.detach(), opt.state_of("0.weight")["exp_avg"].codes, opt.grad_norm))
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_a_step_that_a_scaler_skips_leaves_everything() -> None:
    model = two_layers(torch.bfloat16)
    opt = AdamW(model, state_dtype="8bit", fused=True, rounding="stochastic")
    step(model, opt, 1)
    before = model[0].weight.detach().clone(), opt.state_of("0.weight")["exp_avg"].codes.clone()
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(1.0)  # type: ignore[attr-defined]
    step(model, opt, 2)
    assert torch.equal(model[0].weight, before[0])
    assert torch.equal(opt.state_of("0.weight")["exp_avg"].codes, before[1])
    assert opt.state_of("0.weight")["step"] == 1
