"""Parameter groups: plain containers that everyone edits while training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import paramstate
from small_models import Net, assert_trains, set_gradients, train

PAIRS = [(paramstate.Adam, torch.optim.Adam), (paramstate.AdamW, torch.optim.AdamW)]
OURS = [ours for ours, _ in PAIRS]
CLASSES = [cls for pair in PAIRS for cls in pair]

Optimizer = torch.optim.Optimizer
Edit = Callable[[Optimizer, Net], None]


def trained_with_an_edit(cls: type, edit: Edit, steps: int = 3) -> tuple[Net, Any]:
    """Two steps, a client's edit, and some more; two groups, the second with a layer less than the model has."""
    torch.manual_seed(3)
    net = Net()
    opt = cls([{"params": net.first.parameters()}, {"params": net.second.parameters(), "lr": 0.02}], lr=0.05)
    train(net, opt, range(2))
    edit(opt, net)
    train(net, opt, range(10, 10 + steps))
    return net, opt


def assert_same_training(ours: type, theirs: type, edit: Edit) -> None:
    """After the same edit, both classes have the same values, steps and moments."""
    (net, opt), (twin, stock) = (trained_with_an_edit(cls, edit) for cls in (ours, theirs))
    for (name, mine), their in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
        mine_state, their_state = opt.state.get(mine, {}), stock.state.get(their, {})
        assert mine_state.keys() == their_state.keys(), name
        for key, tensor in their_state.items():
            torch.testing.assert_close(mine_state[key], tensor, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("cls", OURS)
def test_groups_are_plain_lists_and_dicts_of_torchs_keys(cls: type) -> None:
    """`param_groups` is a plain list of plain dicts, those that were given, with torch's keys and no others."""
    net = Net()
    given = {"params": net.first.parameters(), "tag": "mine"}
    opt, stock = cls([given]), torch.optim.Adam([{"params": net.first.parameters(), "tag": "mine"}])
    assert type(opt.param_groups) is list
    assert type(opt.param_groups[0]) is dict
    assert opt.param_groups[0] is given
    assert type(given["params"]) is list
    assert opt.param_groups[0].keys() == stock.param_groups[0].keys()
    train(net, opt, range(2))
    assert opt.param_groups[0].keys() == stock.param_groups[0].keys(), "nor does a step add any"


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_text_of_an_optimizer_is_torchs(ours: type, theirs: type) -> None:
    """`repr` prints class and groups as torch's does."""
    net = Net()
    assert repr(ours(net.named_parameters())) == repr(theirs(net.named_parameters()))


OPTIONS: list[tuple[str, Any]] = [
    ("lr", 0),
    ("lr", 1),
    ("lr", np.float64(0.02)),
    ("lr", torch.tensor(0.02)),
    ("lr", torch.tensor(0.02, dtype=torch.float64)),
    ("betas", [0.5, 0.6]),
    ("betas", (0.0, 0.0)),
    ("eps", 1e-3),
    ("weight_decay", 0.5),
    ("maximize", True),
    ("foreach", True),
    ("fused", False),
    ("decoupled_weight_decay", True),
    ("decoupled_weight_decay", False),
]


@pytest.mark.parametrize(("key", "value"), OPTIONS, ids=[f"{key}-{value!r}" for key, value in OPTIONS])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_an_option_that_is_edited_counts_from_the_next_step(ours: type, theirs: type, key: str, value: Any) -> None:
    """Every option of a group, written at any time and in any type that torch takes, is what the next step uses."""

    def edit(opt: Optimizer, _: Net) -> None:
        opt.param_groups[0][key] = value

    assert_same_training(ours, theirs, edit)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_option_keeps_the_object_that_was_written(cls: type) -> None:
    """A step reads options and leaves them as they were written: the type and the object."""
    net = Net()
    opt = cls(net.parameters())
    written = {"lr": torch.tensor(0.5), "betas": [0.5, 0.6], "weight_decay": np.float32(0.5)}
    opt.param_groups[0].update(written)
    train(net, opt, range(2))
    for key, value in written.items():
        assert opt.param_groups[0][key] is value
    assert float(written["lr"]) == 0.5


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_parameter_appended_to_a_group_is_trained(ours: type, theirs: type) -> None:
    """A parameter that a client appends to a group's list is trained from the next step on."""

    def edit(opt: Optimizer, net: Net) -> None:
        opt.param_groups[0]["params"].extend(net.third.parameters())

    assert_same_training(ours, theirs, edit)
    net, opt = trained_with_an_edit(ours, edit)
    assert len({opt.id_of(parameter) for parameter in net.parameters()}) == 6
    assert len(opt.state_dict()["state"]) == 6


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_group_whose_list_is_another_trains_what_it_holds(ours: type, theirs: type) -> None:
    """`group["params"] = [...]` is trained from the next step on, and what left is not."""

    def edit(opt: Optimizer, net: Net) -> None:
        opt.param_groups[0]["params"] = list(net.third.parameters())

    assert_same_training(ours, theirs, edit)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_removed_group_is_no_longer_stepped(ours: type, theirs: type) -> None:
    """A group that a client deletes from the list is not stepped any more, and comes back with its state."""

    def edit(opt: Optimizer, net: Net) -> None:
        group = opt.param_groups.pop(0)
        before = copy.deepcopy(net.first)
        train(net, opt, [5])
        assert all(map(torch.equal, before.parameters(), net.first.parameters()))
        opt.param_groups.append(group)

    assert_same_training(ours, theirs, edit)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_groups_may_be_assigned_as_a_whole(ours: type, theirs: type) -> None:
    """`optimizer.param_groups = [...]` is taken: other dicts, in another order, as Accelerate and ZeRO assign them."""

    def edit(opt: Optimizer, _: Net) -> None:
        opt.param_groups = [dict(group, params=list(group["params"])) for group in reversed(opt.param_groups)]

    assert_same_training(ours, theirs, edit)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_groups_of_any_container_and_shared_between_optimizers_are_read(ours: type, theirs: type) -> None:
    """A tuple of groups, a tuple or a view of parameters, and a group of another optimizer are all read."""

    def edit(opt: Optimizer, net: Net) -> None:
        other = type(opt)(net.third.parameters(), lr=0.3)
        opt.param_groups = (*opt.param_groups, *other.param_groups)
        opt.param_groups[0]["params"] = tuple(opt.param_groups[0]["params"])
        opt.param_groups[1]["params"] = dict.fromkeys(opt.param_groups[1]["params"]).keys()

    assert_same_training(ours, theirs, edit)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_groups_listed_twice_still_serialise_as_in_torch(ours: type, theirs: type) -> None:
    """After `param_groups.extend(param_groups)` a state dict has torch's layout, and loads into such an optimizer."""
    dicts = []
    for cls in (ours, theirs):
        net, opt = trained_with_an_edit(cls, lambda *_: None)
        opt.param_groups.extend(opt.param_groups)
        dicts.append(opt.state_dict())
        twin = copy.deepcopy(net)
        fresh = cls([{"params": twin.first.parameters()}, {"params": twin.second.parameters()}])
        fresh.param_groups.extend(fresh.param_groups)
        fresh.load_state_dict(opt.state_dict())
        assert float(fresh.state[twin.first.weight]["step"]) == 5
        assert torch.equal(fresh.state[twin.second.bias]["exp_avg"], opt.state[net.second.bias]["exp_avg"])
    assert dicts[0]["param_groups"] == dicts[1]["param_groups"]
    assert dicts[0]["state"].keys() == dicts[1]["state"].keys()
    assert [group["params"] for group in dicts[0]["param_groups"]] == [[0, 1], [2, 3]] * 2


@pytest.mark.parametrize("cls", CLASSES)
def test_keys_of_a_client_survive_steps_saving_and_loading(cls: type) -> None:
    """Keys that libraries add to a group (`initial_lr`, `name`, `lr_scale`) survive steps, saving and loading."""
    extra = {"initial_lr": 0.5, "name": "head", "lr_scale": 0.1, "tag": ("a", 1)}
    net = Net()
    opt = cls([{"params": net.parameters(), **extra}])
    train(net, opt, range(2))
    fresh = cls(copy.deepcopy(net).parameters())
    fresh.load_state_dict(opt.state_dict())
    for group in (opt.param_groups[0], fresh.param_groups[0]):
        assert {key: group[key] for key in extra} == extra


@pytest.mark.parametrize("cls", OURS)
def test_amsgrad_switched_on_after_a_step_makes_its_buffer(cls: type) -> None:
    """`amsgrad` may be switched on after state exists, where torch raises `KeyError: 'max_exp_avg_sq'`."""
    net, opt = trained_with_an_edit(cls, lambda opt, _: opt.param_groups[0].update(amsgrad=True))
    assert opt.state[net.first.weight]["max_exp_avg_sq"].shape == net.first.weight.shape
    assert float(opt.state[net.first.weight]["step"]) == 5
    assert "max_exp_avg_sq" not in opt.state[net.second.weight]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_amsgrad_switched_off_keeps_its_buffer_as_torch_does(ours: type, theirs: type) -> None:
    """Switched off, `amsgrad` leaves the maximum where it is; switched on again, it goes on from there."""

    def edit(opt: Optimizer, net: Net) -> None:
        opt.add_param_group({"params": net.third.parameters(), "amsgrad": True})
        for seed, amsgrad in ((5, True), (6, False), (7, True)):
            opt.param_groups[2]["amsgrad"] = amsgrad
            train(net, opt, [seed])

    assert_same_training(ours, theirs, edit)


# ---- add_param_group ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("form", [list, tuple, iter, lambda params: next(iter(params))])
def test_an_added_group_takes_the_defaults_and_is_trained(
    ours: type, theirs: type, form: Callable[[Iterable[nn.Parameter]], Any]
) -> None:
    """A group may be added with any iterable or one tensor; options it does not give are the constructor's."""

    def edit(opt: Optimizer, net: Net) -> None:
        opt.add_param_group({"params": form(list(net.third.parameters())), "weight_decay": 0.3})
        assert opt.param_groups[-1]["lr"] == 0.05

    assert_same_training(ours, theirs, edit)


def refusals(net: Net) -> dict[str, Any]:
    """What `add_param_group` refuses, for an optimizer of the first layer."""
    leaf = torch.ones(2, requires_grad=True)
    return {
        "no dict": [torch.ones(2)],
        "a set": {"params": set(net.second.parameters())},
        "no tensor": {"params": [3.0]},
        "no leaf": {"params": [leaf * 2]},
        "mixed names": {"params": [("a", net.second.weight), net.second.bias]},
        "names where there are none": {"params": list(net.second.named_parameters())},
        "in two groups": {"params": [net.first.weight]},
        "lacking params": {"lr": 0.1},
    }


@pytest.mark.parametrize("case", refusals(Net()))
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_what_add_param_group_refuses_is_refused_with_torchs_error(ours: type, theirs: type, case: str) -> None:
    """What torch's `add_param_group` refuses is refused with the same class and text, and nothing is added."""
    errors = []
    for cls in (ours, theirs):
        net = Net()
        opt = cls(net.first.parameters())
        with pytest.raises((TypeError, ValueError, KeyError)) as caught:
            opt.add_param_group(refusals(net)[case])
        errors.append((caught.type, str(caught.value)))
        assert len(opt.param_groups) == 1
        train(net, opt, [0])
    assert errors[0] == errors[1]


@pytest.mark.parametrize("cls", CLASSES)
def test_names_and_bare_parameters_do_not_mix(cls: type) -> None:
    """An optimizer of named parameters refuses a bare group where it cannot find names in a model that it knows."""
    net = Net()
    opt = cls(net.first.named_parameters())
    with pytest.raises(ValueError, match="all optimizer param groups should be with/without names"):
        opt.add_param_group({"params": net.second.parameters()})
    opt.add_param_group({"params": list(net.third.named_parameters("third"))})
    assert opt.param_groups[1]["param_names"] == ["third.weight", "third.bias"]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_duplicate_inside_a_group_warns(cls: type) -> None:
    """A parameter listed twice in one group warns with torch's text, and is stepped twice."""
    parameter = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="optimizer contains a parameter group with duplicate parameters"):
        opt = cls([parameter, parameter])
    parameter.grad = torch.ones(2)
    opt.step()
    assert float(opt.state[parameter]["step"]) == 2


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_set_of_parameters_warns_as_in_torch(ours: type, theirs: type) -> None:
    """A set given in the place of the parameters gives the warnings that this release of torch gives."""
    texts = []
    for cls in (ours, theirs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cls(set(Net().parameters()))
        texts.append([(warning.category, str(warning.message)) for warning in caught])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("cls", CLASSES)
def test_leaf_tensors_that_are_no_parameters_are_legal(cls: type) -> None:
    """Leaf tensors are stepped like parameters, also such that require no gradient but were given one."""
    leaf, idle = torch.ones(3, requires_grad=True), torch.ones(3)
    opt = cls([leaf, idle], lr=0.1, weight_decay=0)
    leaf.grad, idle.grad = torch.ones(3), torch.ones(3)
    opt.step()
    torch.testing.assert_close(leaf.detach(), torch.full((3,), 0.9))
    torch.testing.assert_close(idle, torch.full((3,), 0.9))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_result_that_retains_its_gradient_is_legal(cls: type) -> None:
    """A tensor that is no leaf is accepted where it retains its gradient."""
    result = torch.ones(3, requires_grad=True) * 2
    result.retain_grad()
    opt = cls([result], lr=0.1, weight_decay=0)
    result.sum().backward()
    opt.step()
    torch.testing.assert_close(result.detach(), torch.full((3,), 1.9))


# ---- clients that edit groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_group_dicts_are_carried_over_to_another_optimizer(ours: type, theirs: type) -> None:
    """Groups of one optimizer construct another one, of torch's class or of ours, names and all: DeepSpeed's way."""
    for source, target in ((ours, theirs), (theirs, ours)):
        net = Net()
        old = source(net.named_parameters(), lr=0.25, weight_decay=0.5)
        new = target(old.param_groups)
        assert new.param_groups[0]["lr"] == 0.25
        assert new.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]
        assert_trains(net, new)


