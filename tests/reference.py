"""The slow twin of the kernel: Adam and AdamW on single tensors, bit for bit.

The update is the one the library documents, with `fma(a, b, c) = a * b + c` rounded once:

    g     = grad * coefficient
    g     = fma(weight_decay, value, g)                  L2 decay only
    m     = fma(g - m, 1 - beta1, m)
    v     = fma((1 - beta2) * g, g, beta2 * v)
    s     = max(max_v, v) when amsgrad, else v
    value = fma(-(lr / bc1) * sqrt(bc2), m / (sqrt(s) + eps * sqrt(bc2)), value * decay)
    value = clamp(value, min, max)

The scalars are float64 and narrowed once. The arithmetic is float64 where any tensor is, else float32. All of it is
NumPy and `fractions`, written for being obviously right; tensors are only there to hold bits of any dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """`a * b + c` in float32, rounded once.

    The product of two float32 is exact in float64 (48 of 53 bits, and the exponents fit). The sum is rounded to odd,
    which keeps what the second rounding, to 24 bits, must know: with 53 >= 24 + 2 bits double rounding is innocuous.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = np.broadcast_to(c.astype(np.float64), product.shape)
    total = product + addend
    back = total - product  # Knuth's TwoSum: `error` is what the addition lost, exactly
    error = (product - (total - back)) + (addend - back)
    inexact_and_even = np.isfinite(total) & (error != 0) & (total.view(np.int64) % 2 == 0)
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(inexact_and_even, odd, total).astype(np.float32)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """`a * b + c` in float64, rounded once, by exact rationals."""
    return np.vectorize(_fma64, otypes=[np.float64])(a, b, c)


def _fma64(a: float, b: float, c: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c  # the sign of an exact zero is the sum's; only an underflowing product could be told wrongly
    try:
        return float(exact)  # int / int is correctly rounded
    except OverflowError:
        return math.copysign(math.inf, exact)


@dataclass(frozen=True)
class Settings:
    """One parameter group's numbers, as Python floats."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    amsgrad: bool = False
    maximize: bool = False


def adam(
    value: torch.Tensor,
    grad: torch.Tensor,
    moments: dict[str, torch.Tensor],
    step: float,
    settings: Settings,
    coefficient: float = 1.0,
    bounds: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    zero_at_bound: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The value and the moments after one update; `step` counts this one already. Bounds are of the value's shape."""
    exact, written = unrounded_adam(value, grad, moments, step, settings, coefficient, bounds, zero_at_bound)
    after = {key: moment.to(moments[key].dtype) for key, moment in written.items()}
    return exact.to(value.dtype), {**moments, **after}


def unrounded_adam(
    value: torch.Tensor,
    grad: torch.Tensor,
    moments: dict[str, torch.Tensor],
    step: float,
    settings: Settings,
    coefficient: float = 1.0,
    bounds: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    zero_at_bound: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same before anything is rounded to what it is stored in."""
    tensors = [value, grad, *moments.values()]
    wide = any(t.dtype == torch.float64 for t in tensors)
    kind, fma = (np.float64, fma64) if wide else (np.float32, fma32)

    def read(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().to(torch.float64 if wide else torch.float32).numpy()

    def narrow(scalar: float) -> np.ndarray:
        return np.asarray(scalar, np.float64).astype(kind)

    with np.errstate(all="ignore"):
        bc1 = 1.0 - np.float64(settings.beta1**step)
        root_bc2 = np.sqrt(1.0 - np.float64(settings.beta2**step))
        w, m, v = read(value), read(moments["exp_avg"]), read(moments["exp_avg_sq"])
        g = read(grad) * narrow(-coefficient if settings.maximize else coefficient)
        if settings.weight_decay != 0 and not settings.decoupled:
            g = fma(narrow(settings.weight_decay), w, g)
        m = fma(g - m, narrow(1.0 - settings.beta1), m)
        v = fma(narrow(1.0 - settings.beta2) * g, g, narrow(settings.beta2) * v)
        written = {"exp_avg": m, "exp_avg_sq": v}
        s = v
        if settings.amsgrad:
            s = written["max_exp_avg_sq"] = np.maximum(read(moments["max_exp_avg_sq"]), v)
        decay = 1.0 - settings.lr * settings.weight_decay if settings.decoupled else 1.0
        update = m / (np.sqrt(s) + narrow(settings.eps * root_bc2))
        w = fma(narrow(-(settings.lr / bc1) * root_bc2), update, w * narrow(decay))
        low, high = (None if bound is None else read(bound) for bound in bounds)
        held = np.zeros(w.shape, bool)
        if low is not None:
            held |= w < low
        if high is not None:
            held |= w > high
        if low is not None:
            w = np.where(w < low, low, w)
        if high is not None:
            w = np.where(w > high, high, w)
        if zero_at_bound:
            written["exp_avg"] = np.where(held, np.zeros_like(m), m)
    return torch.from_numpy(np.array(w)), {key: torch.from_numpy(np.array(written[key])) for key in written}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits, so that -0.0 differs from 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(words), b.detach().contiguous().view(words))
