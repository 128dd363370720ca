"""What is declared for parameters, as actions of the state machine: frozen or not, and constraints."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.stateful import rule

import paramstate
from client_writes import drawn
from identity_machine import IdentityMachine, meanings, seeds, which
from reference_limits import Limit, RefusedError


def halved_beyond_one(values: torch.Tensor) -> torch.Tensor:
    """Not idempotent: that it is applied once in each step, and no more, shows."""
    return torch.where(values.abs() > 1.0, values / 2.0, values)


def with_rising_signs(values: torch.Tensor) -> torch.Tensor:
    """Looks at where elements stand, so that a mix-up of rows shows; a zero is no negative one."""
    return torch.where(torch.arange(values.numel()).reshape(values.shape) % 2 == 0, values.abs(), 0.0 - values.abs())


KINDS = ("box", "box of each element", "box of each row", "non-negative", "max norm", "unit norm", "function")


class Declarations(IdentityMachine):
    """Freezing and constraints, on arguments of every kind."""

    @rule(index=which, how=meanings, stop=st.booleans())
    def freeze(self, index: int, how: str, stop: bool) -> None:
        argument, keys = self.meant(index, how)
        self.opt.freeze(argument, stop_gradient=stop)
        for key in keys:
            self.entry(key).freeze(stop_gradient=stop)

    @rule(index=which, how=meanings)
    def unfreeze(self, index: int, how: str) -> None:
        argument, keys = self.meant(index, how)
        self.opt.unfreeze(argument)
        for key in keys:
            self.entry(key).unfreeze()

    @rule()
    def zero_grad_in_place(self) -> None:
        self.opt.zero_grad(set_to_none=False)
        for entry in self.model.entries.values():
            entry.grad = None if entry.grad is None else torch.zeros_like(entry.grad)

    @rule(index=which, how=meanings)
    def reset(self, index: int, how: str) -> None:
        argument, keys = self.meant(index, how)
        self.opt.reset(argument)
        for key in keys:
            self.entry(key).forget()

    @rule(index=which, how=meanings, kind=st.sampled_from(KINDS), zero=st.booleans(), seed=seeds)
    def constrain(self, index: int, how: str, kind: str, zero: bool, seed: int) -> None:
        if kind == "function" and self.model.rounding == "stochastic":
            return  # of values that the library may choose
        argument, keys = self.meant(index, how)
        limit = self.limit(keys[0], kind, zero, seed)
        fits = all(limit.fits(self.entry(key).value) for key in keys)
        if any(isinstance(bound, torch.Tensor) for bound in (limit.low, limit.high)):
            argument, keys = self.held(keys[0]), keys[:1]
        with self.refused(None if fits else RefusedError(paramstate.ConstraintError)):
            self.opt.constrain(argument, limit.declared())
        if fits:
            for key in keys:
                self.entry(key).limit = limit
                self.entry(key).project()
            self.take_over_norms(keys)

    @rule(index=which, how=meanings)
    def take_the_constraint_off(self, index: int, how: str) -> None:
        argument, keys = self.meant(index, how)
        self.opt.constrain(argument, None)
        for key in keys:
            self.entry(key).limit = None

    def limit(self, key: str, kind: str, zero: bool, seed: int) -> Limit:
        """A constraint of this kind; bounds are multiples of 1/8, which every dtype holds."""
        if kind == "box":
            return Limit(*((-0.5, 0.75), (None, 0.5), (0.25, None))[seed % 3], zero)
        if kind == "non-negative":
            return Limit(0.0, zero_exp_avg=zero)
        if kind == "max norm":
            return Limit(norm=(0.5, 1.0, 2.0)[seed % 3], dim=(None, 0, 1)[seed // 3 % 3])
        if kind == "unit norm":
            return Limit(norm=1.0, is_exact=True, dim=(None, 0, 1)[seed % 3])
        if kind == "function":
            return Limit(function=(halved_beyond_one, with_rising_signs)[seed % 2])
        shape = list(self.entry(key).value.shape)
        if kind == "box of each row":
            shape[seed % len(shape)] = 1
        drawn_bounds = drawn(torch.empty(shape), seed).mul(4).round().div(8)
        low, high = drawn_bounds.clamp(max=0.0) - 0.25, drawn_bounds.clamp(min=0.0) + 0.25
        return Limit(*((low, high), (None, high), (low, 1.0), (low.double(), None))[seed // 2 % 4], zero)
