"""Going on in another layout of the same model: state moves into the parameters of a model that was made from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from paramstate.identity.membership import Which
from paramstate.identity.rebinding import Rebinding
from paramstate.selection.selecting import Selection

if TYPE_CHECKING:
    from .relayout_report import RelayoutReport
    from .relayout_routes import Origin


class Relayouting(Rebinding):
    """The part of an optimizer that follows a model into another layout."""

    def relayout(
        self,
        model: nn.Module | Selection,
        maps: Mapping[str, Origin] | None = None,
        *,
        drop: Which = (),
        group: int | str | Mapping[str, Any] | None = None,
        label: str | None = None,
    ) -> RelayoutReport:
        """Go on with a model that holds the same weights in another layout: moments move as the values did.

        A new parameter may be an old one laid out anew, a part of one (a fused projection that was split), or put
        together from several. State tensors, pending gradients, steps (of single rows too), bounds and frozen rows
        move with their elements; group, frozen or not, and constraint are those of the old parameters. Where one old
        parameter becomes one new one its ID stays; a part or a union gets an ID of its own, derived from its name. No
        value is written. All is done, or nothing where anything does not fit.

        Args:
            model: the new model, or a selection of it where not all of its parameters are meant.
            maps: new name to where it comes from: an old name; an old name, or several, with the function that makes
                the new tensor (or its part) from the old ones; or ``None``, from nowhere. What it does not mention is
                found as :func:`diff` finds it, by name and by content, and must be a pure re-layout.
            drop: old parameters that the new model does not have, to be dropped with their state.
            group: what adopts trainable parameters that come from nowhere, as in :meth:`rebind`. By default they are
                only reported.
            label: the name or number of the group whose parameters the model takes over; needed only where several
                models are trained and contents cannot tell.

        Returns:
            RelayoutReport: what went where.

        Raises:
            RelayoutError: what ``maps`` does not mention is no pure re-layout: values were processed, or an old
                parameter has no place. Its ``report`` says what was found. Nothing is changed.
            StateShapeError: a map drops, repeats or mixes elements or gives another shape; sources are in different
                groups; a tied parameter is untied. Nothing is changed.
            ConstraintError: a declared constraint cannot be said of the new layout. Nothing is changed.
            UnsupportedError: steps would differ along two dimensions, or a parameter is sharded. Nothing is changed.
            OverlapError: new parameters share memory. Nothing is changed.
            EditError: an edit session of this optimizer is open on what is to be laid out anew. Nothing is changed.
            UnknownParameterError: ``maps``, ``drop`` or ``group`` names what is not there. Nothing is changed.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> fused = torch.nn.ModuleDict({"qkv": torch.nn.Linear(2, 6, bias=False)})
            >>> opt = AdamW(fused)
            >>> split = torch.nn.ModuleDict({head: torch.nn.Linear(2, 2, bias=False) for head in "qkv"})
            >>> for new, old in zip(split.parameters(), fused["qkv"].weight.chunk(3)):
            ...     _ = new.data.copy_(old)
            >>> print(opt.relayout(split))  # nothing more to say: found by content
            new       from        by       layout      ID
            --------  ----------  -------  ----------  ---
            q.weight  qkv.weight  content  part [0:2]  new
            k.weight  qkv.weight  content  part [2:4]  new
            v.weight  qkv.weight  content  part [4:6]  new
            3 carried
        """
        from .relayout_run import RelayoutRun

        with self._lock:
            adopter = self._adopting_group(group)
            self._sync()
            pending = RelayoutRun(self, model, label)
            pending.require_no_session()
            pending.plan(maps or {}, self._select(drop))
            pending.require_own_memory()
            pending.install()
            unmanaged = pending.unmanaged
            names = [places[0].path for places in unmanaged.values()]
            if group is not None and unmanaged:
                self._adopt(unmanaged, adopter, group)
            self._sync()
            self._slots.clean(self._table)
            self._watched = False
            return pending.report([] if group is not None else names, names if group is not None else [])
