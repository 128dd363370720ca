"""`Store` over NumPy arrays, against a naive Adam, and every error by its message."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from paramstate import Store


@dataclass
class NaiveAdam:
    """Adam as the paper writes it, in the dtype of its arrays."""

    settings: dict[str, Any]
    state: dict[str, dict[str, Any]] = field(default_factory=dict)

    def step(self, values: dict[str, np.ndarray], grads: dict[str, np.ndarray]) -> float:
        s = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, **self.settings}
        norm = float(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values())))
        limit = s.get("max_grad_norm")
        coefficient = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        for name, raw in grads.items():
            value = values[name]
            zeros = np.zeros(value.shape, np.float64)
            state = self.state.setdefault(name, {"step": 0, "m": zeros, "v": zeros, "max": zeros})
            state["step"] += 1
            g = raw.astype(np.float64) * (-coefficient if s.get("maximize") else coefficient)
            x = value.astype(np.float64)
            if s.get("decoupled_weight_decay"):
                x = x * (1 - s["lr"] * s["weight_decay"])
            else:
                g = g + s["weight_decay"] * x
            beta1, beta2 = s["betas"]
            state["m"] = beta1 * state["m"] + (1 - beta1) * g
            state["v"] = beta2 * state["v"] + (1 - beta2) * g**2
            state["max"] = np.maximum(state["max"], state["v"])
            second = state["max"] if s.get("amsgrad") else state["v"]
            m_hat = state["m"] / (1 - beta1 ** state["step"])
            v_hat = second / (1 - beta2 ** state["step"])
            value[...] = x - s["lr"] * m_hat / (np.sqrt(v_hat) + s["eps"])
        return norm


SETTINGS = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-4, 0.1),
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
        "eps": st.floats(1e-8, 1e-3),
        "weight_decay": st.floats(0, 0.3),
        "decoupled_weight_decay": st.booleans(),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
        "max_grad_norm": st.none() | st.floats(0.1, 10),
    }
)
TOLERANCE = {np.float64: 1e-12, np.float32: 2e-5, np.float16: 1e-2}


def arranged(array: np.ndarray, layout: str) -> np.ndarray:
    """The same elements, laid out otherwise."""
    if layout == "transposed":
        return np.ascontiguousarray(array.T).T
    if layout == "strided":
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        view = wide[..., ::2]
    elif layout == "reversed":
        view = np.zeros_like(array)[::-1]
    else:
        return array.copy()
    view[...] = array
    return view


LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "reversed"])


@given(
    SETTINGS,
    st.sampled_from([np.float64, np.float32, np.float16]),
    st.sampled_from([np.float64, np.float32, np.float16]),
    LAYOUTS,
    LAYOUTS,
    st.integers(0, 2**32 - 1),
)
def test_a_step_equals_the_naive_adam(
    settings: dict[str, Any], dtype: Any, grad_dtype: Any, layout: str, grad_layout: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    start = {"w": rng.normal(size=(3, 4)).astype(dtype), "b": rng.normal(size=5).astype(dtype)}
    ours = {name: arranged(value, layout) for name, value in start.items()}
    theirs = {name: value.astype(np.float64) for name, value in start.items()}
    store, naive = Store(), NaiveAdam(settings)
    for name, value in ours.items():
        store.register(name, value)
    rounds = 1 if dtype is np.float16 else 3
    for _ in range(rounds):
        grads = {name: rng.normal(size=value.shape).astype(grad_dtype) for name, value in start.items()}
        norm = store.step({name: arranged(grad, grad_layout) for name, grad in grads.items()}, threads=2, **settings)
        expected = naive.step(theirs, grads)
        assert (norm is None) == (settings["max_grad_norm"] is None)
        assert norm is None or norm == pytest.approx(expected, rel=1e-6)
    for name, value in ours.items():
        # A wrong sign or a wrong moment moves a value by lr; an element whose gradient is tiny amplifies rounding.
        np.testing.assert_allclose(
            value, theirs[name], rtol=TOLERANCE[dtype], atol=settings["lr"] * TOLERANCE[dtype] * 50
        )
        assert store.state(name)["step"] == rounds


def test_the_state_comes_as_copies_in_the_shape_and_dtype_of_the_value() -> None:
    store = Store()
    store.register("w", np.ones((2, 3), np.float16))
    assert store.state("w") == {}
    store.step({"w": np.full((2, 3), 0.5)}, betas=(0.5, 0.5), amsgrad=True)
    state = store.state("w")
    assert list(state) == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert all(state[key].shape == (2, 3) and state[key].dtype == np.float16 for key in list(state)[1:])
    np.testing.assert_array_equal(state["exp_avg"], np.full((2, 3), 0.25))
    state["exp_avg"][:] = 7
    assert store.state("w")["exp_avg"].max() == 0.25


def test_the_value_is_the_array_that_was_registered_and_is_kept_alive() -> None:
    class Array(np.ndarray):
        """An ndarray that can be referred to weakly."""

    array = np.zeros(3).view(Array)
    gone = weakref.ref(array)
    store = Store()
    store.register("w", array)
    assert store.value("w") is array
    assert store.lent("w", "value") is array
    assert store.address("w") == array.ctypes.data
    assert store.address("w", "exp_avg") is None
    del array
    gc.collect()
    assert gone() is not None
    store.remove("w")
    gc.collect()
    assert gone() is None


def test_a_store_that_refers_to_itself_through_an_array_is_collected() -> None:
    class Array(np.ndarray):
        owner: Store

    array = np.zeros(3).view(Array)
    gone = weakref.ref(array)
    array.owner = Store()
    array.owner.register("w", array)
    del array
    gc.collect()
    assert gone() is None


def test_reset_starts_the_state_afresh() -> None:
    store = Store()
    store.register("w", np.zeros(2))
    store.step({"w": np.ones(2)})
    store.reset("w")
    assert store.state("w") == {}
    store.step({"w": np.ones(2)})
    assert store.state("w")["step"] == 1.0


def test_identity_survives_rename_and_alias() -> None:
    store = Store()
    w = store.register("w", np.zeros(2))
    mine = store.register("mine", id=42)
    nameless = store.register()
    assert mine == 42
    assert 0 < w < 2**63
    store.rename("w", "proj.weight")
    store.alias(w, "tied.weight")
    assert store.id("proj.weight") == store.id("tied.weight") == w
    assert store.names(w) == ["proj.weight", "tied.weight"]
    assert store.ids() == {"proj.weight": w, "tied.weight": w, "mine": 42}
    assert "w" not in store
    assert nameless in store
    assert -1 not in store
    assert object() not in store
    assert len(store) == 3
    assert store.register("w") != w  # its first ID is taken


def test_memory_counts_value_and_moments() -> None:
    store = Store()
    store.register("w", np.zeros(10, np.float32))
    store.register("b", np.zeros(4)[::2])
    assert (store.memory_bytes("w"), store.memory_bytes("b"), store.memory_bytes()) == (40, 16, 56)
    store.step({"w": np.ones(10, np.float32)})
    assert store.memory_bytes("w") == 120


def test_declared_bounds_hold_at_once_and_after_every_step() -> None:
    store = Store()
    w = np.array([-1.0, 0.5, 3.0])
    store.register("w", w)
    store.set_bounds("w", 0.0, None)
    np.testing.assert_array_equal(w, [0, 0.5, 3])
    assert store.bounds("w") == (0.0, None)
    store.step({"w": np.array([1.0, 1.0, -1.0])}, lr=1.0)
    np.testing.assert_allclose(w, [0, 0, 4])
    w[0] = -5
    store.clip("w")
    assert w[0] == 0


def test_clip_with_a_function_sees_a_copy() -> None:
    store = Store()
    w = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)[:, ::-1]
    store.register("w", w)

    def halve(values: np.ndarray) -> np.ndarray:
        assert values is not w
        values[:] = 100
        return w / 2

    store.clip("w", halve)
    np.testing.assert_array_equal(w, [[1, 0.5], [2, 1.5]])
    with pytest.raises(ZeroDivisionError):
        store.clip("w", lambda _: 1 / 0)
    np.testing.assert_array_equal(w, [[1, 0.5], [2, 1.5]])


def registered() -> tuple[Store, np.ndarray]:
    store, w = Store(), np.zeros((2, 3))
    store.register("weight", w, id=5)
    return store, w


def read_only() -> np.ndarray:
    array = np.zeros(3)
    array.setflags(write=False)
    return array


def fields() -> np.ndarray:
    return np.zeros(3, [("x", np.float32), ("y", np.int8)])["x"]


ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda s: s.register("weight"), ValueError, "the name 'weight' is taken by parameter 'weight' (ID 5)"),
    (lambda s: s.register("other", id=5), ValueError, "ID 5 is taken by parameter 'weight'"),
    (lambda s: s.register("other", id=0), ValueError, "0 is no parameter ID"),
    (lambda s: s.register("other", id=2**63), ValueError, "is no parameter ID"),
    (lambda s: s.register("other", id=-1), OverflowError, "negative int"),
    (
        lambda s: s.register("r", read_only()),
        ValueError,
        "the value of 'r' is read-only, and it would be updated in place",
    ),
    (lambda s: s.register("l", [1.0]), TypeError, "the value of 'l' is a list; pass a numpy.ndarray"),
    (
        lambda s: s.register("i", np.zeros(2, int)),
        TypeError,
        "the value of 'i' has dtype int64; pass float64, float32 or",
    ),
    (lambda s: s.register("e", np.zeros(2, ">f4")), TypeError, "the value of 'e' has dtype >f4"),
    (lambda s: s.register("f", fields()), ValueError, "the value of 'f' has strides [5] in bytes"),
    (lambda s: s.id("wieght"), KeyError, "no parameter is called 'wieght'; the nearest: 'weight'"),
    (lambda s: s.id("q"), KeyError, "no parameter is called 'q'"),
    (lambda s: s.names(9), KeyError, "no parameter has ID 9"),
    (lambda s: s.rename("q", "r"), KeyError, "no parameter is called 'q'"),
    (lambda s: s.rename("weight", "bare"), ValueError, "the name 'bare' is taken"),
    (lambda s: s.alias(5, "bare"), ValueError, "the name 'bare' is taken"),
    (lambda s: s.remove("q"), KeyError, "no parameter is called 'q'"),
    (lambda s: s.value("bare"), KeyError, "parameter 'bare' (ID 6) has no buffer 'value'"),
    (lambda s: s.set_bounds("weight", 1.0, 0.0), ValueError, "no number lies between 1 and 0"),
    (lambda s: s.set_bounds("weight", float("nan"), None), ValueError, "no number lies between NaN and inf"),
    (lambda s: s.clip("weight"), ValueError, "parameter 'weight' (ID 5) has no declared bounds"),
    (lambda s: s.clip("weight", 1.0, 0.0), ValueError, "no number lies between 1 and 0"),
    (lambda s: s.clip("weight", np.abs, 1.0), TypeError, "bounds or a function, not both"),
    (lambda s: s.clip("weight", lambda v: v[0]), ValueError, "'value' has shape [3], the value has [2, 3]"),
    (lambda s: s.step({"q": np.ones(2)}), KeyError, "no parameter is called 'q'"),
    (lambda s: s.step({"bare": np.ones(2)}), KeyError, "parameter 'bare' (ID 6) has no buffer 'value'"),
    (
        lambda s: s.step({"weight": np.ones((3, 2))}),
        ValueError,
        "(ID 5): 'grad' has shape [3, 2], the value has [2, 3]",
    ),
    (lambda s: s.step({"weight": np.ones(6)}), ValueError, "'grad' has shape [6], the value has [2, 3]"),
    (
        lambda s: s.step({"weight": np.ones((2, 3), int)}),
        TypeError,
        "the gradient of parameter 'weight' (ID 5) has dtype int64",
    ),
    (lambda s: s.step({"weight": [1.0]}), TypeError, "the gradient of parameter 'weight' (ID 5) is a list"),
    (lambda s: s.step({"weight": np.ones((2, 3)), 5: np.ones((2, 3))}), ValueError, "has two gradients in one step"),
    (lambda s: s.step({"weight": np.ones((2, 3))}, lr=-1), ValueError, "lr is -1; it must be at least 0"),
    (
        lambda s: s.step({"weight": np.ones((2, 3))}, betas=(1.0, 0.9)),
        ValueError,
        "beta1 is 1; it must be at least 0 and",
    ),
    (lambda s: s.step({"weight": np.ones((2, 3))}, threads=0), ValueError, "zero"),
    (lambda s: s.step({"weight": np.ones((2, 3)), "half": np.ones(3)}), ValueError, "share memory"),
    (lambda s: s.step({"expanded": np.ones(3)}), ValueError, "'value' of parameter 'expanded' (ID 8) is expanded"),
]


@pytest.mark.parametrize(("act", "kind", "message"), ERRORS)
def test_an_error_says_which_and_what_and_writes_nothing(act: Any, kind: type[Exception], message: str) -> None:
    store, w = registered()
    store.register("bare", id=6)
    store.register("half", w[0], id=7)
    one = np.lib.stride_tricks.as_strided(np.zeros(1), (3,), (0,), writeable=True)
    store.register("expanded", one, id=8)
    names = store.ids()
    with pytest.raises(kind, match=re.escape(message)):
        act(store)
    assert store.ids() == names
    assert not w.any()
    assert store.state("weight") == {}


def test_a_gradient_may_be_read_only() -> None:
    store, w = registered()
    grad = np.broadcast_to(np.float32(1), (2, 3))
    store.step({"weight": grad}, lr=0.1)
    np.testing.assert_allclose(w, -0.1)


def test_memory_that_its_owner_moved_is_used_where_it_is_now() -> None:
    store, w = registered()
    before = store.address("weight")
    w.resize((20, 300), refcheck=False)
    w[...] = 1
    assert store.address("weight") == w.ctypes.data != before
    store.step({"weight": np.ones((20, 300))}, lr=0.5)
    np.testing.assert_allclose(w, 0.5)


def test_threads_may_share_a_store() -> None:
    store = Store()
    arrays = [np.zeros(1000) for _ in range(4)]
    for index, array in enumerate(arrays):
        store.register(f"w{index}", array)

    def work(index: int) -> None:
        for _ in range(50):
            store.step({f"w{index}": np.ones(1000)}, lr=0.01, threads=2)
            store.state(f"w{index}")
            store.ids()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for array in arrays:
        np.testing.assert_allclose(array, -0.5)
