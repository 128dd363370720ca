"""State dicts: torch's layout, saved and loaded by either class."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from small_models import Net, assert_same_bits, assert_trains, state_by_name, train

PAIRS = [(paramstate.Adam, torch.optim.Adam), (paramstate.AdamW, torch.optim.AdamW)]
OURS = [ours for ours, _ in PAIRS]
CLASSES = [cls for pair in PAIRS for cls in pair]

StateDict = dict[str, Any]


def trained(cls: type, net: Net | None = None, **options: Any) -> tuple[Net, Any]:
    """Two groups, three steps; parameters with names."""
    torch.manual_seed(5)
    net = Net() if net is None else net
    opt = cls(groups_of(net), **{"lr": 0.01, **options})
    train(net, opt, range(3))
    return net, opt


def groups_of(net: Net, *, named: bool = True) -> list[dict[str, Any]]:
    """The first layer in a group of its own."""
    items = list(net.named_parameters())
    parts = (
        [item for item in items if item[0].startswith("first")],
        [item for item in items if not item[0].startswith("first")],
    )
    return [
        {"params": part if named else [param for _, param in part], "weight_decay": decay}
        for part, decay in zip(parts, (0.0, 0.1), strict=True)
    ]


def through_a_file(value: StateDict) -> StateDict:
    """As `torch.load` reads it by default."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def options_of(opt: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]


# ---- what is saved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_state_dict_has_torchs_layout(ours: type, theirs: type, named: bool) -> None:
    """A state dict has torch's groups, positions across groups, and keys; ours adds one top-level key, `paramstate`."""
    dicts = []
    for cls in (ours, theirs):
        torch.manual_seed(0)
        net = Net()
        opt = cls(groups_of(net, named=named), amsgrad=True)
        train(net, opt, range(2))
        dicts.append(opt.state_dict())
    mine, stock = dicts
    assert list(mine) == [*stock, "paramstate"]
    assert mine["param_groups"] == stock["param_groups"]
    assert [group["params"] for group in mine["param_groups"]] == [[0, 1], [2, 3, 4, 5]]
    assert all(("param_names" in group) == named for group in mine["param_groups"])
    assert list(mine["state"]) == list(stock["state"]) == [0, 1, 2, 3, 4, 5]
    for key, state in stock["state"].items():
        assert list(mine["state"][key]) == list(state)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_dict_refers_to_the_live_tensors(cls: type) -> None:
    """A state dict holds the live tensors, not copies; its groups are dicts of their own."""
    net, opt = trained(cls, lr=torch.tensor(0.5))
    saved = opt.state_dict()
    for key, value in opt.state[net.first.weight].items():
        assert saved["state"][0][key] is value
    assert saved["param_groups"][0]["lr"] is opt.param_groups[0]["lr"]
    saved["param_groups"][0]["lr"] = 9.0
    assert float(opt.param_groups[0]["lr"]) == 0.5


@pytest.mark.parametrize("cls", OURS)
def test_a_state_dict_loads_with_weights_only(cls: type) -> None:
    """A saved state dict holds only tensors, numbers, texts and plain containers: `weights_only=True` takes it."""
    net, opt = trained(cls, lr=torch.tensor(0.1), betas=(0.5, 0.6), amsgrad=True)
    opt.state["global"] = {"tag": 3}
    saved = opt.state_dict()
    read = through_a_file(saved)
    torch.testing.assert_close(read["state"], saved["state"], rtol=0, atol=0)
    assert read["param_groups"] == saved["param_groups"]
    assert read["paramstate"] == saved["paramstate"]
    fresh = cls(groups_of(copy.deepcopy(net)))
    assert sorted(fresh.load_state_dict(read).loaded) == sorted(opt.ids)


