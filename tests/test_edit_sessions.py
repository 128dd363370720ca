"""Edit sessions: the exact original comes back, or the edit stays; and one knows which of the two one holds."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from paramstate import EditError, EditSession, edit
from paramstate.bits import same_bits
from small_models import Net, assert_same_bits, give_gradient, state_by_name, train

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_holds(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_original_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    with torch.no_grad():
        net.first.weight[0, 0] = float("nan")
        net.first.weight[0, 1] = -0.0
    before = bits(net)
    with edit(net, "first") as session:
        net.first.weight.data.mul_(1.1).add_(0.3)
        net.first.bias = nn.Parameter(torch.ones(2, dtype=dtype))
        assert session.is_edited
    assert_holds(net, before)
    assert not session.is_open


def test_the_original_comes_back_after_an_exception() -> None:
    net = Net()
    before = bits(net)

    def fail_midway() -> None:
        with edit(net):
            net.second.weight.data.zero_()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert_holds(net, before)


def test_a_replaced_parameter_is_the_original_object_again() -> None:
    net = Net()
    original = net.first.weight
    with edit(net):
        net.first.weight = nn.Parameter(torch.zeros(5, 5))
    assert net.first.weight is original


def test_buffers_and_requires_grad_come_back() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = bits(net)
    with edit(net, "1"):
        net(torch.randn(8, 2))
        net.requires_grad_(False)
        assert not torch.equal(net[1].running_mean, before["1.running_mean"])
    assert_holds(net, before)
    assert net[1].weight.requires_grad
    assert not net[0].weight.requires_grad, "what was not selected is left alone"


class Rotary(nn.Module):
    """As in a transformer: buffers, and no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.ones(2), persistent=False)


@pytest.mark.parametrize("by_optimizer", [False, True], ids=["model", "optimizer"])
def test_buffers_below_a_module_that_is_edited_as_a_whole_come_back(by_optimizer: bool) -> None:
    net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), Rotary()), "b": nn.Sequential(nn.Linear(2, 2), Rotary())})
    net.register_buffer("count", torch.zeros(1))
    opt = paramstate.Adam(net)

    def names(*what: str) -> list[str]:
        with opt.edit(list(what) or None) if by_optimizer else edit(net, *what) as session:
            return [name for name in session.base() if not name.endswith(("weight", "bias"))]

    assert names("a") == ["a.1.frequencies"]
    assert names("a.0.weight") == []
    assert names() == ["count", "a.1.frequencies", "b.1.frequencies"]
    with opt.edit() if by_optimizer else edit(net):
        net["a"][1].frequencies.zero_()
        net.count = torch.ones(1)
    assert net["a"][1].frequencies.tolist() == [1.0, 1.0]
    assert net.count.item() == 0.0


def test_some_parameters_are_restored_and_others_stay_edited() -> None:
    net = Net()
    before = bits(net)
    with edit(net) as session:
        net.first.weight.data.add_(1.0)
        net.second.weight.data.add_(1.0)
        session.restore("first.weight")
        assert torch.equal(net.first.weight, before["first.weight"])
        assert [change.name for change in session.changes()] == ["second.weight"]
        session.commit()
    assert torch.equal(net.second.weight, before["second.weight"] + 1.0)


def test_undo_and_redo_walk_the_history() -> None:
    net = Net()
    base = net.first.bias.detach().clone()
    with edit(net, "first.bias") as session:
        for label in ("one", "two"):
            net.first.bias.data.add_(1.0)
            session.mark(label)
        assert session.history == ["base", "one", "two"]
        session.undo()
        assert torch.equal(net.first.bias, base + 1.0)
        session.redo()
        assert torch.equal(net.first.bias, base + 1.0 + 1.0)
        session.undo()
        session.undo()
        assert torch.equal(net.first.bias, base)
        with pytest.raises(EditError, match="nothing to undo"):
            session.undo()
        session.redo()
        net.first.bias.data.mul_(3.0)
        with pytest.raises(EditError, match="nothing to redo"):
            session.redo()
        assert session.history == ["base", "one", "edit"], "a change after an undo forgets what was undone"


