"""Adam and AdamW whose state belongs to parameters. Public names, and nothing else.

The names that need torch are imported when they are used: :class:`Store` works without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._core import Store as Store
from .errors import (
    AmbiguousNameError as AmbiguousNameError,
    ConstraintError as ConstraintError,
    LoadError as LoadError,
    OverlapError as OverlapError,
    ParamStateError as ParamStateError,
    ReplacedParameterError as ReplacedParameterError,
    StateShapeError as StateShapeError,
    UnknownParameterError as UnknownParameterError,
    UnsupportedError as UnsupportedError,
)

if TYPE_CHECKING:
    from .clip import clip_ as clip_, clip_grad_norm_ as clip_grad_norm_, clip_grad_value_ as clip_grad_value_
    from .constraints import Box as Box, NonNegative as NonNegative
    from .matching import LoadReport as LoadReport
    from .optim import Adam as Adam, AdamW as AdamW
    from .rebinding import RebindReport as RebindReport
    from .wrappers import canonical_names as canonical_names

__version__ = "0.1.0"

_HOME = {
    "Adam": "optim",
    "AdamW": "optim",
    "Box": "constraints",
    "LoadReport": "matching",
    "NonNegative": "constraints",
    "RebindReport": "rebinding",
    "canonical_names": "wrappers",
    "clip_": "clip",
    "clip_grad_norm_": "clip",
    "clip_grad_value_": "clip",
}

__all__ = [
    "Adam",
    "AdamW",
    "AmbiguousNameError",
    "Box",
    "ConstraintError",
    "LoadError",
    "LoadReport",
    "NonNegative",
    "OverlapError",
    "ParamStateError",
    "RebindReport",
    "ReplacedParameterError",
    "StateShapeError",
    "Store",
    "UnknownParameterError",
    "UnsupportedError",
    "canonical_names",
    "clip_",
    "clip_grad_norm_",
    "clip_grad_value_",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_HOME[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"paramstate.{name} needs torch 2.10 or later: pip install 'paramstate[torch]'. "
            "paramstate.Store works without it."
        ) from error
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
