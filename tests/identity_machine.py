"""The state machine's body: a model, an optimizer and the reference, and what must hold between them.

A parameter is known by a key that the machine chose when it was born ("k0", "k1", ...). No action changes a key; the
slot it sits in, its name, its object and its memory all change. `test_state_machine.py` adds the actions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant
from torch import nn

import paramstate
from paramstate.precision import state_dtype
from paramstate.precision.blockwise import BlockwiseTensor
from precision_models import floats
from reference import MOMENTS, Settings, same_bits
from reference_limits import RefusedError
from reference_model import Entry
from reference_optimizer import Reference
from reference_precision import COMPENSATION, SMALL, Kind, is_short, kept_as, stored
from reference_sessions import Session
from small_models import Layer, Net

NAMES = ("a", "b", "c", "d", "e", "f")
which = st.integers(0, 11)
seeds = st.integers(0, 2**31)
meanings = st.sampled_from(["tensor", "name", "pattern", "layer", "selection", "all of one kind"])
"""How parameters are named to the optimizer."""


@dataclass(frozen=True)
class Recipe:
    """How this run builds its optimizers."""

    decoupled: bool
    amsgrad: bool
    maximize: bool
    max_grad_norm: float | None
    weight_decay: float
    built_from: str  # "model", "groups and model", "named" or "bare and rebind"
    state_dtype: Kind | None = None
    rounding: str = "nearest"
    dtype: torch.dtype = torch.float32

    def build(self, net: Net, groups: list[list[tuple[str, nn.Parameter]]]) -> paramstate.Adam:
        """A fresh optimizer over these named groups."""
        cls = paramstate.AdamW if self.decoupled else paramstate.Adam
        options = {"lr": 0.01, "weight_decay": self.weight_decay, "amsgrad": self.amsgrad, "maximize": self.maximize}
        options |= {"max_grad_norm": self.max_grad_norm, "state_dtype": self.state_dtype, "rounding": self.rounding}
        named = [{"params": list(group)} for group in groups]
        bare = [{"params": [parameter for _, parameter in group]} for group in groups]
        if self.built_from == "model" and len(groups) == 1:
            return cls(net, **options)
        if self.built_from == "named" and all(groups):  # torch takes an empty group for one without names
            return cls(named, **options)
        if self.built_from == "bare and rebind":
            optimizer = cls(bare, **options)
            optimizer.rebind(net)
            return optimizer
        return cls(bare, model=net, **options)


kinds = st.sampled_from([None, None, "float32", "bfloat16", "8bit"])
roundings = st.sampled_from(["nearest", "nearest", "stochastic", "kahan"])
recipes = st.builds(
    Recipe,
    decoupled=st.booleans(),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    max_grad_norm=st.sampled_from([None, None, 0.5, 1e3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    built_from=st.sampled_from(["model", "groups and model", "named", "bare and rebind"]),
    state_dtype=kinds,
    rounding=roundings,
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)


class IdentityMachine(RuleBasedStateMachine):
    """The three and their invariants."""

    net: Net
    opt: paramstate.Adam
    recipe: Recipe
    model: Reference

    def build(self, recipe: Recipe) -> None:
        torch.manual_seed(0)
        self.born, self.recipe = 0, recipe
        self.small = mock.patch.object(state_dtype, "_SMALL", SMALL)
        self.small.start()
        self.net = Net(NAMES[:3]).to(recipe.dtype)
        self.slots: dict[str, tuple[str, str]] = {}
        self.opt = recipe.build(self.net, [list(self.net.named_parameters())])
        self.knows_model = recipe.built_from != "named"
        self.model = self.new_reference([self.settings_of(0.01)])
        for layer in NAMES[:3]:
            self.enter(layer, group=0)
        self.left_behind: list[tuple[Net, dict[str, torch.Tensor]]] = []
        self.original: tuple[paramstate.Adam, dict[str, object]] | None = None
        """The optimizer of which this one is a copy, and what it held then."""
        self.may_widen: set[tuple[str, str]] = set()
        self.sessions: list[Session] = []
        self.claiming: int | None = None
        """The group that was given as a selection."""

    def teardown(self) -> None:
        if hasattr(self, "small"):
            self.small.stop()

    def new_reference(self, groups: list[Settings]) -> Reference:
        recipe = self.recipe
        return Reference(groups, recipe.max_grad_norm, recipe.state_dtype, recipe.rounding, library=self.stored)

    def stored(self, key: str, name: str) -> torch.Tensor:
        """What the library holds, as floats."""
        held = self.held(key)
        return held.detach() if name == "value" else floats(self.opt.state[held][name])

    def enter(self, layer: str, group: int) -> None:
        """The reference takes the parameters of a new layer in, with the IDs they were given."""
        for attribute in ("weight", "bias"):
            key, self.born = f"k{self.born}", self.born + 1
            self.slots[key] = (layer, attribute)
            name = f"{layer}.{attribute}"
            value = self.held(key).detach().clone()
            self.model.entries[key] = Entry(self.opt.ids[name], name, value, group)

    def held(self, key: str) -> nn.Parameter:
        """The object that sits in this parameter's slot now."""
        layer, attribute = self.slots[key]
        return getattr(getattr(self.net, layer), attribute)

    def layer(self, name: str) -> Layer:
        return getattr(self.net, name)

    def layers(self) -> list[str]:
        return [name for name, _ in self.net.named_children()]

    def keys_of(self, layer: str) -> list[str]:
        return [key for key, (home, _) in self.slots.items() if home == layer]

    def entry(self, key: str) -> Entry:
        return self.model.entries[key]

    def pick(self, index: int) -> str:
        """One of the keys that live now."""
        return list(self.slots)[index % len(self.slots)]

    def meant(self, index: int, how: str) -> tuple[object, list[str]]:
        """A parameter or several as an argument, and the keys of those that are meant."""
        key = self.pick(index)
        layer, attribute = self.slots[key]
        if how == "tensor":
            return self.held(key), [key]
        if how == "name":
            return self.entry(key).name, [key]
        if how == "pattern":
            return f"{layer}.*", self.keys_of(layer)
        if how == "layer":
            return paramstate.select(self.net, self.layer(layer)), self.keys_of(layer)
        if how == "selection":
            chosen = paramstate.select(self.net, layer) - paramstate.select(self.net, f"{layer}.{attribute}")
            return chosen, [other for other in self.keys_of(layer) if other != key]
        return [f"*.{attribute}"], [other for other, slot in self.slots.items() if slot[1] == attribute]

    @contextmanager
    def refused(self, refusal: RefusedError | None) -> Iterator[None]:
        """The library refuses what the reference does."""
        if refusal is None:
            yield
        else:
            with pytest.raises(refusal.error):
                yield

    def forget_gradients(self) -> None:
        for entry in self.model.entries.values():
            entry.grad = None

    def follow_step(self, chosen: Mapping[str, Sequence[bool]] | None = None) -> None:
        """The optimizer took a step, of some rows only where these are chosen: the reference takes it too."""
        self.follow_conversions()
        norm = self.model.step(chosen)
        self.take_over_norms()
        if norm is not None:
            torch.testing.assert_close(self.opt.grad_norm.double(), torch.tensor(norm).double(), rtol=1e-6, atol=0)

    def take_over_norms(self, keys: Iterable[str] | None = None) -> None:
        """What was scaled to a norm is the reference's to rounding; from then on it is what the library holds."""
        for key in self.model.entries if keys is None else keys:
            entry, value = self.entry(key), self.held(key).detach()
            if entry.limit is not None and entry.limit.norm is not None and not same_bits(value, entry.value):
                rtol = 8.0 * torch.finfo(value.dtype).eps
                torch.testing.assert_close(value, entry.value, rtol=rtol, atol=0.0)
                entry.value = value.clone()

    def named_groups(self) -> list[list[tuple[str, nn.Parameter]]]:
        """The parameters of each group under their present names, in the model's order."""
        homes = {self.slots[key]: self.entry(key).group for key in self.slots}
        groups: list[list[tuple[str, nn.Parameter]]] = [[] for _ in self.model.groups]
        for name, parameter in self.net.named_parameters():
            layer, attribute = name.split(".")
            groups[homes[layer, attribute]].append((name, parameter))
        return groups

    def settings_of(self, lr: float) -> Settings:
        """The numbers of a new group of this run's optimizers."""
        recipe = self.recipe
        return Settings(
            lr, weight_decay=recipe.weight_decay, decoupled=recipe.decoupled, amsgrad=recipe.amsgrad,
            maximize=recipe.maximize,
        )  # fmt: skip

    def allow_widening(self) -> None:
        """A moment narrower than its value may be widened from here on. Both ways are exact, so both are allowed; what
        a client writes afterwards is literal again."""
        for key, entry in self.model.entries.items():
            for name, moment in entry.moments.items():
                if name != COMPENSATION and moment.dtype.itemsize < entry.value.dtype.itemsize:
                    self.may_widen.add((key, name))

    def follow_conversions(self) -> None:
        """Take over what the library kept as is declared for it, though a client, or a conversion of the value, has
        made something else of it: the next step would do so."""
        self.follow_widening()
        for key, entry in self.model.entries.items():
            state, kind = self.opt.state.get(self.held(key), {}), kept_as(entry.kind or self.model.kind, entry.value)
            if COMPENSATION not in state and not is_short(entry.value):
                entry.moments.pop(COMPENSATION, None)
            for name in () if kind is None else entry.moments.keys() & state.keys() - {COMPENSATION}:
                wanted = {"bfloat16": torch.bfloat16}.get(kind, torch.float32)
                is_compact = isinstance(state[name], BlockwiseTensor)
                if (is_compact, state[name].dtype) == (kind == "8bit", wanted):
                    if not (is_compact and name in entry.compact):
                        entry.moments[name] = stored(entry.moments[name], name, kind)
                    entry.compact = (entry.compact | {name}) if is_compact else entry.compact - {name}

    def follow_widening(self) -> None:
        """Take over the dtype of the moments that were widened."""
        for key, name in list(self.may_widen):
            entry = self.model.entries.get(key)
            if entry is None or name not in entry.moments:
                self.may_widen.discard((key, name))
                continue
            dtype = self.opt.state[self.held(key)][name].dtype if self.held(key) in self.opt.state else None
            if dtype == entry.value.dtype:
                entry.moments[name] = entry.moments[name].to(dtype)
                self.may_widen.discard((key, name))

    @invariant()
    def everything_holds(self) -> None:
        """One invariant and not eight, so that a failing example prints one line for each action."""
        self.identity_is_kept()
        self.the_parameter_that_is_trained_is_the_one_in_the_model()
        self.value_and_state_are_the_references()
        self.gradients_are_the_references()
        self.what_is_declared_is_the_references()
        self.no_state_is_orphaned()
        self.the_store_borrows_what_state_holds()
        self.groups_keep_their_settings()
        self.what_was_copied_is_left_alone()

    def identity_is_kept(self) -> None:
        for key, entry in self.model.entries.items():
            parameter = self.held(key)
            assert self.opt.id_of(parameter) == entry.id
            assert self.opt.param(entry.id) is parameter
            assert self.opt.name_of(parameter) == entry.name
            assert self.opt.ids[entry.name] == entry.id
        assert sorted(self.opt.ids.values()) == sorted(entry.id for entry in self.model.entries.values())

    def the_parameter_that_is_trained_is_the_one_in_the_model(self) -> None:
        for number, group in enumerate(self.opt.param_groups):
            wanted = {id(self.held(key)) for key, entry in self.model.entries.items() if entry.group == number}
            assert {id(parameter) for parameter in group["params"]} == wanted
            assert len(group["params"]) == len(wanted)

    def value_and_state_are_the_references(self) -> None:
        self.follow_conversions()
        for key, entry in self.model.entries.items():
            parameter = self.held(key)
            state = self.opt.state.get(parameter, {})
            self.compare(key, "value", parameter, entry.value)
            assert ("step" in state) == (entry.step is not None), f"{entry.name}: state {list(state)}"
            if entry.step is not None:
                assert float(state["step"]) == entry.step, f"{entry.name}: step {state['step']}, not {entry.step}"
            assert state.keys() - {"step"} == entry.moments.keys()
            for name, moment in entry.moments.items():
                self.compare(key, name, floats(state[name]), moment)
            compact = {name for name in entry.moments if isinstance(state[name], BlockwiseTensor)}
            assert compact == entry.compact, f"{entry.name}: {compact} in eight bits, not {set(entry.compact)}"

    def compare(self, key: str, what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
        assert same_bits(got, wanted), f"{self.entry(key).name}, {what}: {got}, the reference has {wanted}"

    def gradients_are_the_references(self) -> None:
        for key, entry in self.model.entries.items():
            grad = self.held(key).grad
            assert (grad is None) == (entry.grad is None), f"{entry.name}: {grad}, the reference has {entry.grad}"
            if grad is not None and entry.grad is not None:
                self.compare(key, "grad", grad, entry.grad)

    def what_is_declared_is_the_references(self) -> None:
        entries = self.model.entries
        assert sorted(self.opt.frozen) == sorted(entry.name for entry in entries.values() if entry.frozen)
        at_bounds = self.opt.at_bounds()
        for key, entry in entries.items():
            assert self.held(key).requires_grad == entry.trains, f"{entry.name}: requires_grad is not {entry.trains}"
            ages, rows = self.opt.row_steps(entry.name).tolist(), entry.rows
            wanted = [entry.steps] * len(ages) if rows is None else rows.ages
            if rows is not None and not rows.differ:
                wanted = rows.ages[:1] * len(ages)
            assert ages == wanted, f"{entry.name}: row steps {ages}, the reference has {wanted}"
            assert (entry.name in at_bounds) == (entry.limit is not None and entry.limit.is_box)
            if entry.name in at_bounds and entry.limit is not None:
                bounds = [bound for bound in entry.limit.bounds(entry.value) if bound is not None]
                held = torch.stack([entry.value == bound for bound in bounds]).any(0)
                assert at_bounds[entry.name] == int(held.sum()), f"{entry.name}: at its bounds"

    def no_state_is_orphaned(self) -> None:
        listed = {id(parameter) for group in self.opt.param_groups for parameter in group["params"]}
        orphans = [key for key in self.opt.state if isinstance(key, torch.Tensor) and id(key) not in listed]
        assert not orphans
        assert len(self.opt.store) == len(self.model.entries)
        if all(entry.step is None for entry in self.model.entries.values()):
            assert not self.opt.state  # torch's users take its truth value for "has been stepped"

    def the_store_borrows_what_state_holds(self) -> None:
        store = self.opt.store
        for key, entry in self.model.entries.items():
            parameter = self.held(key)
            assert store.address(entry.id, "value") == parameter.data_ptr()
            state = self.opt.state.get(parameter, {})
            for name in (*MOMENTS, COMPENSATION):
                assert name in state or store.address(entry.id, name) is None, f"{entry.name}: {name} is stale"
            for name, tensor in state.items():
                # The core has no integer buffers: a client's integer `step` is read where it is, and not borrowed.
                # Nor has it what reads as floats and is none.
                is_lent = tensor.is_floating_point() and not isinstance(tensor, BlockwiseTensor)
                wanted = tensor.data_ptr() if is_lent else None
                assert store.address(entry.id, name) == wanted, f"{entry.name}, {name}"

    def groups_keep_their_settings(self) -> None:
        for group, settings in zip(self.opt.param_groups, self.model.groups, strict=True):
            assert float(group["lr"]) == settings.lr
            assert [float(beta) for beta in group["betas"]] == [settings.beta1, settings.beta2]

    def what_was_copied_is_left_alone(self) -> None:
        for net, values in self.left_behind:
            for name, parameter in net.named_parameters():
                assert torch.equal(parameter, values[name])
        if self.original is not None:
            optimizer, held = self.original
            for name, now in self.all_of(optimizer).items():
                assert now == held[name], f"{name} of the original: {now}, before the copy was made {held[name]}"

    def all_of(self, optimizer: paramstate.Adam) -> dict[str, object]:
        """State and rows by name, as numbers."""
        return {
            name: (
                {key: floats(tensor).tolist() for key, tensor in optimizer.state_of(name).items()},
                optimizer.row_steps(name).tolist(),
                name in optimizer.frozen,
            )
            for name in optimizer.ids
        }

    def leave_behind(self, net: Net) -> None:
        """Remember a model that no optimizer of ours may touch from here on."""
        self.left_behind = [(net, copy.deepcopy(dict(net.state_dict())))]
        self.sessions, self.original = [], None
