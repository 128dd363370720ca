"""Gaussian splatting: rows come and go while the optimizer lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gsplat.cuda._torch_impl import _quat_scale_to_covar_preci
from gsplat.strategy import DefaultStrategy, MCMCStrategy, ops
from torch import nn

import paramstate
from side_by_side import as_with_torch

OptimizerClass = type[torch.optim.Optimizer]
Params = dict[str, nn.Parameter] | nn.ParameterDict
Optimizers = dict[str, torch.optim.Optimizer]

RATES = {"means": 1e-2, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2, "sh0": 2.5e-3, "shN": 1.25e-4}
CONTAINERS = {"dict": dict, "ParameterDict": nn.ParameterDict}


@pytest.fixture(autouse=True)
def kernels_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two functions that gsplat has for CUDA alone, as torch operations."""
    monkeypatch.setattr(ops, "quat_scale_to_covar_preci", _quat_scale_to_covar_preci)
    monkeypatch.setattr(ops, "compute_relocation", relocated)


def relocated(
    opacities: torch.Tensor, scales: torch.Tensor, ratios: torch.Tensor, binoms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 9 of arXiv:2404.09591: what one Gaussian's opacity and scale are when it becomes ``ratio`` of them."""
    thinned = 1 - (1 - opacities) ** (1 / ratios)
    total = torch.zeros_like(opacities)
    for row, ratio in enumerate(ratios.tolist()):
        for i in range(1, ratio + 1):
            for k in range(i):
                total[row] += binoms[i - 1, k] * (-1) ** k / (k + 1) ** 0.5 * thinned[row] ** (k + 1)
    return thinned, (opacities / total)[:, None] * scales


def scene(rows: int = 12) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(rows, *shape, generator=draw))

    return {
        "means": drawn(3),
        "scales": drawn(3),
        "quats": drawn(4),
        "opacities": drawn(),
        "sh0": drawn(1, 3),
        "shN": drawn(15, 3),
    }


def loss_of(params: Params, seed: int) -> torch.Tensor:
    """A pull of every element towards a point that this seed draws; rows out of view get a gradient of zero."""
    draw = torch.Generator().manual_seed(seed)
    rows = len(params["means"])
    visible = torch.rand(rows, generator=draw) < 0.7
    total = torch.zeros(())
    for param in params.values():
        target = torch.randn(param.shape, generator=draw)
        total = total + 0.5 * (param - target)[visible].square().sum()
    return total


class Splats:
    """A scene with one optimizer for each attribute, as gsplat's trainer has them."""

    def __init__(self, optimizer_class: OptimizerClass, container: str = "ParameterDict") -> None:
        self.params: Params = CONTAINERS[container](scene())
        self.optimizers: Optimizers = {
            name: optimizer_class([{"params": param, "lr": RATES[name], "name": name}], eps=1e-15)
            for name, param in self.params.items()
        }
        self.losses: list[float] = []
        self.side = {"grad2d": torch.arange(12.0), "count": torch.ones(12)}

    def backward(self) -> None:
        loss = loss_of(self.params, len(self.losses))
        loss.backward()
        self.losses.append(loss.item())

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.backward()
            self.step()

    def result(self) -> Any:
        held = {
            name: {"value": param.detach(), **self.optimizers[name].state[param]} for name, param in self.params.items()
        }
        for name, param in self.params.items():
            optimizer = self.optimizers[name]
            assert optimizer.param_groups[0]["params"][0] is param
            assert len(optimizer.state) == 1, f"{name}: state of a tensor that is gone"
        return self.losses, held, self.side


def every(third: int, rows: int) -> torch.Tensor:
    return torch.arange(rows) % 3 == third


def binoms() -> torch.Tensor:
    return MCMCStrategy().initialize_state()["binoms"]


def rows(splats: Splats) -> int:
    return len(splats.params["means"])


