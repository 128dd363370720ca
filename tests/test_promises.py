"""The promises of the design that this version keeps, one test for each, named after it."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import paramstate
from small_models import Layer, Net, assert_same_bits, assert_trains, state_by_name, train


def clip(net: Net, _opt: paramstate.Adam) -> None:
    paramstate.clip_(net.first.weight, -0.1, 0.1)


def edit_in_place(net: Net, _opt: paramstate.Adam) -> None:
    with torch.no_grad():
        net.first.weight[0] = 0


def replace_object(net: Net, _opt: paramstate.Adam) -> None:
    net.first.weight = nn.Parameter(torch.randn(2, 3))


def replace_data(net: Net, _opt: paramstate.Adam) -> None:
    net.first.weight.data = torch.randn(2, 3)


def move_dtype(net: Net, _opt: paramstate.Adam) -> None:
    net.double()


def wrap(net: Net, opt: paramstate.Adam) -> None:
    opt.rebind(torch.compile(nn.DataParallel(net), backend="eager"))


def rename_and_back(net: Net, opt: paramstate.Adam) -> None:
    for old, new in (("first", "renamed"), ("renamed", "first")):
        setattr(net, new, getattr(net, old))
        delattr(net, old)
        opt.rename({f"{old}.weight": f"{new}.weight", f"{old}.bias": f"{new}.bias"})


def freeze_and_unfreeze(net: Net, opt: paramstate.Adam) -> None:
    net.first.weight.requires_grad_(False)
    opt.zero_grad()
    opt.step()
    net.first.weight.requires_grad_(True)


MEANING_KEPT = [
    clip, edit_in_place, replace_object, replace_data, move_dtype, wrap, rename_and_back, freeze_and_unfreeze,
]  # fmt: skip


@pytest.mark.parametrize("change", MEANING_KEPT, ids=lambda change: change.__name__)
def test_promise_1_an_id_survives_everything_that_keeps_the_parameters_meaning(
    change: Callable[[Net, paramstate.Adam], None],
) -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    train(net, opt, range(2))
    ids = dict(opt.ids)
    change(net, opt)
    train(net, opt, [5])
    assert opt.ids == ids
    assert {name: opt.id_of(p) for name, p in net.named_parameters()} == ids
    assert all(float(opt.state_of(name)["step"]) == 3 for name in ids)


OTHER_PROCESS = """
import sys, torch, paramstate
sys.path.insert(0, sys.argv[1])
from small_models import Layer, Net, train
net = Net(())
for name in ("third", "first", "second"):
    net.add_module(name, Layer(("bias", "weight")))
