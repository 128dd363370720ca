"""Constraints, freezing, other layouts, edit sessions and reports over state of every dtype and every rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramstate import AdamW, Box, Constraint, MaxNorm, NonNegative, UnitNorm, diff, doctor
from precision_models import KINDS, SHORT, floats, kept, step, two_layers
from reference import same_bits
from small_models import assert_same_bits, state_by_name

ROUNDINGS = ["nearest", "stochastic", "kahan"]
# Numbers that bfloat16 and float16 do not have.
LOW, HIGH = -0.0301, 0.0403


def moments(opt: AdamW, name: str) -> dict[str, Tensor]:
    return {key: floats(held) for key, held in opt.state_of(name).items() if key != "step"}


@pytest.mark.parametrize("bounds", ["numbers", "tensors"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, *SHORT])
def test_bounds_hold_exactly_after_every_step(dtype: torch.dtype, kind: Any, rounding: Any, bounds: str) -> None:
    model = two_layers(dtype)
    shape = model[0].weight.shape
    low, high = (LOW, HIGH) if bounds == "numbers" else (torch.full(shape, LOW), torch.full(shape, HIGH))
    opt = AdamW(model, lr=1e-3, state_dtype=kind, rounding=rounding, constraints={"0.weight": Box(low, high)})
    stored = [torch.tensor(bound).to(dtype) for bound in (LOW, HIGH)]
    for seed in range(8):
        step(model, opt, seed)
        assert bool((model[0].weight >= stored[0]).all())
        assert bool((model[0].weight <= stored[1]).all())
    at_bound = (model[0].weight == stored[0]) | (model[0].weight == stored[1])
    assert 0.05 < at_bound.double().mean() < 0.95


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, *SHORT])
def test_no_element_becomes_negative_and_norms_hold(dtype: torch.dtype, kind: Any, rounding: Any) -> None:
    constraints: list[Constraint] = [NonNegative(), MaxNorm(0.5, dim=1), UnitNorm(dim=1)]
    for constraint in constraints:
        model = two_layers(dtype)
        opt = AdamW(model, lr=1e-2, state_dtype=kind, rounding=rounding, constraints={"0.weight": constraint})
        for seed in range(5):
            step(model, opt, seed)
            if constraint is constraints[0]:
                assert bool((model[0].weight >= 0).all())
                continue
            norms = model[0].weight.detach().double().norm(dim=1)
            # Rounding the elements one by one moves a norm by half of a place at most; at random, by a whole one.
            allowed = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
            assert bool((norms <= (0.5 if constraint is constraints[1] else 1.0) * (1 + allowed)).all())
            if constraint is constraints[2]:
                assert bool((norms >= 1 - allowed).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_bound_that_zeroes_the_first_moment_does_so_in_every_dtype(kind: Any) -> None:
    model = two_layers()
    box = Box(LOW, HIGH, zero_exp_avg=True)
    opt = AdamW(model, lr=1e-2, state_dtype=kind, constraints={"0.weight": box})
    step(model, opt, 1, 2)
    weight = model[0].weight.detach()
    at_bound = (weight == torch.tensor(LOW)) | (weight == torch.tensor(HIGH))
    first = moments(opt, "0.weight")["exp_avg"]
    assert bool(at_bound.any())
    assert bool((first[at_bound] == 0).all())
    assert bool((first[~at_bound] != 0).any())


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_parameter_keeps_value_and_state_and_goes_on_from_there(kind: Any, rounding: Any) -> None:
    model = two_layers(torch.bfloat16)
    opt = AdamW(model, state_dtype=kind, rounding=rounding)
    step(model, opt, 1, 2)
    before = state_by_name(model, opt)
    opt.freeze("0.weight")
    for number in (3, 4):
        model[1].weight.grad = torch.full_like(model[1].weight, float(number))
        opt.step()
    assert_same_bits(before, state_by_name(model, opt), ["0.weight"])
    opt.unfreeze("0.weight")
    how = kept(opt, "0.weight")
    step(model, opt, 5)
    assert kept(opt, "0.weight") == how
    assert opt.state_of("0.weight")["step"] == 3


@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_goes_through_the_map_that_carried_the_value(kind: Any, rounding: Any) -> None:
    model = two_layers(torch.bfloat16)
    opt = AdamW(model, state_dtype=kind, rounding=rounding)
    step(model, opt, 1, 2)
    before, how = moments(opt, "0.weight"), kept(opt, "0.weight")
    opt.replace_("0.weight", model[0].weight.T.contiguous(), state=lambda tensor: tensor.T)
    for key, held in moments(opt, "0.weight").items():
        assert same_bits(held.contiguous(), before[key].T.contiguous()), key
    assert kept(opt, "0.weight") == how
    opt.replace_("0.weight", torch.zeros(64, 80), state="keep")
    assert kept(opt, "0.weight") == how
    opt.replace_("0.weight", torch.zeros(8, 8), state="reset")
    assert opt.state_of("0.weight") == {}


class Transposed(nn.Module):
    """The two layers' weights, each transposed, as other frameworks lay them."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        for number in "01":
            layer = model[int(number)]
            self.register_parameter(f"kernel_{number}", nn.Parameter(layer.weight.detach().T.contiguous()))
            self.register_parameter(f"bias_{number}", nn.Parameter(layer.bias.detach().clone()))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("alone", [False, True])