EDITS: dict[str, Callable[[Splats], None]] = {
    "duplicate": lambda s: ops.duplicate(s.params, s.optimizers, s.side, every(0, rows(s))),
    "split": lambda s: ops.split(s.params, s.optimizers, s.side, every(1, rows(s))),
    "split, revised opacity": lambda s: ops.split(
        s.params, s.optimizers, s.side, every(1, rows(s)), revised_opacity=True
    ),
    "remove": lambda s: ops.remove(s.params, s.optimizers, s.side, every(2, rows(s))),
    "remove none": lambda s: ops.remove(s.params, s.optimizers, s.side, torch.zeros(rows(s), dtype=torch.bool)),
    "reset_opa": lambda s: ops.reset_opa(s.params, s.optimizers, s.side, 0.3),
    "relocate": lambda s: ops.relocate(s.params, s.optimizers, s.side, every(0, rows(s)), binoms()),
    "sample_add": lambda s: ops.sample_add(s.params, s.optimizers, s.side, 5, binoms()),
    "inject_noise": lambda s: ops.inject_noise_to_position(s.params, s.optimizers, s.side, 0.1),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("before", [0, 4], ids=["before the first step", "after four steps"])
def test_each_of_gsplats_operations_goes_on_as_with_torch(edit: str, container: str, before: int) -> None:
    """Each operation of gsplat's strategies, before the first step or between steps, goes on as with torch."""

    def script(optimizer_class: OptimizerClass) -> Any:
        splats = Splats(optimizer_class, container)
        splats.train(before)
        EDITS[edit](splats)
        splats.train(4)
        return splats.result()

    as_with_torch(script, "Adam", rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("container", CONTAINERS)
def test_all_of_gsplats_operations_one_after_another_go_on_as_with_torch(container: str) -> None:
    """All operations in one run, some with steps between them and some without, go on as with torch."""

    def script(optimizer_class: OptimizerClass) -> Any:
        splats = Splats(optimizer_class, container)
        for number, edit in enumerate([*EDITS.values(), *EDITS.values()]):
            splats.train(number % 3)
            edit(splats)
        splats.train(4)
        return splats.result()

    as_with_torch(script, "Adam", rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_between_backward_and_step_goes_on_as_with_torch(edit: str, container: str) -> None:
    """An operation between `backward()` and `step()`, where older trainers have it, goes on as with torch."""

    def script(optimizer_class: OptimizerClass) -> Any:
        splats = Splats(optimizer_class, container)
        splats.train(3)
        splats.backward()
        EDITS[edit](splats)
        splats.step()
        splats.train(3)
        return splats.result()

    as_with_torch(script, "Adam", rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("container", CONTAINERS)
def test_an_attribute_keeps_its_id_through_every_edit(container: str) -> None:
    """Each attribute keeps its ID through all of gsplat's operations, though its parameter is another each time."""
    splats = Splats(paramstate.Adam, container)
    splats.train(2)
    before = {name: splats.optimizers[name].id_of(param) for name, param in splats.params.items()}
    for edit in EDITS.values():
        edit(splats)
        splats.train(1)
    assert {name: splats.optimizers[name].id_of(param) for name, param in splats.params.items()} == before


def test_gsplats_default_strategy_densifies_as_with_torch() -> None:
    """`DefaultStrategy` (grow, prune, reset) drives our optimizers through a run as it drives torch's."""

    def script(optimizer_class: OptimizerClass) -> Any:
        splats = Splats(optimizer_class)
        strategy = DefaultStrategy(refine_start_iter=1, refine_every=3, reset_every=7, grow_grad2d=1.0, prune_opa=0.2)
        strategy.check_sanity(splats.params, splats.optimizers)
        state = strategy.initialize_state(scene_scale=50.0)
        counts = []
        for step in range(14):
            means2d = splats.params["means"][None, :, :2] * 1.0
            radii = torch.ones(1, rows(splats), 2)
            info = {"means2d": means2d, "radii": radii, "width": 4, "height": 4, "n_cameras": 1, "gaussian_ids": None}
            strategy.step_pre_backward(splats.params, splats.optimizers, state, step, info)
            loss = loss_of(splats.params, step) + means2d.square().sum()
            loss.backward()
            splats.losses.append(loss.item())
            splats.step()
            strategy.step_post_backward(splats.params, splats.optimizers, state, step, info)
            counts.append(rows(splats))
        return counts, splats.result()

    counts, _ = as_with_torch(script, "Adam", rtol=1e-3, atol=1e-5)
    assert len(set(counts)) > 2, "the strategy changed nothing"


def test_gsplats_markov_chain_strategy_relocates_as_with_torch() -> None:
    """`MCMCStrategy` (relocate, add, noise) drives our optimizers through a run as it drives torch's."""

    def script(optimizer_class: OptimizerClass) -> Any:
        splats = Splats(optimizer_class)
        strategy = MCMCStrategy(refine_start_iter=1, refine_every=2, noise_lr=1.0, cap_max=40, min_opacity=0.3)
        state = strategy.initialize_state()
        counts = []
        for step in range(10):
            splats.train(1)
            strategy.step_post_backward(splats.params, splats.optimizers, state, step, {}, lr=1e-2)
            counts.append(rows(splats))
        return counts, splats.result()

    as_with_torch(script, "Adam", rtol=1e-3, atol=1e-5)


class Gaussians:
    """One optimizer with a group for each attribute, edited as the first implementations do."""

    def __init__(self, optimizer_class: OptimizerClass, values: dict[str, torch.Tensor] | None = None) -> None:
        given = scene() if values is None else {name: nn.Parameter(value.clone()) for name, value in values.items()}
        for name, param in given.items():
            self.keep(name, param)
        groups = [{"params": [param], "lr": RATES[name], "name": name} for name, param in given.items()]
        self.optimizer = optimizer_class(groups, lr=0.0, eps=1e-15)
        self.losses: list[float] = []

    def keep(self, name: str, param: nn.Parameter) -> None:
        setattr(self, f"_{name}", param)

    def params(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, f"_{name}") for name in RATES}

    def backward(self) -> None:
        loss = loss_of(self.params(), len(self.losses))
        loss.backward()
        self.losses.append(loss.item())

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.backward()
            self.step()

    def replace(self, name: str, value: torch.Tensor) -> None:
        """A new value with moments of zero: the reset of opacities."""
        for group in self.optimizer.param_groups:
            if group["name"] == name:
                stored = self.optimizer.state.get(group["params"][0])
                if stored is not None:
                    stored["exp_avg"] = torch.zeros_like(value)
                    stored["exp_avg_sq"] = torch.zeros_like(value)
                    del self.optimizer.state[group["params"][0]]
                group["params"][0] = nn.Parameter(value.requires_grad_(True))
                if stored is not None:
                    self.optimizer.state[group["params"][0]] = stored
                self.keep(name, group["params"][0])

    def prune(self, keep: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            stored = self.optimizer.state.get(group["params"][0], None)
            if stored is not None:
                stored["exp_avg"] = stored["exp_avg"][keep]
                stored["exp_avg_sq"] = stored["exp_avg_sq"][keep]
                del self.optimizer.state[group["params"][0]]
            group["params"][0] = nn.Parameter(group["params"][0][keep].requires_grad_(True))
            if stored is not None:
                self.optimizer.state[group["params"][0]] = stored
            self.keep(group["name"], group["params"][0])

    def append(self, extra: dict[str, torch.Tensor]) -> None:
        for group in self.optimizer.param_groups:
            assert len(group["params"]) == 1
            more = extra[group["name"]]
            stored = self.optimizer.state.get(group["params"][0], None)
            if stored is not None:
                for key in ("exp_avg", "exp_avg_sq"):
                    stored[key] = torch.cat((stored[key], torch.zeros_like(more)), dim=0)
                del self.optimizer.state[group["params"][0]]
            group["params"][0] = nn.Parameter(torch.cat((group["params"][0], more), dim=0).requires_grad_(True))
            if stored is not None:
                self.optimizer.state[group["params"][0]] = stored
            self.keep(group["name"], group["params"][0])

    def reset_opacities(self) -> None:
        self.replace("opacities", self.params()["opacities"].detach().clamp(max=-0.5))

    def densify_and_prune(self) -> None:
        """Copies of some rows are appended, the rows before them pruned."""
        with torch.no_grad():
            chosen = every(0, len(self.params()["means"]))
            self.append({name: param.detach()[chosen] * 1.01 for name, param in self.params().items()})
            self.prune(~torch.cat((chosen, torch.zeros(int(chosen.sum()), dtype=torch.bool))))

    def result(self) -> Any:
        params = self.params()
        assert [group["params"][0] for group in self.optimizer.param_groups] == list(params.values())
        assert len(self.optimizer.state) <= len(params), "state of a tensor that is gone"
        return self.losses, {n: {"value": p.detach(), **self.optimizer.state.get(p, {})} for n, p in params.items()}


class ModuleOfGaussians(nn.Module, Gaussians):
    """The same with an `nn.Module` as the keeper: assigning to it is a registration."""

    def __init__(self, optimizer_class: OptimizerClass, values: dict[str, torch.Tensor] | None = None) -> None:
        nn.Module.__init__(self)
        Gaussians.__init__(self, optimizer_class, values)

    def train(self, steps: int) -> None:
        Gaussians.train(self, steps)


KEEPERS = [Gaussians, ModuleOfGaussians]
BY_HAND: dict[str, Callable[[Gaussians], None]] = {
    "replace": Gaussians.reset_opacities,
    "prune": lambda g: g.prune(~every(2, len(g.params()["means"]))),
    "append": lambda g: g.append({name: param.detach()[:4] for name, param in g.params().items()}),
    "prune all, then append": lambda g: (
        g.prune(torch.zeros(len(g.params()["means"]), dtype=torch.bool)),
        g.append({name: param.detach() for name, param in scene(5).items()}),
    )[0],
    "densify and prune": Gaussians.densify_and_prune,
}


@pytest.mark.parametrize("keeper", KEEPERS)
@pytest.mark.parametrize("edit", BY_HAND)
@pytest.mark.parametrize("before", [0, 4], ids=["before the first step", "after four steps"])
def test_surgery_written_by_hand_goes_on_as_with_torch(edit: str, keeper: type[Gaussians], before: int) -> None:
    """Replace, prune and append by re-keying `state` under a new parameter of the group go on as with torch."""

    def script(optimizer_class: OptimizerClass) -> Any:
        gaussians = keeper(optimizer_class)
        gaussians.train(before)
        BY_HAND[edit](gaussians)
        gaussians.train(4)
        return gaussians.result()

    as_with_torch(script, "Adam", rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keeper", KEEPERS)
def test_surgery_between_backward_and_step_goes_on_as_with_torch(keeper: type[Gaussians]) -> None:
    """Surgery between `backward()` and `step()`, in a run with all edits, goes on as with torch."""

    def script(optimizer_class: OptimizerClass) -> Any:
        gaussians = keeper(optimizer_class)
        for number, edit in enumerate([*BY_HAND.values(), *BY_HAND.values()]):
            gaussians.train(number % 3 + 1)
            gaussians.backward()
            edit(gaussians)
            gaussians.step()
        gaussians.train(3)
        return gaussians.result()

    as_with_torch(script, "Adam", rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("keeper", KEEPERS)
def test_a_scene_that_was_densified_is_saved_and_restored(keeper: type[Gaussians]) -> None:
    """A densified scene, captured and restored into a new optimizer, goes on bit-equal to the one that went on."""

    def script(optimizer_class: OptimizerClass) -> Any:
        gaussians = keeper(optimizer_class)
        gaussians.train(3)
        gaussians.densify_and_prune()
        gaussians.train(2)
        values = {name: param.detach() for name, param in gaussians.params().items()}
        torch.save((values, gaussians.optimizer.state_dict(), gaussians.losses), "chkpnt.pth")
        gaussians.train(3)
        values, state, losses = torch.load("chkpnt.pth", weights_only=True)
        restored = keeper(optimizer_class, values)
        restored.losses = losses
        restored.optimizer.load_state_dict(state)
        restored.train(3)
        torch.testing.assert_close(restored.result(), gaussians.result(), rtol=0, atol=0)
        return restored.result()

    as_with_torch(script, "Adam", rtol=1e-4, atol=1e-6)


def nerfstudio_edit(optimizers: Optimizers, params: Params, keep: torch.Tensor, copies: torch.Tensor) -> None:
    """Rows out and copies in, as nerfstudio's splatting does: the list of the group is deleted and made anew."""
    with torch.no_grad():
        new = {name: nn.Parameter(torch.cat([param[keep], param[copies]])) for name, param in params.items()}
    for name, param in new.items():
        params[name] = param
    for name, optimizer in optimizers.items():
        replace_in_nerfstudios_way(optimizer, [new[name]], keep, copies)


def replace_in_nerfstudios_way(
    optimizer: torch.optim.Optimizer, new: list[nn.Parameter], keep: torch.Tensor, copies: torch.Tensor
) -> None:
    param = optimizer.param_groups[0]["params"][0]
    state = optimizer.state[param]
    if "exp_avg" in state:
        for key in ("exp_avg", "exp_avg_sq"):
            fresh = torch.zeros_like(state[key][copies])
            state[key] = torch.cat([state[key][keep], fresh])
    del optimizer.state[param]
    optimizer.state[new[0]] = state
    optimizer.param_groups[0]["params"] = new
    del param


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("before", [0, 4], ids=["before the first step", "after four steps"])
def test_parameters_replaced_in_the_model_first_go_on_as_with_torch(container: str, before: int) -> None:
    """A client that first assigns to the model and then finds the old tensor in the group goes on as with torch."""

    def script(optimizer_class: OptimizerClass) -> Any:
        splats = Splats(optimizer_class, container)
        splats.train(before)
        for third in (0, 2):
            chosen = every(third, rows(splats))
            nerfstudio_edit(splats.optimizers, splats.params, ~every(1, rows(splats)), chosen)
            splats.train(3)
        return splats.result()

    as_with_torch(script, "Adam", rtol=1e-4, atol=1e-6)
