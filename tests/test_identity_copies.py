"""scenarios.md, section A: copies, processes and threads."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import sys
import threading
import types
import weakref

import pytest
import torch
from torch import nn

import paramstate
from small_models import Net, assert_same_bits, assert_trains, give_gradient, set_gradients, state_by_name, train

BIG = 300_000  # elements: enough for the worker threads to take part


def trained() -> tuple[Net, paramstate.Adam]:
    torch.manual_seed(5)
    net = Net()
    opt = paramstate.AdamW(net, lr=0.01)
    train(net, opt, range(3))
    return net, opt


def test_deepcopy_pair() -> None:
    net, opt = trained()
    other, other_opt = copy.deepcopy((net, opt))
    assert other_opt.ids == opt.ids
    before = state_by_name(net, opt)
    assert_same_bits(state_by_name(other, other_opt), before)
    train(other, other_opt, [10])
    assert_same_bits(state_by_name(net, opt), before)
    train(net, opt, [10])
    assert_same_bits(state_by_name(other, other_opt), state_by_name(net, opt))
    other.first.weight = nn.Parameter(other.first.weight.detach().clamp(-0.1, 0.1))
    assert other_opt.id_of(other.first.weight) == opt.ids["first.weight"], "the copy knows the copied model"
    assert_trains(other, other_opt)


def test_deepcopy_of_model_and_optimizer_separately_can_rebind_by_name() -> None:
    net, opt = trained()
    other, other_opt = copy.deepcopy(net), copy.deepcopy(opt)
    report = other_opt.rebind(other)
    assert sorted(report.followed) == sorted(opt.ids)
    assert other_opt.ids == opt.ids
    train(net, opt, [10])
    train(other, other_opt, [10])
    assert_same_bits(state_by_name(other, other_opt), state_by_name(net, opt))


def test_pickle_of_the_pair() -> None:
    net, opt = trained()
    other, other_opt = pickle.loads(pickle.dumps((net, opt)))
    assert other_opt.ids == opt.ids
    other_opt.rebind(other)
    train(other, other_opt, [10])
    train(net, opt, [10])
    assert_same_bits(state_by_name(other, other_opt), state_by_name(net, opt))


def test_an_optimizer_pickles_where_the_model_does_not() -> None:
    net = Net()
    net.unpicklable = lambda: None
    opt = paramstate.AdamW(net)
    train(net, opt, [0])
    other = pickle.loads(pickle.dumps(opt))
    assert other.ids == opt.ids
    assert float(other.state_of("first.weight")["step"]) == 1


@pytest.mark.parametrize("kind", ["lambda", "inner"])
def test_a_constraint_that_does_not_pickle_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def inner(values: torch.Tensor) -> torch.Tensor:
        return values.clamp(-0.1, 0.1)

    for pickler in ("cloudpickle", "dill"):
        monkeypatch.delitem(sys.modules, pickler, raising=False)
    net = Net()
    function = inner if kind == "inner" else lambda values: values.clamp(-0.1, 0.1)
    opt = paramstate.AdamW(net, constraints={"second.weight": function})
    with pytest.raises(paramstate.UnsupportedError, match=r"'second\.weight': its constraint.*top of a module"):
        pickle.dumps(opt)
    for twin in (copy.deepcopy(opt), copy.copy(opt)):
        twin.step()
        assert twin._find("second.weight").constraint.function is function


def test_a_constraint_that_pickles_comes_back() -> None:
    opt = pickle.loads(pickle.dumps(paramstate.AdamW(Net(), constraints={"second.weight": torch.relu})))
    assert opt._find("second.weight").constraint == paramstate.Projection(torch.relu)


def test_where_another_pickler_is_imported_a_function_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", types.ModuleType("cloudpickle"))
    opt = paramstate.AdamW(Net(), constraints={"second.weight": lambda values: values})
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(opt)


def test_an_optimizer_and_its_model_are_freed_when_nobody_holds_them() -> None:
    net, opt = trained()
    held = weakref.ref(opt), weakref.ref(net)
    del net, opt
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def stepped_numbers() -> list[float]:
    parameter = nn.Parameter(torch.linspace(-1, 1, BIG))
    opt = paramstate.AdamW([parameter], lr=0.01)
    for seed in range(2):
        give_gradient(parameter, str(seed))
        opt.step()
    return parameter.detach()[:: BIG // 50].tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_and_threads_fork_after_a_step() -> None:
    """A child of a process that has stepped steps too: no hang, the same bits.

    All else is made before the fork, because torch's own worker threads do not survive one.
    """
    torch.set_num_threads(2)
    parameter = nn.Parameter(torch.linspace(-1, 1, BIG))
    opt = paramstate.AdamW([parameter], lr=0.01)
    give_gradient(parameter, "0")
    opt.step()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def step_and_send() -> None:
        opt.step()
        sender.send(parameter.detach()[:: BIG // 50].tolist())

    children = [context.Process(target=step_and_send) for _ in range(2)]
    for child in children:
        child.start()
    received = [receiver.recv() for _ in children if receiver.poll(60)]
    for child in children:
        child.join(10)
        child.kill()
    opt.step()
    assert received == [parameter.detach()[:: BIG // 50].tolist()] * 2


def test_fork_and_threads_two_threads_with_an_optimizer_each() -> None:
    wanted = stepped_numbers()
    results: list[list[float]] = []
    threads = [threading.Thread(target=lambda: results.append(stepped_numbers())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [wanted] * 4


def test_fork_and_threads_two_threads_that_step_one_optimizer() -> None:
    """Serialised or an error, never a race: each step is taken wholly or not at all."""
    parameter = nn.Parameter(torch.zeros(BIG))
    opt = paramstate.Adam([parameter], lr=0.5, betas=(0.0, 0.0), eps=1e-30)
    parameter.grad = torch.ones(BIG)
    errors: list[BaseException] = []

    def step_once() -> None:
        try:
            opt.step()
        except RuntimeError as error:
            errors.append(error)

    def step_ten_times() -> None:
        for _ in range(10):
            step_once()

    threads = [threading.Thread(target=step_ten_times) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    taken = 30 - len(errors)
    assert float(opt.state[parameter]["step"]) == taken
    assert torch.equal(parameter.detach(), torch.full((BIG,), -0.5 * taken)), "each step moves every element by lr"


def test_fork_and_threads_flush_denormal() -> None:
    """Worker threads take over the caller's floating-point mode, so the bits do not depend on who did the work."""

    def run(threads: int, flush: bool) -> torch.Tensor:
        torch.set_num_threads(threads)
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor cannot flush denormals")
        try:
            parameter = nn.Parameter(torch.zeros(BIG))
            opt = paramstate.Adam([parameter], lr=1e-3)
            parameter.grad = torch.full((BIG,), 1e-38)
            opt.step()
            return opt.state[parameter]["exp_avg"].view(torch.int32).clone()
        finally:
            torch.set_flush_denormal(False)

    kept, flushed = run(1, flush=False), run(1, flush=True)
    assert int(kept[0]) != 0
    assert int(flushed[0]) == 0, "0.1 * 1e-38 is denormal"
    for threads in (2, 7):
        assert torch.equal(run(threads, flush=True), flushed)
        assert torch.equal(run(threads, flush=False), kept)


