"""Every configuration of torch's optim_db: state dicts, loading, copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim_db_cases import INFOS, Case, assert_states_near, each, taken
from reference import same_bits
from small_models import train

TAKEN = taken()
PLAIN = [case for case in TAKEN if not case["differentiable"]]
NAMES = ["0.weight", "0.bias", "1.weight", "1.bias"]

saved_named = pytest.mark.parametrize("saved_named", [False, True], ids=["saved without names", "saved with names"])
loaded_named = pytest.mark.parametrize("named", [False, True], ids=["loaded without names", "loaded with names"])


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 2, 1, stride=2), nn.BatchNorm2d(2))


def given(net: nn.Module, *, named: bool) -> list[Any]:
    return list(net.named_parameters() if named else net.parameters())


def trained(case: Case, *, named: bool = False, steps: int = 3) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    net = model()
    opt = case.ours(given(net, named=named), **case.options())
    train(net, opt, range(steps))
    return net, opt


def pairs(one: nn.Module, two: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return list(zip(one.parameters(), two.parameters(), strict=True))


def assert_goes_on_alike(
    one: tuple[nn.Module, torch.optim.Optimizer], two: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    """Bit for bit, from here on."""
    for seed in (7, 8):
        for net, opt in (one, two):
            train(net, opt, [seed])
        for mine, other in pairs(one[0], two[0]):
            assert same_bits(mine, other)
            assert plain(one[1].state[mine]) == plain(two[1].state[other])


def plain(entry: Any) -> Any:
    """The same structure with a tensor as its dtype and numbers, so that `==` compares all of it."""
    if isinstance(entry, Tensor):
        return entry.dtype, entry.device, entry.tolist()
    if isinstance(entry, dict):
        return {key: plain(value) for key, value in entry.items()}
    if isinstance(entry, list | tuple):
        return type(entry)(map(plain, entry))
    return entry


def without_names(state_dict: dict[str, Any]) -> Any:
    groups = [
        {key: value for key, value in group.items() if key != "param_names"} for group in state_dict["param_groups"]
    ]
    return plain({"state": state_dict["state"], "param_groups": groups})


# ---- state dicts ----------------------------------------------------------------------------------------------------


@saved_named
@each(PLAIN)
def test_a_state_dict_is_torchs_with_one_more_key(case: Case, saved_named: bool) -> None:
    """Keys, order, options, positions, dtypes and shapes are torch's; only the key "paramstate" is more."""
    net, opt = trained(case, named=saved_named)
    twin = model()
    stock = case.theirs(given(twin, named=saved_named), **case.options())
    train(twin, stock, range(3))
    mine, other = opt.state_dict(), stock.state_dict()
    assert [*mine] == [*other, "paramstate"]
    assert plain(mine["param_groups"]) == plain(other["param_groups"])
    assert [[*entry] for entry in mine["state"].values()] == [[*entry] for entry in other["state"].values()]
    assert list(mine["state"]) == list(other["state"])
    assert_states_near(opt, stock, pairs(net, twin))


@saved_named
@each(PLAIN)
def test_a_state_dict_survives_saving_and_loading_with_weights_only(case: Case, saved_named: bool) -> None:
    """Through `torch.save` and `torch.load`, with `weights_only` and without, a state dict comes back the same."""
    _, opt = trained(case, named=saved_named)
    state_dict = opt.state_dict()
    file = io.BytesIO()
    torch.save(state_dict, file)
    for weights_only in (True, False):
        file.seek(0)
        assert plain(torch.load(file, weights_only=weights_only)) == plain(state_dict)


