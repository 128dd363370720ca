"""Saving and loading the state of an optimizer, in torch's layout, by name and without a guess.

Torch's ``load_state_dict`` pairs by position and casts moments to the dtype of the value. Here the pairs are made and
checked first (:mod:`paramstate.matching`); torch's method then loads the groups and runs the hooks, and the tensors
are placed when it calls ``__setstate__``, so that hooks after the load see all of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import LoadError
from .matching import SIZES, LoadReport, Ours, Saved, check, match, saved_parameters
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
        are taken over.

        Args:
            state_dict: as returned by ``state_dict()``, ours or torch's.
            strict: refuse missing, unexpected and reshaped parameters. If not, what matches is loaded, and parameters
                without saved state start afresh.
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
            self._incoming = {
                ours.param: self._copy_state(ours.param, saved, loading)
                for saved, ours in pairs
                if saved.state and ours.label not in found.reshaped
            }
            ids.update({ours.param: saved.id for saved, ours in pairs if saved.id is not None})
            report.append(found)
            return self._aligned(loading, by_name=found.matched_by == "name")

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
        if len(loading["param_groups"]) != len(self.param_groups):
            raise LoadError(f"{_GROUPS}: {len(loading['param_groups'])}, the optimizer has {len(self.param_groups)}")
        pairs, report = match(
            saved_parameters(loading, renamed), self._our_parameters(), strict=strict, strict_names=strict_names
        )
        if report.matched_by == "position" and strict:
            self._require_equal_groups(loading)
        check(pairs, report, self._shaped_state, strict=strict)
        return pairs, report

    def _require_equal_groups(self, loading: Mapping[str, Any]) -> None:
        for number, (saved, ours) in enumerate(zip(loading["param_groups"], self.param_groups, strict=True)):
            if len(saved["params"]) != len(ours["params"]):
                raise LoadError(
                    f"{SIZES}: group {number} has {len(saved['params'])} parameters there and {len(ours['params'])} "
                    "here, and one side has no names"
                )

    def _our_parameters(self) -> list[Ours]:
        ours: dict[Tensor, Ours] = {}
        for group in self.param_groups:
            given = group.get("param_names") or [None] * len(group["params"])
            for param, name in zip(group["params"], given, strict=False):
                names = self._table.names(self._table.find(param))
                if name is not None and name not in names:
                    names = [*names, name]
                label = names[0] if names else f"position {len(ours)}"
                ours.setdefault(param, Ours(param, names, label))
        return list(ours.values())

    def _copy_state(self, param: Tensor, saved: Saved, loading: Mapping[str, Any]) -> dict[str, Any]:
        group = next(group for group in loading["param_groups"] if saved.key in group["params"])
        on_device = bool(group.get("capturable") or group.get("fused"))
        return {key: _copy_entry(param, key, value, on_device=on_device) for key, value in (saved.state or {}).items()}

    def _aligned(self, loading: dict[str, Any], *, by_name: bool) -> dict[str, Any]:
        """The state dict as torch's method is to see it: our parameters, the saved options, no state of parameters."""
        groups = []
        keys = {key for group in loading["param_groups"] for key in group["params"]}
        position = 0
        for saved, ours in zip(loading["param_groups"], self.param_groups, strict=True):
            options = dict(saved)
            options["params"] = list(range(position, position + len(ours["params"])))
            position += len(ours["params"])
            if by_name or "param_names" in ours or len(options.get("param_names", ())) != len(ours["params"]):
                options.pop("param_names", None)
            groups.append(options)
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
