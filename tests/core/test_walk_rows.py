"""`Walk` steps rows by their own count, skips those that are frozen or not named, and tells what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.walk_bench import KEYS, Bench, param, unchanged

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "slice"]


def image(layout: str, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A parameter of 6 by 5 by 4 by 3, laid out as told."""
    made = torch.randn(6, 5, 4, 3, dtype=dtype)
    if layout == "channels_last":
        made = made.to(memory_format=torch.channels_last)
    elif layout == "slice":
        made = torch.randn(12, 5, 4, 6, dtype=dtype)[::2, :, :, ::2]
    p = nn.Parameter(made)
    p.grad = torch.randn(6, 5, 4, 3, dtype=dtype)
    return p


def bits(bench: Bench, p: Tensor) -> list[Tensor]:
    keys = KEYS if bench.amsgrad else KEYS[:2]
    return [p.detach().clone(), *(bench.state[p][key].clone() for key in keys)]


def alone(bench: Bench, p: Tensor, row: int, dim: int, grad: Tensor, old: list[Tensor], step: float) -> list[Tensor]:
    """One row, stepped as a parameter of its own from `old`, with so many steps taken before."""
    assert p.grad is not None
    single = nn.Parameter(old[0].select(dim, row).clone())
    single.grad = grad.select(dim, row).clone()
    other = Bench(single, amsgrad=bench.amsgrad, **bench.settings)
    other.state[single]["step"].fill_(step)
    for key, tensor in zip(KEYS, old[1:], strict=False):
        other.state[single][key] = tensor.select(dim, row).clone()
    other.step()
    return bits(other, single)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_has_the_bits_of_a_parameter_of_its_own(
    dtype: torch.dtype, layout: str, dim: int, amsgrad: bool
) -> None:
    p = image(layout, dtype)
    bench = Bench(p, amsgrad=amsgrad)
    for _ in range(3):
        bench.step()
    rows = p.shape[dim]
    offsets = torch.arange(rows) % 4  # a row of offset 3 is fresh
    frozen = torch.arange(rows) % 3 == 2
    bench.walk.declare(bench.ids[0], dim=dim, offsets=offsets, frozen_rows=frozen)
    before, began = bits(bench, p), offsets.clone()
    assert p.grad is not None
    bench.step()
    for row in range(rows):
        now = [tensor.select(dim, row) for tensor in bits(bench, p)]
        then = [tensor.select(dim, row) for tensor in before]
        taken = 3 - int(began[row])
        expected = then if frozen[row] else alone(bench, p, row, dim, p.grad, before, taken)
        assert all(torch.equal(a, b) for a, b in zip(now, expected, strict=True)), row
    assert offsets.tolist() == (began + frozen).tolist()
    assert bench.state[p]["step"] == 4


def test_a_new_row_moves_as_a_fresh_parameter() -> None:
    p = param(3, 4)
    bench = Bench(p, weight_decay=0.0)
    for _ in range(10):
        bench.step()
    for key in KEYS[:2]:
        bench.state[p][key][2] = 0.0
    bench.walk.declare(bench.ids[0], offsets=torch.tensor([0, 0, 10]))
    before = p.detach().clone()
    bench.step()
    torch.testing.assert_close((p - before)[2].abs(), torch.full((4,), 0.1))


def test_frozen_rows_are_bit_unchanged_after_1000_steps_and_then_go_on() -> None:
    p = param(6, 2)
    bench = Bench(p)
    for _ in range(5):
        bench.step()
    offsets, frozen = torch.zeros(6, dtype=torch.int64), torch.tensor([True, False] * 3)
    before = bits(bench, p)
    bench.walk.declare(bench.ids[0], offsets=offsets, frozen_rows=frozen)
    for _ in range(1000):
        bench.step()
    assert all(torch.equal(a[frozen], b[frozen]) for a, b in zip(bits(bench, p), before, strict=True))
    assert not torch.equal(p[1], before[0][1])
    assert offsets.tolist() == [1000, 0] * 3
    bench.walk.declare(bench.ids[0], offsets=offsets)
    assert p.grad is not None
    expected = alone(bench, p, 0, 0, p.grad, bits(bench, p), 5)
    bench.step()
    assert torch.equal(p[0], expected[0])


