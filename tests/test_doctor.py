"""``doctor``: what is unmanaged, orphaned, aliased or stale, and what moves though it should not."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from torch import nn

import paramstate
from paramstate import Box, clip_, doctor
from paramstate.diagnosis import Finding
from small_models import Net, set_gradients, train

BOTH = pytest.mark.parametrize("kind", [torch.optim.AdamW, paramstate.AdamW])


def names(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings]


@BOTH
def test_a_model_and_its_optimizer_are_healthy(kind: type[torch.optim.AdamW]) -> None:
    model = Net()
    optimizer = kind(model.parameters())
    train(model, optimizer, range(2))
    found = doctor(model, optimizer)
    assert found.healthy
    assert found.findings == {}
    assert str(found) == "healthy: what is trained is what is in the model"


def test_a_replaced_parameter_of_a_stock_optimizer_is_dead_untrained_and_stale() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.named_parameters())
    model.second.weight = nn.Parameter(model.second.weight.detach() + 1)
    found = doctor(model, optimizer)
    assert names(found.trained_not_in_model) == ["second.weight"]
    assert names(found.in_model_not_trained) == ["second.weight"]
    assert [(one.name, one.others) for one in found.stale_copies] == [("second.weight", ("second.weight",))]
    assert not found.healthy


def test_a_replaced_parameter_that_was_followed_is_healthy() -> None:
    model = Net()
    optimizer = paramstate.AdamW(model)
    model.second.weight = nn.Parameter(model.second.weight.detach() + 1)
    assert doctor(model, optimizer).healthy


def test_without_names_a_stale_copy_is_known_by_its_values() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    found = doctor(model, optimizer)
    assert [one.others for one in found.stale_copies] == [(name,) for name, _ in model.named_parameters()]
    assert names(found.stale_copies)[:2] == ["number 0", "number 1"]


@BOTH
def test_a_separately_copied_model_shows_as_stale(kind: type[torch.optim.AdamW]) -> None:
    model = Net()
    optimizer = kind(model.named_parameters())
    twin = copy.deepcopy(model)
    found = doctor(twin, optimizer)
    assert (
        names(found.stale_copies) == names(found.trained_not_in_model) == [name for name, _ in model.named_parameters()]
    )


def test_a_copy_is_stale_even_where_the_optimizer_still_knows_the_first_model() -> None:
    model = Net()
    optimizer = paramstate.AdamW(model)
    found = doctor(copy.deepcopy(model), optimizer)
    assert len(found.stale_copies) == len(found.trained_not_in_model) == 6


def test_the_parameters_of_another_known_model_are_not_dead() -> None:
    generator, critic = Net(("a",)), Net(("a", "b"))
    optimizer = paramstate.AdamW([{"params": generator}, {"params": critic}])
    assert doctor(generator, optimizer).healthy
    assert doctor(critic, optimizer).healthy


@BOTH
def test_a_frozen_parameter_outside_the_groups_is_harmless_and_a_trainable_one_is_not(
    kind: type[torch.optim.AdamW],
) -> None:
    model = Net(("first", "second"))
    optimizer = kind(model.first.parameters())
    assert names(doctor(model, optimizer).in_model_not_trained) == ["second.weight", "second.bias"]
    assert not doctor(model, optimizer).healthy
    model.second.requires_grad_(False)
    found = doctor(model, optimizer)
    assert [one.harmless for one in found.in_model_not_trained] == [True, True]
    assert found.healthy


@BOTH
def test_orphaned_state_is_counted_in_bytes(kind: type[torch.optim.AdamW]) -> None:
    model = Net(("first",))
    optimizer = kind(model.parameters())
    train(model, optimizer, range(1))
    gone = optimizer.param_groups[0]["params"].pop(0)
    found = doctor(model, optimizer)
    (orphan,) = found.orphaned_state
    assert orphan.name == "first.weight"
    assert orphan.bytes == 2 * gone.numel() * 4 + 4  # two moments and the step
    assert orphan.shape == (2, 3)


@BOTH
def test_tied_parameters_are_named_and_harmless(kind: type[torch.optim.AdamW]) -> None:
    model = Net(("first", "second"))
    model.second.weight = model.first.weight
    found = doctor(model, kind(model.parameters()))
    assert [(one.name, one.others) for one in found.aliases] == [("first.weight", ("second.weight",))]
    assert found.healthy


def test_parameters_that_share_memory_are_named() -> None:
    model = Net(("first", "second"))
    model.second.weight = nn.Parameter(model.first.weight.detach())
    found = doctor(model, torch.optim.AdamW(model.parameters()))
    assert [(one.name, one.others) for one in found.aliases] == [("first.weight", ("second.weight",))]
    assert not found.healthy


@BOTH
def test_a_frozen_parameter_with_a_stale_gradient_would_move(kind: type[torch.optim.AdamW]) -> None:
    model = Net(("first",))
    optimizer = kind(model.parameters(), weight_decay=0.1)
    train(model, optimizer, range(1))
    model.first.weight.requires_grad_(False)
    model.first.weight.grad.zero_()
    (found,) = doctor(model, optimizer).frozen_but_moving
    assert (found.name, found.note) == ("first.weight", "moved by weight decay, momentum")
    before = model.first.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.first.weight)


@BOTH
def test_a_frozen_parameter_without_gradient_does_not_move(kind: type[torch.optim.AdamW]) -> None:
    model = Net(("first",))
    optimizer = kind(model.parameters(), weight_decay=0.1)
    train(model, optimizer, range(1))
    model.first.weight.requires_grad_(False)
    optimizer.zero_grad()
    assert doctor(model, optimizer).frozen_but_moving == []


def test_what_is_processed_in_place_under_old_moments_is_seen_without_a_baseline() -> None:
    model = Net()
    optimizer = paramstate.AdamW(model)
    train(model, optimizer, range(3))
    with torch.no_grad():
        model.second.weight.sub_(model.second.weight.mean())
    model.load_state_dict({"third.bias": torch.zeros(2)}, strict=False)
    (weight, bias) = doctor(model, optimizer).processed_under_old_moments
    assert (weight.name, weight.note) == ("second.weight", "written once by others since step 0")
    assert bias.name == "third.bias"


def test_what_was_processed_is_still_seen_after_more_steps_and_a_second_look() -> None:
    model = Net()
    optimizer = paramstate.AdamW(model)
    train(model, optimizer, range(2))
    with torch.no_grad():
        model.first.bias.mul_(2)
    train(model, optimizer, range(2))
    assert names(doctor(model, optimizer).processed_under_old_moments) == ["first.bias"]
    assert names(doctor(model, optimizer).processed_under_old_moments) == ["first.bias"]
    optimizer.reset("first.bias")
    train(model, optimizer, range(2))
    assert doctor(model, optimizer).healthy


def test_what_our_own_calls_write_is_not_taken_for_processing() -> None:
    model = Net()
    optimizer = paramstate.AdamW(model, constraints={"first.weight": Box(-0.5, 0.5)}, max_grad_norm=1.0)
    for seed in range(3):
        train(model, optimizer, [seed])
        clip_(model.second.weight, -0.3, 0.3)
        clip_(model.second.bias, lambda values: values.clamp(max=0.1))
    optimizer.replace_("third.weight", torch.ones(2, 3))
    optimizer.constrain("third.bias", Box(-0.1, 0.1))
    assert doctor(model, optimizer).healthy


def test_values_loaded_before_the_first_step_or_around_a_load_of_the_optimizer_are_not_taken_for_processing() -> None:
    model = Net()
    optimizer = paramstate.AdamW(model)
    assert len(optimizer.ids) == 6
    model.load_state_dict(Net().state_dict())
    train(model, optimizer, range(2))
    saved, values = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, range(2))
    optimizer.load_state_dict(saved)
    model.load_state_dict(values)
    assert doctor(model, optimizer).healthy


@pytest.mark.parametrize("how", ["all rows reset", "another tensor", "written in place"])
def test_a_step_that_is_set_back_is_not_taken_for_processing(how: str) -> None:
    model = Net()
    optimizer = paramstate.AdamW(model)
    train(model, optimizer, range(4))
    weight = model.first.weight
    if how == "all rows reset":
        with optimizer.edit_rows() as rows:
            rows.reset(weight, [0, 1])
    elif how == "another tensor":
        optimizer.state[weight]["step"] = torch.tensor(3.0)
    else:
        optimizer.state[weight]["step"].fill_(3.0)
    assert doctor(model, optimizer).healthy
    train(model, optimizer, range(2))
    assert doctor(model, optimizer).healthy
    with torch.no_grad():
        weight.zero_()
    assert names(doctor(model, optimizer).processed_under_old_moments) == ["first.weight"]


@BOTH
def test_from_the_first_look_on_a_write_without_a_step_is_seen(kind: type[torch.optim.AdamW]) -> None:
    model = Net()
    optimizer = kind(model.parameters())
    train(model, optimizer, range(2))
    assert doctor(model, optimizer).healthy
    with torch.no_grad():
        model.second.weight.zero_()
    assert names(doctor(model, optimizer).processed_under_old_moments) == ["second.weight"]


def test_the_writes_that_made_a_replacement_are_not_taken_for_processing() -> None:
    model = Net()
    optimizer = paramstate.AdamW(model)
    train(model, optimizer, range(2))
    clipped = nn.Parameter(model.first.weight.detach().clone())
    with torch.no_grad():
        for _ in range(5):
            clipped.clamp_(-0.5, 0.5)
    model.first.weight = clipped
    train(model, optimizer, range(2))
    assert doctor(model, optimizer).healthy
    with torch.no_grad():
        model.first.weight.zero_()
    assert names(doctor(model, optimizer).processed_under_old_moments) == ["first.weight"]


def test_steps_that_torch_computes_are_not_taken_for_processing() -> None:
    model = Net()
    model.first.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
    optimizer = paramstate.AdamW(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        optimizer.step()
        optimizer.step()
        assert float(optimizer.state_of("first.weight")["step"]) >= 2
        assert doctor(model, optimizer).healthy


def test_steps_of_a_stock_optimizer_between_two_looks_are_not_taken_for_processing() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    train(model, optimizer, range(2))
    assert doctor(model, optimizer).healthy
    train(model, optimizer, range(2))
    assert doctor(model, optimizer).healthy


def test_an_optimizer_in_a_frameworks_class_is_looked_into() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = Net()
    assert doctor(model, Wrapper(paramstate.AdamW(model))).healthy


def test_a_diagnosis_is_printed_with_advice_and_given_as_plain_data() -> None:
    model = Net(("first", "second"))
    optimizer = torch.optim.AdamW(model.first.named_parameters())
    set_gradients(model, 0)
    found = doctor(model, optimizer)
    assert "in model not trained  second.weight  [2, 3]" in str(found)
    assert "adopts these" in str(found)
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["healthy"] is False
    assert plain["in_model_not_trained"][0]["name"] == "second.weight"


def test_a_diagnosis_is_a_table_where_rich_prints_it() -> None:
    console = pytest.importorskip("rich.console")
    model = Net(("first", "second"))
    screen = console.Console(width=120, record=True, file=io.StringIO())
    screen.print(doctor(model, torch.optim.AdamW(model.first.parameters())))
    assert "second.weight" in screen.export_text()


def test_rich_prints_the_advice_word_for_word() -> None:
    console = pytest.importorskip("rich.console")
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[nn.Parameter(torch.zeros(3))] = {"exp_avg": torch.zeros(3)}
    screen = console.Console(width=120, record=True, file=io.StringIO())
    screen.print(doctor(model, optimizer))
    assert "orphaned state: del opt.state[tensor] frees it" in screen.export_text()


@BOTH
def test_looking_changes_nothing(kind: type[torch.optim.AdamW]) -> None:
    model = Net()
    optimizer = kind(model.named_parameters())
    train(model, optimizer, range(1))
    del model.second
    before = copy.deepcopy(optimizer.state_dict())
    doctor(model, optimizer)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert list(after["state"]) == list(before["state"])


@pytest.mark.parametrize("owner", ["model", "optimizer"])
def test_what_an_edit_session_wrote_and_restored_is_no_write_of_others(owner: str) -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    train(net, opt, range(3))
    with torch.no_grad():
        net.second.weight.add_(1.0)
    with paramstate.edit(net) if owner == "model" else opt.edit(), torch.no_grad():
        net.first.weight.add_(1.0)
        net.second.weight.add_(1.0)
        assert len(doctor(net, opt).processed_under_old_moments) == 2
    (finding,) = doctor(net, opt).processed_under_old_moments
    assert (finding.name, finding.note) == ("second.weight", "written once by others since step 0")
