"""scenarios.md, section A: modules that are replaced, moved or re-parametrised."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import paramstate
from small_models import Layer, Net, assert_same_bits, assert_trains, set_gradients, state_by_name, train

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def trained() -> tuple[Net, paramstate.Adam]:
    torch.manual_seed(5)
    net = Net()
    opt = paramstate.AdamW(net, lr=0.01)
    train(net, opt, range(3))
    return net, opt


def train_by_forward(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    """Steps by a real forward pass, which wrappers need in order to be what they are."""
    for _ in range(steps):
        opt.zero_grad()
        model(X).square().sum().backward()
        opt.step()


def test_replace_module_with_a_deep_copy() -> None:
    net, opt = trained()
    ids = dict(opt.ids)
    net.third = copy.deepcopy(net.third)
    assert {name: opt.id_of(p) for name, p in net.named_parameters()} == ids
    train(net, opt, [10, 11])
    twin, twin_opt = trained()
    train(twin, twin_opt, [10, 11])
    assert_same_bits(state_by_name(net, opt), state_by_name(twin, twin_opt))


@pytest.mark.parametrize("known_by", ["model", "hook"])
def test_replace_module_with_a_fresh_one_of_the_same_shapes(known_by: str) -> None:
    net = Net()
    opt = paramstate.AdamW(net if known_by == "model" else net.named_parameters())
    train(net, opt, range(3))
    ids, moments = dict(opt.ids), opt.state[net.third.weight]["exp_avg"].clone()
    net.third = Layer()
    assert {name: opt.id_of(p) for name, p in net.named_parameters()} == ids
    assert torch.equal(opt.state[net.third.weight]["exp_avg"], moments)
    assert_trains(net, opt)


def test_replace_module_under_the_policy_to_start_the_state_anew() -> None:
    net = Net()
    opt = paramstate.AdamW(net, on_replace="reset")
    train(net, opt, range(3))
    ids = dict(opt.ids)
    net.third = Layer()
    train(net, opt, [10])
    assert {name: opt.id_of(p) for name, p in net.named_parameters()} == ids
    assert [float(opt.state_of(name)["step"]) for name in ("third.weight", "third.bias", "first.weight")] == [1, 1, 4]


def test_replace_module_under_the_policy_that_forbids_it_is_refused_at_once() -> None:
    net = Net()
    opt = paramstate.AdamW(net, on_replace="error")
    train(net, opt, range(3))
    held, before = net.third, state_by_name(net, opt)
    with pytest.raises(paramstate.ReplacedParameterError, match=r"'third\.weight' was replaced .*on_replace='error'"):
        net.third = Layer()
    assert net.third is held
    assert_same_bits(state_by_name(net, opt), before)
    train(net, opt, [10])


def test_replace_module_of_another_shape() -> None:
    net, opt = trained()
    opt.zero_grad()
    net.third = nn.Linear(3, 7)
    set_gradients(net, 10)
    before = state_by_name(net, opt)
    with pytest.raises(paramstate.StateShapeError, match=r"'third\.weight': .*\[2, 3\].*\[7, 3\].*replace_"):
        opt.step()
    assert_same_bits(state_by_name(net, opt), before)
    report = opt.rebind(net)
    assert sorted(report.reshaped) == ["third.bias", "third.weight"]
    opt.step()
    assert float(opt.state[net.third.weight]["step"]) == 1
    assert float(opt.state[net.first.weight]["step"]) == 4
    assert_trains(net, opt)


def test_a_removed_layer_is_raised_by_step_and_dropped_by_rebind() -> None:
    net, opt = trained()
    gone = net.second
    del net.second
    with pytest.raises(paramstate.ReplacedParameterError, match=r"second\.weight"):
        train(net, opt, [10])
    report = opt.rebind(net)
    assert sorted(report.vanished) == ["second.bias", "second.weight"]
    assert sorted(report.kept) == ["first.bias", "first.weight", "third.bias", "third.weight"]
    assert gone.weight not in opt.state
    train(net, opt, [10])
    with pytest.raises(paramstate.UnknownParameterError, match=r"second\.weight"):
        opt.id_of("second.weight")


def test_a_layer_that_takes_the_place_of_a_removed_one_takes_its_name() -> None:
    net, opt = trained()
    moved = opt.id_of(net.third.weight)
    net.second = net.third
    del net.third
    report = opt.rebind(net)
    assert sorted(report.vanished) == ["second.bias", "second.weight"]
    assert sorted(report.kept) == ["first.bias", "first.weight", "second.bias", "second.weight"]
    assert opt.name_of(net.second.weight) == "second.weight"
    assert opt.ids["second.weight"] == moved
    assert set(opt.ids) == set(paramstate.canonical_names(net))
    assert_trains(net, opt)


class Adapted(nn.Module):
    """What PEFT does to a layer: it moves under `base_layer`, and low-rank parameters stand beside it."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a = nn.Parameter(torch.randn(1, 3))
        self.lora_b = nn.Parameter(torch.zeros(2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.lora_a.t() @ self.lora_b.t()


def test_module_moved() -> None:
    net, opt = trained()
    ids = {id(p): opt.id_of(p) for p in net.parameters()}
    steps = {id(p): float(opt.state[p]["step"]) for p in net.parameters()}
    net.second = Adapted(net.second)
    train_by_forward(net, opt, 1)
    moved = [p for name, p in net.named_parameters() if "lora" not in name]
    assert {id(p): opt.id_of(p) for p in moved} == ids
    assert {id(p): float(opt.state[p]["step"]) - 1 for p in moved} == steps
    found = paramstate.doctor(net, opt)
    assert [finding.name for finding in found.in_model_not_trained] == ["second.lora_a", "second.lora_b"]
    assert list(found.findings) == ["in_model_not_trained"]
    report = opt.rebind(net)
    assert sorted(report.unmanaged) == ["second.lora_a", "second.lora_b"]
    report = opt.rebind(net, group={"lr": 0.1})
    assert sorted(report.adopted) == ["second.lora_a", "second.lora_b"]
    assert opt.param_groups[-1]["lr"] == 0.1
    assert {id(p): opt.id_of(p) for p in moved} == ids
    assert_trains(net, opt)


def test_module_moved_by_peft_itself() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    opt = paramstate.AdamW(net, lr=0.01)
    train_by_forward(net, opt, 2)
    ids = dict(opt.ids)
    weight = net[0].weight
    wrapped = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"], r=1))
    opt.rebind(wrapped, group=0)
    assert opt.id_of(weight) == ids["0.weight"]
    assert paramstate.canonical_names(wrapped)["0.weight"] is weight
    train_by_forward(wrapped, opt, 1)


def test_weight_norm_after_init() -> None:
    net, opt = trained()
    with pytest.warns(FutureWarning):
        weight_norm(net.first)
    raised_with_names(net, opt, vanished="first.weight", appeared=["first.weight_g", "first.weight_v"])


def test_weight_norm_by_parametrization_after_init() -> None:
    net, opt = trained()
    parametrizations.weight_norm(net.first)
    appeared = ["first.parametrizations.weight.original0", "first.parametrizations.weight.original1"]
    raised_with_names(net, opt, vanished="first.weight", appeared=appeared)


def test_parametrize() -> None:
    net, opt = trained()
    parametrize.register_parametrization(net.first, "weight", nn.Tanh())
    raised_with_names(net, opt, vanished="first.weight", appeared=["first.parametrizations.weight.original"])


def test_prune() -> None:
    net, opt = trained()
    prune.l1_unstructured(net.first, "weight", amount=0.5)
    raised_with_names(net, opt, vanished="first.weight", appeared=["first.weight_orig"])


def raised_with_names(net: Net, opt: paramstate.Adam, vanished: str, appeared: list[str]) -> None:
    """`step()` names what vanished and what appeared and changes nothing; `rebind` continues."""
    opt.zero_grad()
    net(X).square().sum().backward()
    others = [name for name, _ in net.named_parameters() if not name.startswith("first")]
    before = state_by_name(net, opt)
    with pytest.raises(paramstate.ReplacedParameterError, match="rebind") as caught:
        opt.step()
    message = str(caught.value)
    assert repr(vanished) in message
    for name in appeared:
        assert name in message
    assert_same_bits(state_by_name(net, opt), before)
    report = opt.rebind(net, group=0)
    for name in appeared:
        assert name in [*report.adopted, *report.followed, *report.kept], report
    train_by_forward(net, opt, 1)
    assert {id(p) for group in opt.param_groups for p in group["params"]} == {id(p) for p in net.parameters()}
    assert all(float(opt.state[dict(net.named_parameters())[name]]["step"]) == 4 for name in others)


def test_add_group_bare() -> None:
    net = Net()
    opt = paramstate.AdamW(net.first.named_parameters(prefix="first"), model=net)
    opt.add_param_group({"params": net.second.parameters(), "lr": 0.1})
    assert opt.name_of(net.second.weight) == "second.weight"
    assert sorted(opt.ids) == ["first.bias", "first.weight", "second.bias", "second.weight"]
    train(nn.ModuleDict({"first": net.first, "second": net.second}), opt, range(2))
    assert float(opt.state_of("second.weight")["step"]) == 2
