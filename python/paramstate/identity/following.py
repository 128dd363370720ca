"""How a replaced parameter or module is noticed: then it is followed, or raised where following would be a guess."""

from __future__ import annotations

from torch import Tensor, nn

from paramstate.errors import ReplacedParameterError, listed

from .hooks import listen
from .membership import Membership
from .slots import Findings
from .table import Entry, Slot
from .tables import Alias
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
        if self._table.of(new) is not None or not self._all_hold(others, new):
            self._slots.dirty = True
        else:
            self._follow_announced(entry, new)

    def _all_hold(self, slots: list[Slot], param: Tensor) -> bool:
        """Whether ``param`` stands in all of these slots, as far as they are still in the models."""
        if not slots:
            return True
        now = {place.path: place.param for place in self._slots.places()}
        return all(now.get(slot.path, param) is param for slot in slots)

    def _follow_announced(self, entry: Entry, new: Tensor, places: list[Place] | None = None) -> None:
        """Follow before the assignment is made.

        A client that edits groups and state itself may come right after it and look under the old tensor: until the
        next look at the groups the state stands there as well.
        """
        old, own = entry.param, new.grad
        self._follow(entry, new, places)
        state = self.state.get(new)
        if state:
            self.state[old] = state
            self._aliases.append(Alias(old, new, state, new.grad if own is None else None))
        if not entry.slots:
            self._has_left(entry, old)

    def _is_enrolled(self, needed: bool) -> bool:
        """Whether the parameters have their IDs; if that is ``needed``, they get them."""
        if needed and not self._roster:
            self._sync()
        elif needed:
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
                self._follow_announced(entry, places[0].param, places)
        by_path = {place.path: place.param for place in inside}
        for place, entry in leaving:
            new = by_path.get(place.path)
            if not entry.slots and new is not None and self._table.of(new) is None:
                self._follow_announced(entry, new)

    def _settle(self, *, stepping: bool) -> None:
        """Compare the models with what is recorded, and follow or raise.

        Args:
            stepping: whether a step is about to be taken. If not, only what needs no decision is followed.

        Raises:
            ReplacedParameterError: stepping, and something changed that only the user can decide.
        """
        self._is_enrolled(needed=True)
        self._drop_aliases()
        if stepping:
            self._raise_for_left()
        if self._slots.forget_dead_models(self._table):
            self._watched = False
        if not self._slots.roots:
            return
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
        if not findings.problems:
            # Names follow paths only in a model that is whole: two modules may be about to change places.
            self._resettle(findings.present)
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

    def _raise_for_left(self) -> None:
        """Where the slots are unknown, a tensor that was replaced may still be used: then it has a gradient again."""
        for entry, old, grad in self._left:
            is_used = old.grad is not None and old.grad is not grad and self._table.of(old) is None
            if is_used and self._table.of(entry.param) is entry:  # else it is the user who let the parameter go
                raise ReplacedParameterError(
                    f"{self._table.called(entry)} was replaced in one module, or by opt.replace_(...) or "
                    "opt.edit_rows(), but the tensor before it has a gradient: it is still used (not assigned there, "
                    "tied to another module, or the graph was built before) and no longer optimized. Assign the new "
                    "one there and clear the old one's gradient; or opt.rebind(model, group=0) adopts it, "
                    "opt.rebind(model) goes on without it"
                )
        self._left.clear()

    def _raise_for(self, findings: Findings) -> None:
        for entry, place in findings.untied:
            raise ReplacedParameterError(
                f"{self._table.called(entry)} was tied to {place.path!r}, which now holds a parameter of its "
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
                    f"{self._table.called(entry)} was replaced where no hook sees it, and the new one has a "
                    "gradient already, which a gradient scaler may not have unscaled; call opt.rebind(model) right "
                    "after replacing, before backward()"
                )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as torch does; a parameter that was replaced is followed first.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = AdamW(model)
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> opt.zero_grad()
            >>> model.weight.grad is None
            True
        """
        self._settle(stepping=False)
        super().zero_grad(set_to_none)
