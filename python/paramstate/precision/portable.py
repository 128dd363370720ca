"""Moments in eight bits in a state dict: as plain floats, or as plain codes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .blockwise import BlockwiseTensor
from .state_dtype import MOMENTS

_PARTS = {"codes", "scales"}


def portable(held: Any, *, compact: bool) -> Any:
    """One parameter's state without tensors of a class of ours; itself where it has none."""
    if not (isinstance(held, dict) and any(isinstance(value, BlockwiseTensor) for value in held.values())):
        return held

    def plain(value: Any) -> Any:
        if not isinstance(value, BlockwiseTensor):
            return value
        return {"codes": value.codes, "scales": value.scales} if compact else value.dense()

    return {key: plain(value) for key, value in held.items()}


def restored(held: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's state as ``portable`` found it, over the same codes and scales."""

    def whole(key: str, value: Any) -> Any:
        if not (key in MOMENTS and isinstance(value, Mapping) and set(value) == _PARTS):
            return value
        codes: Tensor = value["codes"]
        return BlockwiseTensor(codes.contiguous(), value["scales"], signed=MOMENTS[key])

    return {key: whole(key, value) for key, value in held.items()}
