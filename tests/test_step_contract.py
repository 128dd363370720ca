"""torch-contract.md: what surrounds the numbers of a step: hooks, closures, schedulers, scalers, fallbacks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from small_models import Net, give_gradient

CLASSES = [(paramstate.Adam, torch.optim.Adam), (paramstate.AdamW, torch.optim.AdamW)]


@pytest.mark.parametrize(("ours", "theirs"), CLASSES)
def test_the_classes_are_torchs_classes(ours: type, theirs: type) -> None:
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__
    opt, stock = ours(Net().parameters()), theirs(Net().parameters())
    assert opt.defaults == stock.defaults
    assert opt.param_groups[0].keys() == stock.param_groups[0].keys(), "no new keys in a group"
    assert not opt.state
    assert not hasattr(opt, "train")
    assert not hasattr(opt, "eval")


@pytest.mark.parametrize(("ours", "theirs"), CLASSES)
def test_the_constructors_begin_with_torchs_signature(ours: type, theirs: type) -> None:
    mine, stock = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    positional = [p.name for p in stock.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in mine.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:] == positional[1:]
    for name, parameter in stock.items():
        if name != "params":
            assert mine[name].default == parameter.default
            assert mine[name].kind == parameter.kind


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0"),
        ({"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
        ({"betas": (1.0, 0.0)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        (
            {"lr": torch.tensor(0.1), "foreach": True},
            ValueError,
            "lr as a Tensor is not supported for capturable",
        ),
        ({"betas": (0.9, torch.tensor(0.99))}, ValueError, "betas must be either both floats or both Tensors"),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together."),
    ],
)
def test_errors_of_the_constructor_are_torchs(options: dict[str, Any], error: type[Exception], text: str) -> None:
    for cls in (paramstate.Adam, torch.optim.Adam):
        with pytest.raises(error, match=text):
            cls([nn.Parameter(torch.ones(2))], **options)


def test_a_tensor_lr_is_stored_as_it_is_and_read_on_every_step() -> None:
    lr = torch.tensor(0.1)
    parameter = nn.Parameter(torch.zeros(1))
    opt = paramstate.Adam([parameter], lr=lr)
    assert opt.param_groups[0]["lr"] is lr
    parameter.grad = torch.ones(1)
    opt.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.1]))
    lr.fill_(0.5)
    opt.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.6]))


def test_tensor_betas_are_read() -> None:
    pair = []
    for cls in (paramstate.Adam, torch.optim.Adam):
        parameter = nn.Parameter(torch.zeros(3))
        opt = cls([parameter], lr=0.1, betas=(torch.tensor([0.5]), torch.tensor(0.6)), foreach=False)
        for seed in range(3):
            give_gradient(parameter, str(seed))
            opt.step()
        pair.append(parameter)
    torch.testing.assert_close(*pair)


def test_capturable_means_nothing_to_a_fused_step_on_the_host() -> None:
    """Torch takes the two together, and its fused kernel then reads a sliced parameter's memory as if it were dense."""
    pair = []
    for options in ({"capturable": True, "fused": True}, {}):
        parameter = nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6)[:, ::2])
        opt = paramstate.Adam([parameter], lr=0.1, max_grad_norm=1.0, **options)
        for seed in range(3):
            give_gradient(parameter, str(seed))
            opt.step()
        assert float(opt.grad_norm) > 1
        pair.append(parameter)
    assert torch.equal(*pair)
