"""The little models that the tests train, and ways to give them gradients and to compare two of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import nn

from reference import same_bits


class Layer(nn.Module):
    """A linear layer whose attribute order can be chosen, because loading must not depend on it."""

    def __init__(self, order: Iterable[str] = ("weight", "bias")) -> None:
        super().__init__()
        shapes = {"weight": (2, 3), "bias": (2,)}
        for attribute in order:
            self.register_parameter(attribute, nn.Parameter(torch.randn(shapes[attribute])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Net(nn.Module):
    """Layers of one and the same shape, so that every mix-up of two parameters' state is possible."""

    def __init__(self, names: Iterable[str] = ("first", "second", "third")) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, Layer())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(layer(x) for layer in self.children())


def set_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Give every parameter the gradient that this seed and its name stand for, by a real backward."""
    for name, parameter in model.named_parameters():
        give_gradient(parameter, f"{name}:{seed}", scale)


def give_gradient(parameter: torch.Tensor, seed: str, scale: float = 1.0) -> None:
    """Backward through a sum, which gives exactly the drawn numbers as the gradient."""
    draw = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    wanted = scale * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    parameter.grad = None
    (parameter * wanted).sum().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: Iterable[int]) -> None:
    """One step for each seed."""
    for seed in seeds:
        optimizer.zero_grad()
        set_gradients(model, seed)
        optimizer.step()


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of the value and the state of each parameter of the model, under its name."""
    found = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors = {"value": parameter, **state}
        found[name] = {key: torch.as_tensor(tensor).detach().clone() for key, tensor in tensors.items()}
    return found


def assert_same_bits(
    a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]], names: Iterable[str] | None = None
) -> None:
    """Value, moments and step of two runs are the same, bit for bit."""
    for name in a.keys() | b.keys() if names is None else names:
        assert a[name].keys() == b[name].keys(), f"{name}: {list(a[name])} and {list(b[name])}"
        for key in a[name]:
            assert same_bits(a[name][key], b[name][key]), f"{name}, {key}: {a[name][key]} and {b[name][key]}"


def assert_trains(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One more step moves every parameter that is in the model now."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, optimizer, [977])
    for name, parameter in model.named_parameters():
        assert not torch.equal(before[name], parameter), f"{name} did not move"
