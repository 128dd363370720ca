"""State: torch's own mapping, in which every client writes, and what is written is what the next step uses."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from small_models import Net, give_gradient, set_gradients, train

PAIRS = [(paramstate.Adam, torch.optim.Adam), (paramstate.AdamW, torch.optim.AdamW)]
OURS = [ours for ours, _ in PAIRS]
CLASSES = [cls for pair in PAIRS for cls in pair]
MOMENTS = ("exp_avg", "exp_avg_sq")

Optimizer = torch.optim.Optimizer
Write = Callable[[Optimizer, Net], None]

# ---- what clients write ---------------------------------------------------------------------------------------------


def other_tensors(opt: Optimizer, net: Net) -> None:
    for parameter in net.parameters():
        for key in MOMENTS:
            opt.state[parameter][key] = opt.state[parameter][key] * 3


def one_moment_of_another_dtype_and_back(opt: Optimizer, net: Net) -> None:
    state = opt.state[net.first.weight]
    state["exp_avg"] = state["exp_avg"].double()
    state["exp_avg"] = state["exp_avg"].float() * 2


def tensors_of_other_strides(opt: Optimizer, net: Net) -> None:
    for key in MOMENTS:
        opt.state[net.first.weight][key] = opt.state[net.first.weight][key].t().contiguous().t()


def slices_of_bigger_tensors(opt: Optimizer, net: Net) -> None:
    for key in MOMENTS:
        held = opt.state[net.first.weight][key]
        opt.state[net.first.weight][key] = torch.cat([held, torch.ones(5, 3)])[: len(held)]


def rows_are_zeroed_in_place(opt: Optimizer, net: Net) -> None:
    for key in MOMENTS:
        opt.state[net.first.weight][key][0].zero_()


def the_data_of_a_moment(opt: Optimizer, net: Net) -> None:
    for key in MOMENTS:
        opt.state[net.second.bias][key].data = torch.full((2,), 0.25)


def the_step(opt: Optimizer, net: Net) -> None:
    opt.state[net.first.weight]["step"] = torch.tensor(7.0)
    opt.state[net.first.bias]["step"].fill_(9)
    opt.state[net.second.weight]["step"] = torch.tensor(3.0, dtype=torch.float64)
    opt.state[net.second.bias]["step"] = torch.tensor(0.0)


def the_inner_dict_in_another_order(opt: Optimizer, net: Net) -> None:
    for parameter in net.parameters():
        opt.state[parameter] = {key: tensor.clone() for key, tensor in reversed(opt.state[parameter].items())}


def the_inner_dict_of_another_type(opt: Optimizer, net: Net) -> None:
    for parameter in net.parameters():
        opt.state[parameter] = OrderedDict((key, tensor * 2) for key, tensor in opt.state[parameter].items())


def a_deleted_entry(opt: Optimizer, net: Net) -> None:
    del opt.state[net.first.weight]


def an_emptied_entry(opt: Optimizer, net: Net) -> None:
    opt.state[net.first.weight].clear()
    opt.state[net.first.bias] = {}


def a_cleared_mapping(opt: Optimizer, _: Net) -> None:
    opt.state.clear()


def another_mapping(opt: Optimizer, _: Net) -> None:
    opt.state = defaultdict(dict, opt.state)
    for state in opt.state.values():
        state["exp_avg"].mul_(2)


def another_mapping_of_copies(opt: Optimizer, _: Net) -> None:
    opt.state = defaultdict(dict, {p: {k: t.clone() for k, t in state.items()} for p, state in opt.state.items()})


def an_empty_mapping(opt: Optimizer, _: Net) -> None:
    opt.state = defaultdict(dict)


def exchanged_entries(opt: Optimizer, net: Net) -> None:
    one, other = net.first.weight, net.second.weight
    opt.state[one], opt.state[other] = opt.state[other], opt.state[one]


def entries_of_their_own(opt: Optimizer, net: Net) -> None:
    """Keys of a client beside torch's, some of them tensors of another shape."""
    opt.state[net.first.weight].update(slow=torch.ones(2, 3), count=3, history=[torch.ones(2)], tag="mine")
    opt.state["global"] = {"seen": 5}


