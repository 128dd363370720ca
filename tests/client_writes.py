"""What the clients of torch.optim write into an optimizer by hand, as actions of the state machine.

Each is taken from real projects: Gaussian splatting (gsplat, 3DGS), Lightning, Accelerate, torchtitan, schedulers.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import nn

from identity_machine import IdentityMachine, seeds, which

moment_names = st.sampled_from(["exp_avg", "exp_avg_sq"])


def drawn(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Random numbers of this shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like.dtype)


class ClientWrites(IdentityMachine):
    """Actions that go around the library's own calls; each must be taken literally by the next step."""

    def stepped(self) -> list[str]:
        return [key for key, entry in self.model.entries.items() if entry.step is not None]

    def pick_stepped(self, index: int) -> str:
        return self.stepped()[index % len(self.stepped())]

    @precondition(lambda self: self.stepped())
    @rule(index=which, name=moment_names, seed=seeds, dtype=st.sampled_from(["own", "bfloat16", "float32", "float64"]))
    def a_moment_is_another_tensor(self, index: int, name: str, seed: int, dtype: str) -> None:
        key = self.pick_stepped(index)
        old = self.entry(key).moments[name]
        new = drawn(old, seed).square()
        wide = torch.float64 in (self.entry(key).value.dtype, old.dtype)
        if dtype == "float64" and self.entry(key).value.dtype != torch.bfloat16:
            new = new.double()
        elif dtype in ("bfloat16", "float32") and not wide:
            new = new.to(getattr(torch, dtype))
        self.opt.state[self.held(key)][name] = new.clone()
        self.entry(key).moments[name] = new
        self.entry(key).compact -= {name}
        self.may_widen.discard((key, name))

    @precondition(lambda self: self.stepped())
    @rule(index=which, name=moment_names, seed=seeds)
    def a_moments_data_is_other_memory(self, index: int, name: str, seed: int) -> None:
        key = self.pick_stepped(index)
        new = drawn(self.entry(key).moments[name], seed).square()
        self.opt.state[self.held(key)][name].data = new.clone()
        self.entry(key).write_moment(name, new)

    @precondition(lambda self: self.stepped())
    @rule(index=which)
    def rows_of_the_moments_are_zeroed(self, index: int) -> None:
        key = self.pick_stepped(index)
        for name, moment in list(self.entry(key).moments.items()):
            self.opt.state[self.held(key)][name][:1] = 0
            moment[:1] = 0
            self.entry(key).write_moment(name, moment)

    @precondition(lambda self: self.stepped())
    @rule(index=which)
    def the_inner_dict_is_another_in_another_order(self, index: int) -> None:
        parameter = self.held(self.pick_stepped(index))
        self.opt.state[parameter] = {k: t.clone() for k, t in reversed(self.opt.state[parameter].items())}

    @precondition(lambda self: self.stepped())
    @rule(index=which, step=st.integers(1, 9), dtype=st.sampled_from([torch.float32, torch.float64, torch.int64]))
    def step_is_another_tensor(self, index: int, step: int, dtype: torch.dtype) -> None:
        key = self.pick_stepped(index)
        entry = self.entry(key)
        if entry.rows is not None and entry.rows.ages:
            step += entry.steps - min(entry.rows.ages)  # no row was made after it
            entry.rows.ages = [age + step - entry.steps for age in entry.rows.ages]
        self.opt.state[self.held(key)]["step"] = torch.tensor(step, dtype=dtype)
        entry.step = step

    @precondition(lambda self: self.stepped())
    @rule(index=which)
    def the_state_is_deleted(self, index: int) -> None:
        key = self.pick_stepped(index)
        del self.opt.state[self.held(key)]
        self.entry(key).forget()

    @rule(copied=st.booleans())
    def the_whole_mapping_is_another(self, copied: bool) -> None:
        old = self.opt.state
        new = {p: {k: t.clone() for k, t in inner.items()} for p, inner in old.items()} if copied else old
        self.opt.state = defaultdict(dict, new)

    @precondition(lambda self: self.stepped())
    @rule(index=which, seed=seeds)
    def gaussian_splatting_puts_a_new_parameter_under_the_old_state(self, index: int, seed: int) -> None:
        key = self.pick_stepped(index)
        self.opt.zero_grad()  # these clients edit after a step, when gradients are gone
        self.forget_gradients()
        old, entry = self.held(key), self.entry(key)
        state = self.opt.state[old]
        del self.opt.state[old]
        for name in entry.moments:
            state[name] = state[name].clone()
        new = nn.Parameter(drawn(entry.value, seed).requires_grad_(True))
        params = self.opt.param_groups[entry.group]["params"]
        self.opt.param_groups[entry.group]["params"] = [new if p is old else p for p in params]
        self.opt.state[new] = state
        layer, attribute = self.slots[key]
        setattr(self.layer(layer), attribute, new)
        entry.value = new.detach().clone()
        entry.replaced_by(trains=True)

    @rule(lr=st.sampled_from([0, 1, 0.003, np.float64(0.02), "tensor"]), group=which)
    def lr_is_edited(self, lr: float | str, group: int) -> None:
        number = group % len(self.model.groups)
        written = torch.tensor(0.05) if isinstance(lr, str) else lr
        self.opt.param_groups[number]["lr"] = written
        self.model.groups[number] = replace(self.model.groups[number], lr=float(written))

    @rule(betas=st.sampled_from([[0.8, 0.99], (0.9, 0.999), [0.0, 0.0]]), group=which)
    def betas_are_edited(self, betas: list[float], group: int) -> None:
        number = group % len(self.model.groups)
        self.opt.param_groups[number]["betas"] = betas
        self.model.groups[number] = replace(self.model.groups[number], beta1=betas[0], beta2=betas[1])

    @rule()
    def the_groups_are_other_dicts(self) -> None:
        self.opt.param_groups = [dict(group, params=list(group["params"])) for group in self.opt.param_groups]
