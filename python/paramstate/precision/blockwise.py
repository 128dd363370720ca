"""A moment in eight bits that reads as float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from paramstate import _core
from paramstate.errors import UnsupportedError

from .blockwise_format import decode, encode, scales_of

_aten = torch.ops.aten
_AS_IT_IS = frozenset({_aten.detach.default, _aten.alias.default})


class _ReadAsFloat(Tensor):
    """What reads as float32 and has no memory of floats: whoever asks for that gets a copy."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __dlpack_c_exchange_api__ = None  # it would hand out a pointer to nothing

    def read(self) -> Tensor:
        """The values as an ordinary float32 tensor, a copy."""
        raise NotImplementedError

    def tolist(self) -> list[Any]:
        """See :meth:`torch.Tensor.tolist`."""
        return self.read().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """See :meth:`torch.Tensor.numpy`; a copy."""
        return self.read().numpy(force=force)

    def __dlpack__(self, **options: Any) -> Any:
        return self.read().__dlpack__(**options)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _read_and_written(func, args, kwargs or {})


class BlockwiseTensor(_ReadAsFloat):
    """A float32 tensor that is kept as 8-bit floats in blocks of 128 with a scale.

    Every operation reads it as float32; one in place writes it back, rounded to the nearest. It takes 1.01 bytes an
    element. ``codes`` and ``scales`` are what it is made of; see :mod:`paramstate.precision.blockwise_format`.

    Args:
        codes: uint8, of the shape of the tensor, contiguous.
        scales: uint8, one for each 128 elements begun.
        signed: for a first moment; a second one has no sign, and more exponent.

    Example:
        >>> import torch
        >>> from paramstate.precision.blockwise import BlockwiseTensor
        >>> moment = BlockwiseTensor.of(torch.tensor([1.0, -0.3]), signed=True)
        >>> moment + 0
        tensor([ 1.0000, -0.3125])
        >>> moment.mul_(2.0).codes.dtype, moment[1].item()
        (torch.uint8, -0.625)
    """

    codes: Tensor
    scales: Tensor
    signed: bool

    @staticmethod
    def __new__(  # noqa: D102
        cls, codes: Tensor, scales: Tensor, *, signed: bool
    ) -> BlockwiseTensor:
        made: BlockwiseTensor = Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=torch.float32, device=codes.device, requires_grad=False
        )
        made.codes, made.scales, made.signed = codes, scales, signed
        return made

    @classmethod
    def of(cls, values: Tensor, *, signed: bool) -> BlockwiseTensor:
        """The values, each rounded to the nearest."""
        codes, scales = encode(values, signed=signed)
        return cls(codes.contiguous(), scales, signed=signed)

    @classmethod
    def zeros(cls, like: Tensor, *, signed: bool) -> BlockwiseTensor:
        """Zeros in the shape and on the device of ``like``."""
        codes = torch.zeros(like.shape, dtype=torch.uint8, device=like.device)
        scales = torch.zeros(scales_of(like.numel()), dtype=torch.uint8, device=like.device)
        return cls(codes, scales, signed=signed)

    def dense(self) -> Tensor:
        """The values as an ordinary float32 tensor."""
        return decode(self.codes, self.scales, signed=self.signed)

    def read(self) -> Tensor:
        """See :meth:`dense`."""
        return self.dense()

    def write_(self, values: Tensor) -> None:
        """Take other values of the same shape."""
        codes, scales = encode(values, signed=self.signed)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    @property
    def data(self) -> Tensor:
        """The same codes and scales; what is assigned is written to them."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        if values.shape != self.shape or values.device != self.device:
            raise UnsupportedError(
                f"a moment in eight bits, of shape {list(self.shape)} on {self.device}, cannot become another one in "
                f"place, of shape {list(values.shape)} on {values.device}; assign to opt.state[param][...] instead"
            )
        self.write_(values)

    def share_memory_(self) -> BlockwiseTensor:
        """See :meth:`torch.Tensor.share_memory_`."""
        self.codes.share_memory_()
        self.scales.share_memory_()
        return self

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"BlockwiseTensor({self.dense()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockwiseTensor:
        twin = memo[id(self)] = self._over(Tensor.clone)
        return twin

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _rebuilt, (self.codes, self.scales, self.signed)

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, bool]]:
        return ["codes", "scales"], {"signed": self.signed}

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], kept: dict[str, bool], *_: object) -> BlockwiseTensor:
        return BlockwiseTensor(inner["codes"], inner["scales"], signed=kept["signed"])

    def _over(self, change: Any) -> BlockwiseTensor:
        return BlockwiseTensor(change(self.codes), change(self.scales), signed=self.signed)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _AS_IT_IS:
            return args[0]._over(Tensor.detach)
        if func is _aten.clone.default:
            return args[0]._over(Tensor.clone)
        if func is _aten._to_copy.default and kwargs.get("dtype", torch.float32) == torch.float32:
            return args[0]._over(lambda part: part.to(kwargs.get("device"), copy=True))
        return _read_and_written(func, args, kwargs)


def _rebuilt(codes: Tensor, scales: Tensor, signed: bool) -> BlockwiseTensor:
    return BlockwiseTensor(codes, scales, signed=signed)


class _View(_ReadAsFloat):
    """A part of a :class:`BlockwiseTensor`: reads it anew at each use, and what is written to it reaches the whole."""

    whole: BlockwiseTensor
    dense: Tensor
    part: Tensor

    @staticmethod
    def __new__(cls, whole: BlockwiseTensor, dense: Tensor, part: Tensor) -> _View:
        made: _View = Tensor._make_wrapper_subclass(
            cls, part.shape, strides=part.stride(), dtype=part.dtype, device=part.device, requires_grad=False
        )
        made.whole, made.dense, made.part = whole, dense, part
        return made

    def read(self) -> Tensor:
        """See :class:`_ReadAsFloat`."""
        self.dense.copy_(self.whole.dense())
        return self.part.clone()

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return repr(self.read())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = memo[id(self)] = self.read()
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self.read().__reduce_ex__(protocol)


def _read_and_written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on float32 tensors; what it wrote is kept in eight bits again."""
    read: dict[int, Tensor] = {}

    def dense(value: Any) -> Any:
        if isinstance(value, _View) and id(value) not in read:
            value.dense.copy_(value.whole.dense())
            read[id(value)] = value.part
        elif isinstance(value, BlockwiseTensor) and id(value) not in read:
            read[id(value)] = value.dense()
        return read[id(value)] if isinstance(value, (BlockwiseTensor, _View)) else value

    result = func(*tree_map(dense, args), **tree_map(dense, kwargs))
    written: dict[int, Tensor] = {}
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None:
            continue
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if not isinstance(value, (BlockwiseTensor, _View)):
                continue
            if not argument.alias_info.is_write:
                return tree_map(lambda part, of=value: _seen(of, dense(of), part), result)
            if isinstance(value, _View):
                value.whole.write_(value.dense)
            else:
                value.write_(dense(value))
            written[id(dense(value))] = value
    return tree_map(lambda value: written.get(id(value), value), result)


def _seen(of: BlockwiseTensor | _View, dense: Tensor, part: Any) -> Any:
    """What an operation that returns a view of a tensor has returned."""
    if not isinstance(part, Tensor):
        return part
    return _View(of.whole, of.dense, part) if isinstance(of, _View) else _View(of, dense, part)


_core.connect_blockwise(BlockwiseTensor)