def test_toggle_changes_between_the_original_and_the_edit() -> None:
    net = Net()
    base = net.first.bias.detach().clone()
    with edit(net, "first") as session:
        with pytest.raises(EditError, match="no edit"):
            session.toggle()
        net.first.bias.data.add_(1.0)
        edited = net.first.bias.detach().clone()
        for expected in (base, edited, base, edited):
            session.toggle()
            assert torch.equal(net.first.bias, expected)
        assert session.is_edited


def test_nested_edits_are_a_stack() -> None:
    net = Net()
    before = bits(net)
    with edit(net) as outer:
        net.first.weight.data.add_(1.0)
        middle = bits(net)
        with edit(net, "first") as inner:
            net.first.weight.data.add_(1.0)
            with pytest.raises(EditError, match="inside this one is still open"):
                outer.undo()
            assert inner.is_edited
        assert_holds(net, middle)
        with edit(net, "first") as inner:
            net.first.weight.data.add_(5.0)
            inner.commit()
        assert torch.equal(net.first.weight, middle["first.weight"] + 5.0)
    assert_holds(net, before)


def test_a_committed_edit_stays_and_what_follows_it_goes() -> None:
    net = Net()
    with edit(net) as session:
        net.first.weight.data.fill_(2.0)
        session.commit()
        assert not session.is_edited
        net.first.weight.data.fill_(3.0)
    assert torch.equal(net.first.weight, torch.full((2, 3), 2.0))
    assert [change.name for change in session.changes()] == ["first.weight"]


def test_a_closed_session_refuses_work_and_keeps_its_record() -> None:
    net = Net()
    session = edit(net)
    net.first.weight.data.add_(1.0)
    session.close()
    session.close()  # a second time changes nothing
    (change,) = session.changes()
    assert (change.name, change.replaced) == ("first.weight", False)
    assert change.max_change == pytest.approx(1.0)
    for call in (session.undo, session.redo, session.toggle, session.restore, session.commit):
        with pytest.raises(EditError, match="closed"):
            call()


@pytest.mark.parametrize(
    ("which", "restored"),
    [
        (lambda _: "first.weight", {"first.weight"}),
        (lambda _: "first", {"first.weight", "first.bias"}),
        (lambda _: "*.bias", {"first.bias", "second.bias"}),
        (lambda net: net.first.weight, {"first.weight"}),
        (lambda net: net.second, {"second.weight", "second.bias"}),
        (lambda net: paramstate.select(net, "second") | paramstate.select(net, "*.bias"),
         {"first.bias", "second.weight", "second.bias"}),
    ],
    ids=["name", "prefix", "glob", "tensor", "module", "selection"],
)  # fmt: skip
@pytest.mark.parametrize("by_optimizer", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_some_are_restored_by_name_pattern_tensor_module_or_selection(
    which: Callable[[Net], Any], restored: set[str], by_optimizer: bool, replaced: bool
) -> None:
    net = Net(("first", "second"))
    names = {name for name, _ in net.named_parameters()}
    with paramstate.AdamW(net).edit() if by_optimizer else edit(net) as session:
        for module in (net.first, net.second):
            for key, value in list(module.named_parameters()):
                if replaced:
                    setattr(module, key, nn.Parameter(value.detach() + 1.0))
                else:
                    value.data.add_(1.0)
        session.restore(which(net))
        assert {change.name for change in session.changes()} == names - restored
        assert session.history[-1] == "restored: " + ", ".join(
            name for name, _ in net.named_parameters() if name in restored
        )


@pytest.mark.parametrize("by_optimizer", [False, True])
def test_a_tied_parameter_is_restored_by_any_of_its_names_and_a_buffer_as_a_tensor(by_optimizer: bool) -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)})
    net["b"].weight = net["a"].weight
    with paramstate.AdamW(net).edit() if by_optimizer else edit(net) as session:
        net["a"].weight.data.add_(1.0)
        net["norm"].running_mean.add_(1.0)
        session.restore("b.weight", net["norm"].running_mean)
        assert session.changes() == []


def test_what_is_not_in_the_edit_is_not_restored_and_the_nearest_is_named() -> None:
    net = Net(("first", "second"))
    with edit(net, "first") as session:
        net.first.weight.data.add_(1.0)
        for which, message in (
            ("first.wait", r"'first\.wait' is not in this edit; the nearest names are 'first\.weight'"),
            (net.second.weight, r"a tensor of shape \[.*\] is not in this edit; it holds 'first\.weight'"),
            (net.second, r"Layer is not in this edit; it holds"),
            (paramstate.select(net, "second"), r"select\(Net: 'second'\) is not in this edit"),
        ):
            with pytest.raises(paramstate.UnknownParameterError, match=message):
                session.restore("first.weight", which)
        assert session.is_edited


