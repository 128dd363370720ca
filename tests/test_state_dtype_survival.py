"""A declared state dtype survives: files, copies, conversions, replacements, another optimizer over the same store."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from paramstate import AdamW
from precision_models import KINDS, MOMENTS, floats, kept, step, two_layers
from small_models import assert_same_bits, state_by_name

Pair = tuple[nn.Sequential, AdamW]


def stepped(kind: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Pair:
    model = two_layers(dtype)
    opt = AdamW(model, state_dtype=kind, amsgrad=True, **options)
    step(model, opt, 1, 2)
    return model, opt


def through_a_file(value: Any) -> Any:
    """Saved and loaded as a checkpoint of strangers is: plain data alone."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copied_pair(model: nn.Sequential, opt: AdamW) -> Pair:
    return copy.deepcopy((model, opt))


def pickled_pair(model: nn.Sequential, opt: AdamW) -> Pair:
    pair: Pair = pickle.loads(pickle.dumps((model, opt)))
    return pair


def copied_optimizer(_: nn.Sequential, opt: AdamW) -> Pair:
    twin, model = copy.deepcopy(opt), two_layers()
    for param, own in zip(twin.param_groups[0]["params"], model.parameters(), strict=True):
        own.data = param.data
    twin.rebind(model)
    return model, twin


def over_the_store(model: nn.Sequential, opt: AdamW) -> Pair:
    return model, AdamW(model, amsgrad=True, store=opt.store)


def loaded_into_the_undeclared(model: nn.Sequential, opt: AdamW) -> Pair:
    other = copy.deepcopy(model)
    fresh = AdamW(other, amsgrad=True)
    fresh.load_state_dict(through_a_file(opt.state_dict(compact=True)))
    return other, fresh


def loaded_from_floats(model: nn.Sequential, opt: AdamW) -> Pair:
    other = copy.deepcopy(model)
    fresh = AdamW(other, amsgrad=True)
    fresh.load_state_dict(through_a_file(opt.state_dict()))
    return other, fresh


def rebound(model: nn.Sequential, opt: AdamW) -> Pair:
    other = copy.deepcopy(model)
    opt.rebind(other)
    return other, opt