def test_a_store_handed_to_a_rebuilt_optimizer_brings_ids_and_state() -> None:
    net, opt = trained()
    net.renamed = net.second
    del net.second
    opt.rename({"second.weight": "renamed.weight", "second.bias": "renamed.bias"})
    ids = dict(opt.ids)
    assert paramstate.AdamW(net).ids != ids
    rebuilt = paramstate.AdamW(net, lr=0.01, store=opt.store)
    assert rebuilt.ids == ids
    set_gradients(net, 3)
    rebuilt.step()
    assert rebuilt.ids == ids
    assert float(rebuilt.state_of("renamed.weight")["step"]) == 4


def test_a_handed_over_store_says_nothing_of_a_parameter_that_was_forgotten() -> None:
    net, opt = trained()
    opt.freeze("second.weight")
    opt.constrain("second.bias", paramstate.Box(-0.1, 0.1))
    opt.freeze_rows("third.weight", [0])
    ids = dict(opt.ids)
    del net.second, net.third
    opt.rebind(net)
    net.second, net.third = Net().second, Net().third
    opt.rebind(net, group=0)
    assert opt.ids == ids, "an ID is derived from the name, so the new parameters have those of the old"
    rebuilt = paramstate.AdamW(net, store=opt.store)
    assert rebuilt.frozen == opt.frozen == []
    assert [entry.constraint or entry.rows for entry in rebuilt._table if entry.constraint or entry.rows] == []


def test_a_handed_over_store_says_nothing_of_an_id_that_was_given_up() -> None:
    net = Net(["second"])
    opt = paramstate.AdamW(net.named_parameters())
    opt.freeze("second.weight")
    given_up = opt.ids["second.weight"]
    saved = opt.state_dict()
    saved["paramstate"]["ids"][0] = 77
    opt.load_state_dict(saved)
    opt.rename({"second.weight": "kept"})
    other = Net(["second"])
    opt.add_param_group({"params": [("second.weight", other.second.weight)]})
    assert opt.ids["kept"] == 77
    assert opt.ids["second.weight"] == given_up, "derived from the name, which is free"
    rebuilt = paramstate.AdamW(other, store=opt.store)
    assert rebuilt.ids["second.weight"] == given_up
    assert rebuilt.frozen == []


def test_rows_are_the_rebuilt_optimizers_own() -> None:
    net, opt = trained()
    opt.freeze_rows("second.weight", [0])
    set_gradients(net, 3)
    opt.step()
    rebuilt = paramstate.AdamW(net, store=opt.store)
    assert rebuilt.row_steps("second.weight").tolist() == opt.row_steps("second.weight").tolist()
    ours, theirs = (optimizer._find("second.weight").rows for optimizer in (rebuilt, opt))
    before = theirs.offsets.clone()
    rebuilt.step()
    assert ours.frozen.tolist() == theirs.frozen.tolist()
    assert ours.offsets[0] == before[0] + 1
    assert torch.equal(theirs.offsets, before)
