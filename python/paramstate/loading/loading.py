"""Saving and loading the state of an optimizer, in torch's layout, by name and without a guess.

Torch's ``load_state_dict`` pairs by position and casts moments to the dtype of the value. Here the pairs are made and
checked first (:mod:`paramstate.loading.matching`); torch's method then loads the groups and runs the hooks, and the
tensors are placed when it calls ``__setstate__``, so that hooks after the load see all of it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from paramstate.errors import LoadError
from paramstate.identity.membership import Membership
from paramstate.identity.sharding import placed_like
from paramstate.identity.shared import Shared

from .checking import check, check_ids
from .group_options import options_by_name
from .matching import LoadReport, Ours, match
from .reading import GivenNames, Saved, saved_parameters
from .traits import Declared, traits_of

_VERSION = 1
_GROUPS = "loaded state dict has a different number of parameter groups"


class NamedLoading(Membership):
    """The part of an optimizer that writes and reads state dicts."""

    _incoming = Shared[dict[Tensor, dict[str, Any]] | None](None)

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's layout, with one more key, ``"paramstate"``: names and IDs by position.

        As in torch the tensors are the live ones, not copies.

        Raises:
            KeyError: ``opt.state`` holds state of a tensor that is in no group.
        """
        self._sync()
        self._require_no_orphans()
        # The first of the post-hooks: those of users see the whole, and what they return is what is returned.
        handle = self.register_state_dict_post_hook(_add_identity, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _require_no_orphans(self) -> None:
        for tensor in self._orphans():
            entry = self._table.of(tensor)
            called = f"of shape {list(tensor.shape)}" if entry is None else repr(self._table.name(entry))
            raise KeyError(
                f"opt.state holds state of a parameter {called} that is in no group; put it into a group, or delete "
                "its entry from opt.state"
            )

    def load_state_dict(  # type: ignore[override]  # returns a report where torch returns None
        self,
        state_dict: Mapping[str, Any],
        *,
        strict: bool = True,
        strict_names: bool = False,
        names: Mapping[str, str] | None = None,
    ) -> LoadReport:
        """Load state that this class or torch's saved.

        Parameters are matched by name where both sides have names, by position with every shape checked otherwise.
        A name that several groups use is found in the group of the same ``name``, or of the same number where one side
        does not name its groups.
        Tensors are copied; moments keep the dtype they were saved in, unless the value is wider. IDs of the saved side
        are taken over, except one that the store holds for a parameter that is not in this optimizer: then our
        parameter keeps its own.

        What was declared for a parameter is taken over as well: steps of single rows, frozen or not, and its constraint
        where none is declared here. A stock file says nothing of these: what is frozen and constrained stays so, and
        all rows of a parameter have taken the steps that the file says.

        Matched by name, a group takes the options of the saved group that holds its parameters, wherever that stands.
        Matched by position, group is paired with group.

        Args:
            state_dict: as returned by ``state_dict()``, ours or torch's.
            strict: refuse missing, unexpected and reshaped parameters, another number of groups, and a group whose
                parameters come from saved groups of different options. If not, what matches is loaded, parameters
                without saved state start afresh, and such a group keeps its own options, as does one none of whose
                parameters was saved; the report says which. Without names the number of groups must be the same all
                the same.
            strict_names: refuse to match by position, of a parameter or of a group.
            names: saved name to our name, for parameters that were renamed.

        Returns:
            LoadReport: what was matched, and how.

        Raises:
            LoadError: it does not fit; the message begins with torch's text where torch has one. Nothing is changed.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Linear(2, 1)
            >>> saved = AdamW(model).state_dict()
            >>> AdamW(reversed(list(model.named_parameters()))).load_state_dict(saved).matched_by
            'name'
        """
        itself: NamedLoading | None = self._itself()
        if itself is not None and itself is not self:
            # Torch's method sets attributes, and those of a wrapper are not the optimizer's.
            return itself.load_state_dict(state_dict, strict=strict, strict_names=strict_names, names=names)
        self._sync()
        report: list[LoadReport] = []
        ids: dict[Tensor, int] = {}
        declared: list[Declared] = []

        def prepare(_: torch.optim.Optimizer, loading: dict[str, Any]) -> dict[str, Any]:
            pairs, found = self._match(loading, names or {}, strict, strict_names)
            aligned = self._aligned(loading, pairs, found, strict=strict)
            self._incoming = {
                ours.param: _copy_state(ours.param, saved, aligned["param_groups"][ours.group])
                for saved, ours in pairs
                if saved.state and ours.label not in found.reshaped
            }
            declared.extend(self._declared(pairs, found))
            ids.update({ours.param: saved.id for saved, ours in pairs if saved.id is not None})
            report.append(found)
            return aligned

        handle = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            handle.remove()
            self._incoming = None
        self._take_over_ids(ids)
        self._adopt_declared(declared)
        return report[0]

    def _adopt_declared(self, declared: list[Declared]) -> None:
        """Let what the state dict declares hold, for state that has just been loaded."""
        self._forget_versions(entry.param for entry in self._table)
        told = {item.entry for item in declared}
        for entry in self._table:
            if entry not in told:
                self._begin_rows(entry)
        for item in declared:
            item.adopt(self)

    def _declared(self, pairs: list[tuple[Saved, Ours]], report: LoadReport) -> list[Declared]:
        """What the state dict says was declared for ours; the report is told of functions that are missing."""
        declared: list[Declared] = []
        for saved, ours in pairs:
            if saved.traits is not None and ours.label not in report.reshaped:
                item = Declared(self._table.find(ours.param), saved.traits, f"parameter {ours.label!r}")
                declared.append(item)
                if item.is_undeclared:
                    report.undeclared.append(ours.label)
        return declared

    def _match(
        self, loading: Mapping[str, Any], renamed: Mapping[str, str], strict: bool, strict_names: bool
    ) -> tuple[list[tuple[Saved, Ours]], LoadReport]:
        if strict:
            self._require_as_many_groups(loading)
        ours = self._our_parameters()
        saved = saved_parameters(loading, renamed, {name for item in ours for name in item.names})
        pairs, report = match(saved, ours, strict=strict, strict_names=strict_names)
        if report.matched_by == "position":
            self._require_as_many_groups(loading)
        check(pairs, report, self._shaped_state, strict=strict)
        check_ids(pairs)
        return pairs, report

    def _require_as_many_groups(self, loading: Mapping[str, Any]) -> None:
        if len(loading["param_groups"]) != len(self.param_groups):
            raise LoadError(
                f"{_GROUPS}: {len(loading['param_groups'])}, the optimizer has {len(self.param_groups)}; build it with "
                "the saved groups, or, where both sides have names, give strict=False"
            )

    def _our_parameters(self) -> list[Ours]:
        ours: dict[Tensor, Ours] = {}
        given = GivenNames(self.param_groups)
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                names = given.added_to(self._table.names(self._table.find(param)), param)
                label = names[0] if names else f"position {len(ours)}"
                ours.setdefault(param, Ours(param, names, label, number, given.shared(param)))
        return list(ours.values())

    def _aligned(
        self, loading: dict[str, Any], pairs: list[tuple[Saved, Ours]], report: LoadReport, *, strict: bool
    ) -> dict[str, Any]:
        """The state dict as torch's method is to see it: our parameters, the saved options, no state of parameters."""
        saved = loading["param_groups"]
        options = self._options(saved, pairs, report, strict=strict)
        # Copied one by one: two groups that take the options of one saved group are not to share a tensor in them.
        groups = [copy.deepcopy({key: value for key, value in group.items() if key != "params"}) for group in options]
        position = 0
        for group, ours in zip(groups, self.param_groups, strict=True):
            group["params"] = list(range(position, position + len(ours["params"])))
            position += len(ours["params"])
            if "param_names" in ours or len(group.get("param_names", ())) != len(ours["params"]):
                group.pop("param_names", None)
        keys = {key for group in saved for key in group["params"]}
        rest = {key: value for key, value in loading["state"].items() if key not in keys}
        rest = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), rest)
        return {**loading, "state": rest, "param_groups": groups}

    def _options(
        self, saved: list[dict[str, Any]], pairs: list[tuple[Saved, Ours]], report: LoadReport, *, strict: bool
    ) -> list[dict[str, Any]]:
        """The groups whose options ours take; the report is told which of ours keep their own."""
        if report.matched_by == "position":
            return saved
        found = options_by_name(saved, self.param_groups, pairs, strict=strict)
        report.kept_options = [
            str(group.get("name", number)) for number, group in enumerate(self.param_groups) if found[number] is None
        ]
        return [own if options is None else options for own, options in zip(self.param_groups, found, strict=True)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        if self._incoming is not None:
            merged: defaultdict[Any, Any] = defaultdict(dict)
            merged.update(self._incoming)
            merged.update(state["state"])
            state = {**state, "state": merged}
        super().__setstate__(state)

    def _take_over_ids(self, ids: Mapping[Tensor, int]) -> None:
        """Let the IDs of the saved side be ours."""
        changed = {
            entry.id: id for param, id in ids.items() if (entry := self._table.of(param)) is not None and entry.id != id
        }
        if changed:
            for id in self._walk.declared():
                self._walk.declare(id)
            self._table.change_ids(changed)
            for entry in self._table:
                self._traits_changed(entry)
            self._roster = []
            self._watched = False
            self._sync()


def _add_identity(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put names and IDs into a state dict that was just made."""
    assert isinstance(optimizer, Membership)
    optimizer._sync()  # a pre-hook may have edited the groups
    table = optimizer._table
    entries = [table.find(param) for group in optimizer.param_groups for param in group["params"]]
    state_dict["paramstate"] = {
        "version": _VERSION,
        "names": [table.names(entry) for entry in entries],
        "ids": [entry.id for entry in entries],
        "traits": [traits_of(entry) for entry in entries],
    }


def _copy_state(param: Tensor, saved: Saved, group: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of a parameter's saved state for the group that it will be in."""
    on_device = bool(group.get("capturable") or group.get("fused"))
    return {key: _copy_entry(param, key, value, on_device=on_device) for key, value in (saved.state or {}).items()}


def _copy_entry(param: Tensor, key: str, value: Any, *, on_device: bool) -> Any:
    if not isinstance(value, Tensor):
        return tree_map_only(Tensor, lambda inner: inner.detach().to(device=param.device, copy=True), value)
    if key == "step":
        return (
            value.detach().to(dtype=torch.float32, device=param.device, copy=True)
            if on_device
            else value.detach().clone()
        )
    if value.shape == param.shape:
        value = placed_like(value, param)
    if not value.is_floating_point() or not param.is_floating_point():
        return value.detach().to(device=param.device, copy=True)
    dtype = param.dtype if param.dtype.itemsize > value.dtype.itemsize else value.dtype
    if type(value) is Tensor and value.shape == param.shape and value.layout == param.layout == torch.strided:
        # Moments take the parameter's strides: then all of them share one layout, which is the fast path.
        return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False).copy_(
            value
        )
    return value.detach().to(dtype=dtype, device=param.device, copy=True)
