"""torch.distributed.checkpoint (get and set state dicts, save and load), single process, no process group."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import paramstate
from small_models import Layer, Net, assert_same_bits, state_by_name, train

Optimizer = torch.optim.Optimizer
Make = Callable[[nn.Module], paramstate.Adam]

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
OPTIONS = {
    "plain": StateDictOptions(),
    "flattened": FLAT,
    "full": StateDictOptions(full_state_dict=True),
    "full, on the host": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())

MAKERS: dict[str, Make] = {
    "Adam with L2 decay": lambda net: paramstate.Adam(net.parameters(), lr=0.1, weight_decay=0.5),
    "AdamW": lambda net: paramstate.AdamW(net.parameters(), lr=0.1, amsgrad=True),
    "of a model": lambda net: paramstate.AdamW(net, lr=0.1, max_grad_norm=0.5),
    "tensor rate": lambda net: paramstate.Adam(net.parameters(), lr=torch.tensor(0.1), weight_decay=0.5),
    "fused": lambda net: paramstate.Adam(net.parameters(), lr=0.1, weight_decay=0.5, fused=True),
    "constrained": lambda net: paramstate.Adam(net, lr=0.1, weight_decay=0.5, constraints=paramstate.Box(-1, 1)),
}


def begin(make: Make = MAKERS["of a model"], steps: int = 0) -> tuple[Net, paramstate.Adam]:
    torch.manual_seed(5)
    net = Net()
    opt = make(net)
    train(net, opt, range(steps))
    return net, opt


# ---- state that is asked for before the first step ------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_asking_for_the_state_of_a_fresh_optimizer_leaves_no_trace(make: Make) -> None:
    """A fresh optimizer that was asked for its state dict has zero state, and trains as one that never was."""
    asked, opt = begin(make)
    versions = [parameter._version for parameter in asked.parameters()]
    rate = opt.param_groups[0]["lr"]
    found = get_optimizer_state_dict(asked, opt)
    assert found["state"].keys() == dict(asked.named_parameters()).keys()
    for state in found["state"].values():
        assert all(int(tensor.count_nonzero()) == 0 for tensor in state.values()), "step and moments are zero"
    assert opt.param_groups[0]["lr"] is rate
    assert [parameter._version for parameter in asked.parameters()] == versions
    assert all(parameter.grad is None for parameter in asked.parameters())
    never, other = begin(make)
    train(asked, opt, range(3))
    train(never, other, range(3))
    assert_same_bits(state_by_name(asked, opt), state_by_name(never, other))


def test_asking_twice_and_after_a_step_reads_what_is_there() -> None:
    """Once there is state it is only read: asking again, before or after real steps, changes nothing."""
    net, opt = begin()
    get_optimizer_state_dict(net, opt)
    get_optimizer_state_dict(net, opt)
    assert {float(state["step"]) for state in opt.state.values()} == {0.0}
    train(net, opt, [0])
    before = state_by_name(net, opt)
    get_optimizer_state_dict(net, opt)
    assert_same_bits(state_by_name(net, opt), before)


def test_a_frozen_parameter_gets_no_state_by_asking() -> None:
    """A parameter that requires no gradient has no state afterwards, as with torch's class."""
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        net = Net()
        net.first.requires_grad_(requires_grad=False)
        opt = cls(net.parameters())
        get_optimizer_state_dict(net, opt)
        assert net.first.weight not in opt.state
        assert net.second.weight in opt.state


@pytest.mark.filterwarnings("ignore")
def test_asking_leaves_no_trace_through_a_wrapped_step() -> None:
    """A `step` that a scheduler has wrapped, or that is compiled, is recognised as well."""
    torch._dynamo.reset()
    for wrap in ("scheduler", "compile"):
        net, opt = begin(MAKERS["Adam with L2 decay"])
        if wrap == "scheduler":
            torch.optim.lr_scheduler.LinearLR(opt, 0.5)
        else:
            opt.step = torch.compile(opt.step, backend="eager")  # type: ignore[method-assign]
        get_optimizer_state_dict(net, opt)
        assert {float(state["step"]) for state in opt.state.values()} == {0.0}
        assert all(int(state["exp_avg"].count_nonzero()) == 0 for state in opt.state.values())
        train(net, opt, [0])
        assert {float(state["step"]) for state in opt.state.values()} == {1.0}


def test_a_copy_of_that_function_in_another_library_leaves_no_trace() -> None:
    """torchtitan's own `init_optim_state`, which does what torch's does, is recognised by its name."""

    def init_optim_state(optimizer: Optimizer) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step(closure=None)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)

    net, opt = begin(MAKERS["Adam with L2 decay"])
    init_optim_state(opt)
    never, other = begin(MAKERS["Adam with L2 decay"])
    train(net, opt, range(2))
    train(never, other, range(2))
    assert_same_bits(state_by_name(net, opt), state_by_name(never, other))


