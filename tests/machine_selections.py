"""Groups that were given as selections, as actions of the state machine: `rebind` adds to them what belongs to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis.stateful import precondition, rule

import paramstate
from identity_machine import IdentityMachine
from small_models import Layer

CLAIMED = ("x", "y", "z")
"""The layers that the selection of a group names, whether they are there or not."""


@dataclass(frozen=True)
class InClaimedLayers:
    """A predicate that pickles."""

    def __call__(self, name: str, _: torch.Tensor) -> bool:
        return name.split(".", maxsplit=1)[0] in CLAIMED


class Selected(IdentityMachine):
    """One group is a selection; layers that it names come later."""

    def unused_claimed_name(self) -> str | None:
        return next((name for name in CLAIMED if name not in self.layers()), None)

    @precondition(
        lambda self: not set(CLAIMED) & set(self.layers()) and self.claiming is None and len(self.model.groups) < 4
    )
    @rule()
    def add_a_group_by_selection(self) -> None:
        if not self.knows_model:
            self.opt.rebind(self.net)
            self.knows_model = True
        setattr(self.net, CLAIMED[0], Layer())
        self.opt.add_param_group({"params": paramstate.select(self.net, InClaimedLayers()), "lr": 0.03})
        self.model.groups.append(self.settings_of(0.03))
        self.claiming = len(self.model.groups) - 1
        self.enter(CLAIMED[0], group=self.claiming)

    @precondition(lambda self: self.claiming is not None and self.unused_claimed_name() and not self.sessions)
    @rule()
    def a_layer_comes_that_a_group_claims(self) -> None:
        name = self.unused_claimed_name()
        assert name is not None
        assert self.claiming is not None
        setattr(self.net, name, Layer())
        report = self.opt.rebind(self.net)
        self.knows_model = True
        assert sorted(report.adopted) == [f"{name}.bias", f"{name}.weight"]
        self.enter(name, group=self.claiming)
