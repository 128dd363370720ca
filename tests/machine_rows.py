"""Surgery on rows, as actions of the state machine."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from hypothesis import strategies as st
from hypothesis.stateful import rule
from torch import nn

import paramstate
import paramstate.surgery.row_targets
from client_writes import drawn
from identity_machine import IdentityMachine, meanings, seeds, which
from paramstate.identity.membership import Membership
from paramstate.surgery.row_edits import EditRows
from paramstate.surgery.row_targets import EditedBuffer
from reference_limits import RefusedError
from reference_model import Entry, gathered
from reference_precision import Kind

STAGES = [
    (paramstate.surgery.row_targets, "successor"),
    (Membership, "_exchange"),
    (Membership, "_traits_changed"),
    (Membership, "_put_into_slots"),
    (EditedBuffer, "install"),
    (EditRows, "_renew_side"),
]
"""Where an edit of rows may fail while it is put in place."""

OPERATIONS = (
    "keep", "keep by a mask", "gather", "permute", "append", "append zeros", "append with state", "append copies",
    "append copies with state", "reset", "pad", "resize",
)  # fmt: skip
FILL = 0.375
MAX_ROWS = 6
Call = Callable[[EditRows, object], None]
LAYOUTS = ("transposed", "flipped", "flattened", "elements in another order", "rows in another order", "reshaped")


class InjectedError(Exception):
    """Fails in the midst of an edit."""


@contextlib.contextmanager
def failing(owner: object, attribute: str, calls_before: int) -> Iterator[None]:
    """The call after these many fails, after its work was done."""
    real, count = getattr(owner, attribute), [0]

    def counting(*args: object, **options: object) -> object:
        count[0] += 1
        made = real(*args, **options)
        if count[0] == calls_before + 1:
            raise InjectedError
        return made

    with mock.patch.object(owner, attribute, counting):
        yield


@dataclass
class Edit:
    """One operation on rows: how the library is told, and the sources of the rows that the reference goes by."""

    dim: int
    call: Call
    values: list[int | None]
    states: list[int | None]
    fill: list[torch.Tensor]
    beside: Call | None = None
    """How a buffer of one element for each row is told, where values are given."""

    def call_beside(self, rows: EditRows, key: str) -> None:
        (self.beside or self.call)(rows, key)

    @property
    def fill_beside(self) -> list[torch.Tensor]:
        return [torch.tensor(0.0 if self.beside is not None else FILL)] * len(self.fill)


class Plan:
    """An edit of several parameters' rows, carried out on copies of the reference's entries as it is drawn up."""

    def __init__(self, entries: dict[str, Entry], held: set[str]) -> None:
        self.twins = {key: entry.copied() for key, entry in entries.items()}
        self.held = held
        """Those whose values a session would bring back without their state: their rows are not to move."""
        for key, twin in self.twins.items():
            twin.grad = entries[key].grad
        self.first, *_ = self.twins
        self.count = self.twins[self.first].value.shape[0]
        self.number = torch.arange(float(self.count))
        self.steps: list[tuple[str, Edit]] = []
        self.refusal: RefusedError | None = None
        self.values_moved: set[str] = set()

    def draw(self, operations: list[str], draw: random.Random) -> None:
        """Draw the arguments of each operation on each parameter, up to the first that is refused."""
        for operation in operations:
            for key, twin in self.twins.items():
                dim = draw.choice([0, 0, *range(twin.value.dim())])
                edit = getattr(Drawing(twin.value.shape, dim, draw), operation.replace(" ", "_"))()
                self.steps.append((key, edit))
                if edit.values != list(range(twin.value.shape[dim])):
                    self.values_moved.add(key)
                if key in self.held and key in self.values_moved:
                    self.refusal = RefusedError(paramstate.EditError)
                    return
                try:
                    twin.move_rows(dim, edit.values, edit.states, edit.fill)
                except RefusedError as refusal:
                    self.refusal = refusal
                    return
                if key == self.first and dim == 0:
                    self.number = gathered(self.number, 0, edit.values, edit.fill_beside)

    def finished(self, kind: Kind | None) -> dict[str, Entry]:
        """The entries when all is in place; the kind is what is declared for all."""
        for key, twin in self.twins.items():
            twin.finish_rows(kind, values_moved=key in self.values_moved)
        return self.twins


class Drawing:
    """Arguments of operations that fit rows along one dimension of a shape."""

    def __init__(self, shape: torch.Size, dim: int, draw: random.Random) -> None:
        count = shape[dim]
        self.dim, self.count, self.draw = dim, count, draw
        self.along = {"dim": dim - len(shape) if dim and draw.random() < 0.5 else dim}
        self.row = [size for at, size in enumerate(shape) if at != dim]
        self.present: list[int | None] = list(range(count))
        least = 0 if draw.random() < 0.1 else min(1, count)
        self.chosen = sorted(draw.sample(range(count), draw.randint(least, count)))
        self.repeated = [draw.randrange(count) for _ in range(draw.randint(0, MAX_ROWS))] if count else []
        self.new = draw.randint(0, max(0, MAX_ROWS - count))
        self.some = self.repeated[: self.new]

    def of_sources(self, call: Call, sources: Sequence[int | None], fill: Sequence[torch.Tensor] = ()) -> Edit:
        return Edit(self.dim, call, [*sources], [*sources], [*fill])

    def values(self, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """New rows, together and one by one."""
        rows = [drawn(torch.empty(self.row), self.draw.randrange(2**31)) for _ in range(count)]
        empty = torch.zeros([*self.row[: self.dim], 0, *self.row[self.dim :]])
        return torch.stack(rows, self.dim) if rows else empty, rows

    def keep(self) -> Edit:
        chosen = self.draw.sample(self.chosen, len(self.chosen))
        return self.of_sources(lambda e, k: e.keep(k, chosen, **self.along), chosen)

    def keep_by_a_mask(self) -> Edit:
        mask = torch.tensor([row in self.chosen for row in range(self.count)], dtype=torch.bool)
        return self.of_sources(lambda e, k: e.keep(k, mask, **self.along), self.chosen)

    def gather(self) -> Edit:
        return self.of_sources(lambda e, k: e.gather(k, self.repeated, **self.along), self.repeated)

    def permute(self) -> Edit:
        order = self.draw.sample(range(self.count), self.count)
        index = torch.tensor(order, dtype=torch.int64)
        return self.of_sources(lambda e, k: e.permute(k, index, **self.along), order)

    def append(self) -> Edit:
        values, rows = self.values(self.new)
        edit = self.of_sources(
            lambda e, k: e.append(k, values, **self.along), [*self.present, *[None] * self.new], rows
        )
        edit.beside = lambda e, k: e.append(k, self.new)
        return edit

    def append_zeros(self) -> Edit:
        sources = [*self.present, *[None] * self.new]
        return self.of_sources(lambda e, k: e.append(k, self.new, **self.along), sources)

    def append_with_state(self) -> Edit:
        count = len(self.some)
        values, rows = self.values(count)
        return Edit(
            self.dim, lambda e, k: e.append(k, values, state_of=self.some, **self.along),
            [*self.present, *[None] * count], [*self.present, *self.some], rows, lambda e, k: e.append(k, count),
        )  # fmt: skip

    def append_copies(self) -> Edit:
        states = [*self.present, *[None] * len(self.some)]
        values = [*self.present, *self.some]
        return Edit(self.dim, lambda e, k: e.append(k, copy_of=self.some, **self.along), values, states, [])

    def append_copies_with_state(self) -> Edit:
        others = [(row + 1) % self.count for row in self.some]
        return Edit(
            self.dim, lambda e, k: e.append(k, copy_of=self.some, state_of=others, **self.along),
            [*self.present, *self.some], [*self.present, *others], [],
        )  # fmt: skip

    def reset(self) -> Edit:
        states = [None if row in self.chosen else row for row in range(self.count)]
        return Edit(self.dim, lambda e, k: e.reset(k, self.chosen, **self.along), self.present, states, [])

    def pad(self) -> Edit:
        before = self.draw.randint(0, self.new)
        after = self.new - before
        sources = [*[None] * before, *self.present, *[None] * after]
        return self.of_sources(lambda e, k: e.pad(k, before, after, value=FILL, **self.along), sources, self.filled())

    def resize(self) -> Edit:
        size = self.draw.randint(0, MAX_ROWS)
        sources = [*self.present[:size], *[None] * (size - self.count)]
        return self.of_sources(lambda e, k: e.resize(k, size, value=FILL, **self.along), sources, self.filled())

    def filled(self) -> list[torch.Tensor]:
        return [torch.full(self.row, FILL)] * MAX_ROWS


def layout(how: str, shape: torch.Size, draw: random.Random) -> Callable[[torch.Tensor], torch.Tensor]:
    """A map that only moves elements of a tensor of this shape."""
    size = shape.numel()
    elements = torch.tensor(draw.sample(range(size), size), dtype=torch.int64)
    rows = torch.tensor(draw.sample(range(shape[0]), shape[0]), dtype=torch.int64)
    other = shape[::-1] if len(shape) == 2 else torch.Size([2, size // 2]) if size % 2 == 0 else shape
    maps: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "transposed": lambda t: t.permute(*range(t.dim())[::-1]).contiguous(),
        "flipped": lambda t: t.flip(0),
        "flattened": lambda t: t.flatten(),
        "elements in another order": lambda t: t.flatten()[elements].reshape(shape),
        "rows in another order": lambda t: t[rows],
        "reshaped": lambda t: t.reshape(other),
    }
    return maps[how]


class Rows(IdentityMachine):
    """Rows are edited, frozen, and stepped by themselves."""

    @rule(
        index=which, also=which, operations=st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=3), seed=seeds,
        stage=st.sampled_from([None, None, None, *STAGES]), calls_before=st.integers(0, 3),
    )  # fmt: skip
    def edit_rows(
        self, index: int, also: int, operations: list[str], seed: int, stage: tuple[object, str] | None,
        calls_before: int,
    ) -> None:  # fmt: skip
        keys = list(dict.fromkeys((self.pick(index), self.pick(also))))
        plan = Plan({key: self.entry(key) for key in keys}, {key for key in keys if not self.state_comes_back(key)})
        plan.draw(operations, random.Random(seed))
        side = {"number": torch.arange(float(plan.count)), "param": self.held(keys[0])}
        before = self.objects(side)
        inject = contextlib.nullcontext() if stage is None else failing(*stage, calls_before)
        done = False
        with self.refused(plan.refusal), contextlib.suppress(InjectedError), inject:
            with self.opt.edit_rows(side=side) as rows:
                for key, edit in plan.steps:
                    edit.call(rows, self.held(key))
                    if key == keys[0] and edit.dim == 0:
                        edit.call_beside(rows, "number")
            done = True
        if not done:
            assert self.objects(side) == before
            return
        assert torch.equal(side["number"], plan.number)
        for key, twin in plan.finished(self.model.kind).items():
            self.model.entries[key] = twin
            if not self.knows_model:
                setattr(self.layer(self.slots[key][0]), self.slots[key][1], rows[twin.name])
        assert side["param"] is self.held(keys[0])
        self.take_over_norms(keys)
        self.allow_widening()

    def state_comes_back(self, key: str) -> bool:
        """Whether no session would bring back the value without the state."""
        return all(session.carries_state or key not in session.names for session in self.sessions)

    def objects(self, side: dict[str, torch.Tensor]) -> object:
        """Which tensors stand where."""
        held = {key: self.held(key) for key in self.slots}
        return (
            {key: (id(tensor), tensor.data_ptr(), id(tensor.grad)) for key, tensor in held.items()},
            [[id(tensor) for tensor in group["params"]] for group in self.opt.param_groups],
            {id(tensor): {name: id(part) for name, part in own.items()} for tensor, own in self.opt.state.items()},
            {key: id(tensor) for key, tensor in side.items()},
            dict(self.opt.ids),
        )

    @rule(index=which, how=meanings, dim=st.integers(-1, 1), seed=seeds)
    def freeze_rows(self, index: int, how: str, dim: int, seed: int) -> None:
        argument, keys = self.meant(index, how)
        ndim = min(self.entry(key).value.dim() for key in keys)
        if dim >= ndim or (dim < 0 and len({self.entry(key).value.dim() for key in keys}) > 1):
            return
        count = min(self.entry(key).value.shape[dim] for key in keys)
        chosen = random.Random(seed).sample(range(count), seed % (count + 1))
        twins = {key: self.entry(key).copied() for key in keys}
        refusal = None
        try:
            for twin in twins.values():
                at = dim % twin.value.dim()
                twin.freeze_rows([row in chosen for row in range(twin.value.shape[at])], at)
        except RefusedError as error:
            refusal = error
        with self.refused(refusal):
            self.opt.freeze_rows(argument, chosen, dim=dim)
        if refusal is None:
            for key, twin in twins.items():
                self.entry(key).rows = twin.rows

    @rule(index=which, how=meanings, some=st.booleans(), row=st.integers(0, MAX_ROWS))
    def unfreeze_rows(self, index: int, how: str, some: bool, row: int) -> None:
        argument, keys = self.meant(index, how)
        held = [rows for key in keys if (rows := self.entry(key).rows) is not None and any(rows.frozen)]
        thawed = row % min((len(rows.frozen) for rows in held), default=1) if some else None
        self.opt.unfreeze_rows(argument, thawed)
        for key in keys:
            self.entry(key).unfreeze_rows(lambda number: thawed in (None, number))

    @rule(index=which, also=which, seed=seeds, by=st.sampled_from(["mask", "indices", "name"]))
    def step_of_some_rows(self, index: int, also: int, seed: int, by: str) -> None:
        draw = random.Random(seed)
        chosen: dict[str, list[bool]] = {}
        named: dict[object, object] = {}
        for key in dict.fromkeys((self.pick(index), self.pick(also))):
            mask = [draw.random() < 0.6 for _ in range(self.entry(key).value.shape[0])]
            chosen[key] = mask
            rows = torch.tensor(mask, dtype=torch.bool)
            named[self.entry(key).name if by == "name" else self.held(key)] = (
                rows if by == "mask" else rows.nonzero().flatten().tolist()
            )
        refusal = None
        try:
            for key in chosen:
                self.entry(key).rows_along(0)
        except RefusedError as error:
            refusal = error
        with self.refused(refusal):
            self.opt.step(rows=named)
        if refusal is None:
            self.follow_step(chosen)

    @rule(index=which, how=st.sampled_from(LAYOUTS), seed=seeds, fresh=st.booleans())
    def replace_by_another_layout(self, index: int, how: str, seed: int, fresh: bool) -> None:
        key = self.pick(index)
        twin = self.entry(key).copied()
        carry = layout(how, twin.value.shape, random.Random(seed))
        limit = twin.limit
        if (
            limit is not None
            and limit.dim is not None
            and (how != "transposed" or min(twin.value.shape, default=1) < 2)
        ):
            return  # what the norm is over then may be said in several ways
        new = drawn(carry(twin.value), seed) if fresh else carry(twin.value)
        twin.grad = self.entry(key).grad
        refusal = None
        if not self.state_comes_back(key):
            refusal = RefusedError(paramstate.EditError)
        else:
            try:
                twin.carry(carry, new)
            except RefusedError as error:
                refusal = error
        (layer, attribute), old = self.slots[key], self.held(key)
        with self.refused(refusal):
            given = nn.Parameter(new.clone(), twin.trains) if seed % 2 else new.clone()
            made = self.opt.replace_(self.held(key), given, state=carry)
            if not self.knows_model:
                setattr(self.layer(layer), attribute, made)
        if refusal is None:
            self.model.entries[key] = twin
            twin.keep_as_declared(self.model.kind)
            if self.held(key) is not old:
                twin.replaced_by(trains=twin.trains)
            self.allow_widening()
