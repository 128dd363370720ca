"""Everything that users do to a model and its optimizer, in any order, against the slow reference.

`PARAMSTATE_SOAK_SECONDS=600 pytest tests/test_state_machine.py` goes on for that long, with a new seed each round; the
seed of a failing round is printed.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import time
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import settings, strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from torch import nn

import paramstate
from client_writes import ClientWrites, drawn
from identity_machine import NAMES, Recipe, kinds, recipes, roundings, seeds, which
from machine_combined import Combined
from machine_looking import Looking
from machine_relayout import Relayout
from machine_selections import CLAIMED, Selected
from reference_precision import COMPENSATION, Kind, is_short
from small_models import Layer, Net

MAX_LAYERS = 5


def shuffled(items: list, seed: int) -> list:
    return random.Random(seed).sample(items, len(items))


class Training(ClientWrites):
    """Backward, step, and what happens to the values."""

    @initialize(recipe=recipes, steps=st.integers(0, 3))
    def begin(self, recipe: Recipe, steps: int) -> None:
        """Most runs begin with state: what an action does to it is what most of them are about."""
        self.build(recipe)
        self.train(seed=0, without=set(), times=steps)

    @rule(seed=seeds, without=st.sets(which, max_size=1), times=st.integers(1, 3))
    def train(self, seed: int, without: set[int], times: int) -> None:
        for number in range(times):
            self.backward(seed + number, without)
            self.step()

    @rule(seed=seeds, without=st.sets(which, max_size=3))
    def backward(self, seed: int, without: set[int]) -> None:
        self.opt.zero_grad()
        skipped = {self.pick(index) for index in without}
        for number, (key, entry) in enumerate(self.model.entries.items()):
            parameter = self.held(key)
            entry.grad = None
            if key in skipped or not parameter.requires_grad:
                continue
            # Multiples of 1/64: their squares sum exactly in any order, which the bits of the global norm need.
            wanted = (drawn(entry.value.float(), seed + number) * 64).round().div(64).to(entry.value.dtype)
            (parameter * wanted).sum().backward()
            entry.grad = wanted

    @rule()
    def step(self) -> None:
        self.opt.step()
        self.follow_step()

    @rule()
    def zero_grad(self) -> None:
        self.opt.zero_grad()
        self.forget_gradients()

    @rule(index=which, bounds=st.sampled_from([(-0.25, 0.25), (None, 0.5), (0.0, None), (0.5, 0.5)]))
    def clip(self, index: int, bounds: tuple[float | None, float | None]) -> None:
        key = self.pick(index)
        assert paramstate.clip_(self.held(key), *bounds) is self.held(key)
        self.entry(key).value = self.entry(key).value.clamp(*bounds)

    @rule(index=which)
    def clip_by_a_callback(self, index: int) -> None:
        key = self.pick(index)
        value = self.entry(key).value
        if value.numel():
            paramstate.clip_(self.held(key), lambda values: values.clamp(max=values.flatten()[0]))
            self.entry(key).value = value.clamp(max=value.flatten()[0])

    @rule(index=which, seed=seeds)
    def data_assign(self, index: int, seed: int) -> None:
        key = self.pick(index)
        new = drawn(self.entry(key).value, seed)
        self.held(key).data = new.clone()
        self.entry(key).value = new

    @rule(index=which, on=st.booleans())
    def requires_grad_is_set_by_hand(self, index: int, on: bool) -> None:
        key = self.pick(index)
        self.held(key).requires_grad_(on)
        self.entry(key).trains = on

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def dtype_move(self, dtype: torch.dtype) -> None:
        moments = [moment for entry in self.model.entries.values() for moment in entry.moments.values()]
        if dtype == torch.bfloat16 and any(moment.dtype == torch.float64 for moment in moments):
            return  # float64 to bfloat16 may be rounded by way of float32, as torch does, or at once
        self.net.to(dtype)
        for entry in self.model.entries.values():
            entry.value = entry.value.to(dtype)
            entry.grad = None if entry.grad is None else entry.grad.to(dtype)
        self.allow_widening()


class Replacing(Training):
    """Objects in slots change, with and without a hook that tells."""

    @rule(index=which, seed=seeds)
    def new_parameter_in_the_slot(self, index: int, seed: int) -> None:
        key = self.pick(index)
        self.entry(key).value = drawn(self.entry(key).value, seed)
        layer, attribute = self.slots[key]
        trains = self.held(key).requires_grad
        setattr(self.layer(layer), attribute, nn.Parameter(self.entry(key).value.clone(), trains))
        self.entry(key).replaced_by(trains=trains)

    @rule(index=which, seed=seeds, state=st.sampled_from(["keep", "reset"]), as_parameter=st.booleans())
    def replace_by_a_value(self, index: int, seed: int, state: str, as_parameter: bool) -> None:
        key = self.pick(index)
        entry, (layer, attribute) = self.entry(key), self.slots[key]
        entry.value = drawn(entry.value, seed)
        given = nn.Parameter(entry.value.clone(), bool(seed % 2)) if as_parameter else entry.value.clone()
        made = self.opt.replace_(entry.name if seed % 3 else self.held(key), given, state=state)
        if not self.knows_model:
            setattr(self.layer(layer), attribute, made)
        if as_parameter:
            entry.replaced_by(trains=given.requires_grad)
        if state == "reset":
            entry.forget()

    @precondition(lambda self: not any(session.owner == "model" for session in self.sessions))
    @rule(index=which, fresh=st.booleans())
    def new_module_in_the_slot(self, index: int, fresh: bool) -> None:
        name = self.layers()[index % len(self.layers())]
        new = Layer() if fresh else copy.deepcopy(self.layer(name))
        if fresh:
            for attribute, parameter in self.layer(name).named_parameters():
                setattr(new, attribute, nn.Parameter(torch.randn(parameter.shape).to(parameter.dtype)))
        setattr(self.net, name, new)
        for key in self.keys_of(name):
            entry = self.entry(key)
            entry.value = self.held(key).detach().clone()
            entry.replaced_by(trains=fresh or entry.trains)

    @rule(seed=seeds)
    def load_with_assign(self, seed: int) -> None:
        new = {name: drawn(tensor, seed + i) for i, (name, tensor) in enumerate(self.net.state_dict().items())}
        self.net.load_state_dict({name: tensor.clone() for name, tensor in new.items()}, assign=True)
        for key, slot in self.slots.items():
            self.entry(key).value = new[".".join(slot)]
            self.entry(key).replaced_by(trains=self.entry(key).trains)

    @precondition(lambda self: self.knows_model)
    @rule(index=which, seed=seeds)
    def new_parameter_that_no_hook_sees(self, index: int, seed: int) -> None:
        key = self.pick(index)
        self.entry(key).value = drawn(self.entry(key).value, seed)
        layer, attribute = self.slots[key]
        self.layer(layer)._parameters[attribute] = nn.Parameter(self.entry(key).value.clone())
        self.zero_grad()
        self.entry(key).replaced_by(trains=True)

    @precondition(lambda self: self.knows_model)
    @rule()
    def overwrite_on_conversion(self) -> None:
        self.zero_grad()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            self.dtype_move(torch.float64 if self.entry(self.pick(0)).value.dtype == torch.float32 else torch.float32)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
        self.zero_grad()


class Restructuring(Replacing):
    """Layers come, go and are renamed."""

    def unused_name(self) -> str:
        return next(name for name in NAMES if name not in self.layers())

    @rule(index=which, by=st.sampled_from(["rename", "rebind"]))
    def rename(self, index: int, by: str) -> None:
        old, new = self.layers()[index % len(self.layers())], self.unused_name()
        if old in CLAIMED:
            return  # under another name it would not be what its group selects
        setattr(self.net, new, self.layer(old))
        delattr(self.net, old)
        if by == "rename":
            self.opt.rename({f"{old}.{attribute}": f"{new}.{attribute}" for attribute in ("weight", "bias")})
        else:
            self.opt.rebind(self.net)
            self.knows_model = True
        for key in self.keys_of(old):
            self.slots[key] = (new, self.slots[key][1])
            self.entry(key).name = ".".join(self.slots[key])

    @precondition(lambda self: len(self.layers()) < MAX_LAYERS and len(self.model.groups) < 4)
    @rule(named=st.booleans())
    def add_param_group(self, named: bool) -> None:
        name = self.unused_name()
        setattr(self.net, name, Layer())
        params = list(self.layer(name).parameters())
        if "param_names" in self.opt.param_groups[0] and (named or not self.knows_model):
            params = [(f"{name}.{attribute}", p) for attribute, p in self.layer(name).named_parameters()]
        self.opt.add_param_group({"params": params, "lr": 0.02})
        self.model.groups.append(self.settings_of(0.02))
        self.enter(name, group=len(self.model.groups) - 1)

    @precondition(lambda self: len(self.layers()) > 1 and not self.sessions)
    @rule(index=which)
    def remove_a_layer_and_rebind(self, index: int) -> None:
        name = self.layers()[index % len(self.layers())]
        if not self.knows_model:
            self.opt.rebind(self.net)  # what was never seen in a model cannot be missed from it
        delattr(self.net, name)
        report = self.opt.rebind(self.net)
        self.knows_model = True
        gone = self.keys_of(name)
        assert sorted(report.vanished) == sorted(self.entry(key).name for key in gone)
        for key in gone:
            del self.slots[key], self.model.entries[key]


class Travelling(Restructuring):
    """Copies, saves and loads; the run goes on with what came out."""

    @rule()
    def deepcopy_of_the_pair(self) -> None:
        self.leave_behind(self.net)
        self.original = self.opt, self.all_of(self.opt)
        self.net, self.opt = copy.deepcopy((self.net, self.opt))
        self.model = self.model.copied()

    @rule()
    def pickle_of_the_pair(self) -> None:
        self.leave_behind(self.net)
        self.net, self.opt = pickle.loads(pickle.dumps((self.net, self.opt)))
        self.model = self.model.copied()
        report = self.opt.rebind(self.net)  # a pickled optimizer does not hold its model
        assert sorted(report.kept) == sorted(entry.name for entry in self.model.entries.values())
        self.knows_model = True

    @rule()
    def state_dict_into_a_fresh_optimizer(self) -> None:
        saved = self.opt.state_dict()
        self.opt = self.rebuilt()
        assert self.opt.load_state_dict(saved).matched_by == "name"
        self.keep_as_loaded()

    @rule(kind=kinds, rounding=roundings, compact=st.booleans())
    def another_precision(self, kind: Kind | None, rounding: str, compact: bool) -> None:
        saved = self.opt.state_dict(compact=compact)
        self.recipe = replace(self.recipe, state_dtype=kind, rounding=rounding)
        self.opt = self.rebuilt()
        assert self.opt.load_state_dict(saved).matched_by == "name"
        self.keep_as_loaded()

    @rule(seed=seeds)
    def save_and_load_in_another_attribute_order(self, seed: int) -> None:
        for group in self.opt.param_groups:
            if not isinstance(group["lr"], torch.Tensor):
                group["lr"] = float(group["lr"])  # torch.load(weights_only=True) refuses NumPy's numbers
        file = io.BytesIO()
        torch.save(self.opt.state_dict(), file)
        file.seek(0)
        self.leave_behind(self.net)
        self.net = self.in_another_order(seed)
        self.opt = self.rebuilt()
        assert self.opt.load_state_dict(torch.load(file, weights_only=True)).matched_by == "name"
        self.keep_as_loaded()
        self.forget_gradients()

    def rebuilt(self) -> paramstate.Adam:
        """A new optimizer over the present model, with the present membership of groups."""
        groups = self.named_groups()
        self.claiming, self.sessions = None, []
        for entry in self.model.entries.values():
            if entry.limit is not None and entry.limit.function is not None:
                entry.limit = None  # a function is not saved
            if entry.frozen and entry.trained is not None:
                entry.trains = False  # loading freezes anew, whatever was set by hand meanwhile
        self.knows_model = self.recipe.built_from != "named" or not all(groups)
        return self.recipe.build(self.net, groups)

    def keep_as_loaded(self) -> None:
        """What the file declares of moments holds where the optimizer declares nothing."""
        model = self.model
        for entry in model.entries.values():
            entry.kind = None if self.recipe.state_dtype is not None else entry.kind or model.kind
        model.kind, model.rounding = self.recipe.state_dtype, self.recipe.rounding
        for entry in model.entries.values():
            entry.keep_as_declared(model.kind)
            if not is_short(entry.value):
                entry.moments.pop(COMPENSATION, None)
        self.allow_widening()

    def in_another_order(self, seed: int) -> Net:
        """The same model as a new process would build it after someone sorted the attributes differently."""
        net = Net(())
        for name in shuffled(self.layers(), seed):
            layer = Layer(shuffled(["weight", "bias"], seed))
            for attribute, parameter in self.layer(name).named_parameters():
                setattr(layer, attribute, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            net.add_module(name, layer)
        return net


class Machine(Travelling, Combined, Selected, Looking, Relayout):
    """All of it together."""


TestIdentity = Machine.TestCase
# The same examples each time: what the suite says of a change is said of the change. New ones are the soak's to find.
TestIdentity.settings = settings(
    max_examples=int(os.environ.get("PARAMSTATE_EXAMPLES", "200")), stateful_step_count=40, derandomize=True
)


@pytest.mark.skipif("PARAMSTATE_SOAK_SECONDS" not in os.environ, reason="PARAMSTATE_SOAK_SECONDS says for how long")
def test_soak() -> None:
    until = time.monotonic() + float(os.environ["PARAMSTATE_SOAK_SECONDS"])
    # What fails is printed as it was found: shrinking would take the time of many rounds.
    endless = settings(max_examples=50, stateful_step_count=60, database=None, phases=[hypothesis.Phase.generate])
    while time.monotonic() < until:
        seed = random.SystemRandom().randrange(2**32)
        print(f"seed {seed}")
        run_state_machine_as_test(hypothesis.seed(seed)(Machine), settings=endless)
