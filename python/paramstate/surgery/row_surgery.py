"""Rows of parameters: edited, frozen, stepped by themselves."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paramstate.declared.rows import RowIndex, Rows, along, normal_dim, row_mask
from paramstate.errors import SelectionError
from paramstate.identity.membership import Key, Membership, Which
from paramstate.identity.table import Entry
from paramstate.identity.tables import between_steps

if TYPE_CHECKING:
    from .row_edits import EditRows


class RowSurgery(Membership):
    """The part of an optimizer that edits, freezes and selects rows."""

    def edit_rows(self, side: MutableMapping[str, Tensor] | None = None) -> EditRows:
        """Edit rows of parameters in one transaction: keep, append, gather, reset, permute, pad, resize.

        Values, gradients, state, IDs, steps taken, per-row bounds and frozen rows move together, in every place that
        holds the parameter. New and reset rows are bias-corrected as a fresh parameter's are. All is applied when the
        ``with`` block ends, or nothing where anything fails.

        Args:
            side: tensors of the user's that are edited along, by key; the mapping is given the new ones. A parameter
                that it holds is exchanged for its new one as well.

        Returns:
            EditRows: the pending edits.

        Raises:
            TypeError: ``side`` is no mapping that can be written.

        Example:
            >>> import torch
            >>> from paramstate import Adam
            >>> model = torch.nn.Embedding(3, 2)
            >>> opt = Adam(model, lr=0.1)
            >>> model.weight.sum().backward(); opt.step()
            >>> seen = {"count": torch.ones(3)}
            >>> with opt.edit_rows(side=seen) as rows:
            ...     rows.keep(["weight", "count"], [0, 2])
            ...     rows.append(["weight", "count"], 1)
            >>> list(model.weight.shape), seen["count"].tolist()
            ([3, 2], [1.0, 1.0, 0.0])
            >>> opt.row_steps("weight").tolist()
            [1, 1, 0]
        """
        from .row_edits import EditRows

        if side is not None and not isinstance(side, MutableMapping):
            raise TypeError(
                "side= maps keys to tensors, as {'count': count}, and is given the new ones; got "
                f"{type(side).__name__}"
            )
        return EditRows(self, {} if side is None else side)

    def row_steps(self, which: Key) -> Tensor:
        """How many steps each row of a parameter has taken.

        Args:
            which: the parameter, as the tensor or by name.

        Returns:
            Tensor: int64 of shape (rows,), along the dimension in which rows differ, dim 0 where none do.

        Example:
            >>> import torch
            >>> from paramstate import Adam
            >>> table = torch.nn.Embedding(3, 2)
            >>> opt = Adam(table)
            >>> table.weight.sum().backward()
            >>> opt.step(rows={"weight": [0, 2]})
            >>> opt.row_steps("weight")
            tensor([1, 0, 1])
        """
        entry = self._find(which)
        held = self.state.get(entry.param) or {}
        step = int(float(held.get("step", 0)))
        if entry.rows is None:
            count = entry.param.shape[0] if entry.param.dim() else 1
            return torch.full((count,), step, dtype=torch.int64)
        return step - entry.rows.offsets if held else torch.zeros_like(entry.rows.offsets)

    @between_steps
    def freeze_rows(self, which: Which, index: RowIndex, *, dim: int = 0) -> None:
        """Freeze rows: no update, no decay, no momentum, until :meth:`unfreeze_rows`; their state does not age.

        Their gradients are still computed, and are not in ``max_grad_norm``'s norm. No constraint changes them either:
        a norm (:class:`MaxNorm`, :class:`UnitNorm`) over frozen and free rows scales the free ones only, and may stay
        off its limit; see :meth:`constrain`.

        Args:
            which: a parameter, a name, a pattern, a module, a selection, or several of them.
            index: a bool mask of shape (n,), or indices.
            dim: along which the rows lie.

        Raises:
            RowIndexError: the index does not fit the rows. Nothing is frozen then.
            UnsupportedError: rows differ along another dimension already. Nothing is frozen then.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> table = torch.nn.Embedding(3, 2)
            >>> opt = AdamW(table, lr=0.1)
            >>> opt.freeze_rows("weight", [0])
            >>> before = table.weight[0].clone()
            >>> table.weight.sum().backward(); opt.step()
            >>> torch.equal(table.weight[0], before)
            True
        """
        changed: list[tuple[Entry, Rows]] = []
        for entry in self._select(which):
            called = self._table.called(entry)
            at = normal_dim(dim, entry.param, called)
            rows = along(self._rows_of(entry), entry.param, at, called).copied()
            mask = row_mask(index, len(rows), called)
            rows.frozen = mask if rows.frozen is None else rows.frozen | mask
            changed.append((entry, rows))
        for entry, rows in changed:
            self._set_rows(entry, rows)

    @between_steps
    def unfreeze_rows(self, which: Which, index: RowIndex | None = None) -> None:
        """Let frozen rows be trained again, from the state that they had.

        Args:
            which: a parameter, a name, a pattern, a module, a selection, or several of them.
            index: a bool mask of shape (n,), or indices; all frozen rows by default.

        Example:
            >>> import torch
            >>> from paramstate import Adam
            >>> table = torch.nn.Embedding(3, 2)
            >>> opt = Adam(table)
            >>> opt.freeze_rows("weight", [0, 1])
            >>> opt.unfreeze_rows("weight", [1])
            >>> table.weight.sum().backward(); opt.step()
            >>> opt.row_steps("weight")
            tensor([0, 1, 1])
        """
        changed: list[tuple[Entry, Rows]] = []
        for entry in self._select(which):
            if entry.rows is None or entry.rows.frozen is None:
                continue
            rows = entry.rows.copied()
            called = self._table.called(entry)
            thawed = slice(None) if index is None else index
            frozen = entry.rows.frozen & ~row_mask(thawed, len(rows), called)
            rows.frozen = frozen if bool(frozen.any()) else None
            changed.append((entry, rows))
        for entry, rows in changed:
            self._set_rows(entry, rows)

    def _set_rows(self, entry: Entry, rows: Rows) -> None:
        entry.rows = None if rows.common_offset == 0 else rows
        self._traits_changed(entry)

    def _chosen_rows(self, rows: Mapping[Key, RowIndex] | None) -> list[tuple[Entry, Tensor]]:
        """The rows that one step is to update, as a mask for each parameter that was named."""
        if rows is not None and not isinstance(rows, Mapping):
            raise TypeError(f"rows= maps parameters to their rows, as {{'weight': mask}}; got {type(rows).__name__}")
        chosen: list[tuple[Entry, Tensor]] = []
        for key, index in (rows or {}).items():
            for entry in self._select(key):
                called = self._table.called(entry)
                if any(entry is other for other, _ in chosen):
                    raise SelectionError(f"{called}: step(rows=...) names it twice; give all of its rows at once")
                at = normal_dim(0, entry.param, called)
                along(self._rows_of(entry), entry.param, at, called)  # raises where rows differ along another dimension
                chosen.append((entry, row_mask(index, entry.param.shape[at], called)))
        return chosen
