"""Edits in an unlucky order: by clients that do not know of us, in models of several parts, half-way through."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import paramstate


def back(module: nn.Module) -> None:
    module(torch.ones(2, 3)).sum().backward()


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


def step_of(opt: paramstate.Adam, parameter: torch.Tensor) -> float:
    return float(opt.state[parameter]["step"])


def test_gaussian_splatting_assigns_the_slot_first_and_edits_the_state_under_the_old_tensor() -> None:
    splats = nn.ParameterDict({"means": nn.Parameter(torch.ones(4, 3))})
    opt = paramstate.Adam([{"params": splats["means"], "name": "means"}], lr=0.1)
    for _ in range(5):
        opt.zero_grad()
        splats["means"].square().sum().backward()
        opt.step()
    old = splats["means"]
    id, moments = opt.id_of(old), opt.state[old]["exp_avg"].clone()
    new = nn.Parameter(torch.cat([old.detach(), old.detach()[:2]]))
    splats["means"] = new
    held = opt.state[old]
    del opt.state[old]
    for key in ("exp_avg", "exp_avg_sq"):
        held[key] = torch.cat([held[key], torch.zeros(2, 3)])
    opt.param_groups[0]["params"] = [new]
    opt.state[new] = held
    assert torch.equal(opt.state[new]["exp_avg"][:4], moments)
    opt.zero_grad()
    new.square().sum().backward()
    opt.step()
    assert step_of(opt, new) == 6.0
    assert opt.id_of(new) == id
    assert list(opt.state) == [new]


def test_what_is_left_for_such_a_client_is_gone_at_the_next_look() -> None:
    model = nn.Linear(3, 3)
    opt = paramstate.Adam(model)
    back(model)
    opt.step()
    model.weight = nn.Parameter(model.weight.detach().clone())
    opt.state_dict()
    assert set(opt.state) == set(model.parameters())


def test_modules_that_change_places_take_their_names_along() -> None:
    model = two_layers()
    opt = paramstate.Adam(model)
    back(model)
    opt.step()
    first, ids = model[0].weight, dict(opt.ids)
    model[0], model[1] = model[1], model[0]
    opt.zero_grad()
    back(model)
    opt.step()
    assert opt.name_of(first) == "1.weight"
    assert opt.id_of(first) == ids["0.weight"]
    loaded = two_layers()
    loaded.load_state_dict(model.state_dict())
    other = paramstate.Adam(loaded)
    other.load_state_dict(opt.state_dict())
    for place in (0, 1):
        assert torch.equal(other.state[loaded[place].weight]["exp_avg"], opt.state[model[place].weight]["exp_avg"])


def test_a_bare_tied_parameter_that_was_followed_away_from_is_raised_when_it_is_used_on() -> None:
    model = two_layers()
    model[1].weight = model[0].weight
    opt = paramstate.Adam(model.parameters(), lr=0.1)
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    back(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(paramstate.ReplacedParameterError, match="still used"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert opt.rebind(model, group=0).adopted == ["0.weight"]
    opt.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("container", ["ModuleList", "DataParallel"])
def test_a_container_made_for_the_optimizers_sake_leaves_its_models_known(container: str) -> None:
    model = nn.Linear(3, 3)
    made = nn.ModuleList([model]) if container == "ModuleList" else nn.DataParallel(model)
    opt = paramstate.Adam(made, lr=0.1)
    del made
    for _ in range(2):
        opt.zero_grad()
        back(model)
        opt.step()
    opt.zero_grad()
    model._parameters["weight"] = nn.Parameter(model.weight.detach().clone())
    opt.zero_grad()
    before = model.weight.detach().clone()
    back(model)
    opt.step()
    assert not torch.equal(before, model.weight)
    assert step_of(opt, model.weight) == 3.0


def test_rebind_of_one_of_two_models_leaves_the_other_alone() -> None:
    models = {"G": nn.Linear(3, 3), "D": nn.Linear(3, 3)}
    opt = paramstate.Adam([{"params": model, "name": name} for name, model in models.items()])
    for model in models.values():
        back(model)
    opt.step()
    rebuilt = copy.deepcopy(models["G"])
    with pytest.raises(paramstate.AmbiguousNameError, match="'G', 'D'"):
        opt.rebind(rebuilt)
    ids = dict(opt.ids)
    report = opt.rebind(rebuilt, label="G")
    assert (len(report.followed), report.vanished) == (2, [])
    assert opt.ids.values() == ids.values() or set(opt.ids.values()) == set(ids.values())
    assert opt.id_of(rebuilt.weight) == ids["G:weight"]
    assert step_of(opt, models["D"].weight) == 1.0


def test_rebind_of_one_of_two_bare_models_leaves_the_other_alone() -> None:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    opt = paramstate.Adam([*one.parameters(), *other.parameters()])
    assert opt.rebind(one).vanished == []
    assert opt.rebind(other).vanished == []
    assert len(opt.param_groups[0]["params"]) == 4
    assert len({opt.id_of(parameter) for parameter in (*one.parameters(), *other.parameters())}) == 4


@pytest.mark.parametrize("known", ["bare", "named", "model"])
def test_a_group_that_is_given_other_parameters_does_not_hand_down_moments(known: str) -> None:
    model = two_layers()
    params = model[0].named_parameters() if known == "named" else model[0].parameters()
    opt = paramstate.Adam(params, model=model if known == "model" else None)
    back(model)
    opt.step()
    former = opt.id_of(model[0].weight)
    opt.param_groups[0]["params"] = list(model[1].parameters())
    opt.zero_grad()
    back(model)
    opt.step()
    assert step_of(opt, model[1].weight) == 1.0
    assert opt.id_of(model[1].weight) != former


def test_tying_anew_after_both_slots_were_replaced_is_followed_though_the_old_module_lives() -> None:
    model = nn.Module()
    model.emb, model.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    model.head.weight = model.emb.weight
    opt = paramstate.Adam(model)
    model.head(model.emb(torch.tensor([1]))).sum().backward()
    opt.step()
    id, held = opt.id_of("emb.weight"), model.emb
    opt.zero_grad()
    model.emb = nn.Embedding(5, 3)
    model.head.weight = model.emb.weight
    model.head(model.emb(torch.tensor([1]))).sum().backward()
    opt.step()
    assert opt.id_of(model.emb.weight) == id
    assert step_of(opt, model.head.weight) == 2.0
    assert held.weight not in opt.state


def test_a_handed_over_store_brings_constraints_and_needs_names() -> None:
    model = nn.Linear(3, 3)
    former = paramstate.Adam(model, constraints=paramstate.Box(-0.125, 0.125))
    with pytest.raises(ValueError, match="matched by name"):
        paramstate.Adam(model.parameters(), store=former.store)
    opt = paramstate.Adam(model, store=former.store, lr=1.0)
    back(model)
    copied_model, copied = copy.deepcopy((model, opt))
    copied.step()
    assert float(copied_model.weight.detach().abs().max()) <= 0.125
    assert paramstate.clip_(model.weight) is model.weight


def test_a_bare_name_of_two_models_is_ambiguous_in_a_copy_too() -> None:
    models = [nn.Linear(3, 3), nn.Linear(3, 3)]
    opt = copy.deepcopy(paramstate.Adam([{"params": model} for model in models]))
    with pytest.raises(paramstate.AmbiguousNameError, match="'0:weight', '1:weight'"):
        opt.id_of("weight")