@pytest.mark.parametrize("cls", OURS)
def test_param_names_may_be_given_in_the_group_beside_bare_tensors(cls: type) -> None:
    """`param_names` given in a group dict with bare tensors are the parameters' names: torchtitan's way."""
    net = Net()
    names, params = zip(*net.named_parameters(), strict=True)
    opt = cls([{"params": list(params), "param_names": list(names), "fused": True, "foreach": False, "lr": 0.1}])
    assert list(opt.ids) == list(names)
    assert opt.param_groups[0]["param_names"] == list(names)
    train(net, opt, range(2))
    fresh = cls(reversed(list(net.named_parameters())))
    assert fresh.load_state_dict(opt.state_dict()).matched_by == "name"
    assert torch.equal(fresh.state_of("second.bias")["exp_avg"], opt.state_of("second.bias")["exp_avg"])


class Container(torch.optim.Optimizer):
    """As torchtitan keeps several optimizers: itself one, over all their parameters, with no defaults."""

    def __init__(self, cls: type, parts: Iterable[nn.Module]) -> None:
        self.optimizers = [cls(part.parameters(), lr=0.05) for part in parts]
        every = [param for opt in self.optimizers for group in opt.param_groups for param in group["params"]]
        torch.optim.Optimizer.__init__(self, every, {})

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_container_that_is_an_optimizer_itself_drives_several(ours: type, theirs: type) -> None:
    """A container over several optimizers, itself one with the same parameters, trains as over torch's."""
    nets = []
    for cls in (ours, theirs):
        torch.manual_seed(0)
        net = Net()
        container = Container(cls, net.children())
        fired: list[Any] = []
        container.register_step_post_hook(lambda *_, fired=fired: fired.append(1))
        train(net, container, range(3))
        assert fired == [1] * 3
        assert not container.state
        nets.append(net)
    for mine, their in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("built_from", ["model", "named", "bare"])
