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


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("dim", [0, 1])
def test_frozen_rows_keep_their_bits_through_a_thousand_steps_of_adamw(dim: int, dtype: str) -> None:
    store, grad = stepped(4, 4, dtype=dtype)
    twin = Store()
    twin.register("w", store.value("w").copy())
    store.freeze_rows(["w"], np.array([True, False, False, True]), dim=dim)

    def frozen() -> list[bytes]:
        state = store.state("w")
        arrays = [store.value("w"), *(state[key] for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))]
        return [np.take(array, [0, 3], axis=dim).tobytes() for array in arrays]

    before = frozen()
    for _ in range(1000):
        store.step({"w": grad}, lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True, amsgrad=True)
    assert frozen() == before
    assert store.row_steps("w") == [3, 1003, 1003, 3]
    store.unfreeze_rows(["w"], [-1])
    assert store.frozen_rows("w") == [True, False, False, False]
    expected = single(store, 3, grad, dim)
    store.step({"w": grad}, lr=0.1, amsgrad=True)
    tolerance = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2}[dtype]
    np.testing.assert_allclose(np.take(store.value("w"), 3, axis=dim), expected, rtol=tolerance, atol=tolerance)
    assert store.row_steps("w") == [3, 1004, 1004, 4]


def test_a_row_that_is_frozen_at_a_nan_keeps_its_bits() -> None:
    store = Store()
    value = np.array([1.0, 2.0])
    value.view(np.uint64)[0] = 0x7FF800000000ABCD
    store.register("w", value)
    store.freeze_rows(["w"], [0])
    assert store.step({"w": np.array([np.inf, 3.0])}, max_grad_norm=1.0) == 3.0
    assert value.view(np.uint64)[0] == 0x7FF800000000ABCD
    store.set_bounds("w", 0.0, 0.5)
    assert value.view(np.uint64)[0] == 0x7FF800000000ABCD
    assert value[1] == 0.5


def test_what_is_declared_moves_no_frozen_row_and_clip_moves_all() -> None:
    store = Store()
    store.register("w", np.array([[3.0, 4.0], [3.0, 4.0]]))
    store.freeze_rows(["w"], [0])
    store.set_bounds("w", None, np.array([1.0, 2.0]))
    assert store.value("w").tolist() == [[3.0, 4.0], [1.0, 2.0]]
    store.clip("w")
    assert store.value("w").tolist() == [[1.0, 2.0], [1.0, 2.0]]
    store.value("w")[:] = [3.0, 4.0]
    store.set_unit_norm("w", dim=1)
    np.testing.assert_allclose(store.value("w"), [[3.0, 4.0], [0.6, 0.8]])
    store.set_max_norm("w", 5.0)  # of all: the free row takes the factor that all would need
    store.clip("w", 6.0)  # bounds that are given move what is frozen
    assert store.value("w").tolist() == [[6.0, 6.0], [6.0, 6.0]]
    store.freeze("w")
    store.set_max_norm("w", 1.0)
    assert store.value("w").max() == 6.0


@pytest.mark.parametrize("layout", ["C", "F"])
@pytest.mark.parametrize("dim", [None, 0, (1,), [0, -1]])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_norms_hold_at_once_after_every_step_and_after_rows_changed(dim: Any, limit: float | None, layout: Any) -> None:
    store = Store()
    store.register("w", np.array(RNG.standard_normal((3, 4)), order=layout))

    def declare() -> None:
        if limit is None:
            store.set_unit_norm("w", dim=dim)
        else:
            store.set_max_norm("w", limit, dim=dim)

    def check() -> None:
        axis = tuple(dim) if isinstance(dim, list) else dim
        norms = np.sqrt((store.value("w") ** 2).sum(axis=axis))
        assert (norms <= (limit or 1.0) + 1e-12).all()
        assert limit is not None or np.allclose(norms, 1.0)

    declare()
    check()
    for _ in range(3):
        store.step({"w": RNG.standard_normal((3, 4))}, lr=0.5)
        check()
    store.append_rows({"w": np.full((2, 4), 7.0)})
    check()
    over = None if dim is None else [axis % 2 for axis in np.atleast_1d(dim).tolist()]
    assert store.norm_limit("w") == (("exactly", 1.0, over) if limit is None else ("at_most", limit, over))
    store.set_bounds("w", -0.1, None)
    assert store.norm_limit("w") is None
    declare()
    assert store.bounds("w") == (None, None)
    store.set_max_norm("w", None)
    assert store.norm_limit("w") is None


