"""Match an optimizer with a model that was rebuilt, wrapped, unwrapped, copied or otherwise changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from paramstate.errors import AmbiguousNameError, UnknownParameterError, listed

from .following import Following
from .selected_groups import claims_on
from .table import Entry
from .wrappers import Place, Tree


@dataclass(slots=True)
class RebindReport:
    """What ``rebind`` did, each list with canonical names.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> opt = AdamW(torch.nn.Linear(2, 1))
        >>> report = opt.rebind(torch.nn.Linear(3, 1, bias=False))
        >>> report.reshaped, report.vanished
        (['weight'], ['bias'])
    """

    kept: list[str] = field(default_factory=list)
    """The tensor object that was trained is in the model."""
    followed: list[str] = field(default_factory=list)
    """Matched by name with another object of the same shape: ID and state are kept."""
    reshaped: list[str] = field(default_factory=list)
    """The value has another shape than the state: the ID is kept, the state starts afresh."""
    vanished: list[str] = field(default_factory=list)
    """Not in the model: dropped from the groups, with their state."""
    unmatched: list[str] = field(default_factory=list)
    """Nothing tells whether they belonged to this model: left as they are."""
    unmanaged: list[str] = field(default_factory=list)
    """Trainable parameters of the model that are in no group."""
    adopted: list[str] = field(default_factory=list)
    """Unmanaged ones that were taken in: by a group whose selection they belong to, else by ``group=``."""


class Rebinding(Following):
    """The part of an optimizer that matches it with a model."""

    def rebind(
        self, model: nn.Module, *, group: int | str | Mapping[str, Any] | None = None, label: str | int | None = None
    ) -> RebindReport:
        """Match the parameters with those of ``model``: by object first, by canonical name then.

        A group that was given as a selection takes in what belongs to it now and is in no group.

        Args:
            model: the model to train from now on. It takes the place of those known before; where an optimizer trains
                several models, those whose parameters it does not touch stay known.
            label: the name or number of the group whose parameters the model holds; needed only where several models of
                the same parameter names are trained, and ``model`` shares no parameter with any of them.
            group: what adopts trainable parameters that are in no group: a group's number, its ``"name"``, or a
                dict of options for a new group. By default they are only reported.

        Returns:
            RebindReport: what was kept, followed, reshaped, dropped, left alone and adopted.

        Raises:
            UnknownParameterError: ``group`` names no group, or ``label`` none with parameters. Nothing is changed then.
            TypeError: ``model`` is no module. Nothing is changed then.
            SelectionError: a new parameter belongs to the selections of two groups. Nothing is changed then.
            AmbiguousNameError: the model could stand for several known ones; give ``label``. Nothing is changed then.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
            >>> opt = AdamW(model)
            >>> wider = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
            >>> report = opt.rebind(wider, group=0)
            >>> report.followed, report.adopted
            (['0.weight', '0.bias'], ['1.weight', '1.bias'])
        """
        adopter = self._adopting_group(group)
        self._sync()
        report = RebindReport()
        walk = Tree(model)
        tree = walk.places
        mine = self._entries_of(model, tree, label)
        claims = claims_on(self, model, walk, mine)
        self._forget_models_of(mine, model)
        _Matching(self, tree, mine, report).run()
        for claiming, claimed in claims:
            self._adopt(claimed, claiming, None)
            report.adopted += [places[0].path for places in claimed.values()]
        unmanaged = self._unmanaged(tree)
        report.unmanaged = [places[0].path for places in unmanaged.values()]
        if group is not None and unmanaged:
            self._adopt(unmanaged, adopter, group)
            report.adopted, report.unmanaged = report.adopted + report.unmanaged, []
        self._sync()
        self._slots.clean(self._table)
        self._watched = False
        return report

    def _adopting_group(self, group: int | str | Mapping[str, Any] | None) -> dict[str, Any] | None:
        if group is None or isinstance(group, Mapping):
            return None
        if isinstance(group, int) and -len(self.param_groups) <= group < len(self.param_groups):
            return self.param_groups[group]
        for candidate in self.param_groups:
            if isinstance(group, str) and candidate.get("name") == group:
                return candidate
        names = [str(candidate.get("name", number)) for number, candidate in enumerate(self.param_groups)]
        raise UnknownParameterError(f"no group {group!r}; the groups are {listed(names)}")

    def _entries_of(self, model: nn.Module, tree: list[Place], label: str | int | None) -> list[Entry]:
        """The parameters that this rebinding decides about: all, but those of other models."""
        if label is not None:
            labelled = [entry for entry in self._table if entry.label == str(label)]
            if not labelled:
                labels = list(dict.fromkeys(entry.label for entry in self._table))
                raise UnknownParameterError(f"no group {label!r} holds parameters; those that do are {listed(labels)}")
            return labelled
        others: list[set[Tensor]] = [
            {place.param for place in Tree(known).places} for known in self._slots.models if known is not model
        ]
        others = [params for params in others if any(entry.param in params for entry in self._table)]
        if not others:
            return list(self._table)
        inside = {place.param for place in tree}
        replaced = [params for params in others if params & inside]
        homeless = [entry for entry in self._table if not any(entry.param in params for params in others)]
        if not replaced and not any(entry.param in inside or self._has_name_in(entry, tree) for entry in homeless):
            replaced = self._namesakes(others, tree)
        mine = [entry for entry in self._table if any(entry.param in params for params in replaced)]
        return mine + homeless

    def _has_name_in(self, entry: Entry, tree: list[Place]) -> bool:
        names = {name.removeprefix(f"{entry.label}:") for name in self._table.names(entry)}
        return any(place.path in names for place in tree)

    def _namesakes(self, others: list[set[Tensor]], tree: list[Place]) -> list[set[Tensor]]:
        """The known model that ``tree`` stands for, told by the names of its parameters."""
        alike = [
            params
            for params in others
            if any(entry.param in params and self._has_name_in(entry, tree) for entry in self._table)
        ]
        if len(alike) > 1:
            labels = dict.fromkeys(entry.label for entry in self._table for params in alike if entry.param in params)
            raise AmbiguousNameError(
                f"the model could stand for any of several known ones, in the groups {listed(list(labels))}; give the "
                "group's name or number as label="
            )
        return alike

    def _forget_models_of(self, mine: list[Entry], model: nn.Module) -> None:
        """Forget the models whose parameters are all decided about now, and know ``model``."""
        decided = {entry.param for entry in mine}
        tracked = {entry.param for entry in self._table}
        self._slots.roots = [
            root
            for root in self._slots.roots
            if (known := root.module()) is not None
            and any(place.param in tracked and place.param not in decided for place in Tree(known).places)
        ]
        self._know(model)

    def _unmanaged(self, tree: list[Place]) -> dict[Tensor, list[Place]]:
        unmanaged: dict[Tensor, list[Place]] = {}
        for place in tree:
            if place.param.requires_grad and self._table.of(place.param) is None:
                unmanaged.setdefault(place.param, []).append(place)
        return unmanaged

    def _adopt(
        self,
        unmanaged: Mapping[Tensor, list[Place]],
        adopter: dict[str, Any] | None,
        options: int | str | Mapping[str, Any] | None,
    ) -> None:
        if adopter is None:
            assert isinstance(options, Mapping)
            self.add_param_group({**options, "params": list(unmanaged)})
            return
        adopter["params"].extend(unmanaged)
        if "param_names" in adopter:
            adopter["param_names"].extend(places[0].path for places in unmanaged.values())
        self._sync()

    def _drop(self, entry: Entry) -> None:
        """Take a parameter out of the groups, the state and the table."""
        for group in self.param_groups:
            stays = [param is not entry.param for param in group["params"]]
            for key in ("params", "param_names"):
                if key in group and len(group[key]) == len(stays):
                    group[key] = [item for item, keep in zip(group[key], stays, strict=True) if keep]
        self.state.pop(entry.param, None)
        self._forget(entry)


class _Matching:
    """One pass over the parameters: by object, then by name."""

    def __init__(self, optimizer: Rebinding, tree: list[Place], mine: list[Entry], report: RebindReport) -> None:
        self._optimizer = optimizer
        self._mine = mine
        self._report = report
        self._by_param: dict[Tensor, list[Place]] = {}
        self._by_path: dict[str, Place] = {}
        for place in tree:
            self._by_param.setdefault(place.param, []).append(place)
            self._by_path.setdefault(place.path, place)

    def run(self) -> None:
        table = self._optimizer._table
        present = [(entry, here) for entry in self._mine if (here := self._by_param.get(entry.param))]
        missing = [(entry, self._namesake(entry)) for entry in self._mine if entry.param not in self._by_param]
        matched = {entry.label for entry, _ in present} | {entry.label for entry, place in missing if place is not None}
        # What went goes first: its name may be that of a place where another parameter lives now.
        for entry, place in missing:
            if place is None:
                self._part_with(entry, matched)
        self._optimizer._resettle(present)
        for entry, _ in present:
            fits = self._optimizer._state_fits(entry)
            if not fits:
                self._optimizer._forget_state(entry)
            (self._report.kept if fits else self._report.reshaped).append(table.name(entry))
        for entry, place in missing:
            if place is not None and table.of(place.param) is None:
                self._match(entry, place)
            elif place is not None:  # by another of the missing, tied to it before
                self._part_with(entry, matched)

    def _part_with(self, entry: Entry, matched: set[str]) -> None:
        """Drop a parameter that the model does not have, where it can be told that the model had it."""
        names = self._optimizer._table.names(entry)
        if entry.slots or (names and entry.label in matched):
            self._report.vanished.append(self._optimizer._table.name(entry))
            self._optimizer._drop(entry)
        else:
            self._report.unmatched.append(self._optimizer._table.name(entry))

    def _namesake(self, entry: Entry) -> Place | None:
        names = self._optimizer._table.names(entry)
        # A name that was qualified by its group matches by what follows the group.
        bare = [name.removeprefix(f"{entry.label}:") for name in names]
        for name in (*names, *bare):
            place = self._by_path.get(name)
            if place is not None and self._optimizer._table.of(place.param) is None:
                return place
        return None

    def _match(self, entry: Entry, place: Place) -> None:
        same = entry.param.shape == place.param.shape
        if not same:
            self._optimizer._forget_state(entry)
        self._optimizer._exchange(entry, place.param)
        if not same:
            self._optimizer._begin_rows(entry)
        self._optimizer._resettle([(entry, self._by_param[place.param])])
        (self._report.followed if same else self._report.reshaped).append(self._optimizer._table.name(entry))