def moved_as_lightning_moves(opt: Optimizer, _: Net) -> None:
    """Every tensor but the step is replaced by one on the device, in the same inner dict."""
    for state in opt.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and key != "step":
                state[key] = value.to("cpu", copy=True)


def the_parameters_storage(opt: Optimizer, net: Net) -> None:
    del opt
    net.first.weight.data = torch.full((2, 3), 0.5)
    net.second.weight.data = net.second.weight.detach().t().contiguous().t()
    with torch.no_grad():
        net.third.weight.set_(torch.full((2, 3), -0.5))


def put_in_the_slot(net: Net, layer: str, new: nn.Parameter) -> None:
    """Give the model a new tensor where no hook of registration sees it."""
    net.get_submodule(layer)._parameters["weight"] = new


def rekeyed_under_a_new_parameter(opt: Optimizer, net: Net) -> None:
    """Gaussian splatting: the entry is taken out, changed, and put under a new parameter that the group then holds."""
    old = net.first.weight
    state = opt.state[old]
    del opt.state[old]
    for key in MOMENTS:
        state[key] = state[key] * 2
    new = nn.Parameter((old.detach() + 1).requires_grad_(True))
    params = opt.param_groups[0]["params"]
    opt.param_groups[0]["params"] = [new if parameter is old else parameter for parameter in params]
    opt.state[new] = state
    put_in_the_slot(net, "first", new)


def rows_are_appended(opt: Optimizer, net: Net) -> None:
    """Gaussian splatting's `cat_tensors_to_optimizer`, in a group of one parameter, with another shape."""
    group = opt.param_groups[1]
    old = group["params"][0]
    state = opt.state.get(group["params"][0], None)
    for key in MOMENTS:
        state[key] = torch.cat((state[key], torch.zeros(1, 3)), dim=0)
    del opt.state[old]
    group["params"][0] = nn.Parameter(torch.cat((old, torch.ones(1, 3)), dim=0).requires_grad_(True))
    opt.state[group["params"][0]] = state
    put_in_the_slot(net, "second", group["params"][0])


def rows_are_pruned(opt: Optimizer, net: Net) -> None:
    """Gaussian splatting's `_prune_optimizer`, by a mask."""
    group, mask = opt.param_groups[1], torch.tensor([True, False])
    old = group["params"][0]
    state = opt.state.get(old, None)
    for key in MOMENTS:
        state[key] = state[key][mask]
    del opt.state[old]
    group["params"][0] = nn.Parameter(old[mask].requires_grad_(True))
    opt.state[group["params"][0]] = state
    put_in_the_slot(net, "second", group["params"][0])


def a_group_without_its_state(opt: Optimizer, net: Net) -> None:
    """Another tensor in the place of a parameter whose state was deleted: it starts afresh."""
    old = net.second.weight
    opt.state.pop(old)
    opt.param_groups[1]["params"] = [nn.Parameter(torch.ones(2, 3))]
    put_in_the_slot(net, "second", opt.param_groups[1]["params"][0])


WRITES: list[Write] = [
    other_tensors,
    one_moment_of_another_dtype_and_back,
    tensors_of_other_strides,
    slices_of_bigger_tensors,
    rows_are_zeroed_in_place,
    the_data_of_a_moment,
    the_step,
    the_inner_dict_in_another_order,
    the_inner_dict_of_another_type,
    a_deleted_entry,
    an_emptied_entry,
    a_cleared_mapping,
    another_mapping,
    another_mapping_of_copies,
    an_empty_mapping,
    exchanged_entries,
    entries_of_their_own,
    moved_as_lightning_moves,
    the_parameters_storage,
    rekeyed_under_a_new_parameter,
    rows_are_appended,
    rows_are_pruned,
    a_group_without_its_state,
]


