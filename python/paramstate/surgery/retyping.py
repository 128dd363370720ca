"""The dtype in which moments are kept, declared for parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paramstate.errors import ConstraintError
from paramstate.identity.membership import Membership, Which
from paramstate.identity.tables import between_steps
from paramstate.precision.state_dtype import StateDType, kind_of


class Retyping(Membership):
    """The part of an optimizer that keeps moments in a declared dtype."""

    @between_steps
    def set_state_dtype(self, which: Which, state_dtype: StateDType | None) -> None:
        """Declare in what dtype the moments of parameters are kept; those that exist are converted at once.

        It stays through replacements, conversions of the value, surgery, copies, save and load. See
        :mod:`paramstate.precision.state_dtype` for what each takes, and which parameters ``"8bit"`` leaves in float32.

        Args:
            which: a parameter, a name, or several of them.
            state_dtype: ``torch.float32``, ``torch.bfloat16`` or ``"8bit"``; ``None``: what the constructor was given.

        Raises:
            UnknownParameterError: one of them is not known. Nothing is declared then.
            ValueError: moments are not kept in that dtype.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Linear(64, 64)
            >>> opt = AdamW(model)
            >>> opt.set_state_dtype("weight", "8bit")
            >>> model(torch.ones(1, 64)).sum().backward(); opt.step()
            >>> opt.state_of("weight")["exp_avg"].nbytes, opt.state_of("bias")["exp_avg"].nbytes
            (4128, 256)
        """
        kind = kind_of(state_dtype)
        entries = self._select(which)
        for entry in entries:
            if kind is not None and not entry.param.is_floating_point():
                raise ConstraintError(
                    f"{self._table.called(entry)} is {entry.param.dtype}: its moments are kept in that; leave it out"
                )
        self._is_retyped = True
        for entry in entries:
            entry.state_dtype = kind
            self._traits_changed(entry)
            self._retype_state(entry.param)
        self._roster = []  # the walk is told of dtypes when parameters are enrolled

    def _begin_state_dtype(self, declared: StateDType | Mapping[Any, StateDType] | None) -> None:
        """Take the constructor's argument: for all parameters, present and to come, or for some."""
        if isinstance(declared, Mapping):
            self._keep_all_as(None)
            kinds = {which: kind_of(state_dtype) for which, state_dtype in declared.items()}
            for which, kind in kinds.items():
                self.set_state_dtype(which, kind)
        else:
            self._keep_all_as(kind_of(declared))
