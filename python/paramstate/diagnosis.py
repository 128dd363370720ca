"""``doctor``: what an optimizer and a model have to do with each other, and what is wrong with it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import _core, table
from .comparison.sides import names_of
from .identified import IdentifiedOptimizer
from .identity.versions import Baseline, baseline, foreign_writes
from .identity.wrappers import canonical_names


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found."""

    name: str
    """The parameter."""
    shape: tuple[int, ...]
    note: str = ""
    """What is known beyond the heading that it stands under."""
    others: tuple[str, ...] = ()
    """The other parameters that it concerns."""
    bytes: int = 0
    """How much memory is held."""
    harmless: bool = False
    """It is as it should be, and only good to know."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What ``doctor`` found, a list for each question. Prints as a table, by rich where that prints it.

    Example:
        >>> import torch
        >>> from paramstate import AdamW, doctor
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1, bias=False))
        >>> found = doctor(model, AdamW(model[0]))
        >>> found.healthy, list(found.findings), found.as_dict()["in_model_not_trained"][0]["name"]
        (False, ['in_model_not_trained'], '1.weight')
    """

    trained_not_in_model: list[Finding] = field(default_factory=list)
    """In a group, but nowhere in the model, nor in another model that the optimizer knows: a dead tensor is trained."""
    in_model_not_trained: list[Finding] = field(default_factory=list)
    """In the model, but in no group; harmless where it requires no gradient."""
    stale_copies: list[Finding] = field(default_factory=list)
    """Trained, while another object of the same name and shape stands in the model untrained."""
    orphaned_state: list[Finding] = field(default_factory=list)
    """State of tensors that are in no group, with its bytes."""
    aliases: list[Finding] = field(default_factory=list)
    """Parameters under several names (tied, and harmless), and different ones that share memory."""
    frozen_but_moving: list[Finding] = field(default_factory=list)
    """``requires_grad`` is off, but a gradient is left: the next step would move it all the same."""
    processed_under_old_moments: list[Finding] = field(default_factory=list)
    """Values that somebody other than the optimizer wrote after the moments began, which are those of other values."""

    @property
    def findings(self) -> dict[str, list[Finding]]:
        """All lists that are not empty, under their names.

        Example:
            >>> import torch
            >>> from paramstate import AdamW, doctor
            >>> model = torch.nn.Linear(2, 1)
            >>> found = doctor(model, AdamW([model.weight]))
            >>> [(question, [one.name for one in answers]) for question, answers in found.findings.items()]
            [('in_model_not_trained', ['bias'])]
        """
        lists = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: found for name, found in lists.items() if found}

    @property
    def healthy(self) -> bool:
        """Whether nothing was found but what is harmless.

        Example:
            >>> import torch
            >>> from paramstate import AdamW, doctor
            >>> model = torch.nn.Linear(2, 1)
            >>> found = doctor(model, AdamW([model.weight]))
            >>> found.healthy, doctor(model, AdamW(model)).healthy
            (False, True)
        """
        return all(finding.harmless for found in self.findings.values() for finding in found)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain numbers and text, for JSON.

        Example:
            >>> import torch
            >>> from paramstate import AdamW, doctor
            >>> model = torch.nn.Linear(2, 1)
            >>> found = doctor(model, AdamW([model.weight]))
            >>> import json
            >>> json.loads(json.dumps(found.as_dict()))["in_model_not_trained"][0]["name"]
            'bias'
        """
        lists = {
            name: [
                {key: _plain(getattr(finding, key)) for key in Finding.__dataclass_fields__}
                for finding in getattr(self, name)
            ]
            for name in self.__dataclass_fields__
        }
        return {"healthy": self.healthy, **lists}

    def __str__(self) -> str:
        rows = self._cells()
        return "\n".join([*([table.plain(_COLUMNS, rows)] if rows else []), self._verdict])

    def __rich__(self) -> Any:
        return table.rich("doctor", _COLUMNS, self._cells(), self._verdict)

    @property
    def _verdict(self) -> str:
        if not self.healthy:
            wrong = [name for name, found in self.findings.items() if not all(one.harmless for one in found)]
            return "\n".join(f"{_title(name)}: {_ADVICE[name]}" for name in wrong)
        return "healthy: what is trained is what is in the model"

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (_title(name), finding.name, str(list(finding.shape)), _details(finding))
            for name, found in self.findings.items()
            for finding in found
        ]


_COLUMNS = ("finding", "parameter", "shape", "details")
_ADVICE = {
    "trained_not_in_model": "opt.rebind(model) goes on with what is in the model now",
    "in_model_not_trained": "opt.rebind(model, group=0) adopts these; or turn their requires_grad off",
    "stale_copies": "opt.rebind(model) follows by name, with the state; or copy model and optimizer in one deepcopy",
    "orphaned_state": "del opt.state[tensor] frees it",
    "aliases": "two parameters that share memory are updated twice; give one its own with .clone()",
    "frozen_but_moving": "set .grad to None, as zero_grad() does",
    "processed_under_old_moments": "opt.reset(name) starts the moments afresh; opt.replace_ and clip_ are not counted",
}


def _title(name: str) -> str:
    return name.replace("_", " ")


def _details(finding: Finding) -> str:
    others = f"with {', '.join(finding.others)}" if finding.others else ""
    held = f"{finding.bytes} bytes" if finding.bytes else ""
    return "; ".join(filter(None, (others, held, finding.note)))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def doctor(model: nn.Module, opt: torch.optim.Optimizer) -> Diagnosis:
    """What is unmanaged, orphaned, aliased, stale, or moves though it should not.

    Args:
        model: the model that is meant to be trained, wrapped or not.
        opt: any optimizer of torch's kind. One of this package's is known to the full; of another, values that were
            processed under old moments are seen from the first call of ``doctor`` on, and only if no step was taken
            between that call and the next.

    Returns:
        Diagnosis: a list for each question. Nothing is changed.

    Raises:
        TypeError: ``model`` is no module, or ``opt`` no optimizer.

    Example:
        >>> import torch
        >>> from paramstate import doctor
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = torch.optim.Adam(model.parameters())
        >>> model.weight = torch.nn.Parameter(model.weight.detach().clamp(-1, 1))
        >>> found = doctor(model, opt)
        >>> [finding.name for finding in found.in_model_not_trained], found.healthy
        (['weight'], False)
    """
    return _Examination(model, _unwrapped(opt)).diagnosis()


def _unwrapped(opt: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, where a framework's class holds it."""
    inner = getattr(opt, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer) and inner is not opt:
        return _unwrapped(inner)
    if not (hasattr(opt, "param_groups") and hasattr(opt, "state")):
        raise TypeError(f"opt must be an optimizer, with param_groups and state; got {type(opt).__name__}")
    return opt


