"""The 8-bit format: its numbers, its error bound, and what is not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from paramstate.precision.blockwise import BlockwiseTensor
from paramstate.precision.blockwise_format import BLOCK, decode, encode, scales_of

REACH = {True: (8 / 7 * 2.0**-14, 8 / 7 * 2.0**-17), False: (8 / 7 * 2.0**-30, 8 / 7 * 2.0**-33)}
"""Of a first and a second moment: down to which part of the greatest the spacing is an eighth, and what it is below."""


def greatest_of_blocks(values: Tensor) -> Tensor:
    """For each element the greatest finite magnitude in its block."""
    flat = values.flatten().abs()
    padded = torch.nn.functional.pad(torch.where(flat.isfinite(), flat, 0), (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    return padded.amax(1, keepdim=True).expand(-1, BLOCK).flatten()[: len(flat)].reshape(values.shape)


def spacing(values: Tensor, *, signed: bool) -> Tensor:
    """How far apart two neighbouring numbers are at most, as the documents have it."""
    reach, below = REACH[signed]
    greatest = greatest_of_blocks(values)
    return torch.where(values.abs() >= reach * greatest, values.abs() / 8, below * greatest)


@st.composite
def numbers(draw: st.DrawFn, *, signed: bool) -> Tensor:
    """Magnitudes over many orders, blocks whole and broken, some zeros."""
    count = draw(st.integers(1, 3 * BLOCK))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    orders = draw(st.integers(0, 60))
    middle = draw(st.integers(-20, 20))
    exponents = (torch.rand(count, generator=generator, dtype=torch.float64) - 0.5) * orders + middle
    values = torch.randn(count, generator=generator) * (2.0**exponents).float()
    values[torch.rand(count, generator=generator) < 0.1] = 0.0
    return values if signed else values.abs()


@pytest.mark.parametrize("signed", [True, False])
@given(st.data())
def test_a_number_is_off_by_half_of_the_distance_that_is_promised(signed: bool, data: st.DataObject) -> None:
    values = data.draw(numbers(signed=signed))
    found = BlockwiseTensor.of(values, signed=signed).dense()
    tolerance = spacing(values, signed=signed) * (0.5 if signed else 1.0)  # the least is never zero: one whole step up
    large = values.abs() >= REACH[signed][0] * greatest_of_blocks(values)
    tolerance[large] = values[large].abs() / 16
    assert bool(((found - values).abs() <= tolerance).all())
    assert torch.equal(found == 0, values == 0) or signed
    assert bool((found.signbit() == values.signbit()).all())


@pytest.mark.parametrize("signed", [True, False])
@given(st.data())
def test_what_was_read_is_written_again_as_it_was(signed: bool, data: st.DataObject) -> None:
    once = BlockwiseTensor.of(data.draw(numbers(signed=signed)), signed=signed)
    again = BlockwiseTensor.of(once.dense(), signed=signed)
    assert torch.equal(again.dense(), once.dense())


@pytest.mark.parametrize("signed", [True, False])
def test_what_was_read_stays_as_it_was_among_other_neighbours(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(8 * BLOCK, generator=generator) + 0.1
    once = BlockwiseTensor.of(values, signed=signed).dense()
    order = torch.randperm(len(values), generator=generator)
    assert torch.equal(BlockwiseTensor.of(once[order], signed=signed).dense(), once[order])


@pytest.mark.parametrize("signed", [True, False])
def test_the_numbers_of_the_format_are_these(signed: bool) -> None:
    codes = torch.arange(256 if not signed else 128, dtype=torch.uint8)
    scales = torch.full((scales_of(len(codes)),), 127, dtype=torch.uint8)
    found = decode(codes, scales, signed=signed)
    bias = 7 if signed else 15
    exponent, mantissa = codes.int() >> 3, (codes.int() & 7) / 8
    normal = (1 + mantissa) * 2.0 ** (exponent - bias)
    expected = torch.where(exponent == 0, mantissa * 2.0 ** (1 - bias), normal).float()
    assert torch.equal(found[:-1], expected[:-1])
    assert found[-1].isnan()
    if signed:
        assert torch.equal(found[:-1], codes[:-1].view(torch.float8_e4m3fn).float())
        assert torch.equal(decode(codes[:-1] | 0x80, scales, signed=True), -found[:-1])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("scale", [18, 60, 127, 200])
def test_every_code_but_those_of_nan_is_what_its_number_is_written_as(signed: bool, scale: int) -> None:
    codes = torch.arange(1, 127 if signed else 255, dtype=torch.uint8)
    for code in codes.split(BLOCK - 1):
        top = torch.tensor([0x7E if signed else 0xFE], dtype=torch.uint8)  # keeps the scale
        block = torch.cat([top, code])
        values = decode(block, torch.tensor([scale], dtype=torch.uint8), signed=signed)
        again, scales = encode(values, signed=signed)
        assert torch.equal(again, block)
        assert scales.tolist() == [scale]


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_not_finite_reads_as_nan_and_spoils_no_neighbour(signed: bool) -> None:
    values = torch.arange(1, BLOCK + 1).float()
    spoilt = values.clone()
    spoilt[[3, 7, 11]] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    found = BlockwiseTensor.of(spoilt, signed=signed).dense()
    assert found.isnan().nonzero().flatten().tolist() == [3, 7, 11]
    clean = BlockwiseTensor.of(torch.where(spoilt.isfinite(), spoilt, 0.0), signed=signed).dense()
    assert torch.equal(found[spoilt.isfinite()], clean[spoilt.isfinite()])
    assert bool(BlockwiseTensor.of(torch.full((3,), float("inf")), signed=signed).isnan().all())


@pytest.mark.parametrize("signed", [True, False])
def test_halfway_between_two_numbers_the_even_one_is_taken(signed: bool) -> None:
    between = torch.tensor([1.0625, 1.1875, 1.3125, 1.4375, 1.5625, 1.6875, 1.8125, 1.9375, 3.5])
    found = BlockwiseTensor.of(between, signed=signed).dense()
    assert found.tolist() == [1.0, 1.25, 1.25, 1.5, 1.5, 1.75, 1.75, 2.0, 3.5]
    least = 2.0 ** (-6 if signed else -14) / 8
    small = torch.tensor([1.5, 2.5, 3.5]) * least
    greatest = torch.tensor([448.0 if signed else 1.75 * 2**16])  # with which the scale is 1
    found = BlockwiseTensor.of(torch.cat([greatest, small]), signed=signed).dense()
    assert (found[1:] / least).tolist() == [2.0, 2.0, 4.0]


def test_a_second_moment_is_never_rounded_to_zero_and_a_first_one_keeps_its_sign() -> None:
    tiny = torch.tensor([1.0, 1e-38, 1e-45, 0.0])
    assert (BlockwiseTensor.of(tiny, signed=False).dense() > 0).tolist() == [True, True, True, False]
    signs = BlockwiseTensor.of(torch.tensor([1.0, -1e-30, -0.0, -2.0]), signed=True).dense()
    assert signs.signbit().tolist() == [False, True, True, True]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("value", [1.75 * 2.0**127, 2.0**127, 1.0, 2.0**-93, 1e-30])
def test_the_range_is_that_of_float32(signed: bool, value: float) -> None:
    found = BlockwiseTensor.of(torch.tensor([value]), signed=signed).item()
    assert abs(found - value) <= value / 16


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_there_is_a_scale_for_each_128_elements_begun(count: int) -> None:
    held = BlockwiseTensor.zeros(torch.zeros(count), signed=True)
    assert held.scales.numel() == scales_of(count) == (count + 127) // 128
    assert torch.equal(held.dense(), torch.zeros(count))