def test_new_rows_are_held_at_once_to_what_is_declared() -> None:
    store, _ = stepped(2, 2)
    store.set_bounds("w", -1.0, 1.0)
    store.append_rows({"w": np.full((1, 2), 9.0, "float32")})
    store.pad_rows(["w"], 1, value=-9.0)
    store.resize_rows(["w"], 5, value=9.0)
    assert store.value("w")[[0, 3, 4]].tolist() == [[-1.0, -1.0], [1.0, 1.0], [1.0, 1.0]]


def test_several_parameters_are_padded_and_resized_together() -> None:
    store, _ = stepped(2, 3)
    store.register("v", np.array([1.0, 2.0]))
    store.freeze_rows(["w"], [1])
    store.pad_rows(["w", "v"], 1, 2, value=0.5)
    assert store.value("v").tolist() == [0.5, 1.0, 2.0, 0.5, 0.5]
    assert (store.row_steps("w"), store.frozen_rows("w")) == ([0, 3, 3, 0, 0], [False, False, True, False, False])
    store.resize_rows(["w", "v"], 3)
    assert (store.row_steps("w"), store.frozen_rows("w")) == ([0, 3, 3], [False, False, True])
    other, _ = stepped(2, 3)
    other.pad_rows(["w"], after=1, dim=-1)
    assert (other.value("w").shape, other.row_steps("w")) == ((2, 4), [3, 3, 3, 0])


def test_new_rows_take_the_bounds_of_the_rows_whose_value_or_state_they_copy() -> None:
    store, _ = stepped(2)
    store.set_bounds("w", None, np.array([0.0, 1.0]))
    store.append_rows({"w": np.array([9.0], "float32")}, state_of=[0])
    store.append_rows(["w"], copy_of=[1])
    high = store.element_bounds("w")[1]
    assert high is not None
    assert high.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert store.value("w")[2] == 0.0
    with pytest.raises(ValueError, match=r"parameter 'w' \(ID .*nothing of new rows"):
        store.pad_rows(["w"], 1)


def test_rows_of_some_parameters_are_stepped_and_all_of_others() -> None:
    store = Store()
    for name in ("a", "b", "c"):
        store.register(name, np.zeros((2, 2)))
    grads = {name: np.ones((2, 2)) for name in ("a", "b")}
    norm = store.step(grads, rows={"a": [1], "c": [0]}, max_grad_norm=100.0, lr=0.5)  # c has no gradient
    assert norm == pytest.approx(np.sqrt(6))
    assert (store.row_steps("a"), store.row_steps("b"), store.state("c")) == ([0, 1], None, {})
    assert store.value("a")[0].tolist() == [0.0, 0.0]
    store.step({"a": np.ones((2, 2))}, rows={"a": [False, True]})
    store.step({"a": np.ones((2, 2))}, rows={"a": 0})
    store.step({"a": np.ones((2, 2))}, rows={"a": np.array([0])})
    assert store.row_steps("a") is None  # all have taken two
    assert store.state("a")["step"] == 2.0


