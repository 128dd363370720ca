"""A declared constraint outlives everything that keeps a parameter's meaning: every kind through every event."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from paramstate import AdamW, Box, Constraint, MaxNorm, NonNegative, UnitNorm, edit

Pair = tuple[nn.Module, AdamW]


def clamped(values: Tensor) -> Tensor:
    """A constraint that is a function; at the top of a module, so that it pickles."""
    return values.clamp(-0.1, 0.1)


class Clamped(Constraint):
    """The same as a class of the user's."""

    def require_fits(self, param: Tensor, called: str) -> None:
        pass

    def project_(self, param: Tensor, called: str) -> None:  # noqa: ARG002
        param.clamp_(-0.1, 0.1)

    def holds(self, param: Tensor) -> bool:
        return bool((param.abs() <= 0.1).all())

    def as_data(self) -> dict[str, object]:
        return {"kind": "clamped"}


CONSTRAINTS = {
    "numbers": Box(-0.05, 0.05),
    "each row": Box(torch.linspace(-0.3, -0.1, 4)[:, None], torch.linspace(0.1, 0.2, 4)[:, None]),
    "non-negative": NonNegative(),
    "norms of rows": MaxNorm(0.2, dim=1),
    "one norm": MaxNorm(0.3),
    "unit norms": UnitNorm(dim=1),
    "function": clamped,
    "class": Clamped(),
}
NOT_SAVED = {"function", "class"}


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})


def trained(model: nn.Module, opt: AdamW, steps: int = 2) -> Pair:
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        opt.step()
    return model, opt


def rebound(_: nn.ModuleDict, opt: AdamW) -> Pair:
    other = net()
    opt.rebind(other)
    return other, opt


def wrapped(model: nn.ModuleDict, opt: AdamW) -> Pair:
    parallel = nn.DataParallel(model)
    opt.rebind(parallel)
    return parallel, opt


def loaded(_: nn.ModuleDict, opt: AdamW) -> Pair:
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = net()
    fresh = AdamW(other, lr=0.3)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return other, fresh


def pickled(model: nn.ModuleDict, opt: AdamW) -> Pair:
    other, fresh = pickle.loads(pickle.dumps((model, opt)))
    fresh.rebind(other)
    return other, fresh


def assigned(model: nn.ModuleDict, opt: AdamW) -> Pair:
    model["a"].weight = nn.Parameter(torch.randn(4, 3))
    return model, opt


def replaced(model: nn.ModuleDict, opt: AdamW) -> Pair:
    opt.replace_("a.weight", torch.randn(4, 3))
    return model, opt


def converted(model: nn.ModuleDict, opt: AdamW) -> Pair:
    return model.double(), opt


def at_no_rate(model: nn.ModuleDict, opt: AdamW) -> Pair:
    model["a"].weight.data.normal_()
    for group in opt.param_groups:
        group["lr"] = 0.0
    return model, opt


def edited(model: nn.ModuleDict, opt: AdamW) -> Pair:
    with opt.edit("a.weight", state="reset") as session:
        model["a"].weight.data.normal_()
        session.commit()
    return model, opt


def edited_without_optimizer(model: nn.ModuleDict, opt: AdamW) -> Pair:
    with edit(model) as session:
        model["a"].weight = nn.Parameter(torch.randn(4, 3))
        session.commit()
    return model, opt


def frozen_meanwhile(model: nn.ModuleDict, opt: AdamW) -> Pair:
    opt.freeze("a")
    model["a"].weight.data.normal_()
    trained(model, opt)
    opt.unfreeze("a")
    return model, opt


def rows_moved(model: nn.ModuleDict, opt: AdamW) -> Pair:
    with opt.edit_rows() as rows:
        rows.append("a.weight", torch.randn(2, 3), state_of=[3, 1])
        rows.gather("a.weight", [0, 5, 2, 4])
    return model, opt


EVENTS: dict[str, Callable[[nn.ModuleDict, AdamW], Pair]] = {
    "deepcopy": lambda model, opt: copy.deepcopy((model, opt)),
    **{
        event.__name__: event
        for event in (
            rebound, wrapped, loaded, pickled, assigned, replaced, converted, at_no_rate, edited,
            edited_without_optimizer, frozen_meanwhile, rows_moved,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_a_declared_constraint_survives(kind: str, event: str) -> None:
    if event == "loaded" and kind in NOT_SAVED:
        pytest.skip("what is code is not saved; the report of the load names it, which has a test of its own")
    constraint = CONSTRAINTS[kind]
    model = net()
    opt = AdamW(model, lr=0.3, constraints={"a.weight": constraint})
    trained(model, opt)
    later, later_opt = EVENTS[event](model, opt)
    trained(later, later_opt)
    weight = later_opt.param(later_opt.ids["a.weight"]).detach()
    assert any(param is later_opt.param(later_opt.ids["a.weight"]) for param in later.parameters())
    assert float(later_opt.state_of("a.weight")["step"]) >= 2
    check = Clamped() if callable(constraint) and not isinstance(constraint, Constraint) else constraint
    assert isinstance(check, Constraint)
    assert check.holds(weight)
    assert not check.holds(torch.full_like(weight, -3.0)), "the constraint says something"
