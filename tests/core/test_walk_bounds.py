"""`Walk` holds bounds of each element and norms, counts what is at a bound, and zeroes momentum where one holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.test_walk_rows import DTYPES, LAYOUTS, image
from core.walk_bench import KEYS, Bench, param, unchanged

SHAPES = [(6, 5, 4, 3), (5, 1, 3), (6, 1, 1, 1), (3,), (), (1,), (6, 5, 1, 3)]


def bounded(bench: Bench, low: Tensor | None, high: Tensor | None) -> Tensor:
    """What a step makes of the first parameter if it is clamped afterwards."""
    p = bench.params[0]
    copy = nn.Parameter(p.detach().clone())
    assert p.grad is not None
    copy.grad = p.grad.clone()
    other = Bench(copy, amsgrad=bench.amsgrad, **bench.settings)
    other.state[copy] = {key: tensor.clone() for key, tensor in bench.state[p].items()}
    other.step()
    result = copy.detach().clone()
    if low is not None:
        result = torch.maximum(result, low.to(result.dtype))
    return result if high is None else torch.minimum(result, high.to(result.dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_of_each_element_hold(dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    bench = Bench(image(layout, dtype), amsgrad=True)
    low, high = -torch.rand(shape) * 0.5, torch.rand(shape, dtype=torch.bfloat16)
    bench.walk.declare(bench.ids[0], min=low, max=high)
    for _ in range(2):
        expected = bounded(bench, low, high)
        bench.step()
        assert torch.equal(bench.params[0], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bounds_in_the_parameter_s_own_layout_hold(layout: str) -> None:
    bench = Bench(image(layout))
    high = torch.empty_like(bench.params[0].detach()).uniform_(-0.1, 0.1)
    bench.walk.declare(bench.ids[0], max=high)
    expected = bounded(bench, None, high)
    bench.step()
    assert torch.equal(bench.params[0], expected)


def test_a_tensor_takes_the_place_of_the_number_on_its_side() -> None:
    bench = Bench(param(50))
    bench.store.set_bounds(bench.ids[0], -0.2, 0.2)
    bench.walk.declare(bench.ids[0], max=torch.full((50,), 0.5))
    bench.params[0].data.fill_(1.0)
    bench.params[0].data[0] = -1.0
    bench.step()
    assert (bench.params[0][0].item(), bench.params[0][1:].min().item()) == (pytest.approx(-0.2), 0.5)


def test_bounds_are_read_anew() -> None:
    bench = Bench(param(4))
    high = torch.zeros(4)
    bench.walk.declare(bench.ids[0], max=high)
    bench.step()
    assert bench.params[0].max() <= 0
    high.data = torch.full((4,), -3.0)
    bench.step()
    assert bench.params[0].tolist() == [-3.0] * 4


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_at_a_bound_are_counted(dtype: torch.dtype, numbers: bool) -> None:
    bench = Bench(image("contiguous", dtype), param(7))
    at = bench.ids[0]
    if numbers:
        bench.store.set_bounds(at, -0.3, 0.7)
        bench.walk.declare(at, count_at_bound=True)
    else:
        bench.walk.declare(at, min=torch.tensor(-0.3), max=torch.tensor([0.7]), count_at_bound=True)
    for _ in range(3):
        ((group, index, count),) = bench.step().at_bound
        p = bench.params[0]
        given = torch.float64 if numbers else torch.float32
        low, high = (torch.tensor(bound, dtype=given).to(dtype) for bound in (-0.3, 0.7))
        assert (group, index) == (0, 0)
        assert count == int(((p == low) | (p == high)).sum()) > 0


def test_frozen_rows_are_neither_bounded_nor_left_out_of_the_count() -> None:
    p = param(4, 600)
    bench = Bench(p)
    p.data[:2] = 1.0
    p.data[2:] = 5.0
    frozen = torch.tensor([True, False, True, False])
    offsets = torch.zeros(4, dtype=torch.int64)
    bench.walk.declare(bench.ids[0], offsets=offsets, frozen_rows=frozen, max=torch.tensor(1.0), count_at_bound=True)
    ((_, _, count),) = bench.step().at_bound
    assert p[2].tolist() == [5.0] * 600
    assert p[1].max() <= 1
    assert p[3].tolist() == [1.0] * 600
    assert count == int((p == 1).sum()) >= 1200


@pytest.mark.parametrize("zero", [False, True])
def test_momentum_that_a_bound_holds_back_is_zeroed_if_asked(zero: bool) -> None:
    p = param(3)
    bench = Bench(p, weight_decay=0.0)
    p.data = torch.tensor([0.05, 5.0, 0.0])
    p.grad = torch.tensor([1.0, 1.0, -1.0])
    bench.store.set_bounds(bench.ids[0], 0.0, None)
    bench.walk.declare(bench.ids[0], zero_at_bound=zero)
    for _ in range(5):
        bench.step()
    assert p[0] == 0
    assert (bench.state[p]["exp_avg"][0] == 0) == zero
    assert (bench.state[p]["exp_avg"][1:] != 0).all()
    p.grad = -p.grad
    taken = 0
    while p[0] == 0:
        bench.step()
        taken += 1
    assert (taken == 1) == zero


# ---- norms ----------------------------------------------------------------------------------------------------------

DIMS = [None, [0], [1], [-1], [0, 1], [1, 2, 3], [0, 2], [-4, 3]]


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_are_held(layout: str, dims: list[int] | None) -> None:
    for kind, limit in (("at_most", 0.8), ("exactly", 1.0)):
        bench = Bench(image(layout))
        free = bounded(bench, None, None)
        bench.walk.declare(bench.ids[0], norm=(kind, limit, dims))
        bench.step()
        norm = torch.linalg.vector_norm(free.double(), dim=dims, keepdim=True)
        factor = limit / norm
        expected = free * (factor.clamp(max=1.0) if kind == "at_most" else factor)
        torch.testing.assert_close(bench.params[0].detach(), expected.float(), rtol=1e-6, atol=1e-7)


def test_a_group_of_norm_zero_and_one_that_is_not_finite_stay() -> None:
    bench = Bench(param(3, 2), lr=0.0, weight_decay=0.0)
    p = bench.params[0]
    p.data = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [3.0, 4.0]])
    bench.walk.declare(bench.ids[0], norm=("exactly", 1.0, [1]))
    bench.step()
    assert (p[0] == 0).all()
    assert p[1].isnan().tolist() == [True, False]
    torch.testing.assert_close(p[2].detach(), torch.tensor([0.6, 0.8]))


def test_frozen_rows_keep_their_norm() -> None:
    bench = Bench(param(4, 3))
    frozen = torch.tensor([True, False, False, True])
    before = bench.params[0].detach().clone()
    offsets = torch.zeros(4, dtype=torch.int64)
    bench.walk.declare(bench.ids[0], offsets=offsets, frozen_rows=frozen, norm=("exactly", 1.0, [1]))
    bench.step()
    p = bench.params[0].detach()
    assert torch.equal(p[frozen], before[frozen])
    torch.testing.assert_close(p[~frozen].norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("norm", [("near", 1.0, None), ("at_most", math.nan, None), ("exactly", -1.0, [0])])
def test_a_norm_that_cannot_be_held_is_refused_at_once(norm: tuple[str, float, list[int] | None]) -> None:
    bench = Bench(param(3))
    with pytest.raises(ValueError, match="norm is held"):
        bench.walk.declare(bench.ids[0], norm=norm)
    assert bench.walk.declared() == []


# ---- what stops a step ----------------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[dict[str, Any], tuple[str, str, list[int], list[int]]]] = {
    "wider": ({"min": torch.zeros(3, 3)}, ("bound_shape", "min", [3, 2], [3, 3])),
    "deeper": ({"max": torch.zeros(1, 3, 2)}, ("bound_shape", "max", [3, 2], [1, 3, 2])),
    "whole numbers": ({"max": torch.zeros(3, 2, dtype=torch.int64)}, ("bound_dtype", "max", [], [])),
    "elsewhere": ({"min": torch.zeros(2, device="meta")}, ("bound_dtype", "min", [], [])),
    "no such dim": ({"norm": ("at_most", 1.0, [0, 2])}, ("dim", "norm", [3, 2], [2])),
}


@pytest.mark.parametrize("which", list(REFUSALS))
def test_what_cannot_be_held_is_told_before_anything_is_written(which: str) -> None:
    declared, expected = REFUSALS[which]
    bench = Bench(param(4), param(3, 2))
    bench.step()
    bench.walk.declare(bench.ids[1], **declared)
    before = bench.snapshot()
    outcome = bench.step()
    (problem,) = outcome.problems
    assert (problem.kind, problem.key, problem.expected, problem.got) == expected
    assert (problem.group, problem.index) == (0, 1)
    assert (outcome.updated, outcome.at_bound) == ([], [])
    unchanged(bench, before)


@pytest.mark.parametrize("key", ["value", *KEYS[:2]])
def test_bounds_in_memory_that_the_step_writes_are_refused(key: str) -> None:
    p, q = param(3), param(3)
    bench = Bench(p, q)
    bound = p.detach() if key == "value" else bench.state[p][key]
    bench.walk.declare(bench.ids[1], max=bound)
    before = bench.snapshot()
    (problem,) = bench.step().problems
    assert (problem.kind, problem.key, problem.index) == ("bound_overlap", "max", 1)
    unchanged(bench, before)
