"""Conversions of a module after its optimizer was built.

A conversion may keep the parameter objects and change what they hold, or put new objects in their place; torch's class
trains on in the first case alone. The measure is a stock optimizer over the converted model, with the state put into it
by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import nn

import paramstate
from small_models import assert_same_bits, set_gradients, state_by_name, train


@contextmanager
def switched_on(switch: Callable[[bool], None]) -> Iterator[None]:
    switch(True)
    try:
        yield
    finally:
        switch(False)


swapping = torch.__future__.set_swap_module_params_on_conversion
overwriting = torch.__future__.set_overwrite_module_params_on_conversion


def by_default(net: nn.Module, dtype: torch.dtype) -> None:
    net.to(dtype)


def by_swapping(net: nn.Module, dtype: torch.dtype) -> None:
    with switched_on(swapping):
        net.to(dtype)


def by_overwriting(net: nn.Module, dtype: torch.dtype) -> None:
    with switched_on(overwriting):
        net.to(dtype)


def by_assignment(net: nn.Module) -> None:
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)


def to_empty_and_load(net: nn.Module) -> None:
    values = copy.deepcopy(net.state_dict())
    net.to_empty(device="cpu")
    net.load_state_dict(values)


def data_of_each(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.detach().clone()


def data_in_another_layout(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data = torch.zeros(*parameter.shape, 2)[..., 1].copy_(parameter.detach())


def swap_each(net: nn.Module) -> None:
    for parameter in net.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().clone()))


class Row(NamedTuple):
    """One row of the table."""

    convert: Callable[[nn.Module], object]
    keeps_objects: bool
    hidden: bool = False
    """No hook of torch tells of it, so that an optimizer over bare parameters does not see it."""


ROWS = {
    "double": Row(lambda net: by_default(net, torch.float64), keeps_objects=True),
    "double, swapping": Row(lambda net: by_swapping(net, torch.float64), keeps_objects=True),
    "double, overwriting": Row(lambda net: by_overwriting(net, torch.float64), keeps_objects=False, hidden=True),
    "load_state_dict(assign=True)": Row(by_assignment, keeps_objects=False),
    "to_empty, then load": Row(to_empty_and_load, keeps_objects=True),
    "channels_last": Row(lambda net: net.to(memory_format=torch.channels_last), keeps_objects=True),
    "share_memory": Row(lambda net: net.share_memory(), keeps_objects=True),
    ".data of each parameter": Row(data_of_each, keeps_objects=True),
    ".data in another layout": Row(data_in_another_layout, keeps_objects=True),
    "swap_tensors of each parameter": Row(swap_each, keeps_objects=True),
}


def model() -> nn.Module:
    torch.manual_seed(5)
    return nn.ModuleDict({"conv": nn.Conv2d(2, 3, 2), "one": nn.Linear(3, 4), "other": nn.Linear(3, 4)})


def trained(known_by: str, before: int) -> tuple[nn.Module, paramstate.AdamW]:
    net = model()
    opt = paramstate.AdamW(net if known_by == "model" else net.parameters(), lr=0.1)
    train(net, opt, range(before))
    return net, opt


def by_hand(row: Row, before: int) -> dict[str, dict[str, torch.Tensor]]:
    """What torch gives where somebody builds the optimizer anew and carries the state over."""
    net = model()
    former = torch.optim.AdamW(net.parameters(), lr=0.1)
    train(net, former, range(before))
    held = [former.state.get(parameter, {}) for parameter in net.parameters()]
    row.convert(net)
    opt = torch.optim.AdamW(net.parameters(), lr=0.1)
    for parameter, state in zip(net.parameters(), held, strict=True):
        moments = {key: tensor.to(parameter.dtype) for key, tensor in state.items() if key != "step"}
        if state:
            opt.state[parameter] = {"step": state["step"], **moments}
    train(net, opt, range(before, before + 3))
    return state_by_name(net, opt)


SEEN = [(name, "model") for name in ROWS] + [(name, "parameters") for name, row in ROWS.items() if not row.hidden]


@pytest.mark.parametrize(("name", "known_by"), SEEN)
@pytest.mark.parametrize("before", [0, 2], ids=["before the first step", "after two steps"])
def test_a_converted_model_is_trained_on(name: str, known_by: str, before: int) -> None:
    """After any conversion, before or after the first step, training goes on as if the state was carried by hand."""
    row = ROWS[name]
    net, opt = trained(known_by, before)
    objects = list(net.parameters())
    row.convert(net)
    assert [a is b for a, b in zip(objects, net.parameters(), strict=True)] == [row.keeps_objects] * len(objects)
    train(net, opt, range(before, before + 3))
    assert [p for group in opt.param_groups for p in group["params"]] == list(net.parameters())
    found = state_by_name(net, opt)
    torch.testing.assert_close(found, by_hand(row, before), rtol=1e-5, atol=1e-6)
    assert all(float(held["step"]) == before + 3 for held in found.values())


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.hidden])
def test_what_no_hook_tells_bare_parameters_do_not_see_and_rebind_does(name: str) -> None:
    """A conversion that overwrites goes unseen by an optimizer over bare parameters until `rebind(model)`."""
    net, opt = trained("parameters", 2)
    ROWS[name].convert(net)
    train(net, opt, [2])
    assert not any(parameter in opt.state for parameter in net.parameters())
    opt.rebind(net, group=0)
    assert set(net.parameters()) <= set(opt.param_groups[0]["params"])
    before = state_by_name(net, opt)
    train(net, opt, [3])
    assert all(not held["value"].equal(before[key]["value"]) for key, held in state_by_name(net, opt).items())


WAYS = [by_default, by_swapping, by_overwriting]


@pytest.mark.parametrize("convert", WAYS, ids=lambda function: function.__name__)
def test_a_narrower_value_leaves_the_moments_as_they_are(
    convert: Callable[[nn.Module, torch.dtype], None],
) -> None:
    """`model.bfloat16()` after a step keeps the float32 moments bit for bit, and the next steps use them as such."""
    net, opt = trained("model", 3)
    before = state_by_name(net, opt)
    convert(net, torch.bfloat16)
    opt.zero_grad()
    for name, held in state_by_name(net, opt).items():
        assert held.pop("value").dtype == torch.bfloat16
        assert_same_bits({name: held}, {name: {key: before[name][key] for key in held}})
    train(net, opt, [3])
    assert {state["exp_avg"].dtype for state in opt.state.values()} == {torch.float32}
    assert {float(state["step"]) for state in opt.state.values()} == {4.0}


@pytest.mark.parametrize("convert", [by_default, by_swapping], ids=lambda function: function.__name__)
def test_there_and_back_is_as_if_it_had_stayed(convert: Callable[[nn.Module, torch.dtype], None]) -> None:
    """float32 to float64 and back between two steps changes no bit of what follows."""
    net, opt = trained("model", 2)
    convert(net, torch.float64)
    convert(net, torch.float32)
    stayed, other = trained("model", 2)
    train(net, opt, range(2, 4))
    train(stayed, other, range(2, 4))
    assert_same_bits(state_by_name(net, opt), state_by_name(stayed, other))


@pytest.mark.parametrize("convert", [by_default, by_swapping], ids=lambda function: function.__name__)
def test_a_gradient_that_is_converted_with_its_parameter_is_used(
    convert: Callable[[nn.Module, torch.dtype], None],
) -> None:
    """A model that is converted between backward and step takes its gradients along, and the step uses them."""
    net, opt = trained("model", 1)
    opt.zero_grad()
    set_gradients(net, 1)
    convert(net, torch.float64)
    assert net.one.weight.grad.dtype == torch.float64
    opt.step()
    stayed, other = trained("model", 2)
    for parameter, single in zip(net.parameters(), stayed.parameters(), strict=True):
        torch.testing.assert_close(parameter, single.double(), rtol=1e-5, atol=1e-6)
    assert {float(state["step"]) for state in [*opt.state.values(), *other.state.values()]} == {2.0}


def test_an_overwriting_conversion_between_backward_and_step_is_raised() -> None:
    """Where the new parameter has a gradient already and no hook told of it, the step raises and names `rebind`."""
    net, opt = trained("model", 1)
    opt.zero_grad()
    set_gradients(net, 1)
    by_overwriting(net, torch.float64)
    before = state_by_name(net, opt)
    with pytest.raises(paramstate.ReplacedParameterError, match=r"conv\.weight.*rebind"):
        opt.step()
    assert_same_bits(state_by_name(net, opt), before)
    opt.rebind(net)
    opt.step()
    assert {float(state["step"]) for state in opt.state.values()} == {2.0}


def test_addresses_are_read_anew_on_every_step() -> None:
    """Memory of values, gradients and moments that is exchanged before every step is the memory that is stepped."""
    net, opt = trained("model", 1)
    stayed, other = trained("model", 1)
    for seed in range(1, 5):
        old = [parameter.data for parameter in net.parameters()]
        data_of_each(net)
        for state in opt.state.values():
            for key in ("exp_avg", "exp_avg_sq", "step"):
                state[key].data = state[key].clone()
        before = [tensor.clone() for tensor in old]
        train(net, opt, [seed])
        train(stayed, other, [seed])
        assert all(torch.equal(a, b) for a, b in zip(old, before, strict=True)), "the old memory is left alone"
    assert_same_bits(state_by_name(net, opt), state_by_name(stayed, other))


def test_nothing_holds_a_parameter_weakly() -> None:
    """After all that an optimizer does with a parameter, `swap_tensors` still accepts it: no weak reference is held."""
    net, opt = trained("model", 2)
    paramstate.clip_(net.one.weight, -1.0, 1.0)
    paramstate.clip_grad_norm_(net.parameters(), 1.0)
    opt.load_state_dict(opt.state_dict())
    opt.rebind(net)
    copy.deepcopy((net, opt))
    opt.zero_grad()
    swap_each(net)
    before = state_by_name(net, opt)
    train(net, opt, [2])
    assert all(not held["value"].equal(before[key]["value"]) for key, held in state_by_name(net, opt).items())
    assert {float(state["step"]) for state in opt.state.values()} == {3.0}