# ---- what is loaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}, {"lr": torch.tensor(0.1)}])
@pytest.mark.parametrize("direction", ["ours to theirs", "theirs to ours", "ours to ours"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_either_class_goes_on_from_the_others_file(
    ours: type, theirs: type, direction: str, options: dict[str, Any], named: bool
) -> None:
    """A run that goes on in the other class, from a file, has the numbers of one that was never interrupted."""
    source, _, target = ({"ours": ours, "theirs": theirs, "to": None}[word] for word in direction.split())
    torch.manual_seed(5)
    net = Net()
    opt = source(groups_of(net, named=named), **{"lr": 0.01, **options})
    train(net, opt, range(3))
    other = copy.deepcopy(net)
    fresh = target(groups_of(other, named=named), lr=0.5)
    fresh.load_state_dict(through_a_file(opt.state_dict()))
    assert [group["lr"] for group in fresh.param_groups] == [group["lr"] for group in opt.param_groups]
    for model, optimizer in ((net, opt), (other, fresh)):
        train(model, optimizer, range(10, 13))
    for name, parameter in net.named_parameters():
        twin = other.get_parameter(name)
        torch.testing.assert_close(twin, parameter, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(fresh.state[twin], opt.state[parameter], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("cls", CLASSES)
def test_options_of_the_file_replace_those_of_the_constructor(cls: type) -> None:
    """Every option of a group, lr and keys of a client too, is the file's after a load, as a copy of its own."""
    _, opt = trained(cls, lr=torch.tensor(0.25), betas=(0.5, 0.6), eps=1e-4, maximize=True, amsgrad=True)
    opt.param_groups[1]["initial_lr"] = 3.0
    saved = opt.state_dict()
    fresh = cls(groups_of(Net()), fused=True)
    fresh.load_state_dict(saved)
    assert options_of(fresh) == options_of(opt)
    assert fresh.param_groups[0]["fused"] is None
    assert fresh.param_groups[0]["lr"] is not opt.param_groups[0]["lr"]
    assert fresh.defaults["lr"] == 1e-3


@pytest.mark.parametrize("cls", CLASSES)
def test_loading_a_fused_group_does_not_make_a_scaler_leave_unscaling_to_the_step(cls: type) -> None:
    """`_step_supports_amp_scaling` is set by the constructor alone: loading a fused group does not set it."""
    _, opt = trained(cls, fused=True)
    fresh = cls(groups_of(Net()))
    fresh.load_state_dict(opt.state_dict())
    assert fresh.param_groups[0]["fused"] is True
    assert not hasattr(fresh, "_step_supports_amp_scaling")


@pytest.mark.parametrize("cls", OURS)
def test_the_dict_that_is_loaded_is_left_as_it_is(cls: type) -> None:
    """Neither loading nor a later step changes the dict that was passed, or what is in it."""
    _, opt = trained(cls)
    saved = copy.deepcopy(opt.state_dict())
    before = copy.deepcopy(saved)
    net = Net()
    fresh = cls(groups_of(net))
    fresh.load_state_dict(saved)
    train(net, fresh, range(2))
    torch.testing.assert_close(saved["state"], before["state"], rtol=0, atol=0)
    assert {key: value for key, value in saved.items() if key != "state"} == {
        key: value for key, value in before.items() if key != "state"
    }


@pytest.mark.parametrize("cls", CLASSES)
def test_a_dict_of_an_optimizer_that_never_stepped_clears_the_state(cls: type) -> None:
    """A state dict without state loads, and leaves no state; an ordered dict and keys of others are no hindrance."""
    saved = OrderedDict(cls(groups_of(Net())).state_dict(), epoch=3)
    net, opt = trained(cls)
    opt.load_state_dict(state_dict=saved)
    assert not opt.state
    train(net, opt, [0])
    assert float(opt.state[net.first.weight]["step"]) == 1


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_old_checkpoints_load(ours: type, theirs: type) -> None:
    """A file whose `step` is a Python number and whose groups lack newer keys loads and goes on as in torch."""
    results = []
    for cls in (ours, theirs):
        net, opt = trained(cls)
        saved = copy.deepcopy(opt.state_dict())
        for state in saved["state"].values():
            state["step"] = int(state["step"])
        newer = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
        for group in saved["param_groups"]:
            for key in newer:
                del group[key]
        other = copy.deepcopy(net)
        fresh = cls(groups_of(other))
        fresh.load_state_dict(saved)
        step = fresh.state[other.first.weight]["step"]
        assert (step.dtype, step.shape, float(step)) == (torch.float32, (), 3.0)
        assert fresh.param_groups[0].keys() >= set(newer)
        train(other, fresh, [10])
        results.append([parameter.detach() for parameter in other.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("load", ["load_state_dict", "__setstate__"])
@pytest.mark.parametrize("cls", CLASSES)
def test_setstate_fills_in_what_old_groups_lack(cls: type, load: str) -> None:
    """`__setstate__` gives groups of old versions their missing options, whoever calls it."""
    net, opt = trained(cls)
    for group in opt.param_groups:
        del group["maximize"], group["capturable"]
    if load == "load_state_dict":
        fresh = cls(groups_of(net))
        fresh.load_state_dict(opt.state_dict())
    else:
        fresh = cls(groups_of(net))
        fresh.load_state_dict(opt.state_dict())
        fresh.__setstate__({"state": defaultdict(dict), "param_groups": opt.param_groups})
        assert not fresh.state, "what was loaded before is not brought back"
    assert fresh.param_groups[0]["maximize"] is False
    assert_trains(net, fresh)


@pytest.mark.parametrize(("source", "target"), [(0, 0), (0, 1), (1, 0), (1, 1)], ids=lambda i: ("Adam", "AdamW")[i])
def test_decoupled_decay_travels_in_the_group_and_adamw_insists_on_it(source: int, target: int) -> None:
    """Adam that loads AdamW's dict decays decoupled from then on; AdamW does so whatever it loads."""
    results = []
    for side in (0, 1):
        net, opt = trained(PAIRS[source][side], weight_decay=0.1)
        fresh = PAIRS[target][side](groups_of(net))
        fresh.load_state_dict(opt.state_dict())
        assert fresh.param_groups[1]["decoupled_weight_decay"] is (source == 1 or target == 1)
        train(net, fresh, range(10, 13))
        results.append([parameter.detach() for parameter in net.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("key", ["fused", "capturable", None])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_saved_group_decides_what_becomes_of_step(ours: type, theirs: type, key: str | None) -> None:
    """`step` is kept as it is, but becomes float32 where the saved group, not ours, is fused or capturable."""
    found = []
    for cls in (ours, theirs):
        net, opt = trained(cls)
        saved = copy.deepcopy(opt.state_dict())
        for state in saved["state"].values():
            state["step"] = state["step"].double()
        if key is not None:
            saved["param_groups"][0][key] = True
        fresh = cls(groups_of(net), fused=key is None)
        fresh.load_state_dict(saved)
        steps = [fresh.state[parameter]["step"] for parameter in (net.first.weight, net.second.weight)]
        found.append([(step.dtype, float(step), step.device) for step in steps])
    assert found[0] == found[1]
    assert found[0][0][0] == (torch.float64 if key is None else torch.float32)
    assert found[0][1][0] == torch.float64


@pytest.mark.parametrize("cls", OURS)
def test_entries_of_a_client_round_trip_and_are_copies(cls: type) -> None:
    """Entries that are no moments round-trip: numbers, texts, other tensors, tensors in lists, tuples and dicts."""
    net, opt = trained(cls)
    extra = {
        "count": 3,
        "tag": "mine",
        "mask": torch.tensor([True, False]),
        "history": [torch.ones(2), (torch.zeros(3), "text")],
        "nested": {"mean": torch.full((2,), 0.5)},
    }
    opt.state[net.first.weight].update(extra)
    opt.state["global"] = {"seen": 5, "mean": torch.ones(2)}
    for saved in (opt.state_dict(), through_a_file(opt.state_dict())):
        other = copy.deepcopy(net)
        fresh = cls(groups_of(other))
        fresh.load_state_dict(saved)
        loaded = fresh.state[other.first.weight]
        assert (loaded["count"], loaded["tag"], loaded["history"][1][1]) == (3, "mine", "text")
        assert fresh.state["global"]["seen"] == 5
        pairs = [
            (loaded["mask"], extra["mask"]),
            (loaded["history"][0], extra["history"][0]),
            (loaded["history"][1][0], extra["history"][1][0]),
            (loaded["nested"]["mean"], extra["nested"]["mean"]),
            (fresh.state["global"]["mean"], opt.state["global"]["mean"]),
        ]
        for mine, source in pairs:
            assert torch.equal(mine, source)
            assert mine.dtype == source.dtype
            assert mine.data_ptr() != source.data_ptr()
        assert_trains(other, fresh)


@pytest.mark.parametrize("cls", OURS)
def test_param_names_stay_what_the_optimizer_was_given(cls: type) -> None:
    """`param_names` are there only where names were given, and a load leaves those of the optimizer as they are."""
    net, opt = trained(cls)
    bare = cls(groups_of(net, named=False))
    assert "param_names" not in bare.param_groups[0]
    other = cls([{"params": list(reversed(group["params"]))} for group in groups_of(net)])
    given = [list(group["param_names"]) for group in other.param_groups]
    assert other.load_state_dict(opt.state_dict()).matched_by == "name"
    assert [group["param_names"] for group in other.param_groups] == given
    partly = copy.deepcopy(opt.state_dict())
    del partly["paramstate"], partly["param_groups"][0]["param_names"]
    partly["param_groups"][1]["param_names"].reverse()
    assert opt.load_state_dict(partly).matched_by == "position"
    assert [name for group in opt.param_groups for name in group["param_names"]] == list(dict(net.named_parameters()))


# ---- what does not fit ----------------------------------------------------------------------------------------------


def without(key: str) -> Callable[[StateDict], None]:
    return lambda saved: saved.pop(key)


def one_group_less(saved: StateDict) -> None:
    del saved["param_groups"][1]


def one_parameter_less(saved: StateDict) -> None:
    """Out of the group, its names and the state."""
    del saved["param_groups"][1]["params"][-1], saved["param_groups"][1]["param_names"][-1], saved["state"][5]
    saved.pop("paramstate", None)


def group_without_params(saved: StateDict) -> None:
    del saved["param_groups"][0]["params"]


MALFORMED = {
    "no groups": without("param_groups"),
    "no state": without("state"),
    "one group less": one_group_less,
    "one parameter less": one_parameter_less,
    "a group without params": group_without_params,
}


@pytest.mark.parametrize("names", ["both", "neither"])
@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_what_does_not_fit_is_refused_with_torchs_text_and_changes_nothing(
    ours: type, theirs: type, case: str, names: str
) -> None:
    """A dict that does not fit raises torch's ValueError or KeyError, our text begins with torch's; nothing changes."""
    errors = []
    for cls in (ours, theirs):
        saved = copy.deepcopy(trained(cls)[1].state_dict())
        MALFORMED[case](saved)
        fresh_net = Net()
        fresh = cls(groups_of(fresh_net, named=names == "both"))
        train(fresh_net, fresh, range(2))
        before, options, groups = state_by_name(fresh_net, fresh), copy.deepcopy(options_of(fresh)), fresh.param_groups
        with pytest.raises((ValueError, KeyError)) as caught:
            fresh.load_state_dict(saved)
        errors.append(caught.value)
        assert_same_bits(state_by_name(fresh_net, fresh), before)
        assert options_of(fresh) == options
        assert fresh.param_groups is groups
        assert_trains(fresh_net, fresh)
    mine, stock = errors
    assert isinstance(mine, type(stock))
    assert str(mine).startswith(str(stock))


def four_findings() -> tuple[StateDict, Net, nn.Module]:
    """A file, and a model of which one layer is new, one is gone, one has another shape and one another dtype."""
    net = Net(("same", "gone", "reshaped", "retyped"))
    net.retyped.bfloat16()
    opt = paramstate.AdamW(net)
    train(net, opt, range(2))
    other = Net(("same", "reshaped", "retyped", "new"))
    other.reshaped.weight = nn.Parameter(torch.randn(5, 3))
    return opt.state_dict(), net, other


def test_missing_unexpected_reshaped_and_retyped_are_four_findings() -> None:
    """A report lists loaded, missing, unexpected, reshaped and retyped parameters, each in a list of its own."""
    saved, _, other = four_findings()
    opt = paramstate.AdamW(other)
    report = opt.load_state_dict(saved, strict=False)
    assert report == paramstate.LoadReport(
        matched_by="name",
        loaded=["same.weight", "same.bias", "reshaped.bias", "retyped.weight", "retyped.bias"],
        missing=["new.weight", "new.bias"],
        unexpected=["gone.weight", "gone.bias"],
        reshaped=["reshaped.weight"],
        retyped=["retyped.weight", "retyped.bias"],
        by_group=[],
        kept_options=[],
    )
    stepped = {name for name in opt.ids if opt.state_of(name)}
    assert stepped == set(report.loaded)
    train(other, opt, [5])
    assert float(opt.state_of("new.weight")["step"]) == float(opt.state_of("reshaped.weight")["step"]) == 1
    assert float(opt.state_of("same.weight")["step"]) == 3


@pytest.mark.parametrize(
    ("layers", "change", "text"),
    [
        (("same", "new"), None, r"missing in the state dict: 'new.weight', 'new.bias'; unexpected in it: none"),
        ((), None, r"missing in the state dict: none; unexpected in it: 'same.weight', 'same.bias'"),
        (("same",), "shape", r"parameter 'same.weight': the saved 'exp_avg' has shape \[2, 3\], .* has \[4, 3\]"),
        (("same",), "dtype", r"parameter 'same.weight': the saved 'exp_avg' has dtype torch.int64"),
    ],
    ids=["missing", "unexpected", "reshaped", "retyped"],
)
def test_missing_unexpected_reshaped_and_retyped_are_four_errors(
    layers: tuple[str, ...], change: str | None, text: str
) -> None:
    """Each of the four is an error that names the parameter, is a ValueError, and leaves everything as it was."""
    net = Net(("kept", "same"))
    source = paramstate.Adam(net)
    train(net, source, range(2))
    saved = copy.deepcopy(source.state_dict())
    other = Net(("kept", *layers))
    if change == "shape":
        other.same.weight = nn.Parameter(torch.randn(4, 3))
    opt = paramstate.Adam(other)
    if change == "dtype":
        position = saved["paramstate"]["names"].index(["same.weight"])
        saved["state"][position]["exp_avg"] = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(paramstate.LoadError, match=text):
        opt.load_state_dict(saved)
    assert not opt.state


@pytest.mark.parametrize("side", ["file", "optimizer"])
def test_strict_names_refuses_what_only_positions_could_decide(side: str) -> None:
    """`strict_names=True` refuses to load where one side has no names, and says which."""
    net = Net()
    source = torch.optim.Adam(net.parameters() if side == "file" else net.named_parameters())
    train(net, source, range(2))
    opt = paramstate.Adam(net if side == "file" else net.parameters())
    called = "the state dict" if side == "file" else "the optimizer"
    with pytest.raises(paramstate.LoadError, match=f"strict_names: {called} has no parameter names"):
        opt.load_state_dict(source.state_dict(), strict_names=True)
    assert not opt.state
    report = opt.load_state_dict(source.state_dict())
    assert report.matched_by == "position"
    assert len(report.loaded) == 6


@pytest.mark.parametrize("cls", OURS)
def test_a_map_of_names_loads_renamed_parameters(cls: type) -> None:
    """`names=` maps a saved name to ours, for a file of torch's class too; names may be exchanged in it."""
    for source in (cls, torch.optim.Adam):
        net = Net(("first", "second"))
        saver = source(net.named_parameters())
        train(net, saver, range(2))
        opt = cls(Net(("first", "other")))
        names = {
            "first.weight": "other.weight",
            "second.weight": "first.weight",
            "first.bias": "other.bias",
            "second.bias": "first.bias",
        }
        report = opt.load_state_dict(saver.state_dict(), names=names, strict_names=True)
        assert sorted(report.loaded) == sorted(opt.ids)
        assert torch.equal(opt.state_of("other.weight")["exp_avg"], saver.state[net.first.weight]["exp_avg"])
        assert torch.equal(opt.state_of("first.bias")["exp_avg"], saver.state[net.second.bias]["exp_avg"])


# ---- clients that rebuild what they carry ---------------------------------------------------------------------------


def rebuilt(value: Any) -> Any:
    """As Accelerate's `move_to_device` does: every container made anew by its type, every tensor moved."""
    if isinstance(value, (list, tuple)):
        return type(value)(rebuilt(item) for item in value)
    if isinstance(value, dict):
        return type(value)({key: rebuilt(item) for key, item in value.items()})
    return value.to("cpu") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_round_trip_through_rebuilt_containers_changes_nothing(ours: type, theirs: type, steps: int) -> None:
    """An optimizer that loads its own dict, all containers rebuilt, goes on as if it had not: Accelerate's prepare."""
    results = []
    for cls in (ours, theirs):
        torch.manual_seed(0)
        net = Net()
        opt = cls(groups_of(net), lr=0.05)
        train(net, opt, range(steps))
        ids = dict(opt.ids) if cls is ours else None
        opt.load_state_dict(rebuilt(opt.state_dict()))
        assert bool(opt.state) == bool(steps)
        opt.state, opt.param_groups, opt.defaults = opt.state, opt.param_groups, dict(opt.defaults)
        assert ids is None or opt.ids == ids
        train(net, opt, range(10, 13))
        results.append([parameter.detach() for parameter in net.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_a_flat_dict_by_names_round_trips() -> None:
    """State flattened to one key for each name and entry, and put together again, loads by name: torchtitan's way."""
    _net, opt = trained(paramstate.AdamW)
    saved = opt.state_dict()
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    flat = {f"state.{names[i]}.{key}": value for i, state in saved["state"].items() for key, value in state.items()}
    other = Net(("third", "second", "first"))
    fresh = paramstate.AdamW(groups_of(other))
    wanted = [list(group["param_names"]) for group in fresh.param_groups]
    order = [name for group in wanted for name in group]
    keys = ("step", "exp_avg", "exp_avg_sq")
    again = {
        "state": {i: {key: flat[f"state.{name}.{key}"] for key in keys} for i, name in enumerate(order)},
        "param_groups": [
            {**group, "params": [order.index(name) for name in mine], "param_names": mine}
            for group, mine in zip(saved["param_groups"], wanted, strict=True)
        ],
    }
    assert fresh.load_state_dict(again).matched_by == "name"
    for name in order:
        assert torch.equal(fresh.state_of(name)["exp_avg"], opt.state_of(name)["exp_avg"])