ROW_REFUSALS: dict[str, tuple[Any, type[Exception], str]] = {
    "mask": (
        lambda s: s.freeze_rows(["v", "w"], [True] * 2),
        ValueError,
        r"'v' \(ID .*has 3 rows, and the mask.* length 2",
    ),
    "index": (lambda s: s.freeze_rows(["v", "w"], [-4]), ValueError, r"'v' \(ID .*has 3 rows, and the index -4 points"),
    "floats": (lambda s: s.freeze_rows(["w"], [0.5]), TypeError, r"'w' .*a mask of bools or by integers, got float64"),
    "table": (lambda s: s.freeze_rows(["w"], [[0]]), ValueError, r"'w' .*of one dimension, got shape \[1, 1\]"),
    "dim": (lambda s: s.freeze_rows(["w", "v"], [0], dim=1), ValueError, r"'v' .*has no dimension 1"),
    "dims": (lambda s: s.freeze_rows(["w", "v"], [0], dim=-1), ValueError, "leads to another dimension"),
    "second": (lambda s: s.freeze_rows(["v", "t"], [0]), ValueError, r"'t' .*dimension 1 .*or are frozen.*dimension 0"),
    "from the end": (
        lambda s: s.freeze_rows(["v", "u"], [-1]),
        ValueError,
        r"others in parameter 'u' .*from the front",
    ),
    "unfreeze": (lambda s: s.unfreeze_rows(["w", "t"], [9]), ValueError, r"'t' .*has 2 rows, and the index 9"),
    "step mask": (lambda s: step(s, {"w": [True]}), ValueError, r"'w' .*has 3 rows, and the mask has length 1"),
    "step index": (lambda s: step(s, {"w": [3]}), ValueError, r"'w' .*the index 3 points beyond them"),
    "step second": (lambda s: step(s, {"t": [0]}), ValueError, r"'t' .*dimension 1 have steps of their own or are fro"),
    "step unknown": (lambda s: step(s, {"q": [0]}), KeyError, "no parameter is called 'q'"),
    "step twice": (lambda s: step(s, {"w": [0], 2: [1]}), ValueError, r"'w' .*names it twice; give all of its rows"),
    "step dim": (lambda s: step(s, {"w": [0], "v": [0]}, dim=1), ValueError, r"'v' .*has no dimension 1"),
    # Python 3.10 has no notes on errors, in which the name of the argument is.
    "step list": (lambda s: step(s, ["w"]), TypeError, "rows|instance of .Mapping"),
    "pad": (lambda s: s.pad_rows(["w"], -1), ValueError, "before and after must be at least 0, got -1 and 0"),
    "resize": (lambda s: s.resize_rows(["w"], -1), ValueError, "takes a number of rows, got -1"),
    "pad second": (lambda s: s.pad_rows(["v", "t"], 1), ValueError, r"'t' .*name rows along dimension 1, or call"),
    "both": (lambda s: s.append_rows({"w": 1}, copy_of=[0]), TypeError, "a list of parameters and copy_of="),
    "neither": (lambda s: s.append_rows(["w"]), TypeError, "a mapping from parameters to their new rows"),
    "fewer": (lambda s: s.append_rows({"w": -2}), ValueError, r"'w' .*cannot get -2 new rows"),
    "state": (lambda s: s.append_rows({"w": 2}, state_of=[0]), ValueError, r"'w' .*2 new rows, and state_of names 1"),
    "counts": (
        lambda s: s.append_rows(["w", "u"], copy_of=[0]),
        ValueError,
        r"'u' .*has 4 rows, and others 3; copy_of and state_of",
    ),
    "shape": (
        lambda s: s.append_rows({"v": np.zeros(1, "float32"), "w": np.zeros((1, 3), "float32")}),
        ValueError,
        r"'w' .*new rows along dimension 0 must have shape \[n, 2\], got \[1, 3\]",
    ),
    "dtype": (
        lambda s: s.append_rows({"v": np.zeros(1)}),
        TypeError,
        r"'v' .*has dtype float32, and its new rows floa",
    ),
    "norm dim": (lambda s: s.set_max_norm("v", 1.0, dim=1), ValueError, r"'v' .*has no dimension 1"),
    "norm twice": (lambda s: s.set_unit_norm("w", dim=(0, -2)), ValueError, r"'w' .*over dimension 0 twice"),
    "norm": (lambda s: s.set_max_norm("w", -1.0), ValueError, r"'w' .*held to -1; pass a finite number"),
}


