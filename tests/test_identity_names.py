"""scenarios.md, section A: names and IDs, ties, and memory that two parameters share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import paramstate
from small_models import Layer, Net, assert_trains, give_gradient, set_gradients, state_by_name, train


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


def test_ids_are_positive_int64_and_the_same_in_every_process() -> None:
    ids, again = paramstate.AdamW(Net()).ids, paramstate.Adam(Net(["third", "first", "second"])).ids
    assert dict(ids) == dict(again)
    assert len(set(ids.values())) == 6
    assert all(0 < torch.tensor(value, dtype=torch.int64).item() < 2**63 for value in ids.values())


def test_every_way_to_build_gives_the_same_names_and_ids() -> None:
    net = Net()
    wanted = paramstate.AdamW(net).ids
    assert paramstate.AdamW(net.named_parameters()).ids == wanted
    assert paramstate.AdamW(net.parameters(), model=net).ids == wanted
    groups = [{"params": net.first.parameters()}, {"params": list(net.second.parameters()), "lr": 0.1}]
    assert paramstate.AdamW([*groups, {"params": net.third.parameters()}], model=net).ids == wanted
    names = [name for name, _ in net.named_parameters()]
    given = [{"params": list(net.parameters()), "param_names": names}]
    assert paramstate.AdamW(given).ids == wanted, "torchtitan gives names this way"
    bare = paramstate.AdamW(net.parameters())
    bare.rebind(net)
    assert sorted(bare.ids) == sorted(wanted)


def test_bare_parameters_have_random_ids_that_rebind_keeps() -> None:
    net = Net()
    opt = paramstate.AdamW(net.parameters())
    ids = [opt.id_of(p) for p in net.parameters()]
    assert len(set(ids)) == 6
    assert set(ids).isdisjoint(opt_id for opt_id in paramstate.AdamW(net).ids.values())
    opt.rebind(net)
    assert [opt.id_of(p) for p in net.parameters()] == ids
    assert [opt.name_of(p) for p in net.parameters()] == [name for name, _ in net.named_parameters()]


def test_look_ups_go_both_ways() -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    train(net, opt, [0])
    for name, parameter in net.named_parameters():
        known = opt.ids[name]
        assert opt.id_of(parameter) == opt.id_of(name) == known
        assert opt.name_of(parameter) == name
        assert opt.param(known) is parameter
        assert opt.state_of(name) is opt.state_of(parameter) is opt.state[parameter]


def test_an_unknown_name_raises_and_says_the_nearest() -> None:
    opt = paramstate.AdamW(Net())
    with pytest.raises(paramstate.UnknownParameterError, match=r"first\.wieght.*first\.weight"):
        opt.id_of("first.wieght")
    with pytest.raises(paramstate.UnknownParameterError, match="rebind"):
        opt.id_of(nn.Parameter(torch.ones(2)))
    with pytest.raises(KeyError):
        opt.param(12345)


def test_two_models_same_names() -> None:
    generator, discriminator = Net(), Net()
    opt = paramstate.AdamW([
        {"params": generator, "name": "generator"},
        {"params": discriminator, "name": "discriminator", "lr": 0.1},
    ])  # fmt: skip
    assert len(opt.ids) == 12
    assert opt.ids["generator:first.weight"] != opt.ids["discriminator:first.weight"]
    assert opt.param(opt.ids["discriminator:first.weight"]) is discriminator.first.weight
    with pytest.raises(paramstate.AmbiguousNameError) as caught:
        opt.id_of("first.weight")
    assert "generator:first.weight" in str(caught.value)
    assert "discriminator:first.weight" in str(caught.value)
    both = nn.ModuleList([generator, discriminator])
    train(both, opt, range(2))
    id_before = opt.id_of(discriminator.first.weight)
    discriminator.first.weight = nn.Parameter(discriminator.first.weight.detach().clamp(-0.1, 0.1))
    assert opt.id_of(discriminator.first.weight) == id_before
    assert_trains(both, opt)


def test_two_models_same_names_without_group_names_are_told_apart_by_number() -> None:
    first, second = Net(), Net()
    groups = [{"params": list(first.named_parameters())}, {"params": list(second.named_parameters())}]
    opt = paramstate.AdamW(groups)
    assert opt.name_of(first.first.weight) == "0:first.weight"
    assert opt.name_of(second.first.weight) == "1:first.weight"


def test_rename_changes_the_name_and_never_the_id() -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    train(net, opt, range(2))
    ids = dict(opt.ids)
    net.renamed = net.second
    del net.second
    opt.rename({"second.weight": "renamed.weight", "second.bias": "renamed.bias"})
    assert opt.ids["renamed.weight"] == ids["second.weight"]
    assert opt.name_of(net.renamed.bias) == "renamed.bias"
    train(net, opt, [5])
    assert float(opt.state_of("renamed.weight")["step"]) == 3
    net.second = Layer()
    opt.rebind(net, group=0)
    assert opt.ids["second.weight"] not in ids.values(), "the derived ID belongs to the renamed parameter"
    assert_trains(net, opt)


def test_rename_of_an_unknown_or_to_a_taken_name_raises() -> None:
    opt = paramstate.AdamW(Net())
    ids = dict(opt.ids)
    with pytest.raises(paramstate.UnknownParameterError, match="nowhere"):
        opt.rename({"nowhere": "somewhere"})
    with pytest.raises((KeyError, ValueError), match=r"second\.weight"):
        opt.rename({"first.weight": "second.weight"})
    assert opt.ids == ids


def test_tied() -> None:
    net = Tied()
    opt = paramstate.AdamW(net, lr=0.1)
    assert opt.ids["embed.weight"] == opt.ids["head.weight"] == opt.id_of(net.head.weight)
    assert len(opt.store) == 1
    assert opt.name_of(net.head.weight) == "embed.weight"
    net(torch.tensor([1, 2])).sum().backward()
    opt.step()
    assert opt.state_of("head.weight") is opt.state_of("embed.weight")
    assert float(opt.state_of("head.weight")["step"]) == 1
    with pytest.raises(paramstate.SelectionError, match=r"'head\.weight' is tied to 'embed\.weight', which is not"):
        opt.reset("head.*")
    with pytest.raises(paramstate.SelectionError, match=r"'embed\.weight' is tied to 'head\.weight', which is not"):
        paramstate.select(net, nn.Embedding).names  # noqa: B018
    assert float(opt.state_of("head.weight")["step"]) == 1


def test_untie() -> None:
    net = Tied()
    opt = paramstate.AdamW(net, lr=0.1)
    train(net, opt, range(2))
    id_before, kept = opt.ids["embed.weight"], opt.state[net.embed.weight]
    opt.zero_grad()
    net.head.weight = nn.Parameter(net.embed.weight.detach().clone())
    set_gradients(net, 7)
    with pytest.raises(paramstate.ReplacedParameterError, match=r"head\.weight.*rebind"):
        opt.step()
    report = opt.rebind(net, group=0)
    assert report.adopted == ["head.weight"]
    assert opt.ids["embed.weight"] == id_before
    assert opt.ids["head.weight"] != id_before
    assert opt.state[net.embed.weight] is kept
    opt.step()
    assert float(opt.state_of("embed.weight")["step"]) == 3
    assert float(opt.state_of("head.weight")["step"]) == 1


def test_a_tied_parameter_replaced_in_every_slot_is_followed() -> None:
    net = Tied()
    opt = paramstate.AdamW(net, lr=0.1)
    train(net, opt, range(2))
    id_before = opt.ids["embed.weight"]
    net.embed.weight = net.head.weight = nn.Parameter(net.embed.weight.detach().clamp(-1, 1))
    train(net, opt, [5])
    assert opt.ids["embed.weight"] == opt.ids["head.weight"] == opt.id_of(net.head.weight) == id_before
    assert float(opt.state_of("head.weight")["step"]) == 3


def test_overlap() -> None:
    storage = torch.randn(4, 6)
    fused, query = nn.Parameter(storage), nn.Parameter(storage[:, :2])
    with pytest.raises(paramstate.OverlapError, match=r"fused.*query|query.*fused"):
        paramstate.AdamW([("fused", fused), ("query", query)])


def test_overlap_that_comes_later_is_raised_by_step_with_nothing_written() -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    train(net, opt, [0])
    opt.zero_grad()
    set_gradients(net, 1)
    net.first.weight.data = net.second.weight.data
    before = state_by_name(net, opt)
    with pytest.raises(paramstate.OverlapError) as caught:
        opt.step()
    assert "first.weight" in str(caught.value)
    assert "second.weight" in str(caught.value)
    after = state_by_name(net, opt)
    assert all(torch.equal(before[name][key], after[name][key]) for name in before for key in before[name])


def test_overlap_is_exact_and_interleaved_views_pass() -> None:
    storage = torch.randn(4, 6)
    even, odd = nn.Parameter(storage[:, ::2]), nn.Parameter(storage[:, 1::2])
    opt = paramstate.AdamW([("even", even), ("odd", odd)], lr=0.1)
    stock_storage = storage.clone()
    stock_even, stock_odd = nn.Parameter(stock_storage[:, ::2]), nn.Parameter(stock_storage[:, 1::2])
    stock = torch.optim.AdamW([stock_even, stock_odd], lr=0.1)
    for ours, theirs in ((even, stock_even), (odd, stock_odd)):
        give_gradient(ours, "g")
        theirs.grad = ours.grad.clone()
    opt.step()
    stock.step()
    torch.testing.assert_close(storage, stock_storage)


def test_expand() -> None:
    expanded = nn.Parameter(torch.randn(3, 1).expand(3, 4))
    with pytest.raises(paramstate.OverlapError, match="wide"):
        paramstate.AdamW([("wide", expanded)])
