"""What torch's own arithmetic cannot do about precision, refused by name."""

from __future__ import annotations

from torch import Tensor

from paramstate.errors import UnsupportedError
from paramstate.identity.membership import Membership
from paramstate.precision.state_dtype import dense

_SHORT = 2  # bytes


def require_plain(optimizer: Membership, param: Tensor, rounding: str, called: str) -> None:
    """Refuse a parameter that is to be stepped by torch and asks for what only the kernels can do.

    Raises:
        UnsupportedError: its value is rounded in another way than to the nearest, or its moments are kept in another
            dtype than its own.
    """
    place = f"is stepped by torch (device {param.device}, {type(param).__name__}; compiled, traced, capturable or not)"
    if rounding != "nearest" and param.is_floating_point() and param.dtype.itemsize == _SHORT:
        raise UnsupportedError(
            f"parameter {called} {place}, which rounds to the nearest alone: rounding={rounding!r} cannot be honoured; "
            "leave it out of this optimizer, or step it on the host"
        )
    kind = optimizer._kept_as(param)
    held = [tensor for tensor in (optimizer.state.get(param) or {}).values() if isinstance(tensor, Tensor)]
    is_compact = any(dense(tensor) is not tensor for tensor in held)
    if is_compact or (kind is not None and f"torch.{kind}" != str(param.dtype)):
        raise UnsupportedError(
            f"parameter {called} {place}, which keeps moments in {param.dtype}: state_dtype={kind!r} cannot be "
            f"honoured; call opt.set_state_dtype({called}, None) where the constructor was given none"
        )
