"""How a replaced parameter or module is noticed: then it is followed, or raised where following would be a guess."""

from __future__ import annotations

from torch import nn

from .errors import ReplacedParameterError, listed
from .hooks import listen
from .identity import Entry
from .membership import Membership
from .slots import Findings
from .wrappers import Link, Place, Tree


class Following(Membership):
    """The part of an optimizer that is told of registrations and checks the slots before a step."""

    def _end_identity(self) -> None:
        self._under_construction = False
        self._require_own_memory()
        listen(self)

    def _on_parameter(self, module: nn.Module, attribute: str, new: nn.Parameter) -> None:
        """A parameter is about to be registered."""
        old = module._parameters.get(attribute)
        if not self._is_enrolled(old is not None):
            return
        entry = self._slots.at(module, attribute)
        if entry is None:
            entry = self._table.of(old) if old is not None else None
            if entry is None or entry.slots:
                return
        if new is entry.param:
            return
        others = [slot for slot in entry.slots if slot.attribute != attribute or slot.module() is not module]
        elsewhere = [held._parameters.get(slot.attribute) for slot in others if (held := slot.module()) is not None]
        if self._table.of(new) is not None or any(param is not new for param in elsewhere):
            self._slots.dirty = True
        else:
            self._follow(entry, new)

    def _is_enrolled(self, needed: bool) -> bool:
        """Whether the parameters have their IDs; if that is ``needed``, they get them."""
        if needed and not self._roster:
            self._sync()
        self._resolve_copies()
        return bool(self._roster)

    def _on_module(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        """A module is about to take the place of another."""
        old = parent._modules.get(name)
        if old is None or old is child or not self._is_enrolled(needed=True):
            return
        inside = Tree(child).places
        kept = {place.param for place in inside}
        leaving = [
            (place, entry)
            for place in Tree(old).places
            if place.param not in kept and (entry := self._table.of(place.param)) is not None
        ]
        if not leaving:
            return
        if self._slots.models:
            self._settle(stepping=False)
            self._slots.dirty = True
            for entry, places in self._slots.examine(self._table, Link(parent, name, child)).replaced:
                self._follow(entry, places[0].param, places)
        by_path = {place.path: place.param for place in inside}
        for place, entry in leaving:
            new = by_path.get(place.path)
            if not entry.slots and new is not None and self._table.of(new) is None:
                self._follow(entry, new)

    def _settle(self, *, stepping: bool) -> None:
        """Compare the models with what is recorded, and follow or raise.

        Args:
            stepping: whether a step is about to be taken. If not, only what needs no decision is followed.

        Raises:
            ReplacedParameterError: stepping, and something changed that only the user can decide.
        """
        self._is_enrolled(needed=True)
        if not self._slots.roots:
            return
        if self._slots.forget_dead_models(self._table):
            self._watched = False
        if not self._watched:
            self._walk.watch(*self._slots.watch_list(self._table))
            self._watched = True
        if not self._slots.dirty:
            slots, links = self._walk.moved()
            if not slots and not links:
                return
        findings = self._slots.examine(self._table)
        if stepping:
            self._raise_for(findings)
        for entry, places in findings.replaced:
            self._follow(entry, places[0].param, places)
        self._resettle(findings.present)
        if not findings.problems:
            self._slots.clean(self._table)
        self._watched = False

    def _resettle(self, moved: list[tuple[Entry, list[Place]]]) -> None:
        """Record new places of parameters; names follow the paths that changed."""
        changes = []
        for entry, places in moved:
            before = [slot.path for slot in entry.slots] or self._table.names(entry)
            after = [place.path for place in places]
            if before != after:
                changes.append((entry, [p for p in before if p not in after], [p for p in after if p not in before]))
        self._table.move_names(changes)
        for entry, places in moved:
            self._slots.settle(entry, places)

    def _raise_for(self, findings: Findings) -> None:
        for entry, place in findings.untied:
            raise ReplacedParameterError(
                f"parameter {self._table.name(entry)!r} was tied to {place.path!r}, which now holds a parameter of its "
                f"own that is not optimized; opt.rebind(model) goes on without it, opt.rebind(model, group=0) adopts it"
            )
        gone = [self._table.name(entry) for entry in findings.vanished]
        gone += [self._table.name(entry) for entry, _ in findings.displaced]
        if gone:
            appeared = [place.path for _, place in findings.displaced]
            appeared += [place.path for place in findings.untracked if place.param.requires_grad]
            raise ReplacedParameterError(
                f"parameters left the model: {listed(gone)}; appeared in it: {listed(appeared) or 'none'}. "
                "opt.rebind(model) goes on with what is there now, opt.rebind(model, group=0) also adopts the new ones"
            )
        for entry, places in findings.replaced:
            if places[0].param.grad is not None:
                raise ReplacedParameterError(
                    f"parameter {self._table.name(entry)!r} was replaced where no hook sees it, and the new one has a "
                    "gradient already, which a gradient scaler may not have unscaled; call opt.rebind(model) right "
                    "after replacing, before backward()"
                )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as torch does; a parameter that was replaced is followed first."""
        self._settle(stepping=False)
        super().zero_grad(set_to_none)