class _Examination:
    def __init__(self, model: nn.Module, opt: torch.optim.Optimizer) -> None:
        self._opt = opt
        self._paths: dict[Tensor, list[str]] = {}
        for path, param in canonical_names(model).items():
            self._paths.setdefault(param, []).append(path)
        self._by_path = {path: param for param, paths in self._paths.items() for path in paths}
        self._called = names_of(opt)
        self._has_names = isinstance(opt, IdentifiedOptimizer) or any("param_names" in g for g in opt.param_groups)
        self._groups = {param: group for group in opt.param_groups for param in group["params"]}

    def diagnosis(self) -> Diagnosis:
        stale = dict(self._stale())
        return Diagnosis(
            trained_not_in_model=[
                _finding(self._name(param), param)
                for param in self._groups
                if param not in self._paths and (param in stale or not self._is_in_another_model(param))
            ],
            in_model_not_trained=list(self._not_trained()),
            stale_copies=[
                _finding(self._name(param), param, others=tuple(self._paths[twin])) for param, twin in stale.items()
            ],
            orphaned_state=list(self._orphans()),
            aliases=list(self._aliases()),
            frozen_but_moving=list(self._moving()),
            processed_under_old_moments=list(self._processed()),
        )

    def _name(self, param: Tensor) -> str:
        if param in self._paths:
            return self._paths[param][0]
        return self._called[param] if self._has_names else f"number {self._called[param]}"

    def _is_in_another_model(self, param: Tensor) -> bool:
        """Whether the optimizer trains several models, and this is one of another's."""
        if not isinstance(self._opt, IdentifiedOptimizer):
            return False
        entry = self._opt._table.of(param)
        return entry is not None and self._opt._is_in_a_model(entry)

    def _not_trained(self) -> Iterator[Finding]:
        for param, paths in self._paths.items():
            if param not in self._groups:
                note = "" if param.requires_grad else "requires no gradient"
                yield _finding(paths[0], param, note=note, harmless=not param.requires_grad)

    # ---- copies -------------------------------------------------------------------------------------------------

    def _stale(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each trained tensor that is not in the model, with the one that stands there in its place."""
        untrained = [param for param in self._paths if param not in self._groups]
        for param in self._groups:
            if param in self._paths:
                continue
            twin = self._named_alike(param) if self._has_names else _only_equal(param, untrained)
            if twin is not None and twin not in self._groups and twin.shape == param.shape:
                yield param, twin

    def _named_alike(self, param: Tensor) -> Tensor | None:
        names: Iterable[str] = (self._called[param],)
        if isinstance(self._opt, IdentifiedOptimizer):
            entry = self._opt._table.of(param)
            names = self._opt._table.names(entry) if entry is not None else names
        return next((self._by_path[name] for name in names if name in self._by_path), None)

    def _orphans(self) -> Iterator[Finding]:
        for key, state in self._opt.state.items():
            if isinstance(key, Tensor) and key not in self._groups:
                tensors = [value for value in state.values() if isinstance(value, Tensor)]
                held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                name = (self._paths.get(key) or [self._called.get(key, "nameless")])[0]
                yield _finding(name, key, note=", ".join(map(str, state)), bytes=held)

    # ---- memory -------------------------------------------------------------------------------------------------

    def _aliases(self) -> Iterator[Finding]:
        for param, paths in self._paths.items():
            if len(paths) > 1:
                yield _finding(paths[0], param, others=tuple(paths[1:]), note="tied", harmless=True)
        every = list(dict.fromkeys((*self._paths, *self._groups)))
        own = [param for param in every if _is_strided(param)]
        for one, other in _core.overlapping(own):
            if one == other:
                yield _finding(self._name(own[one]), own[one], note="shares memory with itself")
            else:
                yield _finding(self._name(own[one]), own[one], others=(self._name(own[other]),), note="shares memory")

    # ---- motion -------------------------------------------------------------------------------------------------

    def _moving(self) -> Iterator[Finding]:
        for param, group in self._groups.items():
            if param.requires_grad or param.grad is None or self._is_held(param):
                continue
            causes = ["its gradient"] if bool(param.grad.any()) else []
            causes += ["weight decay"] if group.get("weight_decay") else []
            causes += ["momentum"] if _has_momentum(self._opt.state.get(param, {})) else []
            if causes:
                yield _finding(self._name(param), param, note=f"moved by {', '.join(causes)}")

    def _is_held(self, param: Tensor) -> bool:
        """Whether the optimizer was told to freeze it, and will not touch it."""
        entry = self._opt._table.of(param) if isinstance(self._opt, IdentifiedOptimizer) else None
        return bool(getattr(entry, "frozen", False))

    def _processed(self) -> Iterator[Finding]:
        storages = Counter(param.untyped_storage()._cdata for param in self._groups if _is_strided(param))
        for param in self._groups:
            if _is_strided(param) and storages[param.untyped_storage()._cdata] > 1:
                continue  # views of one tensor are counted together
            now = baseline(param, self._opt.state.get(param, {}))
            since = self._baseline(param)
            if now is None:
                continue
            comparable = since is not None and (self._is_exact or since.step == now.step)
            writes = foreign_writes(since, now) if since is not None and comparable else None
            if writes is None or since is None:
                self._remember(param, now)
            elif writes:
                times = "once" if writes == 1 else f"{writes} times"
                yield _finding(self._name(param), param, note=f"written {times} by others since step {since.step:.0f}")

    @property
    def _is_exact(self) -> bool:
        """Whether it is known how many writes a step makes."""
        return isinstance(self._opt, IdentifiedOptimizer)

    def _baseline(self, param: Tensor) -> Baseline | None:
        if isinstance(self._opt, IdentifiedOptimizer):
            entry = self._opt._table.of(param)
            return entry.baseline if entry is not None else None
        return _seen.get(self._opt, {}).get(param)

    def _remember(self, param: Tensor, now: Baseline) -> None:
        if isinstance(self._opt, IdentifiedOptimizer):
            entry = self._opt._table.of(param)
            if entry is not None:
                entry.baseline = now
        else:
            _seen.setdefault(self._opt, {})[param] = now


_seen: weakref.WeakKeyDictionary[torch.optim.Optimizer, dict[Tensor, Baseline]] = weakref.WeakKeyDictionary()
"""What the count of writes was when another package's optimizer was last examined."""


def _is_strided(param: Tensor) -> bool:
    return param.layout is torch.strided and not param.is_meta


def _finding(name: str, param: Tensor, **known: Any) -> Finding:
    return Finding(name, tuple(param.shape), **known)


def _only_equal(param: Tensor, candidates: list[Tensor]) -> Tensor | None:
    """The one candidate that holds the same values: what tells where there are no names."""
    shaped = [other for other in candidates if other.shape == param.shape and other.dtype == param.dtype]
    found = [other for other in shaped if torch.equal(other.to(param.device), param)]
    return found[0] if len(found) == 1 else None


def _has_momentum(state: dict[str, Any]) -> bool:
    moments = (state.get("exp_avg"), state.get("momentum_buffer"))
    return any(isinstance(moment, Tensor) and bool(moment.any()) for moment in moments)
