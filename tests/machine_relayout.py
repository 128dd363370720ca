"""Whole models in another layout, as actions of the state machine: laid out anew, cut, joined, thinned out."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import nn

import paramstate
from client_writes import drawn
from identity_machine import NAMES, IdentityMachine, seeds
from machine_rows import LAYOUTS, layout
from reference_joined import joined
from reference_limits import RefusedError
from reference_model import Entry, TensorMap
from small_models import Layer, Net

MAX_LAYERS = 5
Slot = tuple[str, str]


@dataclass
class Form:
    """The new form of a model, as it is drawn up: what is told of it, and what the reference makes of it."""

    maps: dict[str, Any] = field(default_factory=dict)
    made: list[tuple[str | None, Slot, Entry]] = field(default_factory=list)
    """The key that stays, if any; the new slot; and what stands there."""
    refusals: list[type[Exception]] = field(default_factory=list)
    """Each is a reason of its own; which of them is named is not promised."""

    def tell(self, key: str | None, slot: Slot, entry: Entry, origin: object) -> None:
        self.maps[".".join(slot)] = origin
        entry.name = ".".join(slot)
        self.made.append((key, slot, entry))


class Relayout(IdentityMachine):
    """The optimizer goes on with a model that holds the same weights in another layout."""

    @precondition(lambda self: len(self.layers()) < len(NAMES))
    @rule(seed=seeds, how=st.sampled_from(["laid out anew", "a copy", "cut", "joined", "one goes, one comes"]))
    def relayout(self, seed: int, how: str) -> None:
        draw, form, options = random.Random(seed), Form(), {}
        named = self.layers()
        draw.shuffle(named)
        fresh = next(name for name in NAMES if name not in named)
        left, new = list(named), None
        if how == "cut" and len(named) < MAX_LAYERS and self.may_be_cut(named[0]):
            self.cut(form, left.pop(0), fresh, draw)
        if how == "joined" and len(named) > 1 and self.may_be_joined(*named[:2]):
            self.join(form, left.pop(0), left.pop(0))
        if how == "one goes, one comes" and len(named) > 1:
            gone, new = left.pop(0), Layer()
            options = {"drop": [self.entry(key).name for key in self.keys_of(gone)], "group": 0}
        for name in left:
            for key in self.keys_of(name):
                self.lay_out(form, key, "as it is" if how == "a copy" else draw.choice(["as it is", *LAYOUTS]), draw)
        if any(session.owner == "optimizer" for session in self.sessions):
            form.refusals.append(paramstate.EditError)
        is_derived = how == "a copy" and draw.random() < 0.5
        net = self.new_net(form, seed if draw.random() < 0.3 and not is_derived else None)
        if new is not None:
            net.add_module(fresh, new)
            form.maps.update({f"{fresh}.weight": None, f"{fresh}.bias": None})
        with pytest.raises(tuple(form.refusals)) if form.refusals else contextlib.nullcontext():
            report = self.opt.relayout(net, None if is_derived else form.maps, **options)
        if not form.refusals:
            assert sorted(report.dropped) == sorted(options.get("drop", []))
            assert sorted(row.name for row in report.carried) == sorted(entry.name for _, _, entry in form.made)
            self.go_on_with(net, form)
            if new is not None:
                self.enter(fresh, group=0)

    # ---- what becomes of one, of one that is cut, and of two that are joined ----------------------------------------

    def lay_out(self, form: Form, key: str, how: str, draw: random.Random) -> None:
        entry, slot = self.entry(key), self.slots[key]
        limit = entry.limit
        if limit is not None and limit.dim is not None and how != "as it is":
            how = "transposed" if min(entry.value.shape, default=1) > 1 and entry.value.dim() == 2 else "as it is"
        carry: TensorMap = torch.clone if how == "as it is" else layout(how, entry.value.shape, draw)
        origin = entry.name if how == "as it is" else (self.held(key) if draw.random() < 0.5 else entry.name, carry)
        self.carry(form, key, key, slot, carry, origin, keeps_dims=how == "as it is")

    def carry(
        self, form: Form, key: str, stays: str | None, slot: Slot, carry: TensorMap, origin: object, *,
        keeps_dims: bool = False,
    ) -> None:  # fmt: skip
        entry = self.entry(key)
        twin = entry.copied()
        twin.grad = entry.grad
        try:
            twin.carry(carry, carry(twin.value))
        except RefusedError as refusal:
            form.refusals.append(refusal.error)
            if entry.limit is not None and entry.limit.function is not None:
                form.refusals.append(paramstate.ConstraintError)
            twin.value = carry(twin.value)
        if keeps_dims:
            twin.limit = entry.limit
        form.tell(stays, slot, twin, origin)

    def may_be_cut(self, layer: str) -> bool:
        entries = [self.entry(key) for key in self.keys_of(layer)]
        limits = [entry.limit for entry in entries if entry.limit is not None]
        return all(e.value.shape[0] > 1 and e.value.numel() for e in entries) and all(n.norm is None for n in limits)

    def cut(self, form: Form, layer: str, fresh: str, draw: random.Random) -> None:
        for key in self.keys_of(layer):
            entry, (_, attribute) = self.entry(key), self.slots[key]
            at = draw.randint(1, entry.value.shape[0] - 1)
            for home, rows in ((layer, slice(at)), (fresh, slice(at, None))):
                part = _Rows(rows)
                self.carry(form, key, None, (home, attribute), part, (entry.name, part))

    def may_be_joined(self, one: str, other: str) -> bool:
        return all(
            a.value.shape[1:] == b.value.shape[1:] and a.value.dtype == b.value.dtype and a.value.numel()
            and b.value.numel() and all(e.limit is None or e.limit.norm is None for e in (a, b))
            for a, b in (map(self.entry, self.pair(attribute, one, other)) for attribute in ("weight", "bias"))
        )  # fmt: skip

    def pair(self, attribute: str, one: str, other: str) -> list[str]:
        """The keys of the parameters of this attribute in two layers."""
        found = {self.slots[key][0]: key for key in self.slots if self.slots[key][1] == attribute}
        return [found[one], found[other]]

    def join(self, form: Form, one: str, other: str) -> None:
        for attribute in ("weight", "bias"):
            parts = [self.entry(key) for key in self.pair(attribute, one, other)]
            names = [part.name for part in parts]
            try:
                union = joined(parts)
            except RefusedError as refusal:
                form.refusals.append(refusal.error)
                union = Entry(0, "", torch.cat([part.value for part in parts]), parts[0].group)
            form.tell(None, (one, attribute), union, (names, lambda *given: torch.cat(given)))

    # ---- the new model ----------------------------------------------------------------------------------------------

    def new_net(self, form: Form, other_values: int | None) -> Net:
        """The model of this form; its values are those of the maps, or others, which are left alone as well."""
        net = Net(())
        for number, (_, (layer, attribute), entry) in enumerate(form.made):
            if not hasattr(net, layer):
                net.add_module(layer, Layer())
            if other_values is not None:
                entry.value = drawn(entry.value, other_values + number)
            given = entry.trains or other_values is None
            setattr(getattr(net, layer), attribute, nn.Parameter(entry.value.clone(), given))
            entry.trains = given and not (entry.frozen and entry.trained is not None)
        return net

    def go_on_with(self, net: Net, form: Form) -> None:
        self.leave_behind(self.net)
        if self.claiming is not None and any(e.group == self.claiming for e in self.model.entries.values()):
            self.claiming = None  # a group is from now on what it holds
        self.net, self.knows_model = net, True
        self.slots, self.model.entries = {}, {}
        for stays, slot, entry in form.made:
            key = stays or f"k{self.born}"
            if stays is None:
                self.born += 1
                entry.id = self.opt.ids[entry.name]
            self.slots[key], self.model.entries[key] = slot, entry
            entry.keep_as_declared(self.model.kind)
        self.allow_widening()


@dataclass(frozen=True)
class _Rows:
    """Some rows of a tensor."""

    rows: slice

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self.rows]
