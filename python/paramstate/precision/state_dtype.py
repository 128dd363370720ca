"""In what dtype the moments of a parameter are kept, where that is declared.

=================  ===========================================================================  =================
``state_dtype``    moments                                                                      bytes a parameter
=================  ===========================================================================  =================
``None``           the value's dtype at their creation, as in torch; widened when the value is  8 with float32
``torch.float32``  float32 whatever the value                                                   8
``torch.bfloat16`` bfloat16, rounded at random where the value is wider                         4
``"8bit"``         8-bit floats in blocks of 128 with a scale (:mod:`.blockwise`)               2.02
=================  ===========================================================================  =================

Small parameters gain nothing and vectors (biases, norms' weights) are sensitive: ``"8bit"`` keeps the moments of a
parameter of less than 4,096 elements, or of less than two dimensions, in float32. What counts is the whole parameter,
not the shard of it that one process holds.

What a client writes into ``opt.state`` is what the next step begins with, in whatever dtype it comes; the step stores
it as declared.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

StateDType = torch.dtype | Literal["float32", "bfloat16", "8bit"]
"""What may be declared."""

Kind = Literal["float32", "bfloat16", "8bit"]
"""The same, as plain data."""

MOMENTS = {"exp_avg": True, "exp_avg_sq": False, "max_exp_avg_sq": False}
"""The state that it is about, and whether that has a sign."""

COMPENSATION = "compensation"
"""What the rounding of a 16-bit value left over (``rounding="kahan"``): in its dtype, of its shape."""

_SMALL = 4096
_KINDS: dict[Any, Kind] = {
    torch.float32: "float32",
    "float32": "float32",
    torch.bfloat16: "bfloat16",
    "bfloat16": "bfloat16",
    "8bit": "8bit",
}


def kind_of(state_dtype: StateDType | None) -> Kind | None:
    """What was declared, as plain data.

    Raises:
        ValueError: moments are not kept in that.
    """
    if state_dtype is None:
        return None
    try:
        return _KINDS[state_dtype]
    except (KeyError, TypeError):
        raise ValueError(
            f"state_dtype must be torch.float32, torch.bfloat16 or '8bit' (None: as in torch), got {state_dtype!r}"
        ) from None


def kept_as(kind: Kind | None, param: Tensor) -> Kind | None:
    """What holds for one parameter: small ones and vectors are not kept in eight bits; ``None`` where all is open."""
    if kind is None or not param.is_floating_point():
        return None
    is_small = param.numel() < _SMALL or param.dim() < 2
    return "float32" if kind == "8bit" and is_small else kind


def is_short(param: Tensor) -> bool:
    """Whether a value has 16 bits: what its rounding leaves over may be kept."""
    return param.dtype in (torch.bfloat16, torch.float16)


def dense(held: Tensor) -> Tensor:
    """A moment as an ordinary tensor: itself unless it is kept in eight bits."""
    from .blockwise import BlockwiseTensor

    return held.dense() if isinstance(held, BlockwiseTensor) else held


def stored(held: Tensor, key: str, kind: Kind) -> Tensor:
    """A moment as it is kept: itself if it is so already, else a new tensor."""
    if kind == "8bit":
        from .blockwise import BlockwiseTensor

        return held if isinstance(held, BlockwiseTensor) else BlockwiseTensor.of(held, signed=MOMENTS[key])
    return dense(held).to(torch.float32 if kind == "float32" else torch.bfloat16)


def zeros(param: Tensor, key: str, kind: Kind | None) -> Tensor:
    """A moment of a parameter that was never stepped, in its strides."""
    if kind == "8bit":
        from .blockwise import BlockwiseTensor

        return BlockwiseTensor.zeros(param, signed=MOMENTS[key])
    dtypes = {None: param.dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}
    return torch.zeros_like(param, dtype=dtypes[kind], memory_format=torch.preserve_format)
