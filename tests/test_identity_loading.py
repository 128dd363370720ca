"""scenarios.md, section A: saving and loading. Names decide; nothing is guessed, cast down or aliased."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from small_models import Layer, Net, assert_same_bits, state_by_name, train

ORDER = ("first", "second", "third")


def trained(net: Net | None = None, **options: Any) -> tuple[Net, paramstate.Adam]:
    torch.manual_seed(5)
    net = Net() if net is None else net
    opt = paramstate.AdamW(net, lr=0.01, **options)
    train(net, opt, range(3))
    return net, opt


def saved_and_loaded(value: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as `torch.load` reads it by default."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def reordered(net: Net) -> Net:
    """The same model after someone changed the order of its layers and of their attributes."""
    other = Net(())
    for name in reversed(ORDER):
        other.add_module(name, Layer(("bias", "weight")))
    other.load_state_dict(net.state_dict())
    return other


@pytest.mark.parametrize("source", ["model", "named"])
def test_reorder_load(source: str) -> None:
    net, opt = trained()
    other = reordered(net)
    fresh = paramstate.AdamW(other if source == "model" else other.named_parameters())
    report = fresh.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert report.matched_by == "name"
    assert sorted(report.loaded) == sorted(opt.ids)
    assert report.missing == report.unexpected == report.reshaped == report.retyped == []
    assert fresh.ids == opt.ids
    for model, optimizer in ((net, opt), (other, fresh)):
        train(model, optimizer, [10])
    assert_same_bits(state_by_name(net, opt), state_by_name(other, fresh))


def test_reorder_load_is_mixed_up_by_torch() -> None:
    """So that the test above can fail: torch's class gives one layer the moments of another."""
    net = Net()
    opt = torch.optim.AdamW(net.named_parameters())
    train(net, opt, range(3))
    other = reordered(net)
    fresh = torch.optim.AdamW(other.named_parameters())
    fresh.load_state_dict(opt.state_dict())
    assert not torch.equal(fresh.state[other.first.weight]["exp_avg"], opt.state[net.first.weight]["exp_avg"])


def test_a_loaded_files_ids_win() -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    net.renamed = net.second
    del net.second
    opt.rename({"second.weight": "renamed.weight", "second.bias": "renamed.bias"})
    train(net, opt, [0])
    other = Net(("first", "third", "renamed"))
    fresh = paramstate.AdamW(other)
    assert fresh.ids["renamed.weight"] != opt.ids["renamed.weight"]
    fresh.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert fresh.ids == opt.ids
    assert fresh.param(opt.ids["renamed.weight"]) is other.renamed.weight


def unchanged_by_error(opt: paramstate.Adam, net: Net, saved: dict[str, Any], match: str, **options: Any) -> str:
    """Loading raises a LoadError that matches, and leaves everything as it was."""
    before, groups, ids = state_by_name(net, opt), copy.deepcopy(opt.param_groups), dict(opt.ids)
    with pytest.raises(paramstate.LoadError, match=match) as caught:
        opt.load_state_dict(saved, **options)
    assert_same_bits(state_by_name(net, opt), before)
    assert opt.ids == ids
    for group, old in zip(opt.param_groups, groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in old.items() if k != "params"}
    return str(caught.value)


@pytest.mark.parametrize("by", ["name", "position"])
def test_shape_mismatch_load(by: str) -> None:
    _net, opt = trained()
    saved = opt.state_dict()
    other = Net()
    other.second = nn.Linear(3, 5)
    params = other.named_parameters() if by == "name" else other.parameters()
    fresh = paramstate.AdamW(params, lr=0.5)
    if by == "position":
        del saved["paramstate"]
        for group in saved["param_groups"]:
            group.pop("param_names", None)
    message = unchanged_by_error(fresh, other, saved, match=r"second\.weight|number 2|position 2|2\b")
    assert "[2, 3]" in message
    assert "[5, 3]" in message
    if by == "name":
        assert "second.weight" in message
        report = fresh.load_state_dict(saved, strict=False)
        assert sorted(report.reshaped) == ["second.bias", "second.weight"]
        assert sorted(report.loaded) == ["first.bias", "first.weight", "third.bias", "third.weight"]
        train(other, fresh, [10])
        assert float(fresh.state_of("second.weight")["step"]) == 1
        assert float(fresh.state_of("first.weight")["step"]) == 4


@pytest.mark.parametrize("stock_saves", [False, True])
def test_positional_load(stock_saves: bool) -> None:
    torch.manual_seed(5)
    net = Net()
    opt = (torch.optim.AdamW if stock_saves else paramstate.AdamW)(net.parameters(), lr=0.01)
    train(net, opt, range(3))
    other = copy.deepcopy(net)
    fresh = paramstate.AdamW(other)
    saved = saved_and_loaded(opt.state_dict())
    unchanged_by_error(fresh, other, saved, match="name", strict_names=True)
    report = fresh.load_state_dict(saved)
    assert report.matched_by == "position"
    assert sorted(report.loaded) == sorted(fresh.ids)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(fresh.state[other.third.bias][key], opt.state[net.third.bias][key])


def test_positional_load_of_a_named_file_into_bare_parameters() -> None:
    net, opt = trained()
    other = copy.deepcopy(net)
    fresh = paramstate.AdamW(other.parameters())
    report = fresh.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert report.matched_by == "position"
    assert torch.equal(fresh.state[other.third.bias]["exp_avg"], opt.state[net.third.bias]["exp_avg"])


