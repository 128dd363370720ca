"""By which keys state stands in a file: the names of parameters where a state dict has positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from paramstate.loading.reading import saved_parameters

_BY_PARAMETER = ("names", "ids", "traits")
"""What our own part of a state dict lists by position."""


def by_name(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with names for positions; the state dict itself is left as it is.

    A parameter is called by its first name, which a load would match it by: a bare name that several groups use has the
    group's ``name`` or number in front. One without names is called ``#`` and its position.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> content = by_name(AdamW(torch.nn.Linear(2, 1)).state_dict())
        >>> content["param_groups"][0]["params"], list(content["paramstate"]["ids"])
        (['weight', 'bias'], ['weight', 'bias'])
    """
    called = _called(state_dict)
    places = [called[key] for group in state_dict["param_groups"] for key in group["params"]]
    # Sorted, since a load adds ``param_names`` last: the same state is to give the same file.
    groups = [
        {
            **dict(sorted(group.items(), key=lambda option: str(option[0]))),
            "params": [called[key] for key in group["params"]],
        }
        for group in state_dict["param_groups"]
    ]
    state = state_dict["state"]
    ours = {
        key: dict(zip(places, value, strict=True)) if key in _BY_PARAMETER else value
        for key, value in state_dict.get("paramstate", {}).items()  # a user's hook may have dropped it
    }
    others = {key: value for key, value in state_dict.items() if key not in {"state", "param_groups", "paramstate"}}
    return {
        "state": {name: state[key] for key, name in called.items() if key in state},
        "param_groups": groups,
        "paramstate": ours,
        "rest": {**others, "state": {key: held for key, held in state.items() if key not in called}},
    }


def by_position(content: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that :func:`by_name` was given.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it was not.
    """
    places = [called for group in content["param_groups"] for called in group["params"]]
    keys: dict[str, int] = {}
    for position, called in enumerate(places):
        keys.setdefault(called, position)
    groups = [{**group, "params": [keys[called] for called in group["params"]]} for group in content["param_groups"]]
    ours = {
        key: [value[called] for called in places] if key in _BY_PARAMETER else value
        for key, value in content["paramstate"].items()
    }
    _require_text([*ours.get("names", []), *(group.get("param_names", []) for group in groups)])
    # Hooks of users may keep it: it must not hang on the file.
    rest = tree_map_only(Tensor, torch.clone, content["rest"])
    state = {keys[called]: dict(held) for called, held in content["state"].items()}
    return {**rest, "state": {**state, **rest["state"]}, "param_groups": groups, "paramstate": ours}


def _require_text(lists: Iterable[Any]) -> None:
    for names in lists:
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise TypeError(f"names are {names!r}")


def _called(state_dict: Mapping[str, Any]) -> dict[Any, str]:
    """What each parameter of a state dict is called, by the key that it has there; no two are called the same."""
    called: dict[Any, str] = {}
    taken: set[str] = set()
    for saved in saved_parameters(state_dict, {}, ()):
        name = saved.names[0] if saved.names else f"#{saved.key}"
        while name in taken:
            name = f"#{name}"
        taken.add(name)
        called[saved.key] = name
    return called