saved = torch.load(sys.argv[2], weights_only=True)
net.load_state_dict(saved["model"])
opt = paramstate.AdamW(net)
assert opt.load_state_dict(saved["opt"]).matched_by == "name"
assert dict(opt.ids) == saved["ids"], (dict(opt.ids), saved["ids"])
train(net, opt, [9])
torch.save({"model": net.state_dict(), "ids": dict(opt.ids)}, sys.argv[2])
"""


def test_promise_1_an_id_survives_save_and_load_in_another_process_with_another_attribute_order(
    tmp_path: Path,
) -> None:
    net = Net()
    opt = paramstate.AdamW(net)
    train(net, opt, range(3))
    file = tmp_path / "saved.pt"
    torch.save({"model": net.state_dict(), "opt": opt.state_dict(), "ids": dict(opt.ids)}, file)
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, tests, str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    train(net, opt, [9])
    back = torch.load(file, weights_only=True)
    assert back["ids"] == dict(opt.ids)
    for name, value in net.state_dict().items():
        assert torch.equal(back["model"][name], value), "the next step is bit-identical"


def by_hook(net: Net) -> None:
    net.first.weight = nn.Parameter(torch.randn(2, 3))


def behind_the_hooks(net: Net) -> None:
    net.first._parameters["weight"] = nn.Parameter(torch.randn(2, 3))


def by_module(net: Net) -> None:
    net.first = Layer()


def by_module_behind_the_hooks(net: Net) -> None:
    net._modules["first"] = Layer()


def by_deleting(net: Net) -> None:
    del net.first


@pytest.mark.parametrize(
    "change",
    [by_hook, behind_the_hooks, by_module, by_module_behind_the_hooks, by_deleting],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("when", ["before zero_grad", "before backward", "before step"])
def test_promise_2_a_parameter_that_is_trained_is_the_one_in_the_model(
    change: Callable[[Net], None], when: str
) -> None:
    net = Net()
    opt = paramstate.AdamW(net, lr=0.01)
    train(net, opt, range(2))
    try:
        if when == "before zero_grad":
            change(net)
        opt.zero_grad()
        if when == "before backward":
            change(net)
        sum(p.square().sum() for p in net.parameters()).backward()
        if when == "before step":
            change(net)
        opt.step()
    except paramstate.ReplacedParameterError as error:
        assert "first.weight" in str(error)  # noqa: PT017
        assert "rebind" in str(error)  # noqa: PT017
        opt.rebind(net, group=0)
    listed = {id(p) for group in opt.param_groups for p in group["params"]}
    assert listed == {id(p) for p in net.parameters()}
    assert_trains(net, opt)


def test_promise_2_limit_bare_parameters_follow_only_what_the_hook_shows_and_rebind_lifts_it() -> None:
    net = Net()
    opt = paramstate.AdamW(net.parameters(), lr=0.01)
    train(net, opt, range(2))
    behind_the_hooks(net)
    train(net, opt, [5])
    assert net.first.weight not in opt.state, "not seen: this is the limit"
    opt.rebind(net, group=0)
    behind_the_hooks(net)
    assert_trains(net, opt)
    assert net.first.weight in opt.state


def test_promise_6_loading_never_guesses() -> None:
    """Missing, unexpected, reshaped and retyped are four different things, and every load returns a report."""
    net = Net(("same", "shaped", "gone"))
    opt = paramstate.AdamW(net)
    train(net, opt, range(2))
    other = Net(("new", "same", "shaped"))
    other.shaped = nn.Linear(3, 9)
    other.same.double()
    fresh = paramstate.AdamW(other)
    texts = []
    for names in (("same", "shaped", "gone", "new"), ("same", "shaped"), ("same", "gone")):
        partial = Net(names)
        partial.shaped = nn.Linear(3, 9)
        with pytest.raises(paramstate.LoadError) as caught:
            paramstate.AdamW(partial).load_state_dict(opt.state_dict())
        texts.append(str(caught.value))
    assert "new.weight" in texts[0]
    assert "gone.weight" in texts[1]
    assert "shaped.weight" in texts[2]
    assert len(set(texts)) == 3
    report = fresh.load_state_dict(opt.state_dict(), strict=False)
    assert report.matched_by == "name"
    assert sorted(report.missing) == ["new.bias", "new.weight"]
    assert sorted(report.unexpected) == ["gone.bias", "gone.weight"]
    assert sorted(report.reshaped) == ["shaped.bias", "shaped.weight"]
    assert sorted(report.retyped) == ["same.bias", "same.weight"]


@pytest.mark.parametrize(
    ("ours", "theirs"), [(paramstate.Adam, torch.optim.Adam), (paramstate.AdamW, torch.optim.AdamW)]
)
def test_promise_7_same_numbers(ours: type, theirs: type) -> None:
    """To rounding those of torch, and bit-identical for any number of threads."""
    runs = []
    for cls, threads in ((theirs, 1), (ours, 1), (ours, 2), (ours, 7)):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(70, 900), nn.Tanh(), nn.Linear(900, 1))
        opt = cls(model.parameters(), lr=1e-3, weight_decay=0.1)
        train(model, opt, range(20))
        runs.append(state_by_name(model, opt))
    assert_same_bits(runs[1], runs[2])
    assert_same_bits(runs[1], runs[3])
    for name, numbers in runs[0].items():
        for key, wanted in numbers.items():
            torch.testing.assert_close(runs[1][name][key], wanted)


def test_a_deep_copied_model_has_the_ids_of_its_original() -> None:
    net = Net()
    assert paramstate.AdamW(copy.deepcopy(net)).ids == paramstate.AdamW(net).ids
