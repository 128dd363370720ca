"""Input that means nothing is refused; the message says what it is about, what was expected, what came, what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from paramstate import (
    ConstraintError,
    EditError,
    LoadError,
    OverlapError,
    StateShapeError,
    UnknownParameterError,
    UnsupportedError,
)
from small_models import Net, assert_same_bits, set_gradients, state_by_name, train


def trained(**options: Any) -> tuple[Net, paramstate.AdamW]:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.01, **options)
    train(net, opt, range(3))
    return net, opt


CALLS: dict[str, tuple[Callable[[Net, paramstate.AdamW], object], type[Exception], str]] = {
    "an unknown ID": (
        lambda _, opt: opt.param(5),
        UnknownParameterError,
        r"no parameter has the ID 5; opt\.ids lists those known",
    ),
    "a number for a parameter": (
        lambda _, opt: opt.id_of(3),
        TypeError,
        "a parameter is given as the tensor or by name, got int",
    ),
    "a value that is no tensor": (
        lambda _, opt: opt.replace_("first.weight", [1.0]),
        TypeError,
        r"value must be a tensor or an nn\.Parameter, got list",
    ),
    "an unknown policy for the state of a value": (
        lambda net, opt: opt.replace_("first.weight", net.first.weight.detach(), state="carry"),
        ValueError,
        "state must be 'keep', 'reset' or a map, got 'carry'",
    ),
    "another shape without a map": (
        lambda net, opt: opt.replace_("first.weight", net.first.weight.T),
        StateShapeError,
        r"'first\.weight' has shape \[2, 3\], the new value has \[3, 2\]; .*state='reset'",
    ),
    "a map that gives another shape": (
        lambda net, opt: opt.replace_("first.weight", net.first.weight.T, state=lambda t: t),
        StateShapeError,
        r"'first\.weight': the map for its state gives shape \[2, 3\], the new value has \[3, 2\]; give the same map",
    ),
    "a map that changes elements": (
        lambda net, opt: opt.replace_("first.weight", net.first.weight * 2, state=lambda t: t * 2),
        StateShapeError,
        r"'first\.weight': the map for its state is no pure re-layout, it mixes or changes elements; .*them afresh",
    ),
    "a map that repeats elements": (
        lambda net, opt: opt.replace_("first.bias", net.first.bias.repeat(2), state=lambda t: t.repeat(2)),
        StateShapeError,
        r"'first\.bias': the map for its state is no pure re-layout, it repeats elements",
    ),
    "a map that drops elements": (
        lambda net, opt: opt.replace_("first.bias", net.first.bias[:1], state=lambda t: t[:1]),
        StateShapeError,
        r"'first\.bias': the map for its state is no pure re-layout, it drops elements",
    ),
    "an unknown group to adopt": (
        lambda net, opt: opt.rebind(net, group="decoder"),
        UnknownParameterError,
        "no group 'decoder'; the groups are '0'",
    ),
    "a group's number that is too great": (
        lambda net, opt: opt.rebind(net, group=1),
        UnknownParameterError,
        "no group 1; the groups are '0'",
    ),
    "an unknown label": (
        lambda net, opt: opt.rebind(net, label="decoder"),
        UnknownParameterError,
        "no group 'decoder' holds parameters; those that do are '0'",
    ),
    "a model to rebind that is none": (
        lambda _, opt: opt.rebind(3),
        TypeError,
        r"model must be a torch\.nn\.Module, got int",
    ),
    "a model to build with that is none": (
        lambda net, _: paramstate.AdamW(net.parameters(), model=3),
        TypeError,
        r"model must be a torch\.nn\.Module, got int",
    ),
    "a model to select in that is none": (
        lambda *_: paramstate.select(3),
        TypeError,
        r"model must be a torch\.nn\.Module, got int",
    ),
    "a model to examine that is none": (
        lambda _, opt: paramstate.doctor(3, opt),
        TypeError,
        r"model must be a torch\.nn\.Module, got int",
    ),
    "an optimizer to examine that is none": (
        lambda net, _: paramstate.doctor(net, 3),
        TypeError,
        "opt must be an optimizer, with param_groups and state; got int",
    ),
    "an unknown policy for the state of an edit": (
        lambda _, opt: opt.edit(state="carry"),
        ValueError,
        "state must be one of 'keep', 'snapshot', 'reset', got 'carry'",
    ),
    "rows that are no mapping": (
        lambda _, opt: opt.step(rows=[0]),
        TypeError,
        r"rows= maps parameters to their rows, as \{'weight': mask\}; got list",
    ),
    "a name that the package does not have": (
        lambda *_: paramstate.Adan,
        AttributeError,
        "module 'paramstate' has no attribute 'Adan'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CALLS.values(), ids=CALLS.keys())
def test_input_that_means_nothing_is_refused_and_changes_nothing(
    call: Callable[[Net, paramstate.AdamW], object], error: type[Exception], message: str
) -> None:
    net, opt = trained()
    before, objects, ids = state_by_name(net, opt), list(net.parameters()), dict(opt.ids)
    with pytest.raises(error, match=message):
        call(net, opt)
    assert all(one is other for one, other in zip(objects, net.parameters(), strict=True))
    assert opt.ids == ids
    assert_same_bits(state_by_name(net, opt), before)
    train(net, opt, [5])


def gradient_of_another_shape(net: Net, opt: paramstate.AdamW) -> None:
    opt.reset("first.weight")
    net.first.weight.data = torch.randn(5, 3)


def moment_in_another_parameters_value(net: Net, opt: paramstate.AdamW) -> None:
    opt.state[net.first.weight]["exp_avg"] = net.second.weight.detach()


def expanded_moment(net: Net, opt: paramstate.AdamW) -> None:
    opt.state[net.first.weight]["exp_avg"] = torch.zeros(1, 3).expand(2, 3)


def steps_set_back(net: Net, opt: paramstate.AdamW) -> None:
    with opt.edit_rows() as rows:
        rows.reset("first.weight", [1])
    opt.state[net.first.weight]["step"].zero_()


def bounds_of_another_shape(net: Net, opt: paramstate.AdamW) -> None:
    opt.constrain("first.weight", paramstate.Box(torch.full((2, 3), -9.0), 9.0))
    opt.reset("first.weight")
    net.first.weight.grad = None
    net.first.weight.data = torch.randn(5, 3)
    net.first.weight.grad = torch.ones(5, 3)


def norm_over_a_dimension_that_went(net: Net, opt: paramstate.AdamW) -> None:
    opt.constrain("first.weight", paramstate.MaxNorm(9.0, dim=1))
    opt.reset("first.weight")
    net.first.weight.grad = None
    net.first.weight.data = torch.randn(6)
    net.first.weight.grad = torch.ones(6)


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (
            gradient_of_another_shape,
            StateShapeError,
            r"'first\.weight': its gradient has shape \[2, 3\], the parameter has \[5, 3\]; call zero_grad\(\)",
        ),
        (
            moment_in_another_parameters_value,
            OverlapError,
            r"'exp_avg' shares memory with something else that the step writes; give it memory of its own",
        ),
        (
            expanded_moment,
            OverlapError,
            r"'first\.weight': 'exp_avg' shares memory with itself \(shape \[2, 3\], an expand\(\)ed tensor\)",
        ),
        (
            steps_set_back,
            StateShapeError,
            r"'first\.weight': its state 'step' is 0, and a row was made at step 3; .*opt\.reset\('first\.weight'\)",
        ),
        (
            bounds_of_another_shape,
            ConstraintError,
            r"'first\.weight' of shape \[5, 3\]: what was declared as its 'min' \(shape \[2, 3\]\) does not fit it",
        ),
        (
            norm_over_a_dimension_that_went,
            ConstraintError,
            r"'first\.weight' of shape \[6\]: what was declared as its .* does not fit it any more; declare it anew",
        ),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_what_a_client_wrote_that_cannot_be_stepped_is_named_before_anything_is_written(
    write: Callable[[Net, paramstate.AdamW], None], error: type[Exception], message: str
) -> None:
    net, opt = trained()
    opt.zero_grad()
    set_gradients(net, 7)
    write(net, opt)
    before = state_by_name(net, opt)
    with pytest.raises(error, match=message):
        opt.step()
    assert_same_bits(state_by_name(net, opt), before)


def some_rows(_: paramstate.AdamW) -> dict[str, Any]:
    return {"rows": {"first.weight": [0]}}


def frozen_rows(opt: paramstate.AdamW) -> dict[str, Any]:
    opt.freeze_rows("first.weight", [0])
    return {}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (some_rows, r"step\(rows=\.\.\.\) cannot be honoured by a step that is compiled, .*without compiling"),
        (frozen_rows, r"the rows of parameter 'first\.weight', frozen or of different ages, cannot be honoured"),
    ],
    ids=["some rows", "frozen rows"],
)
def test_a_differentiable_step_refuses_what_is_asked_of_rows(
    ask: Callable[[paramstate.AdamW], dict[str, Any]], message: str
) -> None:
    net = Net()
    opt = paramstate.AdamW(net, differentiable=True)
    asked = ask(opt)
    set_gradients(net, 0)
    before = state_by_name(net, opt)
    with pytest.raises(UnsupportedError, match=message), torch.no_grad():
        opt.step(**asked)
    assert_same_bits(state_by_name(net, opt), before)


def test_a_compiled_step_refuses_a_frozen_parameter_that_has_a_gradient() -> None:
    net, opt = trained()
    opt.freeze("first.weight", stop_gradient=False)
    before = state_by_name(net, opt)
    torch._dynamo.reset()
    with pytest.raises(UnsupportedError, match=r"'first\.weight' is frozen .* has a gradient; call zero_grad\(\)"):
        torch.compile(opt.step, backend="eager")()
    assert_same_bits(state_by_name(net, opt), before)


def test_rows_along_another_dimension_than_a_steps_are_refused() -> None:
    _, opt = trained()
    opt.freeze_rows("first.weight", [0], dim=1)
    with pytest.raises(UnsupportedError, match=r"'first\.weight': its rows differ along dim 1 already.*use dim=1"):
        opt.step(rows={"first.weight": [0]})


def test_rows_that_torch_steps_are_not_unscaled_and_say_so() -> None:
    weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
    opt = paramstate.AdamW([("weight", weight)])
    opt.freeze_rows("weight", [0])
    weight.grad = torch.ones_like(weight)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    before = weight.detach().clone()
    with pytest.raises(UnsupportedError, match=r"'weight': its rows differ, .*call scaler\.unscale_\(optimizer\)"):
        opt.step()
    assert torch.equal(weight, before)


def test_a_parameter_that_left_the_model_during_an_edit_is_named_until_it_is_back() -> None:
    net = Net()
    session = paramstate.edit(net, "first")
    original = net.first.weight.detach().clone()
    del net.first.weight
    with pytest.raises(EditError, match=r"'first\.weight' left the model while it was edited: .*put a parameter there"):
        session.close()
    net.first.weight = nn.Parameter(torch.zeros(2, 3))
    session.close()
    assert torch.equal(net.first.weight, original)


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (
            lambda opt: opt.constrain("first.weight", paramstate.Box(torch.full((2, 3), -9.0))),
            r"'first\.weight': min has shape \[2, 3\], .* \[5, 3\]; the state dict declares it",
        ),
        (
            lambda opt: opt.freeze_rows("first.weight", [0]),
            r"'first\.weight' has shape \[5, 3\], and the state dict knows the steps of 2 rows along dim 0; load it",
        ),
    ],
    ids=["bounds", "rows"],
)
def test_a_load_refuses_what_was_declared_for_another_shape(
    declare: Callable[[paramstate.AdamW], None], message: str
) -> None:
    saving, other = paramstate.AdamW(Net()), Net()
    declare(saving)
    other.first.weight = nn.Parameter(torch.randn(5, 3))
    opt = paramstate.AdamW(other)
    ids = dict(opt.ids)
    with pytest.raises(LoadError, match=message):
        opt.load_state_dict(saving.state_dict())
    assert opt.ids == ids
    assert opt._find("first.weight").rows is None


def test_a_constraint_of_a_kind_that_a_later_version_saved_is_refused() -> None:
    net, opt = trained()
    saved = opt.state_dict()
    saved["paramstate"]["traits"][0]["constraint"] = {"kind": "sphere", "radius": 1.0}
    before = state_by_name(net, opt)
    with pytest.raises(UnsupportedError, match="a constraint of an unknown kind, 'sphere'; update paramstate"):
        opt.load_state_dict(saved)
    assert_same_bits(state_by_name(net, opt), before)


def test_a_torch_that_is_too_old_is_named_with_what_to_install() -> None:
    code = "import torch; del torch.Tensor.__dlpack_c_exchange_api__; import paramstate; paramstate.Adam"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: paramstate needs torch 2.10 or later, found" in done.stderr
    assert "pip install 'torch>=2.10'" in done.stderr
