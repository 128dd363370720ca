"""The slow twin of how state and 16-bit values are stored: nearest, at random, with what is left over, in eight bits.

What is rounded at random is one of two neighbours; which of them, the library decides: `chosen` checks and takes it.
"""

from __future__ import annotations

import bisect
import math
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["float32", "bfloat16", "8bit"]
BLOCK = 128
COMPENSATION = "compensation"
SIGNED = {"exp_avg": True, "exp_avg_sq": False, "max_exp_avg_sq": False}
SMALL = 5
"""Parameters of less elements are not kept in eight bits: in the library 4,096, more than the tests' models have."""


def is_short(value: Tensor) -> bool:
    return value.dtype.itemsize == 2


def kept_as(kind: Kind | None, value: Tensor) -> Kind | None:
    """How the moments of this value are kept: small ones and vectors not in eight bits."""
    return "float32" if kind == "8bit" and (value.numel() < SMALL or value.dim() < 2) else kind


def stored(moment: Tensor, name: str, kind: Kind) -> Tensor:
    """A moment that becomes what is declared, as floats."""
    if kind == "8bit":
        return nearest_in_eight_bits(moment, name)
    return moment.to(torch.float32 if kind == "float32" else torch.bfloat16)


# ---- eight bits: floats of which 128 share a power of two -----------------------------------------------------------


def _magnitudes(name: str) -> list[float]:
    """All numbers of a format, but for its scale: three bits of mantissa, four of exponent, or five without a sign."""
    bias, top = (7, 15) if SIGNED[name] else (15, 31)
    small = [mantissa / 8 * 2.0 ** (1 - bias) for mantissa in range(8)]
    return [*small, *((1 + m / 8) * 2.0 ** (e - bias) for e in range(1, top + 1) for m in range(8))][:-1]


def _numbers(block: Tensor, name: str) -> list[float]:
    """The magnitudes that are at hand for these elements, in order."""
    most, exponent = (1.75 * 2.0**8, 10 - 127) if SIGNED[name] else (1.75 * 2.0**16, 18 - 127)
    while float(block.abs().max()) > most * 2.0**exponent:
        exponent += 1
    return [magnitude * 2.0**exponent for magnitude in _magnitudes(name)]


def _neighbours(moment: Tensor, name: str) -> list[tuple[float, float, float]]:
    """Of each element the magnitude, the number below or at it, and the one above or at it; the even one first."""
    found = []
    for block in moment.float().flatten().split(BLOCK) if moment.numel() else ():
        numbers = _numbers(block, name)
        for x in block.abs().double().tolist():
            above = bisect.bisect_left(numbers, x)
            below = above if numbers[above] == x else above - 1
            if not SIGNED[name] and x > 0.0:
                below = max(below, 1)  # nothing positive becomes zero
            even, odd = (below, above) if below % 2 == 0 else (above, below)
            found.append((x, numbers[even], numbers[odd]))
    return found


def nearest_in_eight_bits(moment: Tensor, name: str) -> Tensor:
    """Each element at the nearest number; halfway at that whose last bit is zero."""
    nearest = [even if abs(even - x) <= abs(odd - x) else odd for x, even, odd in _neighbours(moment, name)]
    magnitudes = torch.tensor(nearest, dtype=torch.float64).reshape(moment.shape).float()
    return magnitudes.copysign(moment.float()) if SIGNED[name] else magnitudes


# ---- at random -----------------------------------------------------------------------------------------------------


def chosen(exact: Tensor, got: Tensor, name: str, *, eight_bits: bool) -> Tensor:
    """What was stored for these numbers, which must be one of the two neighbours of each."""
    wanted = exact.double()
    if eight_bits:
        ways = torch.tensor(_neighbours(exact, name), dtype=torch.float64).reshape(*exact.shape, 3)
        magnitude, sign = got.double().abs(), got.double().sign()
        fits = (magnitude == ways[..., 1]) | (magnitude == ways[..., 2])
        fits &= (sign == wanted.sign()) | (sign == 0.0)
    else:
        towards = torch.where(wanted > got.double(), math.inf, -math.inf).to(got.dtype)
        other = torch.nextafter(got, towards).double()
        fits = (got.double() == wanted) | ((got.double() - wanted).sign() * (other - wanted).sign() < 0)
    assert bool(fits.all()), f"{name}: {got} is stored for {exact}"
    return got.detach().clone()


# ---- with what is left over -----------------------------------------------------------------------------------------


def completed(value: Tensor, left_over: Tensor, wide: torch.dtype) -> Tensor:
    """Value and what it left over, where that is of this value: no other number of its dtype is nearer to the sum."""
    total = value.to(wide) + left_over.to(wide)
    nearest = total.to(value.dtype).to(wide)
    return torch.where((total - value.to(wide)).abs() <= (total - nearest).abs(), total, value.to(wide))


def divided(total: Tensor, former: Tensor) -> tuple[Tensor, Tensor]:
    """What is stored, and what that leaves over: the former value stays where none is nearer."""
    nearest = total.to(former.dtype).to(total.dtype)
    old = former.to(total.dtype)
    kept = torch.where((total - old).abs() <= (total - nearest).abs(), old, nearest)
    return kept.to(former.dtype), (total - kept).to(former.dtype)
