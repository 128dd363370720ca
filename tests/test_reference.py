"""The slow model is checked first: against exact rationals, and against torch in float64."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, strategies as st

from reference import MOMENTS, Settings, adam, fma32, fma64

singles = st.floats(width=32, allow_nan=False, allow_infinity=False)


def round32(exact: Fraction) -> float:
    """The float32 nearest to a rational, ties to even, found by comparing the neighbours exactly."""
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    finite = [x for x in around if np.isfinite(x)]
    return float(min(finite, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.int32)) % 2)))


@given(singles, singles, singles)
@example(1.0 + 2.0**-23, 1.0 + 2.0**-23, 2.0**-60)  # just above a tie of the product
@example(1.0 + 2.0**-12, 1.0 + 2.0**-12, -(2.0**-80))  # just below one
@example(2.0**-126, 2.0**-23, -(2.0**-149))  # the result is exactly zero, from subnormals
@example(2.0**-100, 2.0**-50, 2.0**-149)  # half of the smallest subnormal is in play
def test_fma32_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assume(abs(exact) < Fraction(float(np.finfo(np.float32).max)))
    with np.errstate(all="ignore"):
        assert float(fma32(*(np.asarray(x, np.float32) for x in (a, b, c)))) == round32(exact)


def test_fma64_keeps_what_two_roundings_lose() -> None:
    a = np.asarray(1.0 + 2.0**-52)
    b = np.asarray(1.0 - 2.0**-52)
    assert float(fma64(a, b, np.asarray(-1.0))) == -(2.0**-104)
    assert float(a * b - 1.0) == 0.0


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_reference_is_torchs_adam_in_float64(amsgrad: bool, decoupled: bool, maximize: bool) -> None:
    settings = Settings(1e-2, 0.8, 0.95, 1e-6, 0.1, decoupled, amsgrad, maximize)
    value = torch.randn(3, 4, dtype=torch.float64)
    parameter = torch.nn.Parameter(value.clone())
    stock = torch.optim.Adam(
        [parameter], settings.lr, (settings.beta1, settings.beta2), settings.eps, settings.weight_decay, amsgrad,
        maximize=maximize, decoupled_weight_decay=decoupled,
    )  # fmt: skip
    moments = {key: torch.zeros_like(value) for key in (MOMENTS if amsgrad else MOMENTS[:2])}
    for step in range(1, 6):
        parameter.grad = torch.randn_like(value)
        value, moments = adam(value, parameter.grad, moments, step, settings)
        stock.step()
    torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-14)
    for key, moment in moments.items():
        torch.testing.assert_close(stock.state[parameter][key], moment, rtol=1e-12, atol=1e-14)
