"""Where the parameters of an optimizer live in its models, and what changed there.

Three mechanisms show a replacement, since none sees all of them:

* the hook on ``register_parameter`` (``setattr``, ``assign=True``, ``parametrize``, ``prune``),
* the hook on the registration of modules (``model.head = nn.Linear(...)``),
* the check in ``zero_grad()`` and ``step()`` that each slot still holds its tensor and each module still hangs where
  it did (``module._parameters[...] =``, overwrite-on-conversion, ``del``).

This file finds; what is then done about it is decided by the optimizer. Modules are held weakly.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from .sharding import is_sharded
from .table import Entry, IdentityTable, Slot
from .wrappers import Link, Place, Tree


@dataclass(slots=True)
class Findings:
    """What an examination of the models found, each parameter in at most one list besides ``present``."""

    present: list[tuple[Entry, list[Place]]] = field(default_factory=list)
    """Still in the model, at these places."""
    replaced: list[tuple[Entry, list[Place]]] = field(default_factory=list)
    """Gone, and one untracked object stands in all of its slots: the places of that object."""
    untied: list[tuple[Entry, Place]] = field(default_factory=list)
    """Still there, but one of its slots holds an untracked object now."""
    displaced: list[tuple[Entry, Place]] = field(default_factory=list)
    """The same object, under another attribute: it may mean something else now (``prune``, ``parametrize``)."""
    vanished: list[Entry] = field(default_factory=list)
    """Gone, and nothing stands in its place."""
    untracked: list[Place] = field(default_factory=list)
    """Parameters of the models that the optimizer does not know."""

    @property
    def problems(self) -> bool:
        """Whether something was found that only the user can decide."""
        return bool(self.untied or self.displaced or self.vanished)


@dataclass(slots=True)
class Root:
    """A model that an optimizer knows, held weakly, with the modules right below it."""

    module: weakref.ref[nn.Module]
    prefix: str
    children: list[tuple[weakref.ref[nn.Module], str]]

    @classmethod
    def of(cls, model: nn.Module, tree: Tree, prefix: str = "") -> Root:
        """The root for ``model``, whose canonical names begin with ``prefix``; ``tree`` is the walk over it."""
        links = [link for link in tree.links if link.parent is model]
        return cls(weakref.ref(model), prefix, [(weakref.ref(link.child), link.prefix) for link in links])


class SlotTable:
    """The models that an optimizer knows, and the slots of its parameters in them."""

    def __init__(self) -> None:
        self.roots: list[Root] = []
        self.dirty = False
        """Something happened that only an examination can judge."""
        self._links: list[tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module]]] = []
        self._by_module: weakref.WeakKeyDictionary[nn.Module, dict[str, Entry]] = weakref.WeakKeyDictionary()

    @property
    def models(self) -> list[nn.Module]:
        """The models that are still alive."""
        return [model for root in self.roots if (model := root.module()) is not None]

    def add_root(self, model: nn.Module, tree: Tree) -> None:
        """Know ``model`` from now on; ``tree`` is the walk over it."""
        if all(model is not known for known in self.models):
            self.roots.append(Root.of(model, tree))

    def forget_dead_models(self, table: IdentityTable) -> bool:
        """Let go of models that nobody else holds, and of slots in them; returns whether there were any.

        What hung below such a model may live on (the model was a container made for the optimizer's sake): it is known
        from then on in the model's place.
        """
        if len(self.models) == len(self.roots):
            return False
        living: list[Root] = []
        for root in self.roots:
            if root.module() is not None:
                living.append(root)
            else:
                below = ((child(), prefix) for child, prefix in root.children)
                living += [Root.of(m, Tree(m, prefix=prefix), prefix) for m, prefix in below if m is not None]
        self.roots = living
        paths = {place.path for place in self.places()}
        for entry in table:
            if all(slot.module() is None and slot.path not in paths for slot in entry.slots):
                self.release(entry)
        self.dirty = True
        return True

    def trees(self, pending: Link | None = None) -> list[Tree]:
        """A walk over each model that is still alive, as if ``pending`` had been assigned."""
        known = ((root.module(), root.prefix) for root in self.roots)
        return [Tree(model, pending, prefix) for model, prefix in known if model is not None]

    def places(self, pending: Link | None = None) -> list[Place]:
        """Every slot of the models that holds a parameter, as if ``pending`` had been assigned."""
        return [place for tree in self.trees(pending) for place in tree.places]

    def buffer_owner(self, name: str) -> tuple[dict[str, Tensor | None], str] | None:
        """Where a buffer of the models lives: the buffers of its module, and the key in them."""
        for root in self.roots:
            model = root.module()
            if model is None:
                continue
            below = [(link.child, link.prefix) for link in Tree(model, prefix=root.prefix).links]
            for module, prefix in [(model, root.prefix), *below]:
                key = name.removeprefix(prefix)
                if name.startswith(prefix) and module._buffers.get(key) is not None:
                    return module._buffers, key
        return None

    def settle(self, entry: Entry, places: Iterable[Place]) -> None:
        """Record that ``entry`` lives at ``places``."""
        self.release(entry)
        self.dirty = True
        entry.slots = [Slot.of(place) for place in places]
        for place in places:
            self._by_module.setdefault(place.module, {})[place.attribute] = entry

    def release(self, entry: Entry) -> None:
        """Forget the slots of ``entry``."""
        for slot in entry.slots:
            module = slot.module()
            held = self._by_module.get(module) if module is not None else None
            if held is not None and held.get(slot.attribute) is entry:
                del held[slot.attribute]
        entry.slots = []

    def at(self, module: nn.Module, attribute: str) -> Entry | None:
        """The entry that lives in a slot."""
        held = self._by_module.get(module)
        return held.get(attribute) if held is not None else None

    def watch_list(
        self, entries: Iterable[Entry]
    ) -> tuple[
        list[tuple[weakref.ref[nn.Module], str, Tensor]],
        list[tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module]]],
    ]:
        """What to compare before a step: each slot with its tensor, and the links that lead to a slot in use."""
        return [(slot.module, slot.attribute, entry.param) for entry in entries for slot in entry.slots], self._links

    def clean(self, entries: Iterable[Entry]) -> None:
        """Record the links that lead to slots in use: all that was found is settled, and further changes will show."""
        modules = (slot.module() for entry in entries for slot in entry.slots)
        used = {id(module) for module in modules if module is not None}
        self._links = []
        for tree in self.trees():
            # Children come after their parents in the walk, so going backwards sees a child's use first.
            for link in reversed(tree.links):
                if id(link.child) in used:
                    used.add(id(link.parent))
                    self._links.append((weakref.ref(link.parent), link.name, weakref.ref(link.child)))
        self._links.reverse()
        self.dirty = False

    def examine(self, table: IdentityTable, pending: Link | None = None) -> Findings:
        """Compare the models with what was recorded.

        Args:
            table: the parameters to look for.
            pending: an assignment of a module that is about to happen; the models are examined as if it had.
        """
        return _Examination(table, self.places(pending)).findings


class _Examination:
    """One comparison of recorded slots with the places of the models."""

    def __init__(self, table: IdentityTable, places: list[Place]) -> None:
        self.findings = Findings()
        self._table = table
        self._by_param: dict[Tensor, list[Place]] = {}
        self._by_slot: dict[tuple[int, str], Place] = {}
        self._by_path: dict[str, Place] = {}
        for place in places:
            self._by_param.setdefault(place.param, []).append(place)
            self._by_slot.setdefault((id(place.module), place.attribute), place)
            self._by_path.setdefault(place.path, place)
        self._claimed: set[Tensor] = set()
        for entry in table:
            if entry.slots:
                self._judge(entry)
        self.findings.untracked = [
            place for place in places if table.of(place.param) is None and place.param not in self._claimed
        ]

    def _judge(self, entry: Entry) -> None:
        here = self._by_param.get(entry.param, [])
        now = [place for slot in entry.slots if (place := self._now_at(slot)) is not None]
        if here:
            self._judge_present(entry, here, now)
        else:
            self._judge_gone(entry, now)

    def _now_at(self, slot: Slot) -> Place | None:
        """What stands in a slot now: in the same attribute of the same module, else on the same path."""
        module = slot.module()
        place = self._by_slot.get((id(module), slot.attribute)) if module is not None else None
        return place or self._by_path.get(slot.path)

    def _judge_present(self, entry: Entry, here: list[Place], now: list[Place]) -> None:
        paths = {slot.path for slot in entry.slots}
        if not any(place.path in paths or any(slot.is_at(place) for slot in entry.slots) for place in here):
            self.findings.displaced.append((entry, here[0]))
            return
        others = [place for place in now if place.param is not entry.param and self._table.of(place.param) is None]
        if others and not _stands_in(entry.param, others[0].param):
            self.findings.untied.append((entry, others[0]))
        else:
            self.findings.present.append((entry, here))

    def _judge_gone(self, entry: Entry, now: list[Place]) -> None:
        candidates = {place.param for place in now}
        if any(_stands_in(entry.param, candidate) for candidate in candidates):
            return
        free = [param for param in candidates if self._table.of(param) is None and param not in self._claimed]
        if len(candidates) == 1 and free:
            self._claimed.add(free[0])
            self.findings.replaced.append((entry, self._by_param[free[0]]))
        elif len(free) > 1:
            untracked = next(place for place in now if place.param in free)
            self.findings.untied.append((entry, untracked))
        else:
            self.findings.vanished.append(entry)


def _stands_in(tracked: Tensor, shown: Tensor) -> bool:
    """Whether ``shown`` is what FSDP2 puts in the slot of a sharded parameter for the time of a forward pass."""
    return is_sharded(tracked) and not is_sharded(shown)
