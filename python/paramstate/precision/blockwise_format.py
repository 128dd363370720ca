"""Moments in eight bits: the format, in torch operations, for any device.

The compiled step writes and reads the same format, rounding at random where this rounds to the nearest; see
``rust/core/src/blockwise.rs``. It follows the OCP Microscaling Formats (MX) v1.0 with blocks of 128: each element is an
8-bit float, and the elements of a block, neighbours in row-major order, share a power of two, 2**(scale-127) (E8M0).

* A first moment is E4M3, as ``torch.float8_e4m3fn``: a sign, four bits of exponent, three of mantissa. Down to 8/7 *
  2**-14 of the block's greatest magnitude two numbers are at most an eighth apart, below it 8/7 * 2**-17 of the
  greatest.
* A second moment is E5M3: no sign, five bits of exponent, three of mantissa. The same down to 8/7 * 2**-30, below it
  8/7 * 2**-33. It never becomes zero where it is positive.

The error of a number rounded to the nearest is at most half of that distance, rounded at random less than the whole.
What is not finite reads as NaN; what is greater than 1.75 * 2**127 may read as infinite. The scale changes no mantissa,
so what was read is written again as it was, also among other neighbours, unless these are 2**13 (2**29) times greater.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Elements that share a scale."""

_DROPPED = 20  # bits of float32's mantissa that the format does not have
_INFINITE = 255 << 23


def encode(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of some values, each rounded to the nearest.

    Args:
        values: floating, of any shape.
        signed: E4M3, else E5M3; the values of that are not negative.

    Returns:
        tuple: uint8 codes of the shape of ``values``, and a uint8 scale for each 128 of them, in row-major order.

    Example:
        >>> import torch
        >>> codes, scales = encode(torch.tensor([1.0, -0.5, 0.0]), signed=True)
        >>> codes.view(torch.float8_e4m3fn).float() * 2.0 ** (scales.item() - 127)
        tensor([ 1.0000, -0.5000,  0.0000])
    """
    bias, nan, least_scale = _format(signed=signed)
    blocks = _blocks(values.detach().to(torch.float32))
    bits = blocks.view(torch.int32) & 0x7FFF_FFFF
    finite = bits < _INFINITE
    greatest = torch.where(finite, bits, 0).amax(1, keepdim=True)
    exponent = (greatest + ((1 << (_DROPPED + 1)) - 1)) >> 23
    scales = (exponent - ((nan >> 3) - bias)).clamp(min=least_scale)
    magnitude = bits.view(torch.float32) * _power_of_two(254 - scales)
    least = 2.0 ** (1 - bias)
    small = magnitude < least
    led = torch.where(small, magnitude + least, magnitude).view(torch.int32)
    kept = (led + ((1 << (_DROPPED - 1)) - 1) + ((led >> _DROPPED) & 1)) >> _DROPPED
    codes = kept - ((127 - bias) << 3) - torch.where(small, 8, 0)
    if not signed:
        codes = torch.maximum(codes, (bits > 0).to(codes.dtype))
    codes = torch.where(finite, codes, nan)
    if signed:
        codes = codes | torch.where(blocks.view(torch.int32) < 0, 0x80, 0)
    flat = codes.to(torch.uint8).flatten()[: values.numel()]
    return flat.reshape(values.shape), scales.to(torch.uint8).flatten()


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The float32 values that codes and scales stand for, in the shape of the codes."""
    bias, nan, _ = _format(signed=signed)
    blocks = _blocks(codes).to(torch.int32)
    magnitude = blocks & 0x7F if signed else blocks
    small = magnitude < 8
    led = (torch.where(small, magnitude | 8, magnitude) << _DROPPED) + ((127 - bias) << 23)
    values = led.view(torch.float32) - torch.where(small, 2.0 ** (1 - bias), 0.0)
    values = torch.where(magnitude == nan, float("nan"), values) * _power_of_two(scales.to(torch.int32).unsqueeze(1))
    if signed:
        values = torch.where(blocks >= 0x80, -values, values)
    return values.flatten()[: codes.numel()].reshape(codes.shape)


def scales_of(count: int) -> int:
    """How many scales so many elements have."""
    return -(-count // BLOCK)


def _format(*, signed: bool) -> tuple[int, int, int]:
    """The exponent's bias, the code of NaN, and the least scale with which all numbers are normal in float32."""
    return (7, 0x7F, 10) if signed else (15, 0xFF, 18)


def _blocks(values: Tensor) -> Tensor:
    flat = values.reshape(-1)
    missing = -flat.numel() % BLOCK
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, BLOCK)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Two to the power of ``exponent - 127``."""
    return (exponent << 23).to(torch.int32).view(torch.float32)
