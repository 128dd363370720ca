"""The identity table, brought up to date with groups that clients edit.

Groups and state are torch's own plain containers: a client appends, exchanges and removes parameters at will, and what
it did is found out here.
"""

from __future__ import annotations

from torch import Tensor

from paramstate.declared.constraints import Box
from paramstate.declared.rows import Rows

from .succession import Succession, declared_of
from .table import TRAITS, Entry
from .wrappers import Place


class Enrolment(Succession):
    """The part of an optimizer that gives parameters their IDs, and finds in whose place a client put another."""

    def _sync(self) -> None:
        """Bring the table up to date with ``param_groups``, which clients edit."""
        self._resolve_copies()
        self._drop_aliases()
        groups = [list(params) for params in self._lists()]
        if not _same_objects(groups, self._roster):
            self._enroll(groups)

    def _enroll(self, groups: list[list[Tensor]]) -> None:
        current = {param for group in groups for param in group}
        gone = [entry for entry in self._table if entry.param not in current]
        places = self._place_index() if any(self._table.of(param) is None for param in current) else {}
        for position, params in enumerate(groups):
            for index, param in enumerate(params):
                if self._table.of(param) is None:
                    partner = self._partner(position, index, gone, places)
                    if partner is not None:
                        gone.remove(partner)
                        self._follow(partner, param)
        for former in gone:
            if former.param not in self.state:
                self._rest(former)
        if self._resting:
            held = {place.param for place in self._slots.places()}
            for param in [param for param in self._resting if param not in held]:
                del self._resting[param]
        for position in range(len(groups)):
            self._admit(position, places)
        ids = [[self._table.find(param).id for param in group] for group in groups]
        kinds = [self._kept_as(param) for group in groups for param in group]
        self._roster = []  # where the next line is interrupted, what the walk has is not known: all are enrolled again
        self._walk.enroll(groups, ids, kinds if any(kinds) else None)
        self._roster = groups
        self._index = None
        self._watched = False

    def _partner(self, position: int, index: int, gone: list[Entry], places: dict[Tensor, list[Place]]) -> Entry | None:
        """In whose place a client put a new object.

        In a model that is known its slot tells. Otherwise its place in the group does, but only where the client moved
        the state too, or changed nothing else in the group: a whole list of other parameters is just that.
        """
        params = self.param_groups[position]["params"]
        paths = [place.path for place in places.get(params[index], [])]
        if paths:
            return next((entry for entry in gone if set(paths) & set(self._table.names(entry))), None)
        before = self._roster[position] if position < len(self._roster) else []
        if len(before) != len(params):
            return None
        partner = next((entry for entry in gone if entry.param is before[index]), None)
        if partner is None or self._is_in_a_model(partner):
            return None
        moved = bool(self.state.get(params[index])) or not self.state.get(partner.param)
        alone = sum(one is not other for one, other in zip(before, params, strict=True)) == 1
        return partner if moved or alone else None

    def _is_in_a_model(self, entry: Entry) -> bool:
        """Whether a slot of a model still holds the parameter."""
        modules = ((slot.module(), slot.attribute) for slot in entry.slots)
        return any(m is not None and m._parameters.get(attribute) is entry.param for m, attribute in modules)

    def _admit(self, position: int, index: dict[Tensor, list[Place]]) -> None:
        """Give the parameters of a group their IDs."""
        group = self.param_groups[position]
        new = [param for param in dict.fromkeys(group["params"]) if self._table.of(param) is None]
        if not new:
            return
        label = str(group.get("name", position))
        given = dict(zip(group["params"], group.get("param_names", ()), strict=False))
        for param in new:
            here = index.get(param, [])
            names = [place.path for place in here] or ([given[param]] if param in given else [])
            entry = self._woken(param, label) or self._table.add(param, names, label)
            if here:
                self._slots.settle(entry, here)
            if self._handed_over:
                self._adopt_stored_state(entry)
        self._watched = False

    def _rest(self, entry: Entry) -> None:
        """Forget a parameter that a client took out of the groups; if it stays in its model, only until it is back.

        ``torch.optim._stateless`` puts other tensors there for the time of one step.
        """
        if self._is_in_a_model(entry):
            self._resting[entry.param] = self._table.names(entry), entry
        self._forget(entry)

    def _woken(self, param: Tensor, label: str) -> Entry | None:
        """The new entry of a parameter that comes back to the groups: names, ID and what was declared stay."""
        names, former = self._resting.pop(param, ([], None))
        if former is None or former.id in self._table.store:
            return None
        entry = self._table.add(param, names, label, former.id)
        for trait in TRAITS:
            setattr(entry, trait, getattr(former, trait))
        self._traits_changed(entry)
        return entry

    def _forget(self, entry: Entry) -> None:
        """Drop a parameter from all tables, and what was declared for it."""
        self._slots.release(entry)
        declared_of(self._table.store).pop(entry.id, None)
        self._walk.declare(entry.id)
        self._table.forget(entry)

    def _adopt_stored_state(self, entry: Entry) -> None:
        """Take over the state that a handed-over store holds under the ID, and what was declared there."""
        lent = {
            key: tensor
            for key in self._table.store.keys(entry.id)
            if key != "value" and isinstance(tensor := self._table.store.lent(entry.id, key), Tensor)
        }
        if lent:
            self.state[entry.param] = lent
        low, high = self._table.store.bounds(entry.id)
        if low is not None or high is not None:
            entry.constraint = Box(low, high)
        for trait, value in declared_of(self._table.store).get(entry.id, {}).items():
            # Steps change rows in place, and the optimizer that the store comes from keeps those that it has.
            setattr(entry, trait, value.copied() if isinstance(value, Rows) else value)
        if entry.frozen and entry.trained is not None:
            entry.param.requires_grad_(False)
        self._is_retyped = self._is_retyped or entry.state_dtype is not None
        self._traits_changed(entry)

    def _orphans(self) -> list[Tensor]:
        """Tensors that have state but are in no group."""
        current = {param for group in self.param_groups for param in group["params"]}
        return [key for key in self.state if isinstance(key, Tensor) and key not in current]


def _same_objects(groups: list[list[Tensor]], others: list[list[Tensor]]) -> bool:
    return len(groups) == len(others) and all(
        len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
        for one, other in zip(groups, others, strict=True)
    )
