"""Selections in an optimizer: as its groups, resolved anew by ``rebind``, and wherever parameters are named."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import paramstate
from paramstate import Adam, AdamW, Box, SelectionError, UnknownParameterError, select
from reference import same_bits
from small_models import Layer, Net, assert_same_bits, state_by_name, train


def names_of_groups(opt: torch.optim.Optimizer) -> list[list[str]]:
    return [group["param_names"] for group in opt.param_groups]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3)
        self.head.weight = self.wte.weight


def test_two_parts_of_a_model_train_at_rates_of_their_own() -> None:
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    opt = AdamW(
        [
            {"params": select(net, "first", net.second), "lr": 1e-3},
            {"params": select(net, "third"), "lr": 1e-1, "weight_decay": 0.0},
        ]
    )
    stock = torch.optim.AdamW(
        [
            {"params": [*twin.first.parameters(), *twin.second.parameters()], "lr": 1e-3},
            {"params": twin.third.parameters(), "lr": 1e-1, "weight_decay": 0.0},
        ]
    )
    train(net, opt, range(4))
    train(twin, stock, range(4))
    for name, param in net.named_parameters():
        torch.testing.assert_close(param, twin.get_parameter(name), rtol=1e-5, atol=1e-7)
    assert names_of_groups(opt) == [
        ["first.weight", "first.bias", "second.weight", "second.bias"],
        ["third.weight", "third.bias"],
    ]
    assert opt.ids == AdamW(net).ids


def test_a_bare_selection_is_the_only_group_and_everything_outside_stays_bit_for_bit() -> None:
    net = Net()
    outside = {name: param.detach().clone() for name, param in net.named_parameters() if "second" not in name}
    opt = Adam(select(net, "second"), lr=0.1)
    start = net.second.weight.detach().clone()
    train(net, opt, range(3))
    assert list(opt.ids) == ["second.weight", "second.bias"]
    assert not torch.equal(net.second.weight, start)
    for name, value in outside.items():
        assert same_bits(net.get_parameter(name), value), name


def test_a_group_that_is_added_later_may_be_a_selection() -> None:
    net = Net()
    opt = AdamW(select(net, "first"))
    opt.add_param_group({"params": select(net, "second"), "lr": 0.5})
    assert names_of_groups(opt)[1] == ["second.weight", "second.bias"]
    unnamed = AdamW(net.first.parameters())
    unnamed.add_param_group({"params": select(net, "second")})
    assert "param_names" not in unnamed.param_groups[1]
    assert unnamed.name_of(net.second.bias) == "second.bias"


def test_groups_get_no_new_keys() -> None:
    net = Net()
    ours, stock = AdamW([{"params": select(net, "first")}]), torch.optim.AdamW(net.first.named_parameters())
    assert ours.param_groups[0].keys() == stock.param_groups[0].keys()
    assert "selected" not in str(ours.state_dict())


def test_selections_that_overlap_are_torchs_error_with_names() -> None:
    net = Net()
    every = {"params": select(net)}
    with pytest.raises(
        ValueError, match=r"appear in more than one parameter group: 'first\.weight', 'first\.bias' are"
    ):
        AdamW([every, {"params": select(net, "first")}])
    opt = AdamW(select(net, "first"))
    with pytest.raises(SelectionError, match=r"'first\.bias' is in group 0 already; subtract"):
        opt.add_param_group({"params": select(net, "*.bias")})
    with pytest.raises(SelectionError, match=r"'weight', 'bias' are in group 0 already"):
        opt.add_param_group({"params": net.first})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": select(net, "*.bias") - select(net, "first")})
    assert names_of_groups(opt)[1] == ["second.bias", "third.bias"]


def test_an_empty_or_half_selected_group_is_refused() -> None:
    net, tied = Net(), Tied()
    with pytest.raises(UnknownParameterError, match=r"'frist' matches no parameter; the nearest names are 'first'"):
        AdamW([{"params": select(net, "first")}, {"params": select(net, "frist")}])
    with pytest.raises(SelectionError, match=r"'wte\.weight' is tied to 'head\.weight'"):
        AdamW(select(tied, "wte"))
    opt = AdamW(select(tied, "wte", "head.weight"))
    assert opt.ids["wte.weight"] == opt.ids["head.weight"]


def test_rebind_adopts_what_now_belongs_to_a_selection() -> None:
    net = Net()
    opt = AdamW([{"params": select(net, "first", "second"), "lr": 1e-3}, {"params": select(net, "third"), "lr": 1e-1}])
    train(net, opt, range(2))
    before = opt.ids
    net.third.add_module("extra", Layer())
    net.second.register_parameter("scale", nn.Parameter(torch.ones(2)))
    net.add_module("fourth", Layer())
    report = opt.rebind(net)
    assert report.adopted == ["second.scale", "third.extra.weight", "third.extra.bias"]
    assert report.unmanaged == ["fourth.weight", "fourth.bias"]
    assert names_of_groups(opt)[0][-1] == "second.scale"
    assert names_of_groups(opt)[1] == ["third.weight", "third.bias", "third.extra.weight", "third.extra.bias"]
    assert opt.param_groups[1]["params"][2] is net.third.extra.weight
    assert {name: opt.ids[name] for name in before} == before
    assert opt.rebind(net, group=0).adopted == ["fourth.weight", "fourth.bias"]


def test_rebind_to_a_model_built_anew_follows_by_name_and_adopts_by_selection() -> None:
    net, wider = Net(), Net(("first", "second", "third", "fourth"))
    wider.first.register_parameter("gain", nn.Parameter(torch.ones(1)))
    opt = AdamW([{"params": select(net, "first")}, {"params": ~select(net, "first"), "lr": 0.1}])
    train(net, opt, range(2))
    state = state_by_name(net, opt)
    wider.load_state_dict(net.state_dict(), strict=False)
    report = opt.rebind(wider, group=0)
    assert report.followed == [name for name, _ in net.named_parameters()]
    assert report.adopted == ["first.gain", "fourth.weight", "fourth.bias"]
    assert names_of_groups(opt)[0] == ["first.weight", "first.bias", "first.gain"]
    assert_same_bits(state_by_name(wider, opt), state, state)


def test_rebind_adopts_what_a_wrapper_added_below_a_selected_module() -> None:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"base": nn.Sequential(nn.Linear(2, 2)), "head": nn.Linear(2, 1)})
    opt = AdamW([{"params": select(model, "base"), "lr": 1e-5}, {"params": select(model, "head")}])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=1))
    report = opt.rebind(wrapped)
    assert report.kept == ["base.0.weight", "base.0.bias", "head.weight", "head.bias"]
    assert report.adopted == ["base.0.lora_A.default.weight", "base.0.lora_B.default.weight"]
    assert len(opt.param_groups[0]["params"]) == 4


def test_rebind_takes_a_selection_that_finds_nothing_now_as_vanished() -> None:
    net = Net()
    opt = AdamW([{"params": select(net, "first")}, {"params": select(net, "third")}])
    net.third = nn.Identity()
    report = opt.rebind(net)
    assert report.vanished == ["third.weight", "third.bias"]
    net.third = Layer()
    assert opt.rebind(net).adopted == ["third.weight", "third.bias"]
    assert opt.param_groups[1]["params"] == [*net.third.parameters()]


def test_a_new_parameter_that_two_selections_claim_is_refused_before_anything_changes() -> None:
    net = Net()
    net.second.bias = None
    opt = AdamW([{"params": select(net, "first", "**.bias")}, {"params": select(net, "second")}])
    train(net, opt, range(2))
    before, ids = state_by_name(net, opt), opt.ids
    net.second.bias = nn.Parameter(torch.ones(2))
    del net.first.bias
    with pytest.raises(SelectionError, match=r"'second\.bias' is new, and the selections of groups 0 and 1 both"):
        opt.rebind(net)
    assert opt.ids == ids
    assert_same_bits(state_by_name(net, opt), before, ["first.weight", "second.weight", "third.bias"])


def test_a_selection_of_one_model_claims_nothing_in_another() -> None:
    generator, discriminator = Net(("body",)), Net(("body",))
    opt = AdamW([{"params": select(generator, "body")}, {"params": select(discriminator, "body"), "name": "d"}])
    wider = Net(("body",))
    wider.body.register_parameter("gain", nn.Parameter(torch.ones(1)))
    report = opt.rebind(wider, label="d")
    assert report.followed == ["d:body.weight", "d:body.bias"]
    assert report.adopted == ["body.gain"]
    assert [len(group["params"]) for group in opt.param_groups] == [2, 3]
    assert opt.param_groups[0]["params"][0] is generator.body.weight


def test_a_group_that_a_client_moved_is_found_by_what_it_holds() -> None:
    net = Net()
    opt = AdamW([{"params": select(net, "first")}, {"params": select(net, "second")}])
    opt.param_groups.reverse()
    net.first.register_parameter("gain", nn.Parameter(torch.ones(1)))
    assert opt.rebind(net).adopted == ["first.gain"]
    assert names_of_groups(opt)[1] == ["first.weight", "first.bias", "first.gain"]


def test_a_group_that_a_client_took_out_is_not_mixed_up_with_another() -> None:
    net = Net()
    opt = AdamW([{"params": select(net, "first")}, {"params": select(net, "second")}])
    del opt.param_groups[0]
    net.first.register_parameter("gain", nn.Parameter(torch.ones(1)))
    report = opt.rebind(net)
    assert report.adopted == []
    assert "first.gain" in report.unmanaged
    assert names_of_groups(opt) == [["second.weight", "second.bias"]]


def test_a_group_whose_parameters_were_all_renamed_takes_the_new_ones() -> None:
    model = nn.ModuleDict({"base": nn.Linear(1, 1), "conv": nn.Conv1d(1, 1, 1)})
    opt = AdamW([{"params": select(model, nn.Linear)}, {"params": select(model, nn.Conv1d)}])
    other = nn.ModuleDict({"base": nn.Linear(1, 1), "convolution": nn.Conv1d(1, 1, 1)})
    report = opt.rebind(other)
    assert report.vanished == ["conv.weight", "conv.bias"]
    assert report.adopted == names_of_groups(opt)[1] == ["convolution.weight", "convolution.bias"]


def test_loading_keeps_the_selections() -> None:
    net = Net()
    opt = AdamW([{"params": select(net, "first")}, {"params": select(net, "second")}])
    opt.load_state_dict(opt.state_dict())
    net.second.register_parameter("gain", nn.Parameter(torch.ones(1)))
    assert opt.rebind(net).adopted == ["second.gain"]
    assert opt.param_groups[1]["params"][-1] is net.second.gain


def test_an_optimizer_keeps_no_model_alive() -> None:
    net = Net()
    reference = weakref.ref(net)
    opt = AdamW([{"params": select(net, "first")}, {"params": select(net, Layer) - select(net, "first")}])
    del net
    gc.collect()
    assert reference() is None
    assert list(opt.ids)[:2] == ["first.weight", "first.bias"]


def test_model_and_optimizer_are_copied_as_a_pair_and_the_selection_means_the_copy() -> None:
    net = Net()
    opt = AdamW([{"params": select(net, "first")}, {"params": select(net, lambda name, _: name.startswith("second"))}])
    train(net, opt, range(2))
    twin, copied = copy.deepcopy((net, opt))
    twin.second.register_parameter("gain", nn.Parameter(torch.ones(1)))
    assert copied.rebind(twin).adopted == ["second.gain"]
    assert copied.param_groups[1]["params"][-1] is twin.second.gain
    assert len(opt.param_groups[1]["params"]) == 2
    assert opt.rebind(net).adopted == []


def is_second(name: str, _: torch.Tensor) -> bool:
    return name.startswith("second")


def test_an_optimizer_pickles_with_its_selections_where_the_model_does_not() -> None:
    net = Net()
    net.unpicklable = lambda: None
    opt = AdamW([{"params": select(net, "first")}, {"params": select(net, is_second)}])
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(net)
    again = pickle.loads(pickle.dumps(opt))
    fresh = Net()
    fresh.first.register_parameter("gain", nn.Parameter(torch.ones(1)))
    fresh.second.register_parameter("gain", nn.Parameter(torch.ones(1)))
    assert again.rebind(fresh).adopted == ["first.gain", "second.gain"]
    assert [len(group["params"]) for group in again.param_groups] == [3, 3]


def test_a_predicate_that_does_not_pickle_gives_way_to_the_names_that_it_selected() -> None:
    net = Net()
    opt = AdamW([{"params": select(net, lambda name, _: name.startswith("first"))}, {"params": select(net, "second")}])
    again = pickle.loads(pickle.dumps(opt))
    fresh = Net()
    fresh.first.register_parameter("gain", nn.Parameter(torch.ones(1)))
    report = again.rebind(fresh)
    assert (report.adopted, report.unmanaged) == ([], ["first.gain", "third.weight", "third.bias"])
    assert report.followed == ["first.weight", "first.bias", "second.weight", "second.bias"]
    fresh.first.weight = None
    again.rebind(fresh)
    fresh.first.weight = nn.Parameter(torch.ones(2, 3))
    assert again.rebind(fresh).adopted == ["first.weight"]


def test_reset_and_constrain_take_selections_patterns_and_several_of_them() -> None:
    net = Net()
    opt = AdamW(net, lr=0.1)
    train(net, opt, range(2))
    opt.reset(select(net, "first"))
    opt.reset(["sec*.weight", select(net, "third.bias"), net.second.bias])
    assert [name for name in opt.ids if opt.state_of(name)] == ["third.weight"]
    opt.constrain("*.bias", Box(-0.01, 0.01))
    opt.constrain(select(net, "first") & select(net, "*.weight"), Box(0.0))
    assert all(float(param.detach().abs().max()) <= 0.01 for param in select(net, "*.bias"))
    assert float(net.first.weight.detach().min()) >= 0.0
    assert float(net.second.weight.detach().min()) < 0.0


def test_constraints_are_declared_for_patterns_and_selections() -> None:
    net = Net()
    opt = AdamW(net, lr=0.1, constraints={"first": Box(-0.1, 0.1), select(net, "second.bias"): Box(0.0)})
    train(net, opt, range(2))
    assert all(float(param.detach().abs().max()) <= 0.1 + 1e-7 for param in net.first.parameters())
    assert float(net.second.bias.detach().min()) >= 0.0
    with pytest.raises(UnknownParameterError, match="no parameter is called 'frist'"):
        AdamW(net, constraints={"first": Box(0.0), "frist": Box(0.0)})


def test_a_name_stands_before_a_pattern_and_an_ambiguous_name_is_no_pattern() -> None:
    model = nn.ModuleDict({"a*": nn.Linear(1, 1), "ab": nn.Linear(1, 1)})
    opt = AdamW(model)
    train(model, opt, range(1))
    opt.reset("a*")
    assert [name for name in opt.ids if opt.state_of(name)] == ["ab.weight", "ab.bias"]
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    pair = AdamW([{"params": one}, {"params": other, "name": "other"}])
    with pytest.raises(paramstate.AmbiguousNameError, match="shared by '0:weight', 'other:weight'"):
        pair.reset("weight")
    pair.reset("other:*")


def test_a_pattern_that_finds_a_tied_parameter_by_half_changes_nothing() -> None:
    model = Tied()
    opt = AdamW(model)
    train(model, opt, range(1))
    with pytest.raises(SelectionError, match=r"'head\.weight' is tied to 'wte\.weight'"):
        opt.reset("head")
    assert all(opt.state_of(name) for name in opt.ids)
    opt.reset("head.weight")
    assert not opt.state_of("wte.weight")


def test_a_selected_parameter_that_is_in_no_group_is_named() -> None:
    net = Net()
    opt = AdamW(select(net, "first"))
    with pytest.raises(UnknownParameterError, match=r"'second\.weight' is selected, and it is in no group"):
        opt.reset(select(net, "first", "second"))
    with pytest.raises(UnknownParameterError, match=r"no parameter is called 'second\.\*'; the nearest names are"):
        opt.reset("second.*")


def test_a_store_that_is_handed_over_is_matched_through_selections() -> None:
    net = Net()
    opt = AdamW([{"params": select(net, "first")}, {"params": select(net, "second", "third")}])
    train(net, opt, range(2))
    ids, state = opt.ids, state_by_name(net, opt)
    for params in (select(net), [{"params": select(net, "second")}, {"params": ~select(net, "second")}]):
        opt = AdamW(params, store=opt.store)
        assert opt.ids == ids
        assert_same_bits(state_by_name(net, opt), state)
