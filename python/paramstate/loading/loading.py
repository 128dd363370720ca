"""Saving and loading the state of an optimizer, in torch's layout, by name and without a guess.

Torch's ``load_state_dict`` pairs by position and casts moments to the dtype of the value. Here the pairs are made and
checked first (:mod:`paramstate.loading.load`); torch's method then loads the groups and runs the hooks, and the
tensors are placed when it calls ``__setstate__``, so that hooks after the load see all of it.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paramstate.identity.membership import Membership
from paramstate.identity.shared import Shared

if TYPE_CHECKING:
    from .matching import LoadReport

_VERSION = 1


class NamedLoading(Membership):
    """The part of an optimizer that writes and reads state dicts."""

    _incoming = Shared[dict[Tensor, dict[str, Any]] | None](None)

    def state_dict(self, *, compact: bool = False) -> dict[str, Any]:
        """The state in torch's layout, with one more key, ``"paramstate"``: names and IDs by position.

        As in torch the tensors are the live ones, not copies; but moments that are kept in eight bits are given as
        float32, so that any reader of torch's state dicts can read them.

        Args:
            compact: give each of these as a dict of its uint8 ``"codes"`` and ``"scales"`` instead, live: a quarter of
                the size, for our own ``load_state_dict`` alone.

        Raises:
            KeyError: ``opt.state`` holds state of a tensor that is in no group.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = AdamW(model)
            >>> opt.materialize_state()
            >>> saved = opt.state_dict()
            >>> saved["paramstate"]["names"], list(saved["state"][0])
            ([['weight'], ['bias']], ['step', 'exp_avg', 'exp_avg_sq'])
        """
        self._sync()
        self._require_no_orphans()
        # The first of the post-hooks: those of users see the whole, and what they return is what is returned.
        handle = self.register_state_dict_post_hook(partial(_add_identity, compact=compact), prepend=True)
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
        from .load import Load

        self._sync()
        load = Load(self, names or {}, strict=strict, strict_names=strict_names)

        def prepare(_: torch.optim.Optimizer, loading: dict[str, Any]) -> dict[str, Any]:
            aligned = load.aligned(loading)
            self._incoming = load.copied_state(aligned["param_groups"])
            return aligned

        handle = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            handle.remove()
            self._incoming = None
        load.finish()
        return load.report

    def __setstate__(self, state: dict[str, Any]) -> None:
        if self._incoming is not None:
            merged: defaultdict[Any, Any] = defaultdict(dict)
            merged.update(self._incoming)
            merged.update(state["state"])
            state = {**state, "state": merged}
        super().__setstate__(state)


def _add_identity(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], *, compact: bool) -> None:
    """Put names and IDs into a state dict that was just made, and moments in eight bits into its own form."""
    from .traits import traits_of

    assert isinstance(optimizer, Membership)
    optimizer._sync()  # a pre-hook may have edited the groups
    table = optimizer._table
    entries = [table.find(param) for group in optimizer.param_groups for param in group["params"]]
    state_dict["paramstate"] = {
        "version": _VERSION,
        "names": [table.names(entry) for entry in entries],
        "ids": [entry.id for entry in entries],
        "traits": [traits_of(entry, entry.state_dtype or optimizer._state_dtype) for entry in entries],
    }
    if "paramstate.precision.blockwise" in sys.modules:
        from paramstate.precision.portable import portable

        state_dict["state"] = {key: portable(held, compact=compact) for key, held in state_dict["state"].items()}
