"""Rows, bounds of each element and frozen parameters of the NumPy `Store`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from paramstate import Store

Array = NDArray[Any]
RNG = np.random.default_rng(0)


def stepped(*shape: int, dtype: str = "float32", steps: int = 3) -> tuple[Store, Array]:
    """A store with one array, stepped so often under one gradient."""
    store = Store()
    store.register("w", RNG.standard_normal(shape).astype(dtype))
    grad = RNG.standard_normal(shape).astype(dtype)
    for _ in range(steps):
        store.step({"w": grad}, lr=0.1, amsgrad=True)
    return store, grad


def single(store: Store, row: int, grad: Array, dim: int) -> Array:
    """What one step makes of one row if it is a parameter of its own that was stepped as often."""
    other = Store()
    steps = store.row_steps("w")
    taken = store.state("w")["step"] if steps is None else steps[row]
    value = np.take(store.value("w"), row, axis=dim)
    other.register("row", value)
    if taken == 0:
        other.step({"row": np.take(grad, row, axis=dim)}, lr=0.1, amsgrad=True)
        return value
    state = store.state("w")
    m, v, most = (np.take(state[key], row, axis=dim) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
    g = np.take(grad, row, axis=dim).astype(np.float64)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    most = np.maximum(most, v)
    step = taken + 1
    move = (m / (1 - 0.9**step)) / (np.sqrt(most / (1 - 0.999**step)) + 1e-8)
    return (value - 0.1 * move).astype(value.dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_rows_that_come_and_go_take_their_state_along(dim: int, dtype: str) -> None:
    store, grad = stepped(4, 4, dtype=dtype)
    before, state = store.value("w").copy(), store.state("w")
    store.gather_rows(["w"], np.array([3, 0, 0]), dim=dim)
    new = RNG.standard_normal((2, 4)).astype(dtype)
    store.append_rows({"w": new if dim == 0 else new.T}, dim=dim)
    store.reset_rows(["w"], [1], dim=dim)
    assert np.array_equal(np.take(store.value("w"), [0, 1, 2], axis=dim), np.take(before, [3, 0, 0], axis=dim))
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        rows = np.take(store.state("w")[key], range(5), axis=dim)
        assert np.array_equal(np.take(rows, [0, 2], axis=dim), np.take(state[key], [3, 0], axis=dim))
        assert not np.take(rows, [1, 3, 4], axis=dim).any()
    assert store.row_steps("w") == [3, 0, 3, 0, 0]
    grad = np.take(grad, [3, 0, 0, 1, 2], axis=dim)
    expected = [single(store, row, grad, dim) for row in range(5)]
    store.step({"w": grad}, lr=0.1, amsgrad=True)
    assert store.row_steps("w") == [4, 1, 4, 1, 1]
    tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2}[dtype]
    for row in range(5):
        np.testing.assert_allclose(
            np.take(store.value("w"), row, axis=dim), expected[row], rtol=tolerance, atol=1e-3 * (dtype == "float16")
        )


def test_rows_of_one_age_have_no_steps_of_their_own() -> None:
    store, _ = stepped(3, 2)
    store.append_rows({"w": np.zeros((1, 2), "float32")})
    assert store.row_steps("w") == [3, 3, 3, 0]
    store.keep_rows(["w"], [False, False, False, True])
    assert store.row_steps("w") is None
    assert store.state("w")["step"] == 0
    store.permute_rows(["w"], [0])


def test_arrays_that_were_registered_stay_as_they_were() -> None:
    store = Store()
    value = np.arange(6.0).reshape(2, 3).T  # strided
    store.register("w", value)
    store.permute_rows(["w"], [2, 0, 1])
    assert value.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert store.value("w").tolist() == [[2, 5], [0, 3], [1, 4]]
    store.reset_rows(["w"], [0])
    assert store.address("w") == store.value("w").ctypes.data


REFUSALS: dict[str, tuple[Any, type[Exception], str]] = {
    "mask of another length": (lambda s: s.keep_rows(["v", "w"], [True] * 2), ValueError, "needed"),
    "no mask": (lambda s: s.keep_rows(["v", "w"], [1, 0]), TypeError, "bool"),
    "mask as index": (lambda s: s.gather_rows(["v", "w"], np.array([True, False])), TypeError, "keep_rows takes one"),
    "no such row": (lambda s: s.gather_rows(["v", "w"], [3]), ValueError, r"'v' \(ID .* has 3 rows"),
    "from the end": (lambda s: s.gather_rows(["v", "w"], [-1]), OverflowError, "negative"),
    "no permutation": (lambda s: s.permute_rows(["v", "w"], [0, 1, 1]), ValueError, "every row once"),
    "no such dim": (lambda s: s.reset_rows(["w", "v"], [0], dim=1), ValueError, r"'v' .* has no dimension 1"),
    "other dims": (lambda s: s.reset_rows(["w", "v"], [0], dim=-1), ValueError, "leads to another dimension"),
    "twice": (lambda s: s.gather_rows(["w", "v", "w"], [0]), ValueError, "named twice"),
    "another dtype": (lambda s: s.append_rows({"v": np.zeros(1, "float64")}), TypeError, "cast"),
    "another shape": (lambda s: s.append_rows({"w": np.zeros((1, 3), "float32")}), ValueError, "dimension"),
    "not as many": (
        lambda s: s.append_rows({"v": np.zeros(1, "float32"), "w": np.zeros((2, 2), "float32")}),
        ValueError,
        "add as many to each",
    ),
    "unknown": (lambda s: s.gather_rows(["v", "u"], [0]), KeyError, "no parameter is called 'u'"),
}


@pytest.mark.parametrize("which", list(REFUSALS))
def test_what_cannot_be_done_to_all_is_done_to_none(which: str) -> None:
    change, error, words = REFUSALS[which]
    store = Store()
    store.register("v", np.ones(3, "float32"))
    store.register("w", np.ones((3, 2), "float32"))
    store.step({"v": np.ones(3, "float32"), "w": np.ones((3, 2), "float32")})
    before = {name: (store.value(name), store.value(name).copy(), store.state(name)) for name in ("v", "w")}
    with pytest.raises(error, match=words):
        change(store)
    for name, (array, copy, state) in before.items():
        assert store.value(name) is array
        assert np.array_equal(array, copy)
        assert store.row_steps(name) is None
        for key, held in store.state(name).items():
            assert np.array_equal(held, state[key])


def test_a_second_dimension_gets_no_steps_of_its_own() -> None:
    store, _ = stepped(3, 2)
    store.reset_rows(["w"], [0])
    with pytest.raises(ValueError, match="along dimension 0 have steps of their own"):
        store.reset_rows(["w"], [0], dim=1)
    store.gather_rows(["w"], [1, 0], dim=1)
    assert store.row_steps("w") == [0, 3, 3]


def test_a_frozen_parameter_is_passed_over() -> None:
    store, grad = stepped(2, 2)
    store.register("v", np.zeros(2, "float32"))
    store.freeze("w")
    before, state = store.value("w").copy(), store.state("w")
    norm = store.step({"w": grad * 100, "v": np.array([3.0, 4.0], "float32")}, max_grad_norm=1.0)
    assert norm == 5.0
    assert store.is_frozen("w")
    assert np.array_equal(store.value("w"), before)
    assert store.state("w")["step"] == state["step"] == 3
    store.unfreeze("w")
    store.step({"w": grad}, amsgrad=True)
    assert store.state("w")["step"] == 4


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_bounds_of_each_element_hold_at_once_and_after_each_step(dtype: str) -> None:
    store = Store()
    store.register("w", np.array([[5.0, -5.0], [0.0, 5.0], [1.0, 1.0]], dtype).T)
    high = np.array([[0.5], [2.0]])
    store.set_bounds("w", -1.0, high)
    assert store.value("w").tolist() == [[0.5, 0.0, 0.5], [-1.0, 2.0, 1.0]]
    for _ in range(5):
        store.step({"w": np.full((2, 3), -1.0, dtype)}, lr=0.4)
        assert (store.value("w") <= high).all()
    assert store.value("w")[0].tolist() == [0.5] * 3
    assert store.bounds("w") == (None, None)
    low, held = store.element_bounds("w")
    assert held is not None
    assert np.array_equal(low, np.full((2, 3), -1.0))
    assert np.array_equal(held, np.broadcast_to(high, (2, 3)))
    store.value("w")[:] = 9.0
    store.clip("w")
    assert (store.value("w") <= high).all()
    store.set_bounds("w", None, 0.25)
    assert (store.bounds("w"), store.element_bounds("w")) == ((None, 0.25), (None, None))
    assert store.value("w").max() == 0.25


def test_bounds_of_each_element_follow_their_rows() -> None:
    store, _ = stepped(3)
    store.set_bounds("w", None, np.array([0.0, 1.0, 2.0]))
    store.gather_rows(["w"], [2, 0])
    high = store.element_bounds("w")[1]
    assert high is not None
    assert high.tolist() == [2.0, 0.0]
    with pytest.raises(ValueError, match="nothing of new rows"):
        store.append_rows({"w": np.zeros(1, "float32")})


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (np.array([0.0, 2.0]), np.array([1.0, 1.0]), "between 2 and 1"),
        (np.array([np.nan, 0.0]), None, "NaN"),
        (1.0, np.array([2.0, 0.5]), "between 1 and 0.5"),
        (None, np.zeros(3), "broadcast"),
    ],
)
def test_bounds_that_cannot_hold_are_refused(low: Any, high: Any, words: str) -> None:
    store = Store()
    store.register("w", np.array([7.0, 8.0]))
    with pytest.raises(ValueError, match=words):
        store.set_bounds("w", low, high)
    assert store.bounds("w") == store.element_bounds("w") == (None, None)
    assert store.value("w").tolist() == [7.0, 8.0]
