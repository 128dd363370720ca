"""Rows of parameters whose state is kept in a declared dtype: edited, frozen, stepped alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramstate import AdamW
from precision_models import KINDS, MOMENTS, floats, kept, step, two_layers
from reference import same_bits
from small_models import give_gradient

ROUNDINGS = ["nearest", "stochastic", "kahan"]


def stepped(kind: Any, rounding: Any = "nearest", dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, AdamW]:
    model = two_layers(dtype)
    opt = AdamW(model, lr=1e-2, amsgrad=True, state_dtype=kind, rounding=rounding)
    step(model, opt, 1, 2)
    return model, opt


def moments(opt: AdamW, name: str = "0.weight") -> dict[str, Tensor]:
    return {key: floats(held) for key, held in opt.state_of(name).items() if key != "step"}


EDITS = {
    "keep": (lambda rows: rows.keep("0.weight", range(2, 78)), lambda old: old[2:78]),
    "gather": (lambda rows: rows.gather("0.weight", [*range(80), 3, 3]), lambda old: old[[*range(80), 3, 3]]),
    "permute": (lambda rows: rows.permute("0.weight", list(range(79, -1, -1))), lambda old: old.flip(0)),
    "append": (lambda rows: rows.append("0.weight", 3), lambda old: torch.cat([old, torch.zeros(3, 64).to(old)])),
    "reset": (
        lambda rows: rows.reset("0.weight", [0, 5]),
        lambda old: old.index_fill(0, torch.tensor([0, 5]), 0.0),
    ),
    "columns": (lambda rows: rows.keep("0.weight", range(1, 64), dim=1), lambda old: old[:, 1:]),
}


@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", EDITS)
def test_state_moves_with_its_rows_exactly_and_stays_as_it_is_kept(edit: str, kind: Any, rounding: Any) -> None:
    model, opt = stepped(kind, rounding, torch.bfloat16)
    before, how = moments(opt), kept(opt, "0.weight")
    change, expected = EDITS[edit]
    with opt.edit_rows() as rows:
        change(rows)
    assert kept(opt, "0.weight") == how
    assert ("compensation" in before) == (rounding == "kahan")
    for key, held in moments(opt).items():
        assert same_bits(held, expected(before[key]).contiguous()), key
    step(model, opt, 3)
    assert kept(opt, "0.weight") == how


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_new_step_as_fresh_ones(kind: Any) -> None:
    model, opt = stepped(kind)
    with opt.edit_rows() as rows:
        rows.append("0.weight", torch.zeros(4, 64))
    weight = model[0].weight
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    opt.step()
    moved = (before - weight.detach())[-4:]
    assert torch.allclose(moved, torch.full_like(moved, 1e-2), rtol=1e-4)
    assert opt.row_steps("0.weight")[-5:].tolist() == [3, 1, 1, 1, 1]


def test_a_parameter_that_an_edit_makes_small_is_kept_in_float32_and_in_eight_bits_once_it_has_grown() -> None:
    model, opt = stepped("8bit")
    with opt.edit_rows() as rows:
        rows.keep("0.weight", range(63))
    assert kept(opt, "0.weight") == "float32"
    with opt.edit_rows() as rows:
        rows.append("0.weight", 1)
    assert kept(opt, "0.weight") == "8bit"
    assert list(model[0].weight.shape) == [64, 64]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_rows_keep_values_and_state_while_the_others_step(dtype: torch.dtype, kind: Any, rounding: Any) -> None:
    model, opt = stepped(kind, rounding, dtype)
    opt.freeze_rows("0.weight", range(0, 80, 3))
    value, before = model[0].weight.detach().clone(), moments(opt)
    step(model, opt, 3, 4)
    assert same_bits(model[0].weight[::3].contiguous(), value[::3].contiguous())
    assert not same_bits(model[0].weight.detach(), value)
    for key, held in moments(opt).items():
        assert torch.equal(held[::3], before[key][::3]), key
        assert not torch.equal(held[1::3], before[key][1::3]), key
    opt.unfreeze_rows("0.weight")
    step(model, opt, 5)
    assert opt.row_steps("0.weight")[:4].tolist() == [3, 5, 5, 3]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_some_rows_is_that_of_the_same_rows_in_a_whole_step(kind: Any, rounding: Any) -> None:
    mask = torch.arange(80) % 4 == 1
    ends = []
    for chosen in (None, {"0.weight": mask}):
        model, opt = stepped(kind, rounding, torch.bfloat16)
        before = moments(opt)
        for name, param in model.named_parameters():
            give_gradient(param, f"{name}:9")
        opt.step(rows=chosen)
        ends.append((model[0].weight.detach(), moments(opt), before))
    (whole, whole_moments, before), (partly, part_moments, _) = ends
    assert same_bits(partly[mask], whole[mask])
    for key, held in part_moments.items():
        assert torch.equal(held[~mask], before[key][~mask]), key
        # The scales of blocks are of all that is in them, and rounding depends on them alone.
        assert torch.allclose(held[mask].float(), whole_moments[key][mask].float(), rtol=0.13, atol=1e-4), key


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_that_fails_leaves_state_as_it_was(kind: Any) -> None:
    model, opt = stepped(kind)
    before, weight, held = moments(opt), model[0].weight, dict(opt.state_of("0.weight"))

    def fail_midway() -> None:
        with opt.edit_rows() as rows:
            rows.keep("0.weight", [1, 2, 3])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert model[0].weight is weight
    assert all(opt.state_of("0.weight")[key] is tensor for key, tensor in held.items())
    assert all(torch.equal(moments(opt)[key], before[key]) for key in MOMENTS)