def test_an_unknown_name_restores_nothing() -> None:
    net = Net()
    with edit(net) as session:
        net.first.weight.data.add_(1.0)
        with pytest.raises(paramstate.UnknownParameterError, match=r"first\.wait"):
            session.restore("first.weight", "first.wait")
        assert session.is_edited


def test_copies_are_of_the_selected_parameters_only_and_shared_between_steps() -> None:
    net = Net()
    with edit(net, "first") as session:
        assert set(session.base()) == {"first.weight", "first.bias"}
        net.first.bias.data.add_(1.0)
        session.mark()
        before, after = (step.values["first.weight"] for step in session._history)
        assert before is after


def test_copies_go_to_the_device_that_is_asked_for() -> None:
    with edit(Net(), device="cpu") as session:
        assert {tensor.device.type for tensor in session.base().values()} == {"cpu"}


@pytest.mark.parametrize("state", ["keep", "snapshot", "reset"])
def test_training_goes_on_after_an_edit_as_if_there_had_been_none(state: str) -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1)
    straight, straight_opt = copy.deepcopy((net, opt))
    train(net, opt, range(3))
    with opt.edit("first", state=state):
        net.first.weight.data.zero_()
        net.second.weight.data  # noqa: B018  looked at, not edited
    train(net, opt, range(3, 6))
    train(straight, straight_opt, range(6))
    assert_same_bits(state_by_name(net, opt), state_by_name(straight, straight_opt))


def test_a_snapshot_of_state_undoes_steps_that_were_taken_inside() -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1)
    train(net, opt, range(3))
    before = state_by_name(net, opt)
    with opt.edit(state="snapshot"):
        train(net, opt, range(3, 5))
    assert_same_bits(state_by_name(net, opt), before)


def test_kept_state_is_what_the_steps_inside_made_of_it() -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1)
    train(net, opt, range(3))
    with opt.edit("first.weight"):
        give_gradient(net.first.weight, "inside")
        opt.step()
    assert opt.state_of("first.weight")["step"] == 4


def test_a_reset_edit_starts_afresh_and_a_commit_keeps_it_so() -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1)
    train(net, opt, range(3))
    with opt.edit("first.weight", state="reset") as session:
        assert opt.state_of("first.weight") == {}
        net.first.weight.data.zero_()
        session.commit()
    assert opt.state_of("first.weight") == {}
    assert opt.state_of("first.bias")["step"] == 3


def test_a_change_of_state_alone_is_a_step_of_the_history() -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1)
    train(net, opt, range(3))
    with opt.edit("first.weight", state="reset") as session:
        session.commit()  # before any value was changed
    assert opt.state_of("first.weight") == {}
    with opt.edit("second.weight", state="snapshot") as session:
        opt.freeze_rows("second.weight", [0])
        session.undo()
        assert opt._find("second.weight").rows is None
        session.redo()
        assert opt._find("second.weight").rows is not None


def test_a_gradient_follows_a_value_back_to_the_dtype_that_it_had() -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    with opt.edit():
        net.double()
        give_gradient(net.first.weight, "a")
    assert net.first.weight.grad.dtype == net.first.weight.dtype == torch.float32
    with opt.edit_rows() as rows:
        rows.gather("first.weight", [1, 0])
    opt.step()


@pytest.mark.parametrize("state", ["snapshot", "reset"])
def test_what_is_frozen_goes_back_and_forth_with_a_session_that_carries_state(state: str) -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    train(net, opt, [1])
    with opt.edit("first.weight", state=state) as session:
        opt.freeze("first.weight", stop_gradient=False)
        session.mark()
        session.undo()
        assert opt.frozen == []
        session.redo()
        assert opt.frozen == ["first.weight"]
    assert opt.frozen == []
    before = net.first.weight.detach().clone()
    train(net, opt, [2])
    assert not torch.equal(net.first.weight, before)


