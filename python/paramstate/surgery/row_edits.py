"""Surgery on rows: one transaction over any number of parameters and side buffers, applied together or not at all.

Everything is computed on copies while the transaction is open; nothing outside changes. On leaving, all of it is put in
place, and what was put in place is taken back where any part of that fails.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from paramstate.declared.row_moves import FRESH, Move
from paramstate.declared.rows import RowIndex, normal_dim, row_indices, row_mask
from paramstate.editing.session import require_state_comes_back
from paramstate.errors import EditError, ReplacedParameterError, RowIndexError, StateShapeError, UnknownParameterError
from paramstate.identity.membership import Key, Membership, Several, Which, keys_of
from paramstate.identity.table import Entry

from .row_targets import EditedBuffer, EditedParameter
from .snapshots import Snapshot

Edited = EditedParameter | EditedBuffer


class EditRows:
    """Pending edits of rows, made by :meth:`Adam.edit_rows`; a context manager.

    Each call names one or several targets: parameters (as tensors, names, modules or selections), the keys of ``side``,
    or the names of buffers of a model that the optimizer knows. What moves with a row: its value, its gradient, every
    state tensor of the parameter's shape, how many steps it has taken, whether it is frozen, and its bounds.

    Each call edits all of its targets or, where it raises, none; one that several keys stand for is edited once.

    After the block each edited parameter is a new ``nn.Parameter`` in all its places; ``rows[key]`` is it.

    Raises:
        EditError: a method is called after the block, or rows are to move that an open :meth:`Adam.edit` would bring
            back without their state.
        UnknownParameterError: a target is not known.
        ReplacedParameterError: on leaving, where a target was stepped, written or replaced in the block.

    Example:
        >>> import torch
        >>> from paramstate import Adam
        >>> table = torch.nn.Embedding(4, 1)
        >>> opt = Adam(table, lr=0.1)
        >>> table.weight.sum().backward(); opt.step()
        >>> with opt.edit_rows() as rows:
        ...     rows.keep("weight", [0, 1, 3])
        ...     rows.append("weight", torch.zeros(2, 1))  # as rows of a parameter that was never stepped
        ...     rows.permute("weight", [4, 3, 2, 1, 0])
        ...     print(list(rows["weight"].shape))
        [5, 1]
        >>> opt.row_steps("weight").tolist()
        [0, 0, 1, 1, 1]
        >>> with opt.edit_rows() as rows:
        ...     rows.gather("weight", [2, 2, 3])  # a row that is repeated is a duplicate, state included
        ...     rows.reset("weight", [1])
        ...     rows.pad("weight", before=1)
        ...     rows.resize("weight", 5)
        >>> opt.row_steps("weight").tolist()
        [0, 1, 0, 1, 0]
        >>> rows["weight"] is table.weight
        True
    """

    def __init__(self, optimizer: Membership, side: MutableMapping[str, Tensor]) -> None:
        self._optimizer = optimizer
        self._side = side
        self._edited: dict[object, Edited] = {}
        self._is_open = False
        self._was_opened = False

    # ---- the edits ------------------------------------------------------------------------------------------------

    def keep(self, which: Which, index: RowIndex, *, dim: int = 0) -> None:
        """Keep these rows and drop all others.

        Args:
            which: the targets.
            index: a bool mask of shape (n,), or indices, each at most once, in the order that the rows are to have.
            dim: along which the rows lie.

        Raises:
            RowIndexError: the index does not fit the rows, or names one twice.

        Example:
            >>> import torch
            >>> from paramstate import Adam
            >>> table = torch.nn.Embedding(3, 1, _weight=torch.arange(1.0, 3.5).unsqueeze(1))
            >>> opt = Adam(table, lr=0.0)
            >>> table.weight.sum().backward(); opt.step()
            >>> with opt.edit_rows() as rows:
            ...     rows.keep("weight", [0, 2])
            >>> table.weight.flatten().tolist(), opt.row_steps("weight").tolist()
            ([1.0, 3.0], [1, 1])
        """

        def kept(edited: Edited) -> Move:
            sources = self._indices(edited, index, dim)
            if len(sources.unique()) < len(sources):
                raise RowIndexError(f"{edited.called}: keep(...) names a row twice; gather(...) repeats rows")
            return Move.of_all(self._dim(edited, dim), sources)

        self._move(which, kept)

    def gather(self, which: Which, index: RowIndex, *, dim: int = 0) -> None:
        """Let the rows be these, in this order; a row may be repeated (duplicate, split) or left out.

        Args:
            which: the targets.
            index: a bool mask of shape (n,), or indices.
            dim: along which the rows lie.

        Raises:
            RowIndexError: the index does not fit the rows.

        Example:
            >>> import torch
            >>> from paramstate import Adam
            >>> table = torch.nn.Embedding(3, 1, _weight=torch.arange(1.0, 3.5).unsqueeze(1))
            >>> opt = Adam(table, lr=0.0)
            >>> table.weight.sum().backward(); opt.step()
            >>> with opt.edit_rows() as rows:
            ...     rows.gather("weight", [2, 0, 0])
            >>> table.weight.flatten().tolist(), opt.row_steps("weight").tolist()
            ([3.0, 1.0, 1.0], [1, 1, 1])
        """
        self._move(which, lambda edited: Move.of_all(self._dim(edited, dim), self._indices(edited, index, dim)))

    def permute(self, which: Which, order: RowIndex, *, dim: int = 0) -> None:
        """Put the rows into another order.

        Args:
            which: the targets.
            order: the old index of each new row, int64 of shape (n,).
            dim: along which the rows lie.

        Raises:
            RowIndexError: the order does not name each row exactly once.

        Example:
            >>> import torch
            >>> from paramstate import Adam
            >>> table = torch.nn.Embedding(3, 1, _weight=torch.arange(1.0, 3.5).unsqueeze(1))
            >>> opt = Adam(table, lr=0.0)
            >>> table.weight.sum().backward(); opt.step()
            >>> with opt.edit_rows() as rows:
            ...     rows.permute("weight", [2, 0, 1])
            >>> table.weight.flatten().tolist(), opt.row_steps("weight").tolist()
            ([3.0, 1.0, 2.0], [1, 1, 1])
        """

        def permuted(edited: Edited) -> Move:
            sources = self._indices(edited, order, dim)
            if not torch.equal(sources.sort().values, torch.arange(self._count(edited, dim))):
                raise RowIndexError(f"{edited.called}: permute(...) must name each of its rows exactly once")
            return Move.of_all(self._dim(edited, dim), sources)

        self._move(which, permuted)

    def append(
        self,
        which: Which,
        values: Tensor | int | None = None,
        *,
        dim: int = 0,
        copy_of: RowIndex | None = None,
        state_of: RowIndex | None = None,
    ) -> None:
        """Add rows behind the others.

        Args:
            which: the targets.
            values: the new rows, shaped like the target but for ``dim``; or how many rows of zeros.
            dim: along which the rows lie.
            copy_of: in place of ``values``: copies of these rows, with fresh state.
            state_of: rows whose state the new ones copy; without it a new row's state is fresh, and it will step as a
                parameter that was never stepped does.

        Raises:
            StateShapeError: ``values`` do not fit.
            RowIndexError: ``copy_of`` or ``state_of`` do not fit the rows, or name another number of rows than are new.
            ConstraintError: bounds that differ from row to row are declared, and a new row has none.
            TypeError: neither or both of ``values`` and ``copy_of`` are given, or ``values`` is neither a tensor nor a
                number of rows.
            ValueError: that number is negative.

        Example:
            >>> import torch
            >>> from paramstate import Adam
            >>> table = torch.nn.Embedding(3, 1, _weight=torch.arange(1.0, 3.5).unsqueeze(1))
            >>> opt = Adam(table, lr=0.0)
            >>> table.weight.sum().backward(); opt.step()
            >>> with opt.edit_rows() as rows:
            ...     rows.append("weight", torch.tensor([[9.0]]))
            >>> table.weight.flatten().tolist(), opt.row_steps("weight").tolist()
            ([1.0, 2.0, 3.0, 9.0], [1, 1, 1, 0])
        """
        if (values is None) == (copy_of is None):
            raise TypeError("append(...) takes either values (a tensor, or a number of rows) or copy_of=")
        if values is not None and not isinstance(values, Tensor):
            values = _count("append(...) takes a tensor of new rows, or how many: values", values)

        def appended(edited: Edited) -> Move:
            at, count = self._dim(edited, dim), self._count(edited, dim)
            fill = None if values is None else self._new_rows(edited, values, at)
            new = _fresh(fill.shape[at]) if fill is not None else self._indices(edited, copy_of, dim)
            state = _fresh(len(new)) if state_of is None else self._indices(edited, state_of, dim)
            if len(state) != len(new):
                raise RowIndexError(f"{edited.called}: {len(new)} rows are appended, state_of= names {len(state)}")
            present = torch.arange(count)
            return Move(at, torch.cat([present, new]), torch.cat([present, state]), fill)

        self._move(which, appended)

    def reset(self, which: Which, index: RowIndex, *, dim: int = 0) -> None:
        """Make the state of these rows as if they had never been stepped; values stay.

        A row that is reset moves as far in the next step as a fresh parameter does, about ``lr``.

        Args:
            which: the targets.
            index: a bool mask of shape (n,), or indices.
            dim: along which the rows lie.

        Raises:
            RowIndexError: the index does not fit the rows.
            UnsupportedError: rows differ along another dimension already.

        Example:
            >>> import torch
            >>> from paramstate import Adam
            >>> table = torch.nn.Embedding(3, 1, _weight=torch.arange(1.0, 3.5).unsqueeze(1))
            >>> opt = Adam(table, lr=0.0)
            >>> table.weight.sum().backward(); opt.step()
            >>> with opt.edit_rows() as rows:
            ...     rows.reset("weight", [1])
            >>> table.weight.flatten().tolist(), opt.row_steps("weight").tolist()
            ([1.0, 2.0, 3.0], [1, 0, 1])
        """

        def reset(edited: Edited) -> Move:
            present = torch.arange(self._count(edited, dim))
            state = torch.where(row_mask(index, len(present), edited.called), FRESH, present)
            return Move(self._dim(edited, dim), present, state)

        self._move(which, reset)

    def pad(self, which: Which, before: int = 0, after: int = 0, *, value: float = 0.0, dim: int = 0) -> None:
        """Add rows of one value, with fresh state, before and after the others.

        Args:
            which: the targets.
            before: how many, in front of the others.
            after: how many, behind the others.
            value: what the new rows hold.
            dim: along which the rows lie.

        Raises:
            ValueError: a count is negative.
            TypeError: a count is no whole number.

        Example:
            >>> import torch
            >>> from paramstate import Adam
            >>> table = torch.nn.Embedding(3, 1, _weight=torch.arange(1.0, 3.5).unsqueeze(1))
            >>> opt = Adam(table, lr=0.0)
            >>> table.weight.sum().backward(); opt.step()
            >>> with opt.edit_rows() as rows:
            ...     rows.pad("weight", before=1, value=7.0)
            >>> table.weight.flatten().tolist(), opt.row_steps("weight").tolist()
            ([7.0, 1.0, 2.0, 3.0], [0, 1, 1, 1])
        """
        front = _count("pad(...) adds rows: before", before)
        back = _count("pad(...) adds rows: after", after)

        def padded(edited: Edited) -> Move:
            present = torch.arange(self._count(edited, dim))
            return self._filled(edited, torch.cat([_fresh(front), present, _fresh(back)]), value, dim)

        self._move(which, padded)

    def resize(self, which: Which, size: int, *, value: float = 0.0, dim: int = 0) -> None:
        """Let there be ``size`` rows: the last ones go, or rows of one value with fresh state come behind.

        Args:
            which: the targets.
            size: how many rows there are to be.
            value: what new rows hold.
            dim: along which the rows lie.

        Raises:
            ValueError: the size is negative.
            TypeError: the size is no whole number.

        Example:
            >>> import torch
            >>> from paramstate import Adam
            >>> table = torch.nn.Embedding(3, 1, _weight=torch.arange(1.0, 3.5).unsqueeze(1))
            >>> opt = Adam(table, lr=0.0)
            >>> table.weight.sum().backward(); opt.step()
            >>> with opt.edit_rows() as rows:
            ...     rows.resize("weight", 2)
            >>> table.weight.flatten().tolist(), opt.row_steps("weight").tolist()
            ([1.0, 2.0], [1, 1])
        """
        wanted = _count("resize(...) takes a number of rows: size", size)

        def resized(edited: Edited) -> Move:
            count = self._count(edited, dim)
            sources = torch.cat([torch.arange(min(wanted, count)), _fresh(max(0, wanted - count))])
            return self._filled(edited, sources, value, dim)

        self._move(which, resized)

    def _filled(self, edited: Edited, sources: Tensor, value: float, dim: int) -> Move:
        at = self._dim(edited, dim)
        shape = list(edited.value.shape)
        shape[at] = int((sources == FRESH).sum())
        fill = torch.full(shape, value, dtype=edited.value.dtype, device=edited.value.device)
        return Move.of_all(at, sources, fill)

    def _move(self, which: Which, move_of: Callable[[Edited], Move]) -> None:
        """Move the rows of all targets, or of none."""
        if not self._is_open:
            raise EditError(
                "rows are edited inside a block, and applied when it ends: with opt.edit_rows() as rows: ..."
            )
        moves = [(edited, move_of(edited)) for edited in self._targets(which)]
        for edited, move in moves:
            if isinstance(edited, EditedParameter) and not edited.keeps_values(move):
                require_state_comes_back(self._optimizer, edited.entry.param, edited.called)
        before = [(edited, dict(vars(edited))) for edited, _ in moves]
        try:
            for edited, move in moves:
                edited.move(move)
        except BaseException:
            for edited, attributes in before:
                vars(edited).update(attributes)
            raise

    # ---- the targets ----------------------------------------------------------------------------------------------

    def __getitem__(self, key: Key) -> Tensor:
        """A target as it is in this transaction: detached while it is open, and the parameter itself afterwards."""
        found = self._resolved(key)
        if len(found) != 1:
            raise ValueError(f"rows[...] is one target, and {key!r} stands for {len(found)}; name one of them")
        (edited,) = found
        if self._is_open:
            return edited.value
        self._edited.clear()  # nothing is to be kept alive
        return edited.held

    def _targets(self, which: Which) -> list[Edited]:
        """Each target once, also where several names or keys stand for it."""
        return list(dict.fromkeys(edited for key in keys_of(which) for edited in self._resolved(key)))

    def _resolved(self, key: Key | Several) -> list[Edited]:
        if isinstance(key, str) and key in self._side:
            entry = self._optimizer._entry(self._side[key])
            return [self._buffer(key, self._side, key) if entry is None else self._parameter(entry)]
        try:
            entries = self._optimizer._select(key)
        except UnknownParameterError:
            found = self._optimizer._slots.buffer_owner(key) if isinstance(key, str) else None
            if found is None:
                raise
            return [self._buffer(str(key), *found)]
        return [self._parameter(entry) for entry in entries]

    def _parameter(self, entry: Entry) -> Edited:
        if entry.id not in self._edited:
            self._edited[entry.id] = EditedParameter(self._optimizer, entry)
        return self._edited[entry.id]

    def _buffer(self, name: str, owner: MutableMapping[str, Any], key: str) -> Edited:
        if not isinstance(owner[key], Tensor):
            raise TypeError(f"rows are edited of tensors; under {name!r} there is {type(owner[key]).__name__}")
        place = (id(owner), key)
        if place not in self._edited:
            self._edited[place] = EditedBuffer(name, owner, key)
        return self._edited[place]

    def _dim(self, edited: Edited, dim: int) -> int:
        return normal_dim(dim, edited.value, edited.called)

    def _count(self, edited: Edited, dim: int) -> int:
        return edited.value.shape[self._dim(edited, dim)]

    def _indices(self, edited: Edited, index: RowIndex | None, dim: int) -> Tensor:
        assert index is not None
        return row_indices(index, self._count(edited, dim), edited.called)

    @staticmethod
    def _new_rows(edited: Edited, values: Tensor | int, at: int) -> Tensor:
        expected = list(edited.value.shape)
        if isinstance(values, int):
            expected[at] = values
            return torch.zeros(expected, dtype=edited.value.dtype, device=edited.value.device)
        got = list(values.shape)
        if len(got) != len(expected) or got[:at] + got[at + 1 :] != expected[:at] + expected[at + 1 :]:
            expected_rows = [*map(str, expected[:at]), "n", *map(str, expected[at + 1 :])]
            raise StateShapeError(
                f"{edited.called}: new rows along dim {at} must have shape [{', '.join(expected_rows)}], got {got}"
            )
        return values

    # ---- the transaction ------------------------------------------------------------------------------------------

    def __enter__(self) -> EditRows:
        if self._was_opened:
            raise RuntimeError("this edit of rows was applied or given up: call opt.edit_rows() anew")
        self._is_open = self._was_opened = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        try:
            if kind is None:
                with self._optimizer._lock:
                    self._commit()
        finally:
            self._edited.clear()

    def _commit(self) -> None:
        changed = [edited for edited in self._edited.values() if edited.is_changed]
        for edited in changed:
            if edited.is_stale:
                raise ReplacedParameterError(
                    f"{edited.called} was changed while its rows were edited; nothing was applied: edit within one "
                    "`with` block, without a step or an assignment in between"
                )
        for edited in changed:
            edited.prepare()
        snapshot = Snapshot(self._optimizer, [e.entry for e in changed if isinstance(e, EditedParameter)], self._side)
        try:
            for edited in changed:
                edited.install()
            self._renew_side()
            if changed:
                self._let_go()
        except BaseException:
            for edited in changed:
                if isinstance(edited, EditedBuffer):
                    edited.withdraw()
            snapshot.restore()
            raise

    def _let_go(self) -> None:
        """Nothing is to keep the old tensors alive until the next step: they are as large as the new ones."""
        optimizer = self._optimizer
        optimizer._sync()
        optimizer._walk.refresh(optimizer.state)
        optimizer._walk.watch([], [])
        optimizer._watched = False

    def _renew_side(self) -> None:
        """A parameter that the side mapping holds is its new one there as well."""
        news = {id(e.old): e.value for e in self._edited.values() if isinstance(e, EditedParameter)}
        for key, held in list(self._side.items()):
            if id(held) in news:
                self._side[key] = news[id(held)]


def _count(what: str, given: SupportsIndex) -> int:
    if isinstance(given, bool) or not isinstance(given, SupportsIndex):
        raise TypeError(f"{what} must be a whole number, got {type(given).__name__}")
    count = operator.index(given)
    if count < 0:
        raise ValueError(f"{what} must be at least 0, got {count}")
    return count


def _fresh(count: int) -> Tensor:
    return torch.full((count,), FRESH, dtype=torch.int64)
