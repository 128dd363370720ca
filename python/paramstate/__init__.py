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
    EditError as EditError,
    LoadError as LoadError,
    OverlapError as OverlapError,
    ParamStateError as ParamStateError,
    RelayoutError as RelayoutError,
    ReplacedParameterError as ReplacedParameterError,
    RowIndexError as RowIndexError,
    SaveError as SaveError,
    SelectionError as SelectionError,
    StateShapeError as StateShapeError,
    UnknownParameterError as UnknownParameterError,
    UnsupportedError as UnsupportedError,
)

if TYPE_CHECKING:
    from .checkpoint.loading import load as load
    from .checkpoint.saving import save as save
    from .clip import clip_ as clip_, clip_grad_norm_ as clip_grad_norm_, clip_grad_value_ as clip_grad_value_
    from .comparison import DiffReport as DiffReport, diff as diff
    from .declared.constraints import Box as Box, Constraint as Constraint, NonNegative as NonNegative
    from .declared.norm_constraints import MaxNorm as MaxNorm, UnitNorm as UnitNorm
    from .declared.projections import Projection as Projection
    from .diagnosis import Diagnosis as Diagnosis, doctor as doctor
    from .editing.session import EditSession as EditSession, edit as edit
    from .identity.rebinding import RebindReport as RebindReport
    from .identity.wrappers import canonical_names as canonical_names
    from .loading.matching import LoadReport as LoadReport
    from .optim import Adam as Adam, AdamW as AdamW
    from .selection.backbones import base_model as base_model, base_models as base_models
    from .selection.selecting import Selection as Selection, select as select
    from .surgery.relayout_report import RelayoutReport as RelayoutReport
    from .surgery.row_edits import EditRows as EditRows

__version__ = "0.1.0"

_HOME = {
    "Adam": "optim",
    "AdamW": "optim",
    "Box": "declared.constraints",
    "Constraint": "declared.constraints",
    "Diagnosis": "diagnosis",
    "DiffReport": "comparison",
    "EditRows": "surgery.row_edits",
    "EditSession": "editing.session",
    "LoadReport": "loading.matching",
    "MaxNorm": "declared.norm_constraints",
    "NonNegative": "declared.constraints",
    "Projection": "declared.projections",
    "RebindReport": "identity.rebinding",
    "RelayoutReport": "surgery.relayout_report",
    "UnitNorm": "declared.norm_constraints",
    "Selection": "selection.selecting",
    "base_model": "selection.backbones",
    "base_models": "selection.backbones",
    "canonical_names": "identity.wrappers",
    "clip_": "clip",
    "clip_grad_norm_": "clip",
    "clip_grad_value_": "clip",
    "diff": "comparison",
    "doctor": "diagnosis",
    "edit": "editing.session",
    "load": "checkpoint.loading",
    "save": "checkpoint.saving",
    "select": "selection.selecting",
}

__all__ = [
    "Adam",
    "AdamW",
    "AmbiguousNameError",
    "Box",
    "Constraint",
    "ConstraintError",
    "Diagnosis",
    "DiffReport",
    "EditError",
    "EditRows",
    "EditSession",
    "LoadError",
    "LoadReport",
    "MaxNorm",
    "NonNegative",
    "OverlapError",
    "ParamStateError",
    "Projection",
    "RebindReport",
    "RelayoutError",
    "RelayoutReport",
    "ReplacedParameterError",
    "RowIndexError",
    "SaveError",
    "Selection",
    "SelectionError",
    "StateShapeError",
    "Store",
    "UnitNorm",
    "UnknownParameterError",
    "UnsupportedError",
    "base_model",
    "base_models",
    "canonical_names",
    "clip_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "diff",
    "doctor",
    "edit",
    "load",
    "save",
    "select",
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