@pytest.mark.parametrize("state", ["keep", "snapshot"])
def test_requires_grad_comes_back_with_the_object_of_what_was_frozen_meanwhile(state: str) -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1)
    original = net.first.weight
    with opt.edit("first.weight", state=state):
        net.first.weight = nn.Parameter(torch.zeros(2, 3))
        opt.freeze("first.weight")
    assert net.first.weight is original
    assert original.requires_grad


def test_requires_grad_comes_back_into_the_model_also_where_an_optimizer_froze_it_meanwhile() -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1)
    original = net.first.weight
    with edit(net, "first"):
        opt.freeze("first")
        net.first.weight = nn.Parameter(torch.zeros(2, 3))
    assert net.first.weight is original
    assert original.requires_grad
    assert opt.frozen == ["first.weight", "first.bias"]


def test_an_optimizer_that_knows_no_model_puts_values_back_into_what_the_model_holds() -> None:
    net = Net()
    before = net.first.weight.detach().clone()
    opt = paramstate.AdamW(net.named_parameters(), lr=0.1)
    with opt.edit("first.weight"):
        net.first.weight = nn.Parameter(torch.zeros(2, 3))
    assert opt.param(opt.ids["first.weight"]) is net.first.weight, "what is trained is what is in the model"
    assert torch.equal(net.first.weight, before)


def test_bare_parameters_are_edited_too() -> None:
    weight = nn.Parameter(torch.ones(3))
    opt = paramstate.Adam([weight])
    with opt.edit():
        weight.data.zero_()
    assert torch.equal(weight, torch.ones(3))


def test_a_rank_one_edit_mid_training_is_restored_bit_for_bit() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=31, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    opt = paramstate.AdamW(model, lr=1e-2)
    tokens = torch.randint(0, 31, (2, 8))

    def step(model: nn.Module, opt: torch.optim.Optimizer) -> None:
        opt.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        opt.step()

    for _ in range(3):
        step(model, opt)
    straight, straight_opt = copy.deepcopy((model, opt))
    before = bits(model)
    with opt.edit("transformer.h.1.mlp.c_proj.weight") as session:
        weight = model.transformer.h[1].mlp.c_proj.weight
        with torch.no_grad():
            weight += torch.outer(torch.randn(weight.shape[0]), torch.randn(weight.shape[1]))
        logits = model(tokens).logits
        session.toggle()
        assert not torch.equal(model(tokens).logits, logits)
        session.toggle()
        assert torch.equal(model(tokens).logits, logits)
    assert_holds(model, before)
    for _ in range(3):
        step(model, opt)
        step(straight, straight_opt)
    assert_holds(model, bits(straight))


def test_a_restored_edit_is_no_foreign_write_to_the_doctor() -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1)
    train(net, opt, range(2))
    with edit(net, "first"), torch.no_grad():
        net.first.weight.add_(1.0)
    opt.zero_grad()
    assert paramstate.doctor(net, opt).healthy


def test_a_restored_edit_in_which_the_moments_began_is_no_foreign_write_to_the_doctor() -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1)
    with opt.edit("first"):
        train(net, opt, range(2))
    opt.zero_grad()
    assert paramstate.doctor(net, opt).healthy