@pytest.mark.parametrize("by_keyword", [False, True])
def test_the_same_numbers_outside_that_function_are_a_step(by_keyword: bool) -> None:
    """Zero gradients at a rate of zero, taken by anybody else, are a step that counts, as in torch."""
    runs = []
    for cls in (paramstate.Adam, torch.optim.Adam):
        torch.manual_seed(5)
        net = Net()
        opt = cls(net.parameters(), lr=0.0, weight_decay=0.5)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        _ = opt.step(closure=None) if by_keyword else opt.step()
        runs.append(state_by_name(net, opt))
    assert float(runs[0]["first.weight"]["step"]) == 1
    torch.testing.assert_close(runs[0], runs[1])


# ---- there and back -------------------------------------------------------------------------------------------------


@each_option
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_round_trip_continues_bit_for_bit(make: Make, options: StateDictOptions, tmp_path: Path) -> None:
    """get, torch.save, load with `weights_only`, set: the next steps are bit-identical, flattened or not."""
    net, opt = begin(make, steps=3)
    saved = {"model": net.state_dict(), "opt": get_optimizer_state_dict(net, opt, options=options)}
    torch.save(saved, tmp_path / "saved.pt")
    train(net, opt, range(3, 6))
    twin, other = begin(make)
    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)
    twin.load_state_dict(loaded["model"])
    set_optimizer_state_dict(twin, other, loaded["opt"], options=options)
    train(twin, other, range(3, 6))
    assert_same_bits(state_by_name(twin, other), state_by_name(net, opt))


@each_option
def test_parameters_that_changed_order_are_matched_by_name(options: StateDictOptions) -> None:
    """A model whose layers and attributes stand in another order takes each state under its name."""
    net, opt = begin(steps=3)
    saved = get_optimizer_state_dict(net, opt, options=options)
    twin = Net(())
    for name in ("third", "first", "second"):
        twin.add_module(name, Layer(("bias", "weight")))
    twin.load_state_dict(net.state_dict())
    other = paramstate.AdamW(twin, lr=0.1, max_grad_norm=0.5)
    set_optimizer_state_dict(twin, other, saved, options=options)
    assert other.ids == opt.ids
    assert_same_bits(state_by_name(twin, other), state_by_name(net, opt))


def test_what_was_got_may_be_loaded_without_set() -> None:
    """A dict under qualified names, given to `load_state_dict` as it is, is matched by these names and reported so."""
    net, opt = begin(steps=3)
    saved = get_optimizer_state_dict(net, opt)
    twin = Net(("third", "first", "second"))
    twin.load_state_dict(net.state_dict())
    other = paramstate.AdamW(twin)
    report = other.load_state_dict(saved)
    assert report.matched_by == "name"
    assert sorted(report.loaded) == sorted(opt.ids)
    assert_same_bits(state_by_name(twin, other), state_by_name(net, opt))


def test_names_that_a_wrapper_changed_do_not_stand_in_the_way() -> None:
    """Under PEFT torch's qualified names are not the canonical ones: the order that torch made decides."""
    peft = pytest.importorskip("peft")

    def adapted() -> tuple[nn.Module, paramstate.AdamW]:
        torch.manual_seed(5)
        base = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        net = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0", "1"], r=1))
        return net, paramstate.AdamW(net, lr=0.1)

    net, opt = adapted()
    train(adapters(net), opt, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(net, opt))
    assert not saved["state"].keys() & opt.ids.keys()
    twin, other = adapted()
    twin.load_state_dict(net.state_dict())
    set_optimizer_state_dict(twin, other, saved)
    train(adapters(net), opt, [9])
    train(adapters(twin), other, [9])
    assert_same_bits(state_by_name(twin, other), state_by_name(net, opt))


def adapters(net: nn.Module) -> nn.ParameterDict:
    """What PEFT trains, as a model of its own."""
    trained = {name.replace(".", "_"): p for name, p in net.named_parameters() if p.requires_grad}
    return nn.ParameterDict(trained)