def trained_with_a_write(cls: type, write: Write | None, model_is_given: bool = False) -> tuple[Net, Any]:
    """Two steps, a client's write, and three more; one group of most parameters, and one of a single one."""
    torch.manual_seed(3)
    net = Net()
    single = net.second.weight
    groups = [{"params": [p for p in net.parameters() if p is not single]}, {"params": [single], "lr": 0.02}]
    opt = cls(groups, lr=0.05, **({"model": net} if model_is_given else {}))
    train(net, opt, range(2))
    if write is not None:
        write(opt, net)
    for seed in range(10, 13):
        opt.zero_grad()
        set_gradients(net, seed)
        opt.step()
    return net, opt


@pytest.mark.parametrize("known_by", ["parameters", "model"])
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_what_a_client_writes_is_what_the_next_step_uses(ours: type, theirs: type, write: Write, known_by: str) -> None:
    """After the same write into state, groups or a parameter's memory, training goes on as with torch's class."""
    net, opt = trained_with_a_write(ours, write, model_is_given=known_by == "model")
    twin, stock = trained_with_a_write(theirs, write)
    untouched, _ = trained_with_a_write(theirs, None)
    for (name, mine), their in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
        assert list(opt.state[mine]) == list(stock.state[their]), name
        for key, value in stock.state[their].items():
            if isinstance(value, str):
                assert opt.state[mine][key] == value
            else:
                torch.testing.assert_close(opt.state[mine][key], value, rtol=1e-5, atol=1e-8)
    assert opt.state.get("global") == stock.state.get("global")
    if write not in IDLE:
        changed = zip(twin.parameters(), untouched.parameters(), strict=True)
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in changed), "the write has an effect"


IDLE = [
    one_moment_of_another_dtype_and_back,
    tensors_of_other_strides,
    slices_of_bigger_tensors,
    the_inner_dict_in_another_order,
    another_mapping_of_copies,
    entries_of_their_own,
    moved_as_lightning_moves,
]
"""Writes after which training must go on as if nothing had been written."""


@pytest.mark.parametrize("cls", OURS)
def test_a_tensor_that_a_client_put_there_is_updated_where_it_is(cls: type) -> None:
    """A moment that a client put into state stays that object, in that memory, from step to step."""
    net = Net()
    opt = cls(net)
    train(net, opt, range(2))
    given = {key: torch.cat([opt.state[net.first.weight][key]] * 2)[2:] for key in MOMENTS}
    opt.state[net.first.weight].update(given)
    before = {key: tensor.clone() for key, tensor in given.items()}
    train(net, opt, [5])
    for key, tensor in given.items():
        assert opt.state[net.first.weight][key] is tensor
        assert not torch.equal(tensor, before[key])


@pytest.mark.parametrize("cls", OURS)
def test_no_reference_to_a_replaced_mapping_is_kept(cls: type) -> None:
    """A mapping that was replaced, and its tensors, are neither read nor written again."""
    net = Net()
    opt = cls(net)
    train(net, opt, range(2))
    former = opt.state
    opt.state = defaultdict(dict)
    before = copy.deepcopy(list(former.values()))
    train(net, opt, [5])
    assert float(opt.state[net.first.weight]["step"]) == 1
    for state, old in zip(former.values(), before, strict=True):
        assert all(torch.equal(state[key], old[key]) for key in old)


