"""Loading where there are several groups, and IDs that cannot be taken over: right by name, or refused as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from small_models import Layer, Net, assert_same_bits, assert_trains, state_by_name, train

SIZES = "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
NUMBER = "loaded state dict has a different number of parameter groups"
RATES = (("first", 0.1), ("second", 0.001))


def grouped(net: Net, *groups: tuple[str, float], **options: Any) -> paramstate.Adam:
    """An optimizer with one group for each space-separated list of layers, at its own lr."""
    given = [
        {"params": [item for item in net.named_parameters() if item[0].split(".")[0] in layers.split()], "lr": lr}
        for layers, lr in groups
    ]
    return paramstate.Adam(given, **options)


def rates(opt: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in opt.param_groups]


def refused(opt: paramstate.Adam, net: nn.Module, saved: dict[str, Any], match: str, **options: Any) -> None:
    """Loading raises a LoadError that matches, changes nothing, and the optimizer works on."""
    before, ids, lrs = state_by_name(net, opt), dict(opt.ids), rates(opt)
    with pytest.raises(paramstate.LoadError, match=match):
        opt.load_state_dict(saved, **options)
    assert_same_bits(state_by_name(net, opt), before)
    assert opt.ids == ids
    assert rates(opt) == lrs
    assert_trains(net, opt)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([5, 5], r"'weight' and 'bias' have the same saved ID 5"),
        ([-1, 3], r"'weight': the saved ID is -1"),
        ([3, 0], r"'bias': the saved ID is 0"),
        ([3, 2**63], r"'bias': the saved ID is 9223372036854775808"),
        (["3", 4], r"'weight': the saved ID is '3'"),
        ([3.0, 4], r"'weight': the saved ID is 3\.0"),
        ([True, 4], r"'weight': the saved ID is True"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_saved_ids_that_cannot_be_ids_are_refused_before_anything_is_loaded(
    ids: list[Any], match: str, strict: bool
) -> None:
    layer = Layer()
    opt = paramstate.Adam(layer)
    train(layer, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    saved["paramstate"]["ids"] = ids
    train(layer, opt, [2])
    refused(opt, layer, saved, match, strict=strict)


def test_the_largest_and_the_smallest_id_are_taken_over() -> None:
    layer = Layer()
    opt = paramstate.Adam(layer)
    saved = opt.state_dict()
    saved["paramstate"]["ids"] = [2**63 - 1, 1]
    opt.load_state_dict(saved)
    assert opt.ids == {"weight": 2**63 - 1, "bias": 1}
    assert_trains(layer, opt)


def test_a_bad_id_of_a_parameter_that_is_not_loaded_does_no_harm() -> None:
    layer = Layer()
    saved = paramstate.Adam(layer).state_dict()
    saved["paramstate"]["names"][1] = ["gone"]
    saved["param_groups"][0].pop("param_names")
    saved["paramstate"]["ids"] = [7, 7]
    opt = paramstate.Adam(layer)
    assert opt.load_state_dict(saved, strict=False).unexpected == ["gone"]
    assert opt.ids["weight"] == 7


def test_an_id_that_a_shared_store_holds_for_another_parameter_is_left_to_it() -> None:
    old = Net(("first", "second"))
    former = paramstate.Adam(old)
    train(old, former, range(2))
    new = Net(("first", "renamed"))
    opt = paramstate.Adam(new, store=former.store)
    own = dict(opt.ids)
    names = {"second.weight": "renamed.weight", "second.bias": "renamed.bias"}
    report = opt.load_state_dict(former.state_dict(), names=names)
    assert sorted(report.loaded) == sorted(own)
    assert opt.ids == own
    assert former.ids["second.weight"] in former.store
    assert torch.equal(opt.state_of("renamed.weight")["exp_avg"], former.state_of("second.weight")["exp_avg"])
    assert_trains(new, opt)
    assert_trains(old, former)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("stock_saves", [True, False])
def test_options_follow_the_parameters_when_the_groups_changed_places(stock_saves: bool, strict: bool) -> None:
    net = Net(("first", "second"))
    opt: torch.optim.Optimizer = grouped(net, ("first", 0.1), ("second", 0.001))
    if stock_saves:
        opt = torch.optim.Adam(
            [{"params": list(getattr(net, name).named_parameters(name)), "lr": lr} for name, lr in RATES]
        )
    opt.param_groups[1]["tag"] = "slow"
    train(net, opt, range(2))
    other = copy.deepcopy(net)
    fresh = grouped(other, ("second", 0.5), ("first", 0.5))
    assert fresh.load_state_dict(opt.state_dict(), strict=strict).matched_by == "name"
    assert rates(fresh) == [0.001, 0.1]
    assert [group.get("tag") for group in fresh.param_groups] == ["slow", None]
    assert fresh.param_groups[0]["param_names"] == ["second.weight", "second.bias"]
    train(net, opt, [5])
    train(other, fresh, [5])
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_group_made_of_saved_groups_with_other_options_is_refused_or_keeps_its_own() -> None:
    net = Net()
    saved = grouped(net, ("first second", 0.1), ("third", 0.001)).state_dict()
    fresh = grouped(net, ("first", 0.5), ("second third", 0.25))
    refused(fresh, net, saved, r"group 1: parameter 'second.weight' .* group 0 and 'third.weight' in group 1.* 'lr'")
    report = fresh.load_state_dict(saved, strict=False)
    assert sorted(report.loaded) == sorted(fresh.ids)
    assert rates(fresh) == [0.1, 0.25]
    assert report.kept_options == ["1"]
    assert_trains(net, fresh)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_groups_of_the_same_options_may_be_divided_otherwise(lr: Any) -> None:
    net = Net()
    opt = grouped(net, ("first second", lr), ("third", copy.deepcopy(lr)))
    for group, name in zip(opt.param_groups, ("a", "b"), strict=True):
        group["name"] = name
    fresh = grouped(net, ("first", 0.5), ("second third", 0.25))
    fresh.param_groups[0]["name"] = "mine"
    fresh.load_state_dict(opt.state_dict())
    assert [float(rate) for rate in rates(fresh)] == [float(lr), float(lr)]
    assert [group.get("name") for group in fresh.param_groups] == ["mine", None]


def test_another_number_of_groups_loads_by_name_when_not_strict() -> None:
    net = Net()
    lr = torch.tensor(0.1)
    opt = grouped(net, ("first second", lr), foreach=False)
    fresh = grouped(net, ("third", 0.5), ("first", 0.25), ("second", 0.25))
    fresh.param_groups[0]["name"] = "head"
    refused(fresh, net, opt.state_dict(), NUMBER)
    report = fresh.load_state_dict(opt.state_dict(), strict=False)
    assert sorted(report.missing) == ["third.bias", "third.weight"]
    assert report.kept_options == ["head"]
    assert [float(rate) for rate in rates(fresh)] == [0.5, float(lr), float(lr)]
    assert fresh.param_groups[1]["lr"] is not fresh.param_groups[2]["lr"]
    assert fresh.param_groups[1]["lr"] is not lr
    assert_trains(net, fresh)


def test_another_number_of_groups_never_loads_by_position() -> None:
    net = Net(("first", "second"))
    saved = torch.optim.Adam(net.parameters()).state_dict()
    fresh = grouped(net, ("first", 0.5), ("second", 0.25))
    refused(fresh, net, saved, NUMBER, strict=False)


def test_an_empty_group_takes_the_options_of_the_empty_group_in_its_place() -> None:
    net = Net(("first",))
    opt = paramstate.Adam([{"params": net.parameters(), "lr": 0.1}, {"params": [], "lr": 0.001}], model=net)
    opt.param_groups[1]["initial_lr"] = 0.5
    fresh = paramstate.Adam([{"params": net.parameters()}, {"params": []}], model=net)
    fresh.load_state_dict(opt.state_dict())
    assert rates(fresh) == [0.1, 0.001]
    assert fresh.param_groups[1]["initial_lr"] == 0.5


def test_positions_are_paired_within_each_group() -> None:
    net = Net()
    first, second, third = (list(layer.parameters()) for layer in net.children())
    opt = torch.optim.Adam([{"params": [*first, *second], "lr": 0.1}, {"params": third, "lr": 0.001}])
    train(net, opt, range(2))
    fresh = paramstate.Adam([{"params": first}, {"params": [*third, *second]}])
    refused(fresh, net, opt.state_dict(), f"{SIZES}: group 0 has 4 parameters there and 2 here")
    report = fresh.load_state_dict(opt.state_dict(), strict=False)
    assert report.matched_by == "position"
    assert report.unexpected == ["position 2", "position 3"]
    assert report.missing == ["position 4", "position 5"]
    assert rates(fresh) == [0.1, 0.001]
    for parameter in (*first, *third):
        assert torch.equal(fresh.state[parameter]["exp_avg"], opt.state[parameter]["exp_avg"])
    assert not any(fresh.state.get(parameter) for parameter in second)


def two_models(cls: type[torch.optim.Optimizer], *models: nn.Module, names: tuple[str, ...] = ()) -> Any:
    groups: list[dict[str, Any]] = [{"params": list(model.named_parameters())} for model in models]
    for group, name in zip(groups, names, strict=False):
        group["name"] = name
    return cls(groups)


@pytest.mark.parametrize("names", [(), ("generator", "critic"), ("same", "same")])
def test_names_that_two_groups_of_a_stock_file_share_are_told_apart(names: tuple[str, ...]) -> None:
    models = Layer(), Layer(("bias", "weight"))
    opt = two_models(torch.optim.Adam, *models, names=names)
    for model in models:
        train(model, opt, range(3))
    fresh = two_models(paramstate.Adam, *models, names=names)
    report = fresh.load_state_dict(opt.state_dict())
    assert report.matched_by == "name"
    assert sorted(report.loaded) == sorted(fresh.ids)
    assert report.by_group == ([] if names[:1] == ("generator",) else list(fresh.ids))
    assert report.kept_options == []
    for model in models:
        for parameter in model.parameters():
            assert torch.equal(fresh.state[parameter]["exp_avg"], opt.state[parameter]["exp_avg"])


def test_named_groups_of_a_stock_file_are_found_in_another_order() -> None:
    one, two = Layer(), Layer()
    opt = two_models(torch.optim.Adam, one, two, names=("one", "two"))
    for model in (one, two):
        train(model, opt, range(3))
    fresh = two_models(paramstate.Adam, two, one, names=("two", "one"))
    fresh.load_state_dict(opt.state_dict())
    assert torch.equal(fresh.state[one.weight]["exp_avg"], opt.state[one.weight]["exp_avg"])
    assert [group["name"] for group in fresh.param_groups] == ["two", "one"]


@pytest.mark.parametrize("named", ["theirs", "ours"])
def test_the_number_tells_groups_of_which_one_side_does_not_know_the_names(named: str) -> None:
    models = Layer(), Layer(("bias", "weight"))
    opt = two_models(torch.optim.Adam, *models, names=("generator", "critic") if named == "theirs" else ())
    opt.param_groups[1]["lr"] = 0.5
    for model in models:
        train(model, opt, range(3))
    fresh = two_models(paramstate.Adam, *models, names=("generator", "critic") if named == "ours" else ())
    refused(fresh, models[0], opt.state_dict(), r"0:|generator:", strict_names=True)
    report = fresh.load_state_dict(opt.state_dict())
    assert report.matched_by == "name"
    assert report.loaded == report.by_group == list(fresh.ids)
    assert rates(fresh) == [0.001, 0.5]
    assert [group.get("name") for group in fresh.param_groups] == ["generator", "critic"]
    for model in models:
        for parameter in model.parameters():
            assert torch.equal(fresh.state[parameter]["exp_avg"], opt.state[parameter]["exp_avg"])


def test_groups_that_are_called_otherwise_or_are_of_another_number_are_not_one_anothers() -> None:
    one, two, three = Layer(), Layer(), Layer()
    saved = two_models(torch.optim.Adam, one, two, names=("one", "two")).state_dict()
    other = two_models(paramstate.Adam, one, two, names=("generator", "critic"))
    refused(other, one, saved, "missing in the state dict: 'generator:weight'")
    assert other.load_state_dict(saved, strict=False).loaded == []
    more = two_models(paramstate.Adam, one, two, three)
    report = more.load_state_dict(saved, strict=False)
    assert report.loaded == report.by_group == []
    assert report.kept_options == ["0", "1", "2"]


def test_a_name_that_one_group_holds_twice_is_not_told_by_the_groups_number() -> None:
    one, two = Layer(), Layer()
    groups = [{"params": [("weight", one.weight), ("weight", two.weight)]}, {"params": [("weight", one.bias)]}]
    saved = torch.optim.Adam(copy.deepcopy(groups)).state_dict()
    fresh = paramstate.Adam([{**group, "name": name} for group, name in zip(groups, "ab", strict=True)])
    report = fresh.load_state_dict(saved, strict=False)
    assert report.loaded == report.by_group == ["b:weight"]
    assert report.unexpected == ["0:weight", "0:weight#2"]


def test_a_bare_name_is_not_taken_for_one_of_two_that_share_it() -> None:
    one, two = Layer(), Layer()
    saved = torch.optim.Adam(one.named_parameters()).state_dict()
    fresh = two_models(paramstate.Adam, one, two)
    report = fresh.load_state_dict(saved, strict=False)
    assert report.loaded == []
    assert report.unexpected == ["weight", "bias"]
    names = {"weight": "1:weight", "bias": "1:bias"}
    assert fresh.load_state_dict(saved, strict=False, names=names).loaded == ["1:weight", "1:bias"]


def test_own_files_of_two_models_load_after_their_groups_changed_places() -> None:
    one, two = Layer(), Layer()
    opt = two_models(paramstate.Adam, one, two)
    for model in (one, two):
        train(model, opt, range(3))
    opt.param_groups.reverse()
    fresh = two_models(paramstate.Adam, one, two)
    fresh.load_state_dict(opt.state_dict())
    assert fresh.ids == opt.ids
    assert torch.equal(fresh.state[one.weight]["exp_avg"], opt.state[one.weight]["exp_avg"])


def test_a_bare_name_stays_ambiguous_under_the_ids_of_a_file() -> None:
    models = Layer(), Layer()
    opt = two_models(paramstate.Adam, *models)
    saved = opt.state_dict()
    saved["paramstate"]["ids"] = [11, 12, 13, 14]
    opt.load_state_dict(saved)
    assert opt.ids == {"0:weight": 11, "0:bias": 12, "1:weight": 13, "1:bias": 14}
    with pytest.raises(paramstate.AmbiguousNameError, match="'0:weight', '1:weight'"):
        opt.state_of("weight")
