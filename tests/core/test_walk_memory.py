"""`Walk` remembers no address, holds no tensor in C++, and keeps the store's loans true."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from core.walk_bench import Bench, follows, param, twin
from paramstate import _core

# ---- nothing is remembered ------------------------------------------------------------------------------------------


def address_agrees(bench: Bench) -> None:
    for p, id_ in zip(bench.params, bench.ids, strict=True):
        assert bench.store.address(id_) == p.data_ptr()
        for key, tensor in bench.state[p].items():
            assert bench.store.address(id_, key) == tensor.data_ptr()
            assert bench.store.lent(id_, key) is tensor


CHANGES: dict[str, Any] = {
    "value_data": lambda _, p: setattr(p, "data", p.data.clone()),
    "value_set": lambda _, p: p.data.set_(p.data.clone()),
    "moment": lambda b, p: b.state[p].update(exp_avg=b.state[p]["exp_avg"].clone()),
    "moment_data": lambda b, p: setattr(b.state[p]["exp_avg"], "data", b.state[p]["exp_avg"].data.clone()),
    "step": lambda b, p: b.state[p].update(step=b.state[p]["step"].clone()),
    "inner": lambda b, p: b.state.update({p: OrderedDict({k: v.clone() for k, v in b.state[p].items()})}),
    "order": lambda b, p: b.state.update({p: b.state.pop(p)}),
    "foreign_keys": lambda b, _: setattr(b, "state", {"global": 1, 7: {}, **b.state}),
    "mapping": lambda b, _: setattr(b, "state", dict(reversed(list(b.state.items())))),
    "extra_key": lambda b, p: b.state.update({p: {"ema": torch.zeros(2), **b.state[p]}}),
    "equal_keys": lambda b, p: b.state.update({p: {"".join(list(k)): v for k, v in b.state[p].items()}}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_client_puts_there_is_what_the_next_step_uses(change: str) -> None:
    bench = Bench(*(param(40) for _ in range(8)))
    other = twin(bench)
    bench.step()
    follows(bench, other)
    kept = [t for inner in bench.state.values() for t in inner.values()] + [p.data for p in bench.params]
    for p in bench.params:
        CHANGES[change](bench, p)
    for _ in range(2):
        assert len(bench.step().updated) == 8
        follows(bench, other)
    bench.walk.refresh(bench.state)
    address_agrees(bench)
    assert len(kept) == 32  # held until here, so that no new tensor can come to lie where an old one was


@pytest.mark.parametrize("which", ["parameter", "grad", "moment"])
def test_swap_tensors_works_after_a_step(which: str) -> None:
    """It refuses a tensor that anybody holds in C++ or by weak reference."""
    bench = Bench(param(40), param(40))
    other = twin(bench)
    bench.step()
    follows(bench, other)
    p = bench.params[0]
    target = {"parameter": p, "grad": p.grad, "moment": bench.state[p]["exp_avg"]}[which]
    assert target is not None
    if which == "grad":
        p.grad = None  # the parameter itself holds it in C++
    fresh = target.detach().clone()
    torch.utils.swap_tensors(target, nn.Parameter(fresh) if which == "parameter" else fresh)
    if p.grad is None:
        p.grad = other.param_groups[0]["params"][0].grad.clone()
    bench.step()
    follows(bench, other)


def test_a_gradient_is_not_kept_after_the_step() -> None:
    bench = Bench(param(3))
    gone = weakref.ref(bench.params[0].grad)  # type: ignore[arg-type]
    bench.step()
    bench.params[0].grad = None
    assert gone() is None


def test_refresh_lends_what_the_state_holds_and_takes_back_the_rest() -> None:
    bench = Bench(param(3), param(3))
    first, second = bench.ids
    assert bench.walk.refresh(bench.state)
    assert not bench.walk.refresh(bench.state)
    address_agrees(bench)
    bench.state[bench.params[0]]["ema"] = ema = torch.zeros(3)
    del bench.state[bench.params[1]]
    assert bench.walk.refresh(bench.state)
    assert bench.store.lent(first, "ema") is ema
    assert bench.store.lent(second, "exp_avg") is None
    assert bench.store.lent(second, "value") is bench.params[1]
    assert bench.store.memory_bytes(first) == 4 * 3 * 4 + 4
    assert bench.store.memory_bytes(second) == 12


def test_a_store_that_somebody_else_changed_is_lent_everything_again() -> None:
    bench = Bench(param(3))
    bench.step()
    other = _core.Walk(bench.store)
    replaced = nn.Parameter(torch.zeros(3))
    other.enroll([[replaced]], [bench.ids])
    other.refresh({})
    assert bench.store.lent(bench.ids[0], "value") is replaced
    bench.step()
    address_agrees(bench)


def test_a_walk_that_is_referred_to_by_its_parameter_is_collected() -> None:
    bench = Bench(param(3))
    bench.step()
    bench.params[0].keeper = bench  # type: ignore[attr-defined]
    gone = weakref.ref(bench)
    del bench
    gc.collect()
    assert gone() is None
