"""Freezing parameters: nothing of theirs changes, state included, until they are trained again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from paramstate.identity.membership import Membership, Which
from paramstate.identity.tables import between_steps


class Freezing(Membership):
    """The part of an optimizer that freezes whole parameters."""

    @between_steps
    def freeze(self, which: Which, *, stop_gradient: bool = True) -> None:
        """Leave parameters untouched from now on: no update, no decay, no clip, no ageing of state.

        In torch a parameter with a stale or a zero gradient still moves, by momentum and decay; here it does not, and
        its gradient is not in ``max_grad_norm``'s norm. (The free ``clip_grad_norm_`` cannot know.)

        Args:
            which: a parameter, a name, a pattern, a module, a selection, or several of them.
            stop_gradient: also turn ``requires_grad`` off, so that no gradient is computed; :meth:`unfreeze` turns it
                on again where it was on.

        Raises:
            UnknownParameterError: one of them is not known. Nothing is frozen then.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
            >>> opt = AdamW(model)
            >>> opt.freeze(["0.weight", "0.bias"])
            >>> model[0].weight.requires_grad, opt.frozen
            (False, ['0.weight', '0.bias'])
            >>> opt.unfreeze("0.weight")
            >>> model[0].weight.requires_grad, opt.frozen
            (True, ['0.bias'])
        """
        for entry in self._select(which):
            entry.frozen = True
            if stop_gradient and entry.trained is None:
                entry.trained = entry.param.requires_grad
                entry.param.requires_grad_(False)
            self._traits_changed(entry)

    @between_steps
    def unfreeze(self, which: Which) -> None:
        """Train frozen parameters again, from exactly the state that they had.

        Args:
            which: a parameter, a name, a pattern, a module, a selection, or several of them; what is not frozen stays
                as it is.

        Raises:
            UnknownParameterError: one of them is not known. Nothing is changed then.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = AdamW(model)
            >>> opt.freeze("*")
            >>> opt.unfreeze("bias")
            >>> opt.frozen, model.bias.requires_grad
            (['weight'], True)
        """
        for entry in self._select(which):
            entry.frozen = False
            if entry.trained is not None:
                entry.param.requires_grad_(entry.trained)
                entry.trained = None
            self._traits_changed(entry)

    @property
    def frozen(self) -> list[str]:
        """The names of the frozen parameters.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> opt = AdamW(torch.nn.Linear(2, 1))
            >>> opt.freeze("weight")
            >>> opt.frozen
            ['weight']
        """
        self._sync()
        return [self._table.name(entry) for entry in self._table if entry.frozen]

    @contextmanager
    def _frozen_out_of_sight(self) -> Iterator[None]:
        """Frozen parameters have no gradient meanwhile: then a step that is torch's passes them over."""
        hidden: list[tuple[Tensor, Tensor]] = []
        for entry in self._table:
            if entry.frozen and entry.param.grad is not None:
                hidden.append((entry.param, entry.param.grad))
                entry.param.grad = None
        try:
            yield
        finally:
            for param, grad in hidden:
                param.grad = grad