@each_option
@pytest.mark.parametrize("back", [False, True], ids=["from torch's class", "to torch's class"])
def test_state_goes_between_torchs_class_and_ours(options: StateDictOptions, back: bool) -> None:
    """What one class's optimizer gave, the other takes: values and moments go on within rounding."""
    classes = (paramstate.AdamW, torch.optim.AdamW)
    giver, taker = classes if back else classes[::-1]
    net, twin = Net(), Net()
    opt = giver(net.parameters(), lr=0.1)
    train(net, opt, range(3))
    other = taker(twin.parameters(), lr=0.5)
    twin.load_state_dict(net.state_dict())
    # Copied: torch's own load would share the tensors with their giver.
    saved = copy.deepcopy(get_optimizer_state_dict(net, opt, options=options))
    set_optimizer_state_dict(twin, other, saved, options=options)
    assert other.param_groups[0]["lr"] == 0.1
    train(net, opt, range(3, 5))
    train(twin, other, range(3, 5))
    torch.testing.assert_close(state_by_name(twin, other), state_by_name(net, opt), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [StateDictOptions(), FLAT], ids=["plain", "flattened"])
def test_groups_keep_their_options(options: StateDictOptions) -> None:
    """Groups with options of their own come back with them."""

    def grouped(net: Net) -> paramstate.AdamW:
        slow, fast = list(net.first.parameters()), [*net.second.parameters(), *net.third.parameters()]
        return paramstate.AdamW([{"params": slow, "lr": 0.01, "betas": (0.5, 0.6)}, {"params": fast}], lr=0.1)

    net, opt = begin(grouped, steps=2)
    saved = get_optimizer_state_dict(net, opt, options=options)
    twin, other = begin(grouped)
    twin.load_state_dict(net.state_dict())
    for group in other.param_groups:
        group.update(lr=7.0, betas=(0.1, 0.1))
    set_optimizer_state_dict(twin, other, saved, options=options)
    assert [(group["lr"], group["betas"]) for group in other.param_groups] == [(0.01, (0.5, 0.6)), (0.1, (0.9, 0.999))]
    train(net, opt, [9])
    train(twin, other, [9])
    assert_same_bits(state_by_name(twin, other), state_by_name(net, opt))


@pytest.mark.parametrize("options", [StateDictOptions(), FLAT], ids=["plain", "flattened"])
def test_several_optimizers_over_one_model_come_back(options: StateDictOptions) -> None:
    """Two optimizers over parts of one model are got and set together, each its own part."""

    def two(net: Net) -> list[Optimizer]:
        rest = [*net.second.parameters(), *net.third.parameters()]
        return [paramstate.AdamW(net.first.parameters(), lr=0.1), paramstate.Adam(rest, lr=0.01)]

    nets = [Net(), Net()]
    opts = [two(net) for net in nets]
    for opt in opts[0]:
        train(nets[0], opt, range(2))
    model_state, optimizer_state = get_state_dict(nets[0], opts[0], options=options)
    set_state_dict(nets[1], opts[1], model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)
    for net, pair in zip(nets, opts, strict=True):
        for opt in pair:
            train(net, opt, [5])
    for ours, theirs in zip(*opts, strict=True):
        assert_same_bits(state_by_name(nets[0], ours), state_by_name(nets[1], theirs))


def test_moments_wider_than_the_value_stay_so() -> None:
    """float32 moments of a bfloat16 model stay float32, bit for bit, through get and set."""
    net, opt = begin(steps=3)
    net.bfloat16()
    train(net, opt, [3])
    assert opt.state[net.first.weight]["exp_avg"].dtype == torch.float32
    saved = get_optimizer_state_dict(net, opt)
    twin = Net().bfloat16()
    twin.load_state_dict(net.state_dict())
    other = paramstate.AdamW(twin, lr=0.1)
    set_optimizer_state_dict(twin, other, saved)
    assert_same_bits(state_by_name(twin, other), state_by_name(net, opt))


@pytest.mark.parametrize("options", [StateDictOptions(), FLAT], ids=["plain", "flattened"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_checkpoint_on_disk_resumes_bit_for_bit(make: Make, options: StateDictOptions, tmp_path: Path) -> None:
    """`dcp.save` and `dcp.load` into a fresh model and optimizer continue the run bit for bit."""
    net, opt = begin(make, steps=3)
    model_state, optimizer_state = get_state_dict(net, opt, options=options)
    dcp.save({"model": model_state, "opt": optimizer_state}, checkpoint_id=tmp_path / "saved", no_dist=True)
    train(net, opt, range(3, 6))
    twin, other = begin(make)
    model_state, optimizer_state = get_state_dict(twin, other, options=options)
    loaded = {"model": model_state, "opt": optimizer_state}
    dcp.load(loaded, checkpoint_id=tmp_path / "saved", no_dist=True)
    set_state_dict(twin, other, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"], options=options)
    train(twin, other, range(3, 6))
    assert_same_bits(state_by_name(twin, other), state_by_name(net, opt))
