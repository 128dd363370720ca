"""The identity table as users see it: parameter, name and ID, each to be found from the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from paramstate import _core

from .following import Following
from .membership import Key


class Lookup(Following):
    """The part of an optimizer that answers which parameter is which."""

    @property
    def store(self) -> _core.Store:
        """The store that keeps every state buffer under its ID; ``store=opt.store`` hands it to a rebuilt optimizer.

        It is brought up to date with ``opt.state`` each time it is asked for.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = AdamW(model)
            >>> model(torch.ones(1, 2)).sum().backward(); opt.step()
            >>> rebuilt = AdamW(model, lr=1e-4, store=opt.store)
            >>> rebuilt.ids == opt.ids, rebuilt.state_of("weight")["step"]
            (True, tensor(1.))
        """
        self._sync()
        self._walk.refresh(self.state)
        return self._table.store

    @property
    def ids(self) -> dict[str, int]:
        """Every canonical name to its ID; a tied parameter stands under each of its names.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = AdamW(model)
            >>> list(opt.ids)
            ['weight', 'bias']
            >>> opt.ids["weight"] == opt.id_of(model.weight)
            True
        """
        self._sync()
        return self._table.ids()

    def id_of(self, param: Key) -> int:
        """The ID of a parameter, given as the tensor or by name.

        Raises:
            UnknownParameterError: it is not one of this optimizer's.
            AmbiguousNameError: the name stands for several.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = AdamW(model)
            >>> opt.id_of(model.weight) == opt.id_of("weight")
            True
        """
        return self._find(param).id

    def name_of(self, param: Key) -> str:
        """The canonical name of a parameter, given as the tensor or by one of its names.

        Raises:
            UnknownParameterError: it is not one of this optimizer's.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.DataParallel(torch.nn.Linear(2, 1))
            >>> AdamW(model).name_of(model.module.weight)
            'weight'
        """
        return self._table.name(self._find(param))

    def param(self, id: int) -> Tensor:
        """The tensor that stands for an ID now.

        Raises:
            UnknownParameterError: no parameter has that ID.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = AdamW(model)
            >>> opt.param(opt.ids["bias"]) is model.bias
            True
        """
        self._sync()
        return self._table.by_id(id).param

    def state_of(self, param: Key) -> dict[str, Any]:
        """The state of a parameter, the very dict in ``opt.state``; empty where it was never stepped.

        Raises:
            UnknownParameterError: it is not one of this optimizer's.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = AdamW(model)
            >>> model(torch.ones(1, 2)).sum().backward(); opt.step()
            >>> list(opt.state_of("weight")["exp_avg"].shape), opt.state_of("weight") is opt.state[model.weight]
            ([1, 2], True)
        """
        tensor = self._find(param).param
        state: dict[str, Any] = self.state.get(tensor, {})
        return state

    def rename(self, names: Mapping[str, str]) -> None:
        """Change names; IDs and state stay.

        Where the model is known, names follow a module that moved in it by themselves; a pair that is in effect already
        is passed over.

        Args:
            names: old name to new name.

        Raises:
            UnknownParameterError: an old name is not known. Nothing is renamed then.
            ValueError: a new name is taken, or given twice. Nothing is renamed then.

        Example:
            >>> import torch
            >>> from paramstate import AdamW
            >>> opt = AdamW(torch.nn.Linear(2, 1).named_parameters())
            >>> before = opt.ids["weight"]
            >>> opt.rename({"weight": "head.weight"})
            >>> opt.ids["head.weight"] == before
            True
        """
        self._sync()
        self._settle(stepping=False)
        known = self._table.ids()
        moves = [(old, new) for old, new in names.items() if old in known or new not in known]
        wanted: dict[str, str] = {}
        for old, new in moves:
            self._table.find(old)
            first = wanted.setdefault(new, old)
            if first != old:
                raise ValueError(f"cannot rename both {first!r} and {old!r} to {new!r}: give them different names")
            if new in known and new not in names:
                raise ValueError(f"cannot rename {old!r} to {new!r}: another parameter is called so")
        self._table.rename(moves)
