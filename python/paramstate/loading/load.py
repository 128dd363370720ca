"""One load of a state dict: found and checked before anything changes, then finished after torch's method has run."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from paramstate.errors import LoadError
from paramstate.identity.membership import Membership
from paramstate.identity.sharding import placed_like
from paramstate.identity.succession import declared_of
from paramstate.precision.state_dtype import COMPENSATION, dense, is_short

from .checking import check, check_ids
from .group_options import options_by_name
from .matching import LoadReport, Ours, match
from .reading import GivenNames, Saved, saved_parameters
from .traits import Declared

_GROUPS = "loaded state dict has a different number of parameter groups"


class Load:
    """What of a state dict goes where in an optimizer.

    Args:
        optimizer: what it is loaded into.
        names: saved name to our name.
        strict: refuse what is missing, unexpected or reshaped.
        strict_names: refuse to match by position.
    """

    report: LoadReport

    def __init__(self, optimizer: Membership, names: Mapping[str, str], *, strict: bool, strict_names: bool) -> None:
        self._optimizer = optimizer
        self._renamed = names
        self._strict = strict
        self._strict_names = strict_names
        self._pairs: list[tuple[Saved, Ours]] = []
        self._declared: list[Declared] = []

    # ---- before anything changes ------------------------------------------------------------------------------------

    def aligned(self, loading: dict[str, Any]) -> dict[str, Any]:
        """The state dict as torch's method is to see it: our parameters, the saved options, no state of parameters.

        Raises:
            LoadError: it does not fit the optimizer.
        """
        self._match(loading)
        saved = loading["param_groups"]
        options = self._options(saved)
        self._read_declared()
        # Copied one by one: two groups that take the options of one saved group are not to share a tensor in them.
        groups = [copy.deepcopy({key: value for key, value in group.items() if key != "params"}) for group in options]
        position = 0
        for group, ours in zip(groups, self._optimizer.param_groups, strict=True):
            group["params"] = list(range(position, position + len(ours["params"])))
            position += len(ours["params"])
            if "param_names" in ours or len(group.get("param_names", ())) != len(ours["params"]):
                group.pop("param_names", None)
        keys = {key for group in saved for key in group["params"]}
        rest = {key: value for key, value in loading["state"].items() if key not in keys}
        rest = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), rest)
        return {**loading, "state": rest, "param_groups": groups}

    def copied_state(self, groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, dict[str, Any]]:
        """Copies of the saved state by our parameter, for the groups that these will be in."""
        return {
            ours.param: _copy_state(ours.param, saved, groups[ours.group])
            for saved, ours in self._pairs
            if saved.state and ours.label not in self.report.reshaped
        }

    def _match(self, loading: Mapping[str, Any]) -> None:
        if self._strict:
            self._require_as_many_groups(loading)
        ours = self._our_parameters()
        saved = saved_parameters(loading, self._renamed, {name for item in ours for name in item.names})
        self._pairs, self.report = match(saved, ours, strict=self._strict, strict_names=self._strict_names)
        if self.report.matched_by == "position":
            self._require_as_many_groups(loading)
        check(self._pairs, self.report, self._optimizer._shaped_state, strict=self._strict)
        check_ids(self._pairs)

    def _require_as_many_groups(self, loading: Mapping[str, Any]) -> None:
        saved, ours = len(loading["param_groups"]), len(self._optimizer.param_groups)
        if saved != ours:
            raise LoadError(
                f"{_GROUPS}: {saved}, the optimizer has {ours}; build it with the saved groups, or, where both sides "
                "have names, give strict=False"
            )

    def _our_parameters(self) -> list[Ours]:
        ours: dict[Tensor, Ours] = {}
        table, groups = self._optimizer._table, self._optimizer.param_groups
        given = GivenNames(groups)
        for number, group in enumerate(groups):
            for param in group["params"]:
                names = given.added_to(table.names(table.find(param)), param)
                label = names[0] if names else f"position {len(ours)}"
                ours.setdefault(param, Ours(param, names, label, number, given.shared(param)))
        return list(ours.values())

    def _options(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups whose options ours take; the report is told which of ours keep their own."""
        if self.report.matched_by == "position":
            return saved
        groups = self._optimizer.param_groups
        found = options_by_name(saved, groups, self._pairs, strict=self._strict)
        self.report.kept_options = [
            str(group.get("name", number)) for number, group in enumerate(groups) if found[number] is None
        ]
        return [own if options is None else options for own, options in zip(groups, found, strict=True)]

    def _read_declared(self) -> None:
        """What the state dict says was declared for ours; the report is told of functions that are missing."""
        for saved, ours in self._pairs:
            if saved.traits is not None and ours.label not in self.report.reshaped:
                item = Declared(self._optimizer._table.find(ours.param), saved.traits, f"parameter {ours.label!r}")
                self._declared.append(item)
                if item.is_undeclared:
                    self.report.undeclared.append(ours.label)

    # ---- after torch's method has run -------------------------------------------------------------------------------

    def finish(self) -> None:
        """Take over IDs, and let what the state dict declares hold for the state that has just been loaded."""
        self._take_over_ids()
        optimizer = self._optimizer
        optimizer._forget_versions(entry.param for entry in optimizer._table)
        told = {item.entry for item in self._declared}
        for entry in optimizer._table:
            if entry not in told:
                optimizer._begin_rows(entry)
        for item in self._declared:
            item.adopt(optimizer)
        if optimizer._is_retyped:
            for entry in optimizer._table:
                optimizer._retype_state(entry.param)

    def _take_over_ids(self) -> None:
        """Let the IDs of the saved side be ours."""
        optimizer, table = self._optimizer, self._optimizer._table
        pairs = [(table.of(ours.param), saved.id) for saved, ours in self._pairs]
        changed = {entry.id: id for entry, id in pairs if entry is not None and id is not None and entry.id != id}
        if changed:
            for id in optimizer._walk.declared():
                optimizer._walk.declare(id)
            for id in changed:
                declared_of(table.store).pop(id, None)
            table.change_ids(changed)
            for entry in table:
                optimizer._traits_changed(entry)
            optimizer._roster = []
            optimizer._watched = False
            optimizer._sync()


def _copy_state(param: Tensor, saved: Saved, group: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of a parameter's saved state for the group that it will be in."""
    on_device = bool(group.get("capturable") or group.get("fused"))
    state = {key: _copy_entry(param, key, value, on_device=on_device) for key, value in (saved.state or {}).items()}
    left_over = state.pop(COMPENSATION, None)
    if isinstance(left_over, Tensor) and is_short(param):
        state[COMPENSATION] = left_over.to(param.dtype)
    return state


def _copy_entry(param: Tensor, key: str, value: Any, *, on_device: bool) -> Any:
    if not isinstance(value, Tensor):
        return tree_map_only(Tensor, lambda inner: inner.detach().to(device=param.device, copy=True), value)
    if key == "step":
        return (
            value.detach().to(dtype=torch.float32, device=param.device, copy=True)
            if on_device
            else value.detach().clone()
        )
    if dense(value) is not value:
        return value.to(param.device, copy=True)
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