@pytest.mark.parametrize("cls", OURS)
def test_placeholders_that_stand_in_for_parameters_for_a_while_are_never_read(cls: type, built_from: str) -> None:
    """Placeholders with a number as `data_ptr` may stand in the groups until the new parameters come: Accelerate."""
    torch.manual_seed(0)
    net = Net()
    opt = cls({"model": net, "named": net.named_parameters(), "bare": net.parameters()}[built_from], lr=0.1)
    ids = [opt.id_of(parameter) for parameter in net.parameters()]
    old = {name: parameter.data_ptr() for name, parameter in net.named_parameters()}
    for group in opt.param_groups:
        for index, parameter in enumerate(group["params"]):
            address = parameter.data_ptr()
            group["params"][index] = torch.empty(1)
            group["params"][index].data_ptr = address
    for name, parameter in list(net.named_parameters()):  # as FSDP2 registers its sharded parameters
        layer, _, attribute = name.rpartition(".")
        setattr(net.get_submodule(layer), attribute, nn.Parameter(parameter.detach().clone()))
    sharded = {old[name]: parameter for name, parameter in net.named_parameters()}
    for group in opt.param_groups:
        group["params"] = [sharded[placeholder.data_ptr] for placeholder in group["params"]]
    assert_trains(net, opt)
    if built_from != "bare":
        assert [opt.id_of(parameter) for parameter in net.parameters()] == ids
    assert len(opt.state_dict()["state"]) == 6


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_wrapper_that_shares_groups_and_defaults_works_on_them(ours: type, theirs: type) -> None:
    """A wrapper with the same `param_groups`, `defaults` and `state`, which adds keys to all of them: Lookahead."""

    def edit(opt: Optimizer, net: Net) -> None:
        wrapper = Optimizer.__new__(Optimizer)
        wrapper.param_groups, wrapper.defaults, wrapper.state = opt.param_groups, opt.defaults, opt.state
        wrapper.defaults.update(lookahead_alpha=0.5)
        for group in wrapper.param_groups:
            group.setdefault("lookahead_alpha", 0.5)
        for seed in range(4):
            train(net, opt, [seed])
            for group in wrapper.param_groups:
                for fast in group["params"]:
                    slow = wrapper.state[fast].setdefault("slow", fast.detach().clone())
                    slow.add_(fast.detach() - slow, alpha=group["lookahead_alpha"])
                    fast.data.copy_(slow)
        saved = copy.deepcopy(opt.state_dict())
        opt.load_state_dict(saved)
        assert torch.equal(opt.state[net.first.weight]["slow"], saved["state"][0]["slow"])

    assert_same_training(ours, theirs, edit)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_one_optimizer_for_each_parameter_steps_inside_backward(ours: type, theirs: type) -> None:
    """Optimizers of one parameter each, stepped and cleared by hooks during backward, and saved by name: torchtune."""
    results = []
    for cls in (ours, theirs):
        torch.manual_seed(0)
        net = Net()
        opts = {name: cls([parameter], lr=0.05) for name, parameter in net.named_parameters()}

        def step(parameter: torch.Tensor, net: Net = net, opts: dict[str, Any] = opts) -> None:
            name = next(name for name, other in net.named_parameters() if other is parameter)
            opts[name].step()
            opts[name].zero_grad()

        for parameter in net.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for seed in range(3):
            set_gradients(net, seed)
        assert all(parameter.grad is None for parameter in net.parameters())
        saved = {name: opt.state_dict() for name, opt in opts.items()}
        for name, parameter in net.named_parameters():
            fresh = cls([parameter])
            fresh.load_state_dict(saved[name])
            assert float(fresh.state[parameter]["step"]) == 3
        results.append([parameter.detach() for parameter in net.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_zero_grad_clears_what_is_in_the_groups_now(cls: type, set_to_none: bool) -> None:
    """`zero_grad` clears the gradients of all parameters that are in the groups, by `None` or by zeros."""
    net = Net()
    opt = cls(net.first.parameters())
    opt.param_groups[0]["params"].extend(net.second.parameters())
    set_gradients(net, 0)
    opt.zero_grad(set_to_none=set_to_none)
    for parameter in (*net.first.parameters(), *net.second.parameters()):
        assert parameter.grad is None if set_to_none else not parameter.grad.any()
    assert net.third.weight.grad is not None