def test_a_step_for_some_rows_leaves_the_others_and_their_age() -> None:
    p, q = param(5, 3), param(4)
    bench = Bench(p, q)
    offsets = torch.zeros(5, dtype=torch.int64)
    bench.walk.declare(bench.ids[0], offsets=offsets)
    for step in range(7):
        before = bits(bench, p)
        named = torch.arange(5) % 2 == step % 2
        ages = step - offsets
        bench.step(rows=[(bench.ids[0], named)])
        assert p.grad is not None
        for row in range(5):
            now = [tensor[row] for tensor in bits(bench, p)]
            then = [tensor[row] for tensor in before]
            expected = alone(bench, p, row, 0, p.grad, before, int(ages[row])) if named[row] else then
            assert all(torch.equal(a, b) for a, b in zip(now, expected, strict=True))
    assert offsets.tolist() == [3, 4, 3, 4, 3]
    assert (bench.state[p]["step"], bench.state[q]["step"]) == (7, 7)
    bench.step()  # without names: all rows
    assert offsets.tolist() == [3, 4, 3, 4, 3]


def test_gradients_of_skipped_rows_and_frozen_parameters_are_not_in_the_norm() -> None:
    p, q, r = param(4, 3), param(5), param(6)
    bench = Bench(p, q, r)
    frozen, named = torch.tensor([True, False, False, False]), torch.tensor([True, True, False, True])
    bench.walk.declare(bench.ids[0], offsets=torch.zeros(4, dtype=torch.int64), frozen_rows=frozen)
    bench.walk.declare(bench.ids[1], frozen=True)
    outcome = bench.step(max_grad_norm=0.5, rows=[(bench.ids[0], named)])
    assert p.grad is not None
    assert r.grad is not None
    counted = torch.cat([p.grad[1], p.grad[3], r.grad])
    assert outcome.grad_norm == pytest.approx(counted.norm().item(), rel=1e-6)


def test_a_frozen_parameter_is_not_looked_at() -> None:
    p, q = param(3), param(3)
    bench = Bench(p, q)
    del bench.state[p]
    bench.walk.declare(bench.ids[0], frozen=True)
    before = p.detach().clone()
    outcome = bench.step()
    assert [id(each) for each in outcome.updated] == [id(q)]
    assert (outcome.missing, outcome.problems, outcome.elsewhere) == ([], [], [])
    assert torch.equal(p, before)
    assert bench.walk.declared() == [bench.ids[0]]
    bench.walk.declare(bench.ids[0])
    assert bench.walk.declared() == []
    assert bench.step().missing == [(0, 0)]


def test_what_was_declared_outlives_the_roster() -> None:
    p, q = param(3), param(3)
    bench = Bench(p, q)
    bench.walk.declare(bench.ids[1], frozen=True)
    bench.walk.declare(bench.ids[0], frozen=True)
    bench.params.reverse()
    bench.walk.enroll([bench.params], [bench.ids[::-1]])
    assert bench.step().updated == []
    bench.walk.declare(bench.ids[1])
    assert [id(each) for each in bench.step().updated] == [id(q)]


def test_offsets_that_changed_are_sorted_anew() -> None:
    p = param(4, 2)
    bench = Bench(p)
    offsets = torch.zeros(4, dtype=torch.int64)
    bench.walk.declare(bench.ids[0], offsets=offsets)
    for step in range(4):
        offsets[step] = step  # in place: the row is fresh again
        before = bits(bench, p)
        bench.step()
        assert p.grad is not None
        expected = alone(bench, p, step, 0, p.grad, before, 0)
        assert torch.equal(p[step], expected[0])
    offsets.data = torch.full((4,), 4)  # other memory
    before = bits(bench, p)
    bench.step()
    assert torch.equal(p[1], alone(bench, p, 1, 0, p.grad, before, 0)[0])


def test_one_parameter_listed_twice_ages_its_rows_twice() -> None:
    p = param(4)
    bench = Bench(p, p)
    bench.ids = [bench.ids[0]] * 2
    bench.walk.enroll([bench.params], [bench.ids])
    offsets = torch.zeros(4, dtype=torch.int64)
    bench.walk.declare(bench.ids[0], offsets=offsets, frozen_rows=torch.tensor([True, False, False, False]))
    bench.step()
    assert offsets.tolist() == [2, 0, 0, 0]


