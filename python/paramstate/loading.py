"""Saving and loading the state of an optimizer, in torch's layout, by name and without a guess.

Torch's ``load_state_dict`` pairs by position and casts moments to the dtype of the value. Here the pairs are made and
checked first (:mod:`paramstate.matching`); torch's method then loads the groups and runs the hooks, and the tensors
are placed when it calls ``__setstate__``, so that hooks after the load see all of it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import LoadError
from .matching import GivenNames, LoadReport, Ours, Saved, check, check_ids, match, options_by_name, saved_parameters
from .membership import Membership

_VERSION = 1
_GROUPS = "loaded state dict has a different number of parameter groups"


class NamedLoading(Membership):
    """The part of an optimizer that writes and reads state dicts."""

    _incoming: dict[Tensor, dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's layout, with one more key, ``"paramstate"``: names and IDs by position.

        As in torch the tensors are the live ones, not copies.

        Raises:
            KeyError: ``opt.state`` holds state of a tensor that is in no group.
        """
        self._sync()
        self._require_no_orphans()
        state_dict = super().state_dict()
        if isinstance(state_dict, dict) and "param_groups" in state_dict:
            entries = [self._table.find(param) for group in self.param_groups for param in group["params"]]
            state_dict["paramstate"] = {
                "version": _VERSION,
                "names": [self._table.names(entry) for entry in entries],
                "ids": [entry.id for entry in entries],
            }
        return state_dict

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
        Tensors are copied; moments keep the dtype they were saved in, unless the value is wider. IDs of the saved side
        are taken over, except one that the store holds for a parameter that is not in this optimizer: then our
        parameter keeps its own.

        Matched by name, a group takes the options of the saved group that holds its parameters, wherever that stands.
        Matched by position, group is paired with group.

        Args:
            state_dict: as returned by ``state_dict()``, ours or torch's.
            strict: refuse missing, unexpected and reshaped parameters, another number of groups, and a group whose
                parameters come from saved groups of different options. If not, what matches is loaded, parameters
                without saved state start afresh, and such a group keeps its own options, as does one none of whose
                parameters was saved. Without names the number of groups must be the same all the same.
            strict_names: refuse to match by position.
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
        self._sync()
        report: list[LoadReport] = []
        ids: dict[Tensor, int] = {}

        def prepare(_: torch.optim.Optimizer, loading: dict[str, Any]) -> dict[str, Any]:
            pairs, found = self._match(loading, names or {}, strict, strict_names)
            aligned = self._aligned(loading, pairs, by_name=found.matched_by == "name", strict=strict)
            self._incoming = {
                ours.param: _copy_state(ours.param, saved, aligned["param_groups"][ours.group])
                for saved, ours in pairs
                if saved.state and ours.label not in found.reshaped
            }
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
        return report[0]

    def _match(
        self, loading: Mapping[str, Any], renamed: Mapping[str, str], strict: bool, strict_names: bool
    ) -> tuple[list[tuple[Saved, Ours]], LoadReport]:
        if strict:
            self._require_as_many_groups(loading)
        pairs, report = match(
            saved_parameters(loading, renamed), self._our_parameters(), strict=strict, strict_names=strict_names
        )
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
                ours.setdefault(param, Ours(param, names, label, number))
        return list(ours.values())

    def _aligned(
        self, loading: dict[str, Any], pairs: list[tuple[Saved, Ours]], *, by_name: bool, strict: bool
    ) -> dict[str, Any]:
        """The state dict as torch's method is to see it: our parameters, the saved options, no state of parameters."""
        saved = loading["param_groups"]
        options = options_by_name(saved, self.param_groups, pairs, strict=strict) if by_name else saved
        # Copied one by one: two groups that take the options of one saved group are not to share a tensor in them.
        groups = [copy.deepcopy(dict(group)) for group in options]
        position = 0
        for group, ours in zip(groups, self.param_groups, strict=True):
            group["params"] = list(range(position, position + len(ours["params"])))
            position += len(ours["params"])
            if "param_names" in ours or len(group.get("param_names", ())) != len(ours["params"]):
                group.pop("param_names", None)
        keys = {key for group in saved for key in group["params"]}
        rest = {key: value for key, value in loading["state"].items() if key not in keys}
        return {**loading, "state": rest, "param_groups": groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if self.__dict__.get("_incoming") is not None and self._incoming is not None:
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
            self._table.change_ids(changed)
            self._roster = []
            self._watched = False
            self._sync()


def _copy_state(param: Tensor, saved: Saved, group: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of a parameter's saved state for the group that it will be in."""
    on_device = bool(group.get("capturable") or group.get("fused"))
    return {key: _copy_entry(param, key, value, on_device=on_device) for key, value in (saved.state or {}).items()}


def _copy_entry(param: Tensor, key: str, value: Any, *, on_device: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    if key == "step":
        return (
            value.detach().to(dtype=torch.float32, device=param.device, copy=True)
            if on_device
            else value.detach().clone()
        )
    if not value.is_floating_point() or not param.is_floating_point():
        return value.detach().to(device=param.device, copy=True)
    dtype = param.dtype if param.dtype.itemsize > value.dtype.itemsize else value.dtype
    if type(value) is Tensor and value.shape == param.shape and value.layout == param.layout == torch.strided:
        # Moments take the parameter's strides: then all of them share one layout, which is the fast path.
        return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False).copy_(
            value
        )
    return value.detach().to(dtype=dtype, device=param.device, copy=True)