@loaded_named
@saved_named
@each(PLAIN)
def test_a_loaded_optimizer_goes_on_as_the_saved_one(case: Case, saved_named: bool, named: bool) -> None:
    """Loaded into an optimizer with names or without, training goes on bit for bit, and the state dicts agree."""
    net, opt = trained(case, named=saved_named)
    twin = copy.deepcopy(net)
    loaded = case.ours(given(twin, named=named), **case.options())
    saved = copy.deepcopy(opt.state_dict())
    before = plain(saved)
    loaded.load_state_dict(saved)
    assert_goes_on_alike((net, opt), (twin, loaded))
    assert plain(saved) == before, "what was loaded is not written"
    assert without_names(opt.state_dict()) == without_names(loaded.state_dict())
    loaded.param_groups.extend(loaded.param_groups)
    assert without_names(opt.state_dict())["param_groups"][-1] == without_names(loaded.state_dict())["param_groups"][-1]


@loaded_named
@saved_named
@each(PLAIN)
def test_names_are_kept_where_either_side_has_them(case: Case, saved_named: bool, named: bool) -> None:
    """`param_names` is in the groups after loading where the saved or the loading side has names, as in torch."""
    net, opt = trained(case, named=saved_named)
    loaded = case.ours(given(net, named=named), **case.options())
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(net, loaded, [5])
    expected = NAMES if named or saved_named else None
    assert loaded.state_dict()["param_groups"][0].get("param_names") == expected


@each(PLAIN)
def test_state_moves_between_torchs_class_and_ours(case: Case) -> None:
    """A checkpoint of torch's class is loaded by ours and one of ours by torch's, and both go on alike."""
    net, opt = trained(case)
    twin = copy.deepcopy(net)
    stock = case.theirs(twin.parameters(), **case.options())
    stock.load_state_dict(copy.deepcopy(opt.state_dict()))
    for seed in (5, 6):
        train(net, opt, [seed])
        train(twin, stock, [seed])
        assert_states_near(opt, stock, pairs(net, twin))
    back = case.ours(net.parameters(), **case.options())
    back.load_state_dict(copy.deepcopy(stock.state_dict()))
    for one, two in pairs(net, twin):
        assert plain(back.state[one]) == plain(stock.state[two])


@each(PLAIN)
def test_state_under_a_key_of_the_users_own_is_saved_and_loaded(case: Case) -> None:
    """What is in `state` under a key that is no parameter comes back through a state dict, beside the moments."""
    net, opt = trained(case)
    opt.state["rounds"] = {"seen": 3}
    loaded = case.ours(net.parameters(), **case.options())
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert loaded.state["rounds"] == {"seen": 3}
    assert len(loaded.state) == len(opt.state) == len(NAMES) + 1


# ---- old checkpoints ------------------------------------------------------------------------------------------------


@each(PLAIN)
def test_a_checkpoint_from_before_the_newer_flags_gets_their_defaults(case: Case) -> None:
    """Groups without the flags that torch added later load, get torch's defaults for them, and step as torch does."""
    pair = []
    for cls in (case.theirs, case.ours):
        net = model()
        opt = cls(net.parameters(), **case.options())
        train(net, opt, range(3))
        old = copy.deepcopy(opt.state_dict())
        for group in old["param_groups"]:
            for flag in INFOS[case.name].not_og_supported_flags:
                del group[flag]
        opt.load_state_dict(old)
        train(net, opt, [3])
        pair.append((net, opt))
    (twin, stock), (net, opt) = pair
    assert plain(opt.state_dict()["param_groups"]) == plain(stock.state_dict()["param_groups"])
    assert_states_near(opt, stock, pairs(net, twin))


@each(PLAIN)
def test_a_step_that_was_saved_as_a_number_becomes_a_tensor(case: Case) -> None:
    """Checkpoints whose `step` is a Python number load, and go on as those with a tensor."""
    net, opt = trained(case)
    old = copy.deepcopy(opt.state_dict())
    for entry in old["state"].values():
        entry["step"] = entry["step"].item()
    twin = copy.deepcopy(net)
    loaded = case.ours(twin.parameters(), **case.options())
    loaded.load_state_dict(old)
    assert_goes_on_alike((net, opt), (twin, loaded))


# ---- hooks of state dicts and of loading ----------------------------------------------------------------------------