# ---- what state holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_state_is_empty_before_the_first_step(cls: type) -> None:
    """`state` is a `defaultdict(dict)` that is empty, and so false, until the first step."""
    net = Net()
    opt = cls(net.parameters())
    assert type(opt.state) is defaultdict
    assert opt.state.default_factory is dict
    assert not opt.state
    assert opt.state.get(opt.param_groups[0]["params"][0]) is None
    opt.zero_grad()
    opt.state_dict()
    opt.step()
    assert not opt.state, "nothing had a gradient"


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_an_entry_has_torchs_keys_dtypes_shapes_and_strides(
    ours: type, theirs: type, dtype: torch.dtype, amsgrad: bool
) -> None:
    """An entry has torch's keys in torch's order; moments have the value's dtype and, where dense, its strides."""
    values = {
        "contiguous": torch.ones(3, 4, dtype=dtype),
        "transposed": torch.ones(4, 3, dtype=dtype).t(),
        "channels last": torch.ones(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last),
        "a slice": torch.ones(3, 6, dtype=dtype)[:, ::2],
        "a number": torch.ones((), dtype=dtype),
        "nothing": torch.ones(0, 3, dtype=dtype),
    }
    found = []
    for cls in (ours, theirs):
        params = {name: nn.Parameter(value.detach()) for name, value in values.items()}
        opt = cls(params.values(), amsgrad=amsgrad)
        for parameter in params.values():
            parameter.grad = torch.zeros_like(parameter)
        opt.step()
        found.append(
            {
                name: {
                    key: (tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.requires_grad)
                    for key, tensor in opt.state[parameter].items()
                }
                for name, parameter in params.items()
            }
        )
    for name in values:
        assert list(found[0][name]) == list(found[1][name]), name
        assert found[0][name] == found[1][name], name


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_step_is_a_0_dim_tensor_of_torchs_dtype(ours: type, theirs: type, default: torch.dtype, fused: Any) -> None:
    """`step` is a 0-dim tensor: float32, or float64 where that is the default dtype and the group is not fused."""
    torch.set_default_dtype(default)
    found = []
    for cls in (ours, theirs):
        parameter = nn.Parameter(torch.ones(3))
        opt = cls([parameter], fused=fused)
        parameter.grad = torch.ones(3)
        opt.step()
        step = opt.state[parameter]["step"]
        assert float(step) == 1
        found.append((step.dtype, step.shape, step.device))
    assert found[0] == found[1]
    assert found[0][0] == (default if fused is None else torch.float32)


@pytest.mark.parametrize("cls", CLASSES)
def test_gradients_that_are_none_are_skipped_and_do_not_age(cls: type) -> None:
    """A parameter without a gradient has no entry, does not decay, and its `step` does not advance."""
    stepped, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = cls([stepped, idle], weight_decay=0.5)
    stepped.grad = torch.ones(3)
    opt.step()
    assert idle not in opt.state
    assert torch.equal(idle.detach(), torch.ones(3))
    opt.zero_grad()
    opt.step()
    assert float(opt.state[stepped]["step"]) == 1
    idle.grad = torch.ones(3)
    opt.step()
    assert float(opt.state[idle]["step"]) == float(opt.state[stepped]["step"]) == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_the_keys_are_the_parameter_objects(cls: type) -> None:
    """The keys of `state` are the parameters themselves."""
    net = Net()
    opt = cls(net.parameters())
    train(net, opt, [0])
    assert all(key is parameter for key, parameter in zip(opt.state, net.parameters(), strict=True))


@pytest.mark.parametrize("cls", CLASSES)
def test_state_of_a_tensor_that_is_in_no_group_cannot_be_saved(cls: type) -> None:
    """A tensor key that is in no group makes `state_dict()` raise KeyError; deleting it mends that."""
    net = Net()
    opt = cls(net.parameters())
    train(net, opt, [0])
    stray = torch.ones(2)
    opt.state[stray] = {"exp_avg": torch.ones(2)}
    with pytest.raises(KeyError):
        opt.state_dict()
    del opt.state[stray]
    assert len(opt.state_dict()["state"]) == 6


@pytest.mark.parametrize("cls", CLASSES)
def test_an_entry_that_lacks_a_moment_raises_key_error(cls: type) -> None:
    """An entry that has something but lacks a moment raises KeyError with its name, and nothing is changed."""
    parameter = nn.Parameter(torch.ones(3))
    opt = cls([parameter])
    parameter.grad = torch.ones(3)
    opt.state[parameter]["mine"] = 1
    with pytest.raises(KeyError, match=r"exp_avg|step"):
        opt.step()
    assert opt.state[parameter] == {"mine": 1}
    assert torch.equal(parameter.detach(), torch.ones(3))


@pytest.mark.parametrize("cls", OURS)
def test_a_plain_dict_as_state_is_used_where_it_is_complete(cls: type) -> None:
    """A mapping that is a plain dict is stepped on like a defaultdict."""
    parameter = nn.Parameter(torch.ones(3))
    opt = cls([parameter])
    parameter.grad = torch.ones(3)
    opt.step()
    opt.state = {parameter: {key: tensor.clone() for key, tensor in opt.state[parameter].items()}}
    opt.step()
    assert type(opt.state) is dict
    assert float(opt.state[parameter]["step"]) == 2