def test_a_file_of_torchs_named_optimizer_is_matched_by_name() -> None:
    net = Net()
    opt = torch.optim.AdamW(net.named_parameters(), lr=0.01)
    train(net, opt, range(3))
    other = reordered(net)
    fresh = paramstate.AdamW(other)
    assert fresh.load_state_dict(saved_and_loaded(opt.state_dict())).matched_by == "name"
    for name, parameter in other.named_parameters():
        assert torch.equal(fresh.state[parameter]["exp_avg"], opt.state[dict(net.named_parameters())[name]]["exp_avg"])


def test_extra_layer_load() -> None:
    """The file holds a layer that the model has no more."""
    _net, opt = trained()
    smaller = Net(("first", "third"))
    fresh = paramstate.AdamW(smaller)
    message = unchanged_by_error(fresh, smaller, opt.state_dict(), match=r"second\.weight")
    assert message.startswith("loaded state dict contains a parameter group that doesn't match the size of")
    report = fresh.load_state_dict(opt.state_dict(), strict=False)
    assert sorted(report.unexpected) == ["second.bias", "second.weight"]
    assert sorted(report.loaded) == ["first.bias", "first.weight", "third.bias", "third.weight"]
    assert torch.equal(fresh.state_of("third.weight")["exp_avg"], opt.state_of("third.weight")["exp_avg"])


def test_missing_layer_load() -> None:
    """The model has a layer that the file does not hold."""
    _net, opt = trained()
    bigger = Net((*ORDER, "fourth"))
    fresh = paramstate.AdamW(bigger)
    unchanged_by_error(fresh, bigger, opt.state_dict(), match=r"fourth\.weight")
    report = fresh.load_state_dict(opt.state_dict(), strict=False)
    assert sorted(report.missing) == ["fourth.bias", "fourth.weight"]
    train(bigger, fresh, [10])
    assert float(fresh.state_of("fourth.weight")["step"]) == 1
    assert float(fresh.state_of("third.weight")["step"]) == 4


def test_load_with_a_map_of_names() -> None:
    _net, opt = trained()
    other = Net(("first", "renamed", "third"))
    fresh = paramstate.AdamW(other)
    names = {"second.weight": "renamed.weight", "second.bias": "renamed.bias"}
    report = fresh.load_state_dict(opt.state_dict(), names=names)
    assert sorted(report.loaded) == sorted(fresh.ids)
    assert torch.equal(fresh.state_of("renamed.weight")["exp_avg"], opt.state_of("second.weight")["exp_avg"])
    assert fresh.ids["renamed.weight"] == opt.ids["second.weight"]


def test_bf16_params_fp32_state_load() -> None:
    net, opt = trained()
    net.bfloat16()
    other = copy.deepcopy(net)
    fresh = paramstate.AdamW(other)
    report = fresh.load_state_dict(saved_and_loaded(opt.state_dict()))
    assert sorted(report.loaded) == sorted(opt.ids)
    for name in opt.ids:
        assert fresh.state_of(name)["exp_avg"].dtype == torch.float32
    assert_same_bits(state_by_name(net, opt), state_by_name(other, fresh))
    for model, optimizer in ((net, opt), (other, fresh)):
        train(model, optimizer, [10])
    assert_same_bits(state_by_name(net, opt), state_by_name(other, fresh))


def test_narrow_moments_are_widened_with_a_wider_value_and_reported() -> None:
    _net, opt = trained(Net().bfloat16())
    wider = Net()
    fresh = paramstate.AdamW(wider)
    report = fresh.load_state_dict(opt.state_dict())
    assert sorted(report.retyped) == sorted(opt.ids)
    for name in opt.ids:
        assert fresh.state_of(name)["exp_avg"].dtype == torch.float32
        assert torch.equal(fresh.state_of(name)["exp_avg"], opt.state_of(name)["exp_avg"].float())


def test_in_process_alias() -> None:
    net, opt = trained()
    other = copy.deepcopy(net)
    fresh = paramstate.AdamW(other)
    saved = opt.state_dict()
    fresh.load_state_dict(saved)
    before = state_by_name(net, opt)
    for name in opt.ids:
        for key, tensor in fresh.state_of(name).items():
            assert tensor.data_ptr() != opt.state_of(name)[key].data_ptr(), f"{name}, {key}"
    train(other, fresh, [10, 11])
    assert_same_bits(state_by_name(net, opt), before)


def test_orphan_growth() -> None:
    net, opt = trained()
    sizes = []
    for launch in range(20):
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        sizes.append(file.tell())
        net = reordered(net)
        opt = paramstate.AdamW(net)
        opt.load_state_dict(saved_and_loaded(torch.load(io.BytesIO(file.getvalue()), weights_only=True)))
        train(net, opt, [launch])
        net.first.weight = nn.Parameter(net.first.weight.detach().clone())
    assert max(sizes) - min(sizes) <= 64, f"a file grows: {sizes}"
    assert len(opt.store) == 6
    assert float(opt.state_of("first.weight")["step"]) == 23


def test_a_state_dict_carries_names_and_ids_in_one_key_of_its_own() -> None:
    net, opt = trained()
    saved = opt.state_dict()
    assert sorted(saved) == ["param_groups", "paramstate", "state"]
    assert saved["paramstate"]["version"] == 1
    assert [names[0] for names in saved["paramstate"]["names"]] == [name for name, _ in net.named_parameters()]
    assert saved["paramstate"]["ids"] == [opt.id_of(p) for p in net.parameters()]
    assert saved["state"][0]["exp_avg"] is opt.state[net.first.weight]["exp_avg"], "live references, as torch gives"