class Caching(nn.Module):
    """A model that keeps something between calls, in a buffer that is empty at first or at last."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.register_buffer("cache", None)
        self.register_buffer("start", torch.ones(2), persistent=False)


@pytest.mark.parametrize("by_optimizer", [False, True], ids=["model", "optimizer"])
def test_what_is_or_becomes_none_comes_back(by_optimizer: bool) -> None:
    model = Caching()
    opt = paramstate.Adam(model)
    before, start, bias = bits(model), model.start, model.layer.bias
    with opt.edit() if by_optimizer else edit(model) as session:
        assert "cache" not in session.base()
        model.norm(torch.randn(8, 2))
        model.cache, model.start, model.layer.bias = torch.ones(3), None, None
        changed = {change.name: change.max_change for change in session.changes()}
        assert {"norm.running_mean", "cache", "start"} <= changed.keys()
        assert changed["start"] is None
        assert "start" not in session.tensors()
        session.mark()
        session.toggle()
        assert model.cache is None
        session.toggle()
        assert model.start is None
        assert model.cache.shape == (3,)
    assert_holds(model, before)
    assert model.cache is None
    assert model.start is start
    assert model.layer.bias is bias
    give_gradient(bias, "after")
    opt.step()
    assert not torch.equal(bias, before["layer.bias"]), "it is still trained"


def test_buffers_of_two_models_that_share_names_come_back_each() -> None:
    models = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)]
    opt = paramstate.Adam([{"params": models[0], "name": "generator"}, {"params": models[1], "name": "critic"}])
    for number, model in enumerate(models):
        model[1].running_mean.fill_(number + 7.0)
    before = [bits(model) for model in models]
    with opt.edit() as session:
        for number, model in enumerate(models):
            model[1].running_mean.fill_(number + 1.0)
            model[1].running_var.fill_(number + 2.0)
        session.restore("critic:1.running_mean")
        assert [model[1].running_mean[0].item() for model in models] == [1.0, 8.0]
    for model, expected in zip(models, before, strict=True):
        assert_holds(model, expected)


def test_a_buffer_and_a_parameter_of_two_models_that_share_a_name_come_back_each() -> None:
    models = nn.Module(), nn.Module()
    models[0].scale = nn.Parameter(torch.ones(2))
    models[1].register_buffer("scale", torch.full((2,), 2.0))
    models[1].weight = nn.Parameter(torch.ones(2))
    opt = paramstate.Adam([{"params": model} for model in models])
    with opt.edit():
        for model in models:
            model.scale.data.zero_()
    assert [model.scale.tolist() for model in models] == [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize("by_optimizer", [False, True], ids=["model", "optimizer"])
def test_the_end_of_a_block_closes_what_was_opened_inside(by_optimizer: bool) -> None:
    net = Net()
    opt = paramstate.Adam(net)
    before = bits(net)
    opened: list[EditSession] = []

    def open_one() -> EditSession:
        return opt.edit() if by_optimizer else edit(net)

    def fail_midway() -> None:
        with open_one():
            net.first.weight.data.add_(1.0)
            for _ in range(2):
                opened.append(open_one())
                net.first.weight.data.add_(1.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()
    assert_holds(net, before)
    assert not any(session.is_open for session in opened)


def test_a_session_that_nobody_closes_keeps_nothing_alive_and_blocks_nothing() -> None:
    net = Net()
    opt = paramstate.Adam(net)
    before = bits(net)
    with edit(net) as outer:
        edit(net, "first")
        net.first.weight.data.add_(1.0)
        outer.undo()
        assert_holds(net, before)
    edit(net)
    opt.edit(state="snapshot")
    with edit(net), opt.edit():
        pass
    former = weakref.ref(net), weakref.ref(opt)
    del net, opt, outer
    gc.collect()
    assert [reference() for reference in former] == [None, None]


def test_a_closed_session_keeps_no_state() -> None:
    net = Net()
    opt = paramstate.Adam(net)
    train(net, opt, range(1))
    with opt.edit(state="snapshot") as session:
        train(net, opt, range(1))
    assert session.base().keys() == bits(net).keys()
    assert [step.companion for step in session._history] == [None]


def test_what_left_the_optimizer_is_passed_over() -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1)
    train(net, opt, range(2))
    before = bits(net)
    with opt.edit(state="snapshot") as session:
        net.second.weight.data.zero_()
        net.third.weight.data.zero_()
        del net.third
        opt.rebind(net)
        assert "third.weight" not in session.tensors()
    del before["third.weight"], before["third.bias"]
    assert_holds(net, before)
    assert len(opt.state) == len(opt.ids) == 4


# ---- rows and layouts inside a session ---------------------------------------------------------------------------


def append_a_row(opt: paramstate.AdamW) -> None:
    with opt.edit_rows() as rows:
        rows.append("first.weight", 1)


def reverse_rows(opt: paramstate.AdamW) -> None:
    with opt.edit_rows() as rows:
        rows.permute("first.weight", [1, 0])


def transpose(opt: paramstate.AdamW) -> None:
    opt.replace_("first.weight", opt.param(opt.ids["first.weight"]).T, state=lambda t: t.T)


MOVES = [append_a_row, reverse_rows, transpose]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("opened_by", ["optimizer", "model", "another optimizer"])
def test_elements_do_not_move_where_the_value_would_come_back_without_the_state(
    move: Callable[[paramstate.AdamW], None], opened_by: str
) -> None:
    net = Net()
    opt, other = paramstate.AdamW(net, lr=0.1), paramstate.AdamW(net)
    straight, straight_opt = copy.deepcopy((net, opt))
    for model, optimizer in ((net, opt), (straight, straight_opt)):
        train(model, optimizer, range(3))
    sessions = {
        "optimizer": lambda: opt.edit("first"),
        "model": lambda: edit(net, "first"),
        "another optimizer": lambda: other.edit("first", state="snapshot"),
    }
    with sessions[opened_by]():
        weight = net.first.weight
        with pytest.raises(EditError, match=r"'first.weight' is in an open edit .* state='snapshot'"):
            move(opt)
        assert net.first.weight is weight
    for model, optimizer in ((net, opt), (straight, straight_opt)):
        train(model, optimizer, range(3, 5))
    assert_same_bits(state_by_name(net, opt), state_by_name(straight, straight_opt))
    move(opt)


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("state", ["snapshot", "reset"])
def test_moved_elements_come_back_with_their_state(move: Callable[[paramstate.AdamW], None], state: str) -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.1)
    straight, straight_opt = copy.deepcopy((net, opt))
    for model, optimizer in ((net, opt), (straight, straight_opt)):
        train(model, optimizer, range(3))
    with opt.edit("first", state=state) as session:
        move(opt)
        train(net.first, opt, [17])
        moved = net.first.weight.detach().clone()
        session.toggle()
        train(net.first, opt, [17])
        session.undo()
        session.restore()
        session.close()
    assert moved.shape != (2, 3) or move is reverse_rows
    for model, optimizer in ((net, opt), (straight, straight_opt)):
        train(model, optimizer, range(3, 5))
    assert_same_bits(state_by_name(net, opt), state_by_name(straight, straight_opt))


def test_a_model_is_not_laid_out_anew_where_the_old_layout_would_come_back() -> None:
    fused, split = nn.Linear(2, 4, bias=False), nn.ModuleDict({key: nn.Linear(2, 2, bias=False) for key in "ab"})
    for new, old in zip(split.parameters(), fused.weight.detach().chunk(2), strict=True):
        new.data.copy_(old)
    opt = paramstate.Adam(fused)
    with opt.edit(state="snapshot"), pytest.raises(EditError, match=r"'weight' is in an open edit.*old layout"):
        opt.relayout(split)
    assert list(opt.ids) == ["weight"]
    with edit(fused):  # its original is the old model's, which is no concern of the new one
        opt.relayout(split)
    assert list(opt.ids) == ["a.weight", "b.weight"]


def test_rows_are_reset_and_buffers_are_edited_in_a_session_that_leaves_state_alone() -> None:
    net = Net(["first"])
    opt = paramstate.AdamW(net, lr=0.1)
    train(net, opt, range(2))
    with opt.edit() as session, opt.edit_rows(side={"seen": torch.ones(2)}) as rows:
        rows.reset("first.weight", [0])
        rows.append("seen", 1)
    assert opt.row_steps("first.weight").tolist() == [0, 2]
    with opt.edit_rows() as rows:
        assert not session.is_open
        rows.append("first.weight", 1)
    assert opt.row_steps("first.weight").tolist() == [0, 2, 0]


@pytest.mark.parametrize("bare", [False, True])
def test_state_of_another_shape_goes_with_the_value_that_it_was_made_for(bare: bool) -> None:
    net = Net(["first"])
    opt = paramstate.AdamW(list(net.named_parameters()) if bare else net, lr=0.1)
    train(net, opt, range(2))
    before = net.first.weight.detach().clone()
    with opt.edit("first.weight"):
        net.first.weight = opt.replace_("first.weight", torch.zeros(4, 5), state="reset")
        give_gradient(net.first.weight, "inside")
        opt.step()
    assert torch.equal(net.first.weight, before)
    assert opt.state_of("first.weight") == {}
    train(net, opt, range(1))
    assert opt.state_of("first.weight")["step"] == 1


def test_an_empty_entry_that_a_look_into_the_state_leaves_is_no_change() -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    with opt.edit(state="snapshot") as session:
        assert opt.state[net.first.weight] == {}
        assert not session.is_edited
        with pytest.raises(paramstate.EditError, match="nothing to undo"):
            session.undo()