def leave_a_mark(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state["mark"] = 1


def take_the_mark(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "marked": state_dict["state"].pop("mark", 0)}


@pytest.mark.parametrize("hooks", [("pre",), ("post",), ("pre", "post")], ids=" and ".join)
@each(TAKEN)
def test_hooks_of_a_state_dict_see_and_change_it(case: Case, hooks: tuple[str, ...]) -> None:
    """A hook before may write the state that is saved, one after may return another dict."""
    opt = case.ours([torch.ones(2)], **case.options())
    if "pre" in hooks:
        opt.register_state_dict_pre_hook(leave_a_mark)
    if "post" in hooks:
        opt.register_state_dict_post_hook(take_the_mark)
    state_dict = opt.state_dict()
    assert state_dict["state"].get("mark") == (1 if hooks == ("pre",) else None)
    assert state_dict.get("marked") == (None if hooks == ("pre",) else len(hooks) - 1)


def set_rate(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["lr"] = 0.002


def return_another_rate(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    mine = copy.deepcopy(state_dict)
    mine["param_groups"][0]["lr"] = 0.003
    return mine


@each(TAKEN)
def test_hooks_before_loading_run_in_their_order(case: Case) -> None:
    """A hook before loading may write the dict or return another; a prepended one runs first, so the other wins."""
    opt = case.ours([torch.ones(2)], **case.options())
    saved = copy.deepcopy(opt.state_dict())
    handles = [opt.register_load_state_dict_pre_hook(set_rate)]
    opt.load_state_dict(copy.deepcopy(saved))
    assert opt.param_groups[0]["lr"] == 0.002
    handles.append(opt.register_load_state_dict_pre_hook(return_another_rate, prepend=True))
    opt.load_state_dict(copy.deepcopy(saved))
    assert opt.param_groups[0]["lr"] == 0.002
    handles.pop(0).remove()
    opt.load_state_dict(copy.deepcopy(saved))
    assert opt.param_groups[0]["lr"] == 0.003


@pytest.mark.parametrize("with_pre_hook", [False, True], ids=["post", "pre and post"])
@each(PLAIN)
def test_a_hook_after_loading_sees_all_that_was_loaded(case: Case, with_pre_hook: bool) -> None:
    """A hook after loading sees the loaded options and tensors, and may write `state` under a key of its own."""
    param = nn.Parameter(torch.ones(2))
    opt = case.ours([param], **case.options())
    param.grad = torch.ones(2)
    opt.step()
    saved, before = copy.deepcopy(opt.state_dict()), plain(opt.state[param])
    seen: list[tuple[Any, Any]] = []

    def look(optimizer: torch.optim.Optimizer) -> None:
        seen.append((optimizer.param_groups[0]["lr"], plain(optimizer.state[param])))
        optimizer.state["looked"] = True

    if with_pre_hook:
        opt.register_load_state_dict_pre_hook(return_another_rate)
    opt.register_load_state_dict_post_hook(look)
    opt.state.clear()
    opt.load_state_dict(saved)
    rate = 0.003 if with_pre_hook else saved["param_groups"][0]["lr"]
    assert seen == [(rate, before)]
    assert opt.state["looked"]


# ---- copies ---------------------------------------------------------------------------------------------------------


@each(PLAIN)
def test_a_deep_copy_has_every_public_attribute(case: Case) -> None:
    """After some steps a deep copy has the same public attributes, which are torch's own."""
    _, opt = trained(case)
    attributes = [{key for key in vars(one) if not key.startswith("_")} for one in (opt, copy.deepcopy(opt))]
    assert attributes[0] == attributes[1] == {"defaults", "state", "param_groups"}


def pickled(pair: tuple[nn.Module, torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@each(PLAIN)
def test_a_copied_pair_goes_on_as_the_first(case: Case, duplicate: Any) -> None:
    """Model and optimizer copied together train on bit for bit as the ones they were copied from."""
    pair = trained(case)
    assert_goes_on_alike(pair, duplicate(pair))