@pytest.mark.parametrize("value", [0.0, -3.0, 1e30, float("nan"), float("inf")])
def test_a_step_count_that_means_nothing_never_crashes(value: float) -> None:
    """Whatever number a client writes as `step`, the next step neither crashes nor loses the parameter's shape."""
    parameter = nn.Parameter(torch.ones(3))
    opt = paramstate.Adam([parameter])
    parameter.grad = torch.ones(3)
    opt.step()
    opt.state[parameter]["step"] = torch.tensor(value)
    opt.step()
    assert parameter.shape == (3,)
    assert opt.state[parameter]["exp_avg"].isfinite().all()


@pytest.mark.parametrize("number", [4, 4.0])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_number_as_step_counts_on(ours: type, theirs: type, number: float) -> None:
    """A Python number that a client writes as `step` is counted on from, where torch's class raises."""
    values = []
    for cls, written in ((ours, number), (theirs, torch.tensor(4.0))):
        parameter = nn.Parameter(torch.ones(3))
        opt = cls([parameter], lr=0.1)
        give_gradient(parameter, "0")
        opt.step()
        opt.state[parameter]["step"] = written
        opt.step()
        assert float(opt.state[parameter]["step"]) == 5
        values.append(parameter)
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize("cls", OURS)
def test_materialize_state_makes_what_a_first_step_would_make(cls: type) -> None:
    """`materialize_state()` makes the entries of a first step, and the first step after it is the same."""
    net = Net()
    opt = cls(net, amsgrad=True)
    opt.materialize_state()
    for parameter in net.parameters():
        state = opt.state[parameter]
        assert sorted(state) == ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"]
        assert float(state["step"]) == 0
        assert state["exp_avg"].shape == parameter.shape
    twin = copy.deepcopy(net)
    other = cls(twin, amsgrad=True)
    train(net, opt, [1])
    train(twin, other, [1])
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- other tensors for the time of a step ---------------------------------------------------------------------------


@pytest.mark.parametrize("known_by", ["parameters", "model"])
@pytest.mark.parametrize("cls", OURS)
def test_a_step_on_tensors_that_are_swapped_in_leaves_the_live_ones_alone(cls: type, known_by: str) -> None:
    """Parameters and state swapped in for a while are stepped; live ones, gradients, IDs and constraints stay."""
    stateless = pytest.importorskip("torch.optim._stateless", reason="this release of torch swaps nothing in")
    net = Net()
    box = {"constraints": {"first.weight": paramstate.Box(-0.5, 0.5)}, "model": net} if known_by == "model" else {}
    opt = cls(net.parameters(), lr=0.1, **box)
    train(net, opt, range(2))
    if known_by == "model":
        net.renamed = net.second
        del net.second
        opt.rename({"second.weight": "renamed.weight", "second.bias": "renamed.bias"})
    twin = copy.deepcopy(net)
    saved = copy.deepcopy({key: opt.state_dict()[key] for key in ("state", "param_groups")})
    set_gradients(net, 3)
    set_gradients(twin, 3)
    ids, names = [opt.id_of(p) for p in net.parameters()], list(opt.ids)
    before = copy.deepcopy(list(net.parameters()))
    others = dict(zip(net.parameters(), twin.parameters(), strict=True))
    swapped_in = {str(index): others[parameter] for index, parameter in enumerate(opt.param_groups[0]["params"])}
    with stateless.swap_in_optimizer_params_and_state(opt, swapped_in, saved):
        opt.step()
        assert float(opt.state[twin.first.weight]["step"]) == 3
    assert all(map(torch.equal, before, net.parameters()))
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert float(opt.state[net.first.weight]["step"]) == 2
    assert [opt.id_of(p) for p in net.parameters()] == ids
    assert list(opt.ids) == names
    opt.step()
    if known_by == "model":
        assert float(net.first.weight.detach().abs().max()) <= 0.5
        twin.first.weight.data.clamp_(-0.5, 0.5)
    for mine, swapped in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, swapped)
