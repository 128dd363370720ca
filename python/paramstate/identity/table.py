"""The identity table of one optimizer: which ID belongs to which parameter, and which names lead to it.

An ID is derived from a parameter's canonical name when it is first seen and never changes after that; names may. The
names and IDs themselves are kept by the compiled :class:`~paramstate.Store`; this table ties them to tensor objects.

Parameters are held strongly: a weak reference to one would make ``torch.utils.swap_tensors`` fail.
"""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from paramstate._core import Store
from paramstate.declared.constraints import Constraint
from paramstate.declared.rows import Rows
from paramstate.errors import AmbiguousNameError, UnknownParameterError, listed
from paramstate.precision.state_dtype import Kind

from .versions import Baseline
from .wrappers import Place


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a parameter lives: the attribute of a module, which is held weakly, and the path to it."""

    module: weakref.ref[nn.Module]
    attribute: str
    path: str

    @classmethod
    def of(cls, place: Place) -> Slot:
        """The slot at ``place``."""
        return cls(weakref.ref(place.module), place.attribute, place.path)

    def is_at(self, place: Place) -> bool:
        """Whether ``place`` is this slot, whatever the path to it."""
        return self.attribute == place.attribute and self.module() is place.module


@dataclass(eq=False, slots=True)
class Entry:
    """One logical parameter: its ID for life, the tensor that stands for it now, and its slots where they are known."""

    id: int
    param: Tensor
    label: str
    """The name or number of the group that it came with: qualifies a name that two groups use."""
    slots: list[Slot] = field(default_factory=list)
    constraint: Constraint | None = None
    frozen: bool = False
    trained: bool | None = None
    """``requires_grad`` before it was frozen; ``None`` where freezing left that alone."""
    rows: Rows | None = None
    """What differs between its rows; ``None`` where nothing does."""
    state_dtype: Kind | None = None
    """In what its moments are kept; ``None`` where nothing is declared for it alone."""
    baseline: Baseline | None = None
    """The version of the tensor when its moments began; ``None`` where that is not known."""


TRAITS = ("constraint", "frozen", "trained", "rows", "state_dtype")
"""What is declared for a parameter: the fields of an entry that copies and files carry along."""


class IdentityTable:
    """IDs, names and tensor objects of one optimizer, each to be found from the others."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._entries: dict[int, Entry] = {}
        self._by_param: dict[Tensor, Entry] = {}
        self.ambiguous: dict[str, list[int]] = {}
        """Bare names that several parameters share, with the IDs of those that do."""

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def of(self, param: Tensor) -> Entry | None:
        """The entry of a tensor object, or ``None``."""
        return self._by_param.get(param)

    def by_id(self, id: int) -> Entry:
        """The entry of an ID.

        Raises:
            UnknownParameterError: no parameter of this optimizer has that ID.
        """
        try:
            return self._entries[id]
        except KeyError:
            raise UnknownParameterError(f"no parameter has the ID {id}; opt.ids lists those known") from None

    def name(self, entry: Entry) -> str:
        """The main name of an entry; one without names is called by its ID."""
        names = self.store.names(entry.id)
        return names[0] if names else f"<unnamed {entry.id}>"

    def called(self, entry: Entry) -> str:
        """How a message names an entry."""
        return f"parameter {self.name(entry)!r}"

    def names(self, entry: Entry) -> list[str]:
        """All names of an entry: several where the parameter is tied, none where it was given bare."""
        return self.store.names(entry.id)

    def ids(self) -> dict[str, int]:
        """Every name to its ID."""
        return {name: id for name, id in self.store.ids().items() if id in self._entries}

    def is_name(self, name: str) -> bool:
        """Whether ``name`` is what a parameter is called, be it by several."""
        known = name in self.store and self.store.id(name) in self._entries
        return known or name in self.ambiguous

    def find(self, key: Tensor | str) -> Entry:
        """The entry that a parameter or a name stands for.

        Raises:
            UnknownParameterError: it stands for none; the message names the nearest names.
            AmbiguousNameError: several groups use that bare name; the message lists the qualified ones.
            TypeError: it is neither a tensor nor a name.
        """
        if isinstance(key, str):
            return self._find_name(key)
        if not isinstance(key, Tensor):
            raise TypeError(f"a parameter is given as the tensor or by name, got {type(key).__name__}")
        entry = self._by_param.get(key)
        if entry is None:
            raise UnknownParameterError(
                f"a tensor of shape {list(key.shape)} is no parameter of this optimizer; if the model was rebuilt or "
                "copied, call opt.rebind(model)"
            )
        return entry

    def _find_name(self, name: str) -> Entry:
        if name in self.store:
            entry = self._entries.get(self.store.id(name))
            if entry is not None:
                return entry
        sharing = [self.name(self._entries[id]) for id in self.ambiguous.get(name, []) if id in self._entries]
        if sharing:
            raise AmbiguousNameError(f"the name {name!r} is shared by {listed(sharing)}; use one of these")
        known = list(self.ids())
        near = difflib.get_close_matches(name, known, n=3) or known[:3]
        hint = f"; the nearest names are {listed(near)}" if near else "; this optimizer's parameters have no names"
        raise UnknownParameterError(f"no parameter is called {name!r}{hint}")

    def add(self, param: Tensor, names: Sequence[str], label: str, id: int | None = None) -> Entry:
        """Register a parameter under its names, the first of them its main one.

        Args:
            param: the tensor object; in the table not yet.
            names: canonical names, none for a bare parameter (its ID is random then).
            label: the group's name or number, with which a name that is taken is qualified.
            id: the ID to use; derived from the first name by default. A name that the store knows but this table does
                not is one that a handed-over store brings along: its ID is kept.
        """
        free = [self._claim(name, label) for name in names]
        if free and free[0] in self.store:
            known = self.store.id(free[0])
        else:
            known = self.store.register(free[0] if free else None, id=id)
        entry = Entry(known, param, label)
        for alias in free[1:]:
            if alias not in self.store:
                self.store.alias(known, alias)
        for name, qualified in zip(names, free, strict=True):
            if name != qualified:
                self.ambiguous[name].append(known)
        self._entries[known] = entry
        self._by_param[param] = entry
        return entry

    def _claim(self, name: str, label: str) -> str:
        """The name to use for a new parameter: ``name``, or a qualified one where another parameter has it."""
        holder = self._entries.get(self.store.id(name)) if name in self.store else None
        if holder is None and name not in self.ambiguous:
            return name
        if holder is not None:
            self.ambiguous[name] = [holder.id]
            self.store.rename(name, self._unused(f"{holder.label}:{name}"))
        return self._unused(f"{label}:{name}")

    def _unused(self, name: str) -> str:
        candidate, count = name, 2
        while candidate in self.store and self.store.id(candidate) in self._entries:
            candidate, count = f"{name}#{count}", count + 1
        return candidate

    def follow(self, entry: Entry, new: Tensor) -> None:
        """Let ``new`` stand for the entry from now on."""
        self._by_param.pop(entry.param, None)
        entry.param = new
        entry.baseline = None  # another object counts from another number
        self._by_param[new] = entry

    def move_names(self, changes: list[tuple[Entry, list[str], list[str]]]) -> None:
        """Let names follow paths that changed, all at once, so that two parameters may exchange places.

        Args:
            changes: for each entry the paths that it lost, and those that it gained. A gained path takes the place of a
                lost one, or of the main name where the user had given another; what is left over is added or dropped.
        """
        moves: list[tuple[str, str]] = []
        additions: list[tuple[Entry, str]] = []
        for entry, lost, gained in changes:
            names = self.names(entry)
            stale = [name for name in lost if name in names] or (names[:1] if lost else [])
            new = [path for path in gained if path not in names]
            moves += zip(stale, new, strict=False)
            additions += [(entry, path) for path in new[len(stale) :]]
            for name in stale[len(new) :]:
                if len(self.names(entry)) > 1:
                    self.store.unalias(name)
        self.rename(moves)
        for entry, path in additions:
            taken = path in self.store
            self.store.alias(entry.id, self._unused(f"{entry.label}:{path}") if taken else path)

    def rename(self, moves: Sequence[tuple[str, str]]) -> None:
        """Change names, all at once; one whose new name another parameter has keeps the old."""
        for number, (old, _) in enumerate(moves):
            self.store.rename(old, f"\0{number}")
        for number, (old, new) in enumerate(moves):
            self.store.rename(f"\0{number}", old if new in self.store else new)

    def forget(self, entry: Entry) -> None:
        """Drop an entry, its names and its ID."""
        self._by_param.pop(entry.param, None)
        del self._entries[entry.id]
        self.store.remove(entry.id)

    def change_ids(self, changed: Mapping[int, int]) -> None:
        """Give entries other IDs, all at once; names, tensors, slots and constraints stay.

        What the store holds of constraints is the caller's to renew.

        An entry that is not changed but whose ID is wanted gets one of its own anew. An ID that the store holds for a
        parameter outside this table is not taken: that parameter may be another optimizer's.

        Args:
            changed: present ID to new ID; the new ones are distinct, and integers from 1 to 2**63 - 1.
        """
        changed = {old: new for old, new in changed.items() if new in self._entries or new not in self.store}
        wanted = set(changed.values())
        moving = [entry for entry in self if entry.id in changed or entry.id in wanted]
        names = {entry.id: self.names(entry) for entry in moving}
        moved: dict[int, int] = {}
        for entry in moving:
            self.store.remove(entry.id)
            del self._entries[entry.id]
        for entry in sorted(moving, key=lambda entry: entry.id not in changed):
            former, own = entry.id, names[entry.id]
            entry.id = self.store.register(own[0] if own else None, id=changed.get(former))
            moved[former] = entry.id
            for alias in own[1:]:
                self.store.alias(entry.id, alias)
            self._entries[entry.id] = entry
        for sharing in self.ambiguous.values():
            sharing[:] = [moved.get(id, id) for id in sharing]