# ---- what stops a step ----------------------------------------------------------------------------------------------


def longs(*values: int) -> Tensor:
    return torch.tensor(values)


def bools(*values: bool) -> Tensor:
    return torch.tensor(values)


Refusal = tuple[dict[str, Any], Tensor | None, tuple[str, str, list[int], list[int]]]
REFUSALS: dict[str, Refusal] = {
    "short offsets": ({"offsets": longs(0, 0)}, None, ("rows_length", "offsets", [3], [2])),
    "two dimensions": ({"offsets": longs(0, 0, 0).view(3, 1)}, None, ("rows_length", "offsets", [3], [3, 1])),
    "float offsets": ({"offsets": torch.zeros(3)}, None, ("rows_dtype", "offsets", [], [])),
    "strided offsets": ({"offsets": longs(*[0] * 6)[::2]}, None, ("rows_dtype", "offsets", [], [])),
    "meta offsets": ({"offsets": torch.zeros(3, device="meta").long()}, None, ("rows_dtype", "offsets", [], [])),
    "offsets ahead": ({"offsets": longs(0, 2, 1)}, None, ("rows_ahead", "offsets", [1], [2])),
    "no such dim": ({"offsets": longs(0, 0, 0), "dim": 2}, None, ("dim", "offsets", [3, 2], [2])),
    "no such negative dim": ({"offsets": longs(0, 0, 0), "dim": -3}, None, ("dim", "offsets", [3, 2], [-3])),
    "frozen alone": ({"frozen_rows": bools(True, False, True)}, None, ("rows_undeclared", "frozen_rows", [], [])),
    "long frozen": (
        {"offsets": longs(0, 0, 0), "frozen_rows": bools(*[True] * 4)},
        None,
        ("rows_length", "frozen_rows", [3], [4]),
    ),
    "byte frozen": (
        {"offsets": longs(0, 0, 0), "frozen_rows": torch.zeros(3, dtype=torch.uint8)},
        None,
        ("rows_dtype", "frozen_rows", [], []),
    ),
    "named alone": ({}, bools(True, False, True), ("rows_undeclared", "rows", [], [])),
    "named with bounds": ({"min": torch.zeros(2)}, bools(True, False, True), ("rows_undeclared", "rows", [], [])),
    "short names": ({"offsets": longs(0, 0, 0)}, bools(True), ("rows_length", "rows", [3], [1])),
    "index as names": ({"offsets": longs(0, 0, 0)}, longs(0, 1, 2), ("rows_dtype", "rows", [], [])),
}


@pytest.mark.parametrize("which", list(REFUSALS))
def test_what_cannot_be_used_is_told_before_anything_is_written(which: str) -> None:
    declared, named, expected = REFUSALS[which]
    bench = Bench(param(4), param(3, 2))
    bench.step()
    bench.walk.declare(bench.ids[1], **declared)
    before = bench.snapshot()
    outcome = bench.step(rows=None if named is None else [(bench.ids[1], named)])
    (problem,) = outcome.problems
    assert (problem.kind, problem.key, problem.expected, problem.got) == expected
    assert (problem.group, problem.index) == (0, 1)
    assert outcome.updated == []
    unchanged(bench, before)


def test_names_of_a_refused_step_are_forgotten() -> None:
    p = param(3)
    bench = Bench(p)
    offsets = longs(0, 0, 0)
    bench.walk.declare(bench.ids[0], offsets=offsets)
    assert bench.step(rows=[(bench.ids[0], bools(True))]).problems
    with pytest.raises(KeyError, match="no enrolled parameter has ID 5"):
        bench.step(rows=[(bench.ids[0], bools(True, False, False)), (5, bools(True))])
    assert bench.step().updated
    assert offsets.tolist() == [0, 0, 0]


def test_offsets_in_memory_that_the_step_writes_are_refused() -> None:
    p = param(6, dtype=torch.float64)
    bench = Bench(p)
    bench.walk.declare(bench.ids[0], offsets=bench.state[p]["exp_avg"].view(torch.int64))
    (problem,) = bench.step().problems
    assert (problem.kind, problem.key) == ("bound_overlap", "offsets")
