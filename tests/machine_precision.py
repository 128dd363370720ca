"""In what the moments are kept, as actions of the state machine: declared for some in the midst of a run."""

from __future__ import annotations

from hypothesis.stateful import rule

from identity_machine import IdentityMachine, kinds, meanings, which
from reference_precision import Kind


class Precision(IdentityMachine):
    """Declared for arguments of every kind; all else that happens keeps to it."""

    @rule(index=which, how=meanings, kind=kinds)
    def set_state_dtype(self, index: int, how: str, kind: Kind | None) -> None:
        argument, keys = self.meant(index, how)
        self.opt.set_state_dtype(argument, kind)
        for key in keys:
            self.entry(key).kind = kind
            self.entry(key).keep_as_declared(self.model.kind)
        self.allow_widening()