def step(store: Store, rows: Any, **options: Any) -> None:
    store.step({name: np.ones(store.value(name).shape) for name in "vwtu"}, rows=rows, **options)


@pytest.mark.parametrize("which", list(ROW_REFUSALS))
def test_what_cannot_be_said_of_rows_changes_nothing(which: str) -> None:
    change, error, words = ROW_REFUSALS[which]
    store = Store()
    for number, (name, shape) in enumerate({"v": (3,), "w": (3, 2), "t": (3, 2), "u": (4, 2)}.items(), 1):
        store.register(name, np.ones(shape, "float32"), id=number)
    step(store, None)
    store.freeze_rows(["t"], [1], dim=1)
    seen = [(store.value(name), store.value(name).copy(), store.state(name)) for name in "vwtu"]
    with pytest.raises(error, match=words):
        change(store)
    for name, (array, copy, state) in zip("vwtu", seen, strict=True):
        assert store.value(name) is array
        assert np.array_equal(array, copy)
        assert store.row_steps(name) is None
        assert store.frozen_rows(name) == ([False, True] if name == "t" else None)
        assert store.norm_limit(name) is None
        for key, held in store.state(name).items():
            assert np.array_equal(held, state[key])


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("layout", ["C", "F"])
def test_clip_takes_arrays_that_broadcast_and_keeps_the_state(dtype: str, layout: Any) -> None:
    store, _ = stepped(3, 2, dtype=dtype)
    value = np.array(np.arange(6).reshape(3, 2) - 2.0, dtype, order=layout)
    store.remove("w")
    store.register("w", value)
    store.step({"w": np.ones((3, 2))}, lr=0.0)
    before = value.copy()
    low, high = np.array([0.0, -1.0]), np.array([[1.0], [0.5], [2.0]])
    store.clip("w", low, high)
    np.testing.assert_array_equal(value, np.clip(before, low, high))
    store.clip("w", None, np.float64(0.75) * np.ones((1, 1)))
    np.testing.assert_array_equal(value, np.clip(before, low, high).clip(max=0.75))
    store.clip("w", np.array(0.25), 0.5)
    assert (value.min(), value.max()) == (0.25, 0.5)
    assert (store.bounds("w"), store.element_bounds("w")) == ((None, None), (None, None))
    assert store.state("w")["step"] == 1


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (np.array([[0.0, 0.0], [2.0, 0.0]]), 1.0, r"'w' \(ID .*between 2 and 1, the bounds of its element \[1, 0\]"),
        (None, np.array([1.0, np.nan]), r"'w' .*between -inf and NaN, the bounds of its element \[0, 1\]"),
        (np.zeros(3), None, r"'w' .*a bound of shape \[3\] does not broadcast to the value's shape \(2, 2\)"),
        (2.0, 1.0, r"'w' .*between 2 and 1"),
    ],
)
def test_bounds_that_hold_for_no_number_name_parameter_and_element(low: Any, high: Any, words: str) -> None:
    store = Store()
    store.register("w", np.full((2, 2), 7.0))
    for change in (store.clip, store.set_bounds):
        with pytest.raises(ValueError, match=words):
            change("w", low, high)
    assert store.value("w").min() == store.value("w").max() == 7.0


def test_an_array_whose_owner_changed_its_rows_is_refused_until_the_state_is_reset() -> None:
    store = Store()
    value = np.ones((3, 2))
    store.register("w", value)
    store.step({"w": value})
    store.freeze_rows(["w"], [2])
    value.resize((2, 2), refcheck=False)
    for change in (
        lambda: store.step({"w": value}),
        lambda: store.gather_rows(["w"], [0]),
        lambda: store.freeze_rows(["w"], [0]),
        lambda: store.set_bounds("w", 0.0, 0.5),
    ):
        with pytest.raises(ValueError, match=r"'rows' has shape \[3, 2\], the value has \[2, 2\].*call Store::reset"):
            change()
    store.reset("w")
    store.step({"w": value})
    assert store.frozen_rows("w") is None
