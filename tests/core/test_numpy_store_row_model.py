"""Rows of the NumPy `Store` through random lists of actions, against rows that are stepped one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from paramstate import Store

Array = NDArray[np.float64]
INNER = 3
SETTINGS = {"lr": 0.1, "weight_decay": 0.05, "decoupled_weight_decay": True}


@dataclass
class Row:
    """One row by itself, stepped as AdamW is published."""

    value: Array
    m: Array = field(default_factory=lambda: np.zeros(INNER))
    v: Array = field(default_factory=lambda: np.zeros(INNER))
    taken: int = 0
    frozen: bool = False

    def step(self, grad: Array, coefficient: float) -> None:
        grad = grad * coefficient
        self.taken += 1
        self.m = 0.9 * self.m + 0.1 * grad
        self.v = 0.999 * self.v + 0.001 * grad**2
        m, v = self.m / (1 - 0.9**self.taken), self.v / (1 - 0.999**self.taken)
        self.value = self.value * (1 - 0.1 * 0.05) - 0.1 * m / (np.sqrt(v) + 1e-8)

    def begun_anew(self) -> Row:
        return Row(self.value, frozen=self.frozen)

    def with_state_of(self, other: Row) -> Row:
        return Row(self.value, other.m, other.v, other.taken, self.frozen)


def new_row(number: float) -> Row:
    return Row(np.full(INNER, number))


class Pair:
    """A store with one array, of shape (rows, INNER) or the transpose, and the rows by themselves."""

    def __init__(self, count: int, dim: int, *, strided: bool) -> None:
        self.rng = np.random.default_rng(count)
        self.axis = dim % 2
        self.dim = dim
        self.rows = [Row(self.rng.normal(size=INNER)) for _ in range(count)]
        self.store = Store()
        array = self.laid([row.value for row in self.rows])
        self.store.register("w", np.asfortranarray(array) if strided else array)

    def laid(self, rows: list[Array]) -> Array:
        flat = np.array(rows).reshape(len(rows), INNER)
        return flat if self.axis == 0 else np.ascontiguousarray(flat.T)

    def step(self, index: list[int] | None, limit: float | None) -> None:
        grads = [self.rng.normal(size=INNER) for _ in self.rows]
        named = range(len(self.rows)) if index is None else index
        active = [row for row in range(len(self.rows)) if row in named and not self.rows[row].frozen]
        norm = np.sqrt(sum((grads[row] ** 2).sum() for row in active))
        coefficient = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        for row in active:
            self.rows[row].step(grads[row], coefficient)
        rows = None if index is None else {"w": self.named(index)}
        got = self.store.step({"w": self.laid(grads)}, max_grad_norm=limit, rows=rows, dim=self.dim, **SETTINGS)
        assert (got is None) == (limit is None)
        assert got is None or np.isclose(got, norm)

    def named(self, index: list[int]) -> Any:
        """The rows as a mask, as indices, or as indices from the end."""
        count = len(self.rows)
        kind = self.rng.integers(3)
        if kind == 0:
            return np.isin(np.arange(count), index)
        return [row - count for row in index] if kind == 1 else np.array(index, np.int32)

    def gather(self, index: list[int]) -> None:
        self.store.gather_rows(["w"], index, dim=self.dim)
        self.rows = [Row(**vars(self.rows[row])) for row in index]

    def reset(self, index: list[int]) -> None:
        self.store.reset_rows(["w"], self.named(index), dim=self.dim)
        for row in index:
            self.rows[row] = self.rows[row].begun_anew()

    def pad(self, before: int, after: int) -> None:
        self.store.pad_rows(["w"], before, after, value=0.25, dim=self.dim)
        new = [new_row(0.25) for _ in range(before + after)]
        self.rows = [*new[:before], *self.rows, *new[before:]]

    def resize(self, size: int) -> None:
        self.store.resize_rows(["w"], size, value=-0.25, dim=self.dim)
        self.rows = [*self.rows, *(new_row(-0.25) for _ in range(size))][:size]

    def append(self, index: list[int], *, copies: bool, state: bool) -> None:
        state_of = index[::-1] if state else None
        if copies:
            self.store.append_rows(["w"], copy_of=index, state_of=state_of, dim=self.dim)
            new = [self.rows[row].begun_anew() for row in index]
        else:
            values = [self.rng.normal(size=INNER) for _ in index]
            self.store.append_rows({"w": self.laid(values)}, state_of=state_of, dim=self.dim)
            new = [Row(value) for value in values]
        if state_of is not None:
            new = [row.with_state_of(self.rows[of]) for row, of in zip(new, state_of, strict=True)]
        self.rows = [*self.rows, *new]

    def freeze(self, index: list[int]) -> None:
        self.store.freeze_rows(["w"], self.named(index), dim=self.dim)
        for row in index:
            self.rows[row].frozen = True

    def unfreeze(self, index: list[int] | None) -> None:
        self.store.unfreeze_rows(["w"], None if index is None else self.named(index))
        for row in range(len(self.rows)) if index is None else index:
            self.rows[row].frozen = False

    def check(self) -> None:
        np.testing.assert_allclose(self.store.value("w"), self.laid([row.value for row in self.rows]), atol=1e-12)
        state = self.store.state("w")
        if state:
            np.testing.assert_allclose(state["exp_avg"], self.laid([row.m for row in self.rows]), atol=1e-12)
            np.testing.assert_allclose(state["exp_avg_sq"], self.laid([row.v for row in self.rows]), atol=1e-12)
        taken, frozen = [row.taken for row in self.rows], [row.frozen for row in self.rows]
        steps = self.store.row_steps("w")
        if self.rows:
            assert taken == ([state["step"] if state else 0] * len(taken) if steps is None else steps)
        assert self.store.frozen_rows("w") == (frozen if any(frozen) else None)


INDEX = st.lists(st.integers(0, 99), max_size=5)
ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.none() | INDEX, st.none() | st.just(0.5)),
    st.tuples(st.just("gather"), INDEX),
    st.tuples(st.just("reset"), INDEX),
    st.tuples(st.just("pad"), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.just("resize"), st.integers(0, 8)),
    st.tuples(st.just("append"), INDEX, st.booleans(), st.booleans()),
    st.tuples(st.just("freeze"), INDEX),
    st.tuples(st.just("unfreeze"), st.none() | INDEX),
)


@given(st.lists(ACTIONS, max_size=20), st.integers(0, 5), st.sampled_from([0, 1, -1, -2]), st.booleans())
def test_a_row_does_what_a_row_by_itself_does(actions: list[Any], count: int, dim: int, strided: bool) -> None:
    pair = Pair(count, dim, strided=strided)
    for name, *given_ in actions:
        rows = len(pair.rows)

        def fitted(index: list[int] | None, rows: int = rows) -> list[int] | None:
            return index if index is None else [row % rows for row in index if rows]

        match name, given_:
            case "step", [index, limit]:
                pair.step(fitted(index), limit)
            case "append", [index, copies, state]:
                pair.append(fitted(index) or [], copies=copies, state=state)
            case "pad" | "resize", numbers:
                getattr(pair, name)(*numbers)
            case _, [index]:
                getattr(pair, name)(fitted(index))
        pair.check()
