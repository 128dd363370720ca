"""Wrappers: DDP, DataParallel, torch.compile, FSDP2, activation checkpointing, PEFT, and combinations.

A wrapper changes qualified names, and some change the parameter objects; the canonical names, the IDs and the moments
stay, through wrapping and unwrapping in mid-training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import paramstate
from small_models import Net, assert_same_bits, state_by_name

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
Wrap = Callable[[nn.Module], nn.Module]
Found = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module", autouse=True)
def a_process_group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet() -> None:
    torch._dynamo.reset()


def compiled(net: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(net, backend="eager")
    return wrapped


def checkpointed(net: nn.Module) -> nn.Module:
    for name, layer in list(net.named_children()):
        setattr(net, name, checkpoint_wrapper(layer))
    return net


def sharded(net: nn.Module) -> nn.Module:
    for layer in net.children():
        fully_shard(layer)
    fully_shard(net)
    return net


class Wrapper(NamedTuple):
    """How to wrap, and how the wrapped is trained on without the wrapper."""

    wrap: Wrap
    unwrap: Wrap
    bare: bool = True
    """Whether an optimizer over bare parameters can follow."""


def base(wrapped: nn.Module) -> nn.Module:
    """The `Net` that a chain of wrappers around the whole holds."""
    while not isinstance(wrapped, Net):
        wrapped = wrapped._orig_mod if hasattr(wrapped, "_orig_mod") else wrapped.module
    return wrapped


def without_checkpoints(wrapped: nn.Module) -> nn.Module:
    net = base(wrapped)
    for name, layer in list(net.named_children()):
        setattr(net, name, layer._checkpoint_wrapped_module)
    return net


def gathered(wrapped: nn.Module) -> nn.Module:
    """A plain copy of a sharded model, as one exports it."""
    plain = Net()
    whole = {name: tensor.full_tensor() for name, tensor in base(wrapped).state_dict().items()}
    plain.load_state_dict({name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in whole.items()})
    return plain


WRAPPERS = {
    "DDP": Wrapper(DistributedDataParallel, base),
    "DataParallel": Wrapper(nn.DataParallel, base),
    "compile": Wrapper(compiled, base),
    "checkpoint": Wrapper(checkpointed, without_checkpoints),
    "FSDP2": Wrapper(sharded, gathered, bare=False),
    "compile of DDP": Wrapper(lambda net: compiled(DistributedDataParallel(net)), base),
    "DDP of compile": Wrapper(lambda net: DistributedDataParallel(compiled(net)), base),
    "compile of DataParallel": Wrapper(lambda net: compiled(nn.DataParallel(net)), base),
    "DDP of checkpoint": Wrapper(lambda net: DistributedDataParallel(checkpointed(net)), without_checkpoints),
    "compile of FSDP2 of checkpoint": Wrapper(lambda net: compiled(sharded(checkpointed(net))), gathered, bare=False),
}
each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS.keys())


def begin(steps: int = 2) -> tuple[Net, paramstate.AdamW]:
    torch.manual_seed(5)
    net = Net()
    opt = paramstate.AdamW(net, lr=0.01)
    train(net, opt, steps)
    return net, opt


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    """Steps by a real forward pass, which wrappers need in order to be what they are."""
    for _ in range(steps):
        opt.zero_grad()
        model(X).square().sum().backward()
        opt.step()


def found(model: nn.Module, opt: torch.optim.Optimizer) -> Found:
    """Values and state under canonical names, each whole."""
    names = {parameter: name for name, parameter in paramstate.canonical_names(model).items()}
    return {
        names[parameter]: {key: whole(tensor) for key, tensor in {"value": parameter, **opt.state[parameter]}.items()}
        for parameter in model.parameters()
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@each_wrapper
def test_names_are_canonical_and_ids_the_same(wrapper: Wrapper) -> None:
    """A wrapped model has the canonical names of the plain one, so an optimizer over it has the same IDs."""
    net = Net()
    plain = paramstate.AdamW(net)
    wrapped = wrapper.wrap(copy.deepcopy(net))
    assert list(paramstate.canonical_names(wrapped)) == [name for name, _ in net.named_parameters()]
    assert paramstate.AdamW(wrapped).ids == plain.ids
    assert paramstate.AdamW(wrapped.named_parameters(), model=wrapped).ids == plain.ids


@each_wrapper
def test_training_through_a_wrapper_from_the_start_is_as_without(wrapper: Wrapper) -> None:
    """An optimizer over a model that is wrapped already trains it as it trains the plain one."""
    net, opt = begin(4)
    torch.manual_seed(5)
    wrapped = wrapper.wrap(Net())
    other = paramstate.AdamW(wrapped, lr=0.01)
    train(wrapped, other, 4)
    torch.testing.assert_close(found(wrapped, other), found(net, opt), rtol=1e-5, atol=1e-7)


@each_wrapper
@pytest.mark.parametrize("told", [False, True], ids=["untold", "rebind"])
def test_wrapping_and_unwrapping_in_mid_training_changes_nothing(wrapper: Wrapper, told: bool) -> None:
    """Wrapped and unwrapped in mid-training, told of it or not, IDs, moments and numbers are those of staying."""
    net, opt = begin()
    ids = dict(opt.ids)
    wrapped = wrapper.wrap(net)
    if told:
        report = opt.rebind(wrapped)
        assert sorted([*report.kept, *report.followed]) == sorted(ids)
        assert not report.vanished
        assert not report.unmanaged
    train(wrapped, opt, 2)
    assert opt.ids == ids
    assert {opt.id_of(p) for p in wrapped.parameters()} == set(ids.values())
    assert {float(state["step"]) for state in opt.state.values()} == {4.0}
    plain = wrapper.unwrap(wrapped)
    if told or plain is not net:
        opt.rebind(plain)
    train(plain, opt, 2)
    assert opt.ids == ids
    assert {name: opt.id_of(p) for name, p in plain.named_parameters()} == ids
    stayed, other = begin(6)
    torch.testing.assert_close(found(plain, opt), found(stayed, other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, wrapper in WRAPPERS.items() if wrapper.bare])
def test_bare_parameters_are_trained_through_a_wrapper_too(name: str) -> None:
    """An optimizer that knows parameters alone trains on through a wrapper that keeps the objects, bit for bit."""
    torch.manual_seed(5)
    net = Net()
    opt = paramstate.AdamW(net.parameters(), lr=0.01)
    train(net, opt, 2)
    train(WRAPPERS[name].wrap(net), opt, 2)
    stayed, other = begin(4)
    assert_same_bits(found(net, opt), found(stayed, other))


@each_wrapper
@pytest.mark.parametrize("saved_wrapped", [False, True], ids=["saved plain", "saved wrapped"])
def test_state_goes_between_wrapped_and_plain_models_by_name(
    wrapper: Wrapper, saved_wrapped: bool, tmp_path: Path
) -> None:
    """State that was saved beside a wrapped model loads beside a plain one by name, and the reverse."""
    net, opt = begin()
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, tmp_path / "saved.pt")
    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)
    twin = Net()
    twin.load_state_dict(loaded["net"])
    wrapped = wrapper.wrap(twin)
    other = paramstate.AdamW(wrapped, lr=0.5)
    assert other.load_state_dict(loaded["opt"]).matched_by == "name"
    assert other.ids == opt.ids
    train(wrapped, other, 2)
    train(net, opt, 2)
    torch.testing.assert_close(found(wrapped, other), found(net, opt), rtol=1e-5, atol=1e-6)
    if saved_wrapped:
        plain = wrapper.unwrap(wrapped)
        last = paramstate.AdamW(plain, lr=0.5)
        assert last.load_state_dict(other.state_dict()).matched_by == "name"
        torch.testing.assert_close(found(plain, last), found(net, opt), rtol=1e-5, atol=1e-6)


def test_sharded_parameters_have_sharded_moments() -> None:
    """Under FSDP2 moments are DTensors placed as their values are, also where sharding came in mid-training."""
    net, opt = begin()
    train(sharded(net), opt, 1)
    for parameter in net.parameters():
        assert isinstance(parameter, DTensor)
        state = opt.state[parameter]
        assert not isinstance(state["step"], DTensor)
        for key in ("exp_avg", "exp_avg_sq"):
            assert isinstance(state[key], DTensor)
            assert state[key].placements == parameter.placements
            assert state[key].device_mesh == parameter.device_mesh


def with_lora(net: nn.Module) -> Any:
    """PEFT's model over the net, its base trainable as before; an adapter that is not trained changes nothing."""
    peft = pytest.importorskip("peft")

    for name in ("first", "third"):
        linear = nn.Linear(3, 2)
        linear._parameters.update(getattr(net, name)._parameters)
        setattr(net, name, linear)
    wrapped = peft.get_peft_model(net, peft.LoraConfig(target_modules=["first", "third"], r=1))
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_("lora" not in name)
    return wrapped