def test_a_model_in_another_layout_goes_on_with_what_was_declared(alone: bool, kind: Any) -> None:
    model = two_layers()
    opt = AdamW(model, state_dtype=None if alone else kind)
    if alone:
        opt.set_state_dtype(["0.weight", "1.weight"], kind)
    step(model, opt, 1, 2)
    before, how = moments(opt, "0.weight"), kept(opt, "0.weight")
    other = Transposed(model)
    opt.relayout(other)
    assert kept(opt, "kernel_0") == how
    for key, held in moments(opt, "kernel_0").items():
        assert torch.equal(held, before[key].T)
    step(other, opt, 3)
    assert kept(opt, "kernel_0") == how


class Halves(nn.Module):
    """The first layer's weight in two parts."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.upper, self.lower = (nn.Parameter(part.clone()) for part in model[0].weight.detach().split([70, 10]))
        self.rest = nn.Parameter(model[0].bias.detach().clone())


@pytest.mark.parametrize("kind", ["bfloat16", "8bit"])
def test_parts_of_a_parameter_for_which_a_dtype_was_declared_keep_it(kind: Any) -> None:
    model = two_layers()
    opt = AdamW(model[0], state_dtype={"weight": kind})
    step(model[0], opt, 1, 2)
    before = moments(opt, "weight")
    opt.relayout(
        Halves(model),
        {"upper": ("weight", lambda w: w[:70]), "lower": ("weight", lambda w: w[70:]), "rest": "bias"},
    )
    assert kept(opt, "upper") == kind
    assert kept(opt, "lower") == ("float32" if kind == "8bit" else kind), "it is small"
    assert kept(opt, "rest") == "float32"
    for key, held in before.items():
        assert torch.equal(torch.cat([moments(opt, "upper")[key], moments(opt, "lower")[key]]), held), key


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_session_with_a_snapshot_brings_every_bit_of_the_state_back(kind: Any, rounding: Any) -> None:
    model = two_layers(torch.bfloat16)
    opt = AdamW(model, state_dtype=kind, rounding=rounding)
    step(model, opt, 1, 2)
    before, how = state_by_name(model, opt), kept(opt, "0.weight")
    with opt.edit(state="snapshot") as session:
        step(model, opt, 3)
        assert session.is_edited
    assert_same_bits(before, state_by_name(model, opt))
    assert kept(opt, "0.weight") == how
    step(model, opt, 3)
    assert kept(opt, "0.weight") == how


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inside", KINDS)
def test_a_dtype_that_was_declared_in_a_session_goes_with_it(kind: Any, inside: Any) -> None:
    model = two_layers()
    opt = AdamW(model, state_dtype=kind)
    step(model, opt, 1)
    before, how = state_by_name(model, opt), kept(opt, "0.weight")
    with opt.edit(state="snapshot"):
        opt.set_state_dtype("0.weight", inside)
        step(model, opt, 2)
    assert_same_bits(before, state_by_name(model, opt))
    step(model, opt, 2)
    assert kept(opt, "0.weight") == how
    assert opt.state_of("0.weight")["step"] == 2


def test_a_dtype_that_was_declared_before_a_session_holds_after_it_for_what_clients_write() -> None:
    model = two_layers()
    opt = AdamW(model)
    opt.set_state_dtype("0.weight", "8bit")
    step(model, opt, 1)
    with opt.edit(state="snapshot"):
        opt.set_state_dtype("0.weight", None)
        step(model, opt, 2)
    held = opt.state_of("0.weight")
    held["exp_avg"], held["exp_avg_sq"] = torch.zeros(80, 64), torch.zeros(80, 64)
    step(model, opt, 2)
    assert kept(opt, "0.weight") == "8bit"


@pytest.mark.parametrize("kind", KINDS)
def test_a_diff_compares_moments_as_floats(kind: Any) -> None:
    model = two_layers()
    opt = AdamW(model, state_dtype=kind)
    step(model, opt, 1)
    assert all(row.kind == "equal" for row in diff(opt, opt.state_dict()).rows if row.role != "value")
    twin_model = two_layers()
    twin = AdamW(twin_model, state_dtype=kind)
    step(twin_model, twin, 1)
    assert all(row.kind == "equal" for row in diff(opt, twin).rows)
    step(twin_model, twin, 2)
    changed = {row.a for row in diff(opt, twin).rows if row.kind != "equal" and row.role == "exp_avg"}
    assert changed == set(opt.ids)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_doctor_finds_nothing_in_a_run_and_what_somebody_wrote(kind: Any, rounding: Any) -> None:
    model = two_layers(torch.bfloat16)
    opt = AdamW(model, state_dtype=kind, rounding=rounding)
    step(model, opt, 1, 2)
    assert doctor(model, opt).findings == {}
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    assert list(doctor(model, opt).findings) == ["processed_under_old_moments"]
