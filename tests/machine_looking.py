"""`diff` and `doctor`, called at any moment: they change nothing, and find what was planted and nothing else."""

from __future__ import annotations

import copy

import torch
from hypothesis.stateful import rule
from torch import nn

import paramstate
from identity_machine import IdentityMachine, which


class Looking(IdentityMachine):
    """The invariants see that looking changed nothing."""

    @rule()
    def doctor_finds_nothing_that_was_not_planted(self) -> None:
        assert self.examined().healthy == (not self.moving())

    @rule()
    def doctor_finds_an_orphan(self) -> None:
        orphan = nn.Parameter(torch.zeros(3))
        self.opt.state[orphan] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}
        (finding,) = self.examined().orphaned_state
        assert (finding.shape, finding.bytes) == ((3,), 16)
        del self.opt.state[orphan]

    @rule(index=which)
    def doctor_finds_a_stale_copy(self, index: int) -> None:
        key = self.pick(index)
        (layer, attribute), trained = self.slots[key], self.held(key)
        self.layer(layer)._parameters[attribute] = nn.Parameter(trained.detach().clone())
        found = paramstate.doctor(self.net, self.opt)
        assert [finding.name for finding in found.stale_copies] == [self.entry(key).name]
        assert [finding.name for finding in found.trained_not_in_model] == [self.entry(key).name]
        assert not found.healthy
        self.layer(layer)._parameters[attribute] = trained

    @rule(index=which)
    def doctor_finds_an_alias(self, index: int) -> None:
        key = self.pick(index)
        like = (self.entry(key).value.shape, self.entry(key).value.dtype)
        others = [k for k, e in self.model.entries.items() if k != key and (e.value.shape, e.value.dtype) == like]
        if not others or not self.entry(key).value.numel():
            return
        own = self.held(key).data
        self.held(key).data = self.held(others[0]).data
        (finding,) = self.examined().aliases
        assert {finding.name, *finding.others} == {self.entry(key).name, self.entry(others[0]).name}
        self.held(key).data = own

    def examined(self) -> paramstate.Diagnosis:
        """A diagnosis in which everything is as it should be, but for what was planted or is known to move."""
        found = paramstate.doctor(self.net, self.opt)
        assert sorted(finding.name for finding in found.frozen_but_moving) == self.moving()
        for nothing in ("in_model_not_trained", "trained_not_in_model", "stale_copies", "processed_under_old_moments"):
            assert not getattr(found, nothing), str(found)
        return found

    def moving(self) -> list[str]:
        """The names of what a step would move though it requires no gradient."""
        decays = self.recipe.weight_decay > 0.0
        return sorted(
            entry.name
            for entry in self.model.entries.values()
            if entry.grad is not None and not entry.trains and not entry.frozen
            if decays or bool(entry.grad.any()) or ("exp_avg" in entry.moments and bool(entry.moments["exp_avg"].any()))
        )

    @rule()
    def diff_with_itself(self) -> None:
        assert {row.kind for row in paramstate.diff(self.net, self.net).rows} == {"equal"}
        assert {row.kind for row in paramstate.diff(self.opt, self.opt).rows} == {"equal"}

    @rule(index=which)
    def diff_finds_what_was_changed(self, index: int) -> None:
        entry = self.entry(self.pick(index))
        other = copy.deepcopy(self.net)
        values = dict(other.named_parameters())[entry.name].data
        values.add_(1.0)
        found = [row.a for row in paramstate.diff(self.net, other).rows if row.kind != "equal"]
        assert found == ([entry.name] if values.numel() else [])