@pytest.mark.parametrize("outer", [None, DistributedDataParallel, compiled, checkpointed], ids=str)
def test_peft_in_mid_training_keeps_names_ids_and_moments(outer: Wrap | None) -> None:
    """PEFT puts layers under `.base_layer` in mid-training, inside other wrappers too: IDs, moments, numbers stay."""
    net, opt = begin()
    ids = dict(opt.ids)
    adapted = with_lora(net)
    wrapped = adapted if outer is None or outer is checkpointed else outer(adapted)
    if outer is checkpointed:
        net.second = checkpoint_wrapper(net.second)
    names = paramstate.canonical_names(wrapped)
    assert {name: opt.id_of(parameter) for name, parameter in names.items() if "lora" not in name} == ids
    train(wrapped, opt, 2)
    assert opt.ids == ids
    plain = adapted.unload()
    opt.rebind(plain)
    train(plain, opt, 2)
    assert opt.ids == ids
    stayed, other = begin(6)
    torch.testing.assert_close(found(plain, opt), found(stayed, other), rtol=1e-5, atol=1e-7)


def test_adapters_are_adopted_on_request_and_dropped_on_unwrapping() -> None:
    """`rebind(model, group=...)` adopts PEFT's adapters; after `unload`, `rebind` drops them, and the rest stays."""
    net, opt = begin()
    ids = dict(opt.ids)
    adapted = with_lora(net)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora" in name)
    report = opt.rebind(adapted, group={"lr": 0.1})
    assert sorted(report.adopted) == sorted(name for name in opt.ids if name not in ids)
    assert len(report.adopted) == 4
    train(adapted, opt, 2)
    assert {float(opt.state_of(name)["step"]) for name in ids} == {2.0}, "the frozen base has not aged"
    assert {float(opt.state_of(name)["step"]) for name in report.adopted} == {2.0}
    plain = adapted.unload()
    report = opt.rebind(plain)
    assert len(report.vanished) == 4
    assert opt.ids == ids
    plain.requires_grad_()
    train(plain, opt, 1)
    assert {float(opt.state_of(name)["step"]) for name in ids} == {3.0}


def test_wrappers_are_told_by_type_and_a_users_own_module_keeps_its_name() -> None:
    """A user's own submodule called `module`, `_orig_mod` or `base_layer` keeps its name: only types count."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1, bias=False)
            self._orig_mod = nn.Linear(1, 1, bias=False)
            self.base_layer = nn.Linear(1, 1, bias=False)

    own = ["_orig_mod.weight", "base_layer.weight", "module.weight"]
    assert sorted(paramstate.AdamW(Holder()).ids) == own
    assert sorted(paramstate.AdamW(nn.DataParallel(Holder())).ids) == own


def test_the_state_of_a_wrapped_model_is_found_by_either_name() -> None:
    """A parameter of a wrapped model is found by its canonical name and by its object."""
    net = Net()
    opt = paramstate.AdamW(compiled(DistributedDataParallel(net)))
    assert opt.param(opt.ids["first.weight"]) is net.first.weight
    opt.materialize_state()
    assert opt.state_of("first.weight") is opt.state_of(net.first.weight)
    assert opt.name_of(net.first.weight) == "first.weight"
    assert state_by_name(net, opt)["first.weight"]["exp_avg"].shape == (2, 3)