WAYS = [
    copied_pair,
    pickled_pair,
    copied_optimizer,
    over_the_store,
    loaded_into_the_undeclared,
    loaded_from_floats,
    rebound,
]


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_keeps_what_was_declared_and_steps_as_the_original(
    way: Callable[[nn.Sequential, AdamW], Pair], kind: Any, partly: bool
) -> None:
    declared = {"0.*": kind} if partly and kind is not None else kind
    model, opt = stepped(declared)
    before = {name: {key: kept(opt, name, key) for key in MOMENTS} for name in opt.ids}
    straight_model, straight = copy.deepcopy((model, opt))
    step(straight_model, straight, 3, 4)
    other, twin = way(model, opt)
    assert {name: {key: kept(twin, name, key) for key in MOMENTS} for name in twin.ids} == before
    step(other, twin, 3, 4)
    assert_same_bits(state_by_name(other, twin), state_by_name(straight_model, straight))
    other.to(torch.bfloat16)
    step(other, twin, 5)
    assert {name: {key: kept(twin, name, key) for key in MOMENTS} for name in twin.ids} == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_conversions_of_the_model_there_and_back_leave_state_in_its_dtype(kind: Any, dtype: torch.dtype) -> None:
    model, opt = stepped(kind)
    before = kept(opt, "0.weight")
    held = floats(opt.state_of("0.weight")["exp_avg"])
    model.to(dtype)
    assert torch.equal(floats(opt.state_of("0.weight")["exp_avg"]), held)
    step(model, opt, 3)
    assert kept(opt, "0.weight") == before
    model.to(torch.float32)
    step(model, opt, 4)
    assert kept(opt, "0.weight") == before
    assert opt.state_of("0.weight")["step"] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_parameter_in_place_of_another_keeps_its_state_as_it_is(kind: Any, dtype: torch.dtype) -> None:
    model, opt = stepped(kind)
    before, held = kept(opt, "0.weight"), floats(opt.state_of("0.weight")["exp_avg"])
    model[0].weight = nn.Parameter(model[0].weight.detach().to(dtype))
    assert kept(opt, "0.weight") == before
    assert torch.equal(floats(opt.state_of("0.weight")["exp_avg"]), held)
    step(model, opt, 3)
    assert kept(opt, "0.weight") == before
    assert opt.state_of(model[0].weight)["step"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_stock_state_loads_into_it(kind: Any, dtype: torch.dtype) -> None:
    model = two_layers(dtype)
    stock = torch.optim.AdamW(model.parameters(), amsgrad=True)
    step(model, stock, 1, 2)
    opt = AdamW(model, amsgrad=True, state_dtype=kind)
    opt.load_state_dict(through_a_file(stock.state_dict()))
    fresh = AdamW(two_layers(dtype), amsgrad=True, state_dtype=kind)
    fresh.materialize_state()
    for name in opt.ids:
        for key in MOMENTS:
            assert kept(opt, name, key) == kept(fresh, name, key)
            theirs = stock.state[model.get_parameter(name)][key].float()
            ours = floats(opt.state_of(name)[key]).float()
            within = {"float32": 0.0, "bfloat16": 2**-8, "8bit": 2**-4}[kept(opt, name, key)]
            assert bool(((ours - theirs).abs() <= within * theirs.abs() + 2**-17 * theirs.abs().max()).all())
    step(model, opt, 3)
    assert opt.state_of("0.weight")["step"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_stock_torch_loads_what_we_save_and_goes_on(kind: Any, dtype: torch.dtype) -> None:
    model, opt = stepped(kind, dtype, rounding="kahan")
    stock = torch.optim.AdamW(model.parameters(), amsgrad=True)
    stock.load_state_dict(through_a_file(opt.state_dict()))
    for name, param in model.named_parameters():
        for key in MOMENTS:
            assert type(stock.state[param][key]) is torch.Tensor
            assert torch.equal(stock.state[param][key], floats(opt.state_of(name)[key]).to(param.dtype))
    before = model[0].weight.detach().clone()
    step(model, stock, 3)
    assert not torch.equal(model[0].weight, before)


def test_a_state_dict_is_plain_floats_and_the_compact_one_plain_bytes() -> None:
    model, opt = stepped("8bit")
    plain, compact = opt.state_dict(), opt.state_dict(compact=True)
    held = opt.state_of("0.weight")["exp_avg"]
    assert type(plain["state"][0]["exp_avg"]) is torch.Tensor
    assert torch.equal(plain["state"][0]["exp_avg"], held.dense())
    parts = compact["state"][0]["exp_avg"]
    assert {key: (type(part), part.dtype) for key, part in parts.items()} == {
        "codes": (torch.Tensor, torch.uint8),
        "scales": (torch.Tensor, torch.uint8),
    }
    assert parts["codes"].data_ptr() == held.codes.data_ptr(), "live, as in torch"
    assert type(compact["state"][1]["exp_avg"]) is torch.Tensor, "the bias is not kept in eight bits"

    def size(state_dict: dict[str, Any]) -> int:
        file = io.BytesIO()
        torch.save(state_dict, file)
        return file.tell()

    assert size(compact) < 0.4 * size(plain)
    step(model, opt, 3)
    assert torch.equal(opt.state_dict()["state"][0]["exp_avg"], opt.state_of("0.weight")["exp_avg"].dense())


@pytest.mark.parametrize("compact", [False, True])
def test_what_is_declared_here_wins_over_what_the_file_declares(compact: bool) -> None:
    _, opt = stepped("8bit")
    file = through_a_file(opt.state_dict(compact=compact))
    for declared, expected in [("bfloat16", "bfloat16"), ({"0.weight": "bfloat16"}, "bfloat16"), ("8bit", "8bit")]:
        ours = AdamW(two_layers(), amsgrad=True, state_dtype=declared)
        ours.load_state_dict(file)
        assert kept(ours, "0.weight") == expected
        others = {"bfloat16": "bfloat16", "8bit": "8bit"}.get(str(declared), "8bit")
        assert kept(ours, "1.weight") == others, "of which nothing was declared here: the file's word holds"


def test_a_compact_state_dict_loads_into_float_state_without_a_policy_here_or_there() -> None:
    model, opt = stepped("8bit")
    file = through_a_file(opt.state_dict(compact=True))
    del file["paramstate"]["traits"]
    ours = AdamW(copy.deepcopy(model), amsgrad=True, state_dtype="float32")
    ours.load_state_dict(file)
    assert kept(ours, "0.weight") == "float32"
    assert torch.equal(ours.state_of("0.weight")["exp_avg"], opt.state_of("0.weight")["exp_avg"].dense())


def test_a_loaded_state_is_a_copy() -> None:
    model, opt = stepped("8bit")
    twin = AdamW(model, amsgrad=True)
    twin.load_state_dict(opt.state_dict(compact=True))
    before = floats(opt.state_of("0.weight")["exp_avg"])
    twin.state_of("0.weight")["exp_avg"].zero_()
    assert torch.equal(floats(opt.state_of("0.weight")["exp_avg"]), before)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_constructor_s_word_over_a_handed_over_store_holds_for_all_that_was_not_declared_alone(kind: Any) -> None:
    model, opt = stepped({"1.weight": "bfloat16"})
    again = AdamW(model, amsgrad=True, store=opt.store, state_dtype=kind)
    step(model, again, 3)
    expected = {torch.float32: "float32", torch.bfloat16: "bfloat16", "8bit": "8bit"}[kind]
    assert [kept(again, "0.weight"), kept(again, "1.weight")] == [expected, "bfloat16"]


def test_shapes_of_a_compact_state_are_checked_by_name() -> None:
    _, opt = stepped("8bit")
    file = through_a_file(opt.state_dict(compact=True))
    other = AdamW(nn.Sequential(nn.Linear(80, 64), nn.Linear(64, 80)), amsgrad=True)
    with pytest.raises(ValueError, match=r"'0\.weight': the saved 'exp_avg' has shape \[80, 64\]"):
        other.load_state_dict(file)
