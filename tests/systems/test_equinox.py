"""Equinox: train only a sub-network, other rates for parts, another frozen set by epoch

One model is written twice, as a torch module and as an Equinox module, with the same weights. Equinox trains it as its
documentation says (``partition`` by a tree of booleans, ``filter_value_and_grad`` of the one part, ``apply_updates``),
paramstate by selections. Adam is written out for JAX, since that is what the two are compared by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from paramstate import Adam, AdamW, Selection, SelectionError, UnknownParameterError, select
from reference import same_bits

jax = pytest.importorskip("jax")
eqx = pytest.importorskip("equinox")
jnp = jax.numpy

LR = 1e-2


# ---- the model, twice ------------------------------------------------------------------------------------------------


class HyperNet(nn.Module):
    """Makes the weights of a layer from a context."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 8)
        self.last = nn.Linear(8, 12)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(context)))


class Target(nn.Module):
    """The network whose first weights are made; the rest are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.head = nn.Linear(4, 1)

    def forward(self, made: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        hidden = (made.reshape(-1, 4, 3) @ x.unsqueeze(-1)).squeeze(-1)
        return self.head(torch.tanh(hidden + self.bias))


class Hyper(nn.Module):
    """A hypernetwork, its running average under a name that begins alike, and the target network."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper_net = HyperNet()
        self.hyper_net_ema = HyperNet()
        self.target_net = Target()

    def forward(self, context: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.target_net(self.hyper_net(context), x)


class EqxHyperNet(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear
    activation: Callable[[Any], Any]

    def __call__(self, context: Any) -> Any:
        return self.last(self.activation(self.first(context)))


class EqxTarget(eqx.Module):
    bias: Any
    head: eqx.nn.Linear

    def __call__(self, made: Any, x: Any) -> Any:
        return self.head(jnp.tanh(made.reshape(4, 3) @ x + self.bias))


class EqxHyper(eqx.Module):
    hyper_net: EqxHyperNet
    hyper_net_ema: EqxHyperNet
    target_net: EqxTarget

    def __call__(self, context: Any, x: Any) -> Any:
        return self.target_net(self.hyper_net(context), x)


def leaf(tree: Any, name: str) -> Any:
    for attribute in name.split("."):
        tree = getattr(tree, attribute)
    return tree


def as_equinox(model: Hyper) -> Any:
    """The Equinox module with the torch module's weights."""
    key = jax.random.key(0)

    def hyper_net() -> Any:
        return EqxHyperNet(eqx.nn.Linear(2, 8, key=key), eqx.nn.Linear(8, 12, key=key), jnp.tanh)

    twin = EqxHyper(hyper_net(), hyper_net(), EqxTarget(jnp.zeros(4), eqx.nn.Linear(4, 1, key=key)))
    for name, param in model.named_parameters():
        twin = eqx.tree_at(lambda tree, name=name: leaf(tree, name), twin, jnp.asarray(param.detach().numpy()))
    return twin


# ---- how Equinox trains a part of it ---------------------------------------------------------------------------------


def only(model: Any, *names: str) -> Any:
    """The tree of booleans that is true at the arrays of these sub-networks."""
    spec = jax.tree.map(lambda _: False, model)
    for name in names:
        spec = eqx.tree_at(
            lambda tree, name=name: leaf(tree, name), spec, jax.tree.map(eqx.is_array, leaf(model, name))
        )
    return spec


@dataclass
class Part:
    """A sub-network that Equinox trains at a rate of its own, with its moments."""

    spec: Any
    lr: float = LR
    step: int = 0
    moments: Any = field(default=None)

    def updates(self, grads: Any) -> Any:
        """What Adam adds to the part's values, as the paper writes it."""
        grads = eqx.filter(grads, self.spec)
        zeros = jax.tree.map(jnp.zeros_like, grads)
        first, second = self.moments or (zeros, zeros)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)
        self.step, self.moments = self.step + 1, (first, second)
        c1, c2 = 1 - 0.9**self.step, 1 - 0.999**self.step
        return jax.tree.map(lambda m, v: -self.lr * (m / c1) / (jnp.sqrt(v / c2) + 1e-8), first, second)


@eqx.filter_value_and_grad
def eqx_loss(diff: Any, static: Any, context: Any, x: Any, y: Any) -> Any:
    return jnp.mean((jax.vmap(eqx.combine(diff, static))(context, x) - y) ** 2)


def eqx_train(model: Any, parts: Iterable[Part], batches: Iterable[int]) -> Any:
    parts = list(parts)
    trained = jax.tree.map(lambda *flags: any(flags), *[part.spec for part in parts])
    for seed in batches:
        context, x, y = (jnp.asarray(tensor.numpy()) for tensor in batch(seed))
        _, grads = eqx_loss(*eqx.partition(model, trained), context, x, y)
        for part in parts:
            model = eqx.apply_updates(model, part.updates(grads))
    return model


# ---- how torch trains it ---------------------------------------------------------------------------------------------


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    context, x = torch.randn(16, 2, generator=draw), torch.randn(16, 3, generator=draw)
    return context, x, (context[:, :1] * x[:, :1]).sin()


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    context, x, y = batch(seed)
    return nn.functional.mse_loss(model(context, x), y)


def train(model: nn.Module, opt: torch.optim.Optimizer, batches: Iterable[int]) -> None:
    for seed in batches:
        opt.zero_grad()
        loss_of(model, seed).backward()
        opt.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_trained_as(model: nn.Module, twin: Any, before: dict[str, torch.Tensor], trained: Iterable[str]) -> None:
    """The named parts are what Equinox made of them, and moved; everything else is as it was, bit for bit."""
    inside = tuple(f"{name}." for name in trained)
    for name, param in model.named_parameters():
        if name.startswith(inside):
            expected = torch.from_numpy(jax.device_get(leaf(twin, name)).copy())
            torch.testing.assert_close(
                param.detach(), expected, rtol=1e-4, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
            )
            assert not torch.equal(param, before[name]), f"{name} did not move"
        else:
            assert same_bits(param.detach(), before[name]), name


def is_hyper(name: str, _param: torch.Tensor) -> bool:
    return name.startswith("hyper_net.")


WAYS: dict[str, Callable[[Hyper], Selection]] = {
    "pattern": lambda model: select(model, "hyper_net"),
    "module": lambda model: select(model, model.hyper_net),
    "type": lambda model: select(model, HyperNet) - select(model, "hyper_net_ema"),
    "predicate": lambda model: select(model, is_hyper),
    "rest": lambda model: ~select(model, "target_net", "*_ema"),
    "and": lambda model: select(model, "hyper_*") & ~select(model, "**_ema"),
    "or": lambda model: select(model, "hyper_net.first") | select(model, model.hyper_net.last),
}


# ---- the task --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_only_the_hypernetwork_is_trained_as_equinox_trains_it(way: str) -> None:
    """A sub-network, selected in any way, trains as Equinox's partition trains it; the rest is bit-unchanged."""
    model = Hyper()
    before, twin = values(model), as_equinox(model)
    opt = Adam(model, lr=LR)
    opt.freeze(~WAYS[way](model))
    train(model, opt, range(20))
    twin = eqx_train(twin, [Part(only(twin, "hyper_net"))], range(20))
    assert_trained_as(model, twin, before, ["hyper_net"])


def leaves_with_a_gradient(loss: torch.Tensor) -> set[torch.Tensor]:
    """The leaves that a backward from here would compute a gradient for."""
    found, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {node.variable} if hasattr(node, "variable") else set()
            waiting += [following for following, _ in node.next_functions]
    return found


def test_no_gradient_is_computed_for_what_is_frozen() -> None:
    """For what is frozen no gradient is computed and no state is made: it is not in the graph of the loss."""
    model = Hyper()
    opt = AdamW(model, lr=LR)
    assert leaves_with_a_gradient(loss_of(model, 0)) > {*model.hyper_net.parameters()}
    opt.freeze(~select(model, "hyper_net"))
    assert leaves_with_a_gradient(loss_of(model, 0)) == {*model.hyper_net.parameters()}
    train(model, opt, range(2))
    assert [name for name, param in model.named_parameters() if param.grad is not None] == opt_names(model, opt)


def opt_names(model: nn.Module, opt: Adam) -> list[str]:
    return [name for name, _ in model.named_parameters() if opt.state_of(name)]


def test_decay_and_stale_gradients_do_not_move_what_is_frozen() -> None:
    """Neither weight decay nor the momentum of earlier steps nor a stale gradient moves what is frozen."""
    model = Hyper()
    opt = AdamW(model, lr=LR, weight_decay=0.5)
    train(model, opt, range(3))
    opt.freeze(select(model, "target_net"), stop_gradient=False)
    before = values(model)
    for seed in range(10):
        loss_of(model, seed).backward()
        opt.step()
    assert all(
        same_bits(model.get_parameter(name).detach(), before[name]) for name in select(model, "target_net").names
    )
    assert not torch.equal(model.hyper_net.first.weight, before["hyper_net.first.weight"])


def test_parts_train_at_rates_of_their_own_as_in_equinox() -> None:
    """Two sub-networks in two groups at other rates give what Equinox gives with an optimizer for each."""
    model = Hyper()
    before, twin = values(model), as_equinox(model)
    opt = Adam(
        [{"params": select(model, "hyper_net"), "lr": 1e-2}, {"params": select(model, model.target_net), "lr": 1e-3}]
    )
    train(model, opt, range(20))
    twin = eqx_train(twin, [Part(only(twin, "hyper_net"), 1e-2), Part(only(twin, "target_net"), 1e-3)], range(20))
    assert_trained_as(model, twin, before, ["hyper_net", "target_net"])


def test_the_frozen_set_alternates_by_epoch_as_in_equinox() -> None:
    """Epochs train one sub-network and the other in turn; the moments of each wait, as Equinox's two states do."""
    model = Hyper()
    before, twin = values(model), as_equinox(model)
    opt = Adam(model, lr=LR)
    opt.freeze(select(model, "hyper_net_ema"))
    parts = {name: Part(only(twin, name)) for name in ("hyper_net", "target_net")}
    for epoch in range(6):
        trained = ("hyper_net", "target_net")[epoch % 2]
        resting = ("target_net", "hyper_net")[epoch % 2]
        opt.unfreeze(select(model, trained))
        opt.freeze(select(model, resting))
        waiting = {name: float(opt.state_of(name).get("step", 0.0)) for name in select(model, resting).names}
        batches = range(4 * epoch, 4 * epoch + 4)
        train(model, opt, batches)
        twin = eqx_train(twin, [parts[trained]], batches)
        assert {name: float(opt.state_of(name).get("step", 0.0)) for name in waiting} == waiting
    assert_trained_as(model, twin, before, ["hyper_net", "target_net"])
    assert float(opt.state_of("hyper_net.first.weight")["step"]) == parts["hyper_net"].step == 12


# ---- saying what is meant --------------------------------------------------------------------------------------------


def test_a_name_ends_at_a_dot() -> None:
    """``hyper_net`` does not match ``hyper_net_ema``, whose name begins alike."""
    model = Hyper()
    assert select(model, "hyper_net").params == [*model.hyper_net.parameters()]
    assert len(select(model, "hyper_net*")) == 8
    assert [name for name, _ in model.named_parameters() if name.startswith("hyper_net")] == select(
        model, "hyper_*"
    ).names


def test_a_selection_is_previewed_before_it_trains() -> None:
    """What a selection would train is shown as a table, with how much of the model it is."""
    model = Hyper()
    model.hyper_net.first.bias.requires_grad_(False)
    preview = (select(model, "hyper_net") - select(model, "**.bias")).preview()
    assert [row.name for row in preview] == ["hyper_net.first.weight", "hyper_net.last.weight"]
    assert str(preview).splitlines()[-1] == "2 of 11 parameters, 112 of 273 elements"


def test_rebind_resolves_the_selections_anew() -> None:
    """A layer that joins the sub-network joins its group at rebind, and one that joins another part does not."""
    model = Hyper()
    opt = AdamW([{"params": select(model, "hyper_net"), "lr": 1e-2}])
    train(model, opt, range(2))
    model.hyper_net.add_module("norm", nn.LayerNorm(12))
    model.target_net.add_module("gate", nn.Linear(1, 1))
    report = opt.rebind(model)
    assert report.adopted == ["hyper_net.norm.weight", "hyper_net.norm.bias"]
    assert {"target_net.gate.weight", "target_net.gate.bias"} <= {*report.unmanaged}
    assert float(opt.state_of("hyper_net.first.weight")["step"]) == 2


# ---- what is an error ------------------------------------------------------------------------------------------------


def test_an_empty_selection_is_an_error_that_suggests_the_nearest_name() -> None:
    """What selects nothing raises, with the nearest names; Equinox's empty partition silently trains nothing."""
    model = Hyper()
    twin = as_equinox(model)
    trained = eqx_train(twin, [Part(jax.tree.map(lambda _: False, twin))], range(2))
    assert eqx.tree_equal(trained, twin), "without a word"
    for what, message in (
        ("hypernet", r"'hypernet' matches no parameter; the nearest names are 'hyper_net'"),
        (nn.Conv2d, r"no module of type Conv2d holds a parameter"),
        (lambda name, _param: name.startswith("hypr"), r"holds for no parameter"),
    ):
        with pytest.raises(UnknownParameterError, match=message):
            Adam(select(model, what))
    with pytest.raises(UnknownParameterError, match="selects no parameter"):
        Adam(select(model, "hyper_net") & select(model, "hyper_net_ema"))
    opt = Adam(model)
    with pytest.raises(UnknownParameterError, match=r"the nearest names are 'hyper_net_ema'"):
        opt.freeze(~select(model, "hyper_net") - select(model, "hypernet_ema"))
    assert opt.frozen == []


def test_parts_that_overlap_are_an_error() -> None:
    """A parameter in two groups is an error that names it; subtracting one part from the other mends it."""
    model = Hyper()
    last = select(model, "hyper_net.last")
    with pytest.raises(ValueError, match=r"more than one parameter group: 'hyper_net\.last\.weight'"):
        Adam([{"params": select(model, "hyper_net")}, {"params": last, "lr": 1e-3}])
    opt = Adam([{"params": select(model, "hyper_net") - last}, {"params": last, "lr": 1e-3}])
    assert [len(group["params"]) for group in opt.param_groups] == [2, 2]


def test_a_tie_that_is_half_selected_is_an_error() -> None:
    """Where the sub-network shares a weight with what stays outside, selecting half of the tie is an error."""
    model = Hyper()
    model.hyper_net_ema.first.weight = model.hyper_net.first.weight
    with pytest.raises(SelectionError, match=r"'hyper_net\.first\.weight' is tied to 'hyper_net_ema\.first\.weight'"):
        Adam(select(model, "hyper_net"))
    opt = Adam(model)
    with pytest.raises(SelectionError, match=r"'hyper_net_ema\.first\.weight' is tied to 'hyper_net\.first\.weight'"):
        opt.freeze(select(model, "hyper_net_ema"))
    assert opt.frozen == []
    assert len(Adam(select(model, "hyper_net", "hyper_net_ema.first.weight")).ids) == 5
