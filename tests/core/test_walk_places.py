"""Slots, threads, and the functions over lists of tensors."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref

import torch
from torch import nn

from core.walk_bench import Bench, conjugated, param
from paramstate import _core

# ---- slots ----------------------------------------------------------------------------------------------------------


def test_moved_names_the_slots_and_links_that_hold_something_else() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    walk = _core.Walk(_core.Store())
    slots = [
        (weakref.ref(module), name, p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
    ]
    links = [(weakref.ref(model), name, weakref.ref(child)) for name, child in model.named_children()]
    assert walk.moved() == ([], [])
    walk.watch(slots, links)
    assert walk.moved() == ([], [])
    model[0]._parameters["bias"] = nn.Parameter(torch.zeros(2))
    assert walk.moved() == ([1], [])
    del model[1].weight
    assert walk.moved() == ([1, 2], [])
    model[1] = nn.Linear(2, 2)  # the old child is dead: its slots are nobody's
    gc.collect()
    assert walk.moved() == ([1], [1])
    del model
    gc.collect()
    assert walk.moved() == ([], [])


# ---- threads --------------------------------------------------------------------------------------------------------


def test_a_second_thread_is_told_and_the_first_is_not_disturbed() -> None:
    bench = Bench(param(4_000_000))
    told: list[str] = []
    started, done = threading.Event(), threading.Event()

    def look() -> None:
        try:
            bench.walk.moved()
        except RuntimeError as error:
            told.append(str(error))

    def other() -> None:
        started.set()
        while not done.is_set():
            look()

    thread = threading.Thread(target=other)
    thread.start()
    started.wait()
    while not told:
        with contextlib.suppress(RuntimeError):  # where the other thread was inside
            bench.step()
    done.set()
    thread.join()
    assert told
    assert "another thread" in told[0]
    assert len(bench.step().updated) == 1


# ---- lists of tensors -----------------------------------------------------------------------------------------------


def test_sum_of_squares_and_scale_take_the_host_s_tensors_each_element_once() -> None:
    a, shared = torch.arange(6.0).reshape(2, 3).T, torch.full((2,), 3.0)
    strange = torch.ones(3).to_sparse()
    squares, elsewhere = _core.sum_of_squares([a, strange, shared, conjugated(3)], threads=2)
    assert squares == 55 + 18
    assert elsewhere == [1, 3]
    whole = torch.ones(4)
    left = _core.scale_([a, strange, shared, shared, torch.ones(1).expand(3), whole[:3], whole[1:]], 2.0, threads=2)
    assert left == [1, 5, 6]
    assert a.sum() == 30
    assert shared.tolist() == [6.0, 6.0]
    assert whole.tolist() == [1.0] * 4


def test_overlapping_is_exact_and_a_tensor_that_shares_with_itself_is_a_pair() -> None:
    whole = torch.zeros(6, 4)
    tensors = [
        whole[:, ::2],
        whole[:, 1::2],
        whole[0],
        whole[0, :0],
        torch.zeros(1).expand(3),
        torch.zeros(3).to_sparse(),
    ]
    assert sorted(_core.overlapping(tensors)) == [(0, 2), (1, 2), (4, 4)]
    assert _core.overlapping([whole, whole]) == []


def test_the_instruction_set_has_a_name() -> None:
    assert _core.isa()
