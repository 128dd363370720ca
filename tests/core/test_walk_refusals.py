"""What stops a step before anything is written, and what is left to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.walk_bench import KEYS, Bench, conjugated, param, unchanged
from paramstate import _core

# ---- what stops a step ----------------------------------------------------------------------------------------------


def test_another_list_of_parameters_is_stale() -> None:
    bench = Bench(param(3), param(3))
    before = bench.snapshot()
    for params in ([bench.params[:1]], [bench.params[::-1]], [bench.params, []], [[*bench.params, param(3)]], []):
        outcome = bench.walk.step(
            params,
            bench.state,
            [(0.1, 0.9, 0.99, 1e-8, 0.0, False, False, False)] * len(params),
            threads=1,
            max_grad_norm=None,
            grad_scale=None,
            elsewhere_squares=None,
        )
        assert outcome.stale
        assert outcome.updated == []
    unchanged(bench, before)


@pytest.mark.parametrize("how", ["no_entry", "empty", "no_step", "no_exp_avg", "amsgrad"])
def test_missing_state_is_named_and_nothing_is_written(how: str) -> None:
    bench = Bench(param(3), param(3), param(3))
    second = bench.params[1]
    if how == "no_entry":
        del bench.state[second]
    elif how == "empty":
        bench.state[second].clear()
    elif how == "amsgrad":
        bench.amsgrad = True
        for p in (bench.params[0], bench.params[2]):
            bench.state[p]["max_exp_avg_sq"] = torch.zeros(3)
    else:
        del bench.state[second][how.removeprefix("no_")]
    before, keys = bench.snapshot(), list(bench.state)
    outcome = bench.step()
    assert outcome.missing == [(0, 1)]
    assert outcome.updated == []
    unchanged(bench, before)
    assert list(bench.state) == keys  # a defaultdict was not asked for its default


PROBLEMS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "state_shape": (lambda b: b.state[b.params[1]].update(exp_avg_sq=torch.zeros(4)), ("exp_avg_sq", [3], [4], None)),
    "grad_shape": (lambda b: setattr(b.params[1], "data", torch.zeros(2, 2)), ("grad", [2, 2], [3], None)),
    "expanded": (lambda b: b.state[b.params[1]].update(exp_avg=torch.zeros(1).expand(3)), ("exp_avg", [3], [3], None)),
    "overlap": (lambda b: setattr(b.params[1], "data", b.params[0].data[::1]), ("value", [], [], (0, 0))),
    "state_overlap": (
        lambda b: b.state[b.params[1]].update(exp_avg=b.state[b.params[1]]["exp_avg_sq"]),
        ("exp_avg_sq", [], [], (0, 1)),
    ),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_problem_is_told_and_nothing_is_written(kind: str) -> None:
    bench = Bench(param(3), param(3), param(3))
    bench.step()
    break_it, expected = PROBLEMS[kind]
    break_it(bench)
    before = bench.snapshot()
    for _ in range(2):
        outcome = bench.step()
        (problem,) = outcome.problems
        assert (problem.kind, problem.group, problem.index) == (kind, 0, 1)
        assert (problem.key, problem.expected, problem.got, problem.other) == expected
        assert outcome.updated == []
        unchanged(bench, before)


def test_a_moment_in_another_parameter_s_value_is_refused() -> None:
    bench = Bench(param(3), param(3))
    bench.state[bench.params[1]]["exp_avg"] = bench.params[0].data
    (problem,) = bench.step().problems
    assert (problem.kind, problem.index, problem.key, problem.other) == ("state_overlap", 1, "exp_avg", (0, 0))


def test_the_overlap_is_exact() -> None:
    whole = torch.randn(6, 4)
    bench = Bench(*(nn.Parameter(whole[:, start::2]) for start in (0, 1)))
    for p in bench.params:
        p.grad = torch.ones(6, 2)
    assert len(bench.step().updated) == 2
    bench = Bench(nn.Parameter(whole[:, ::2]), nn.Parameter(whole[:, 2]))
    for p in bench.params:
        p.grad = torch.ones_like(p)
    (problem,) = bench.step().problems
    assert problem.kind == "overlap"


def test_overlap_that_comes_between_two_steps_is_found() -> None:
    bench = Bench(param(8), param(4))
    assert len(bench.step().updated) == 2
    bench.params[1].data = bench.params[0].data[4:]
    assert [problem.kind for problem in bench.step().problems] == ["overlap"]
    bench.params[1].data = torch.zeros(4)
    assert len(bench.step().updated) == 2


def test_a_wider_value_is_told_once_its_dtype_has_changed() -> None:
    bench = Bench(param(3), param(3))
    bench.step()
    bench.params[0].data = bench.params[0].data.double()
    bench.params[0].grad = torch.ones(3, dtype=torch.float64)
    before = bench.snapshot()
    outcome = bench.step()
    assert outcome.retyped == [(0, 0)]
    unchanged(bench, before)
    inner = bench.state[bench.params[0]]
    inner.update({key: inner[key].double() for key in KEYS[:2]})
    assert len(bench.step().updated) == 2


# ---- elsewhere ------------------------------------------------------------------------------------------------------


class Subclass(Tensor):
    pass


ELSEWHERE: dict[str, Any] = {
    "sparse_grad": lambda p, _: setattr(p, "grad", torch.ones(3).to_sparse()),
    "negated_grad": lambda p, _: setattr(p, "grad", conjugated(3)),
    "subclass_grad": lambda p, _: setattr(p, "grad", torch.ones(3).as_subclass(Subclass)),
    "meta_moment": lambda _, inner: inner.update(exp_avg=torch.zeros(3, device="meta")),
    "subclass_moment": lambda _, inner: inner.update(exp_avg=torch.zeros(3).as_subclass(Subclass)),
    "negated_moment": lambda _, inner: inner.update(exp_avg=torch.zeros(3)._neg_view()),
    "complex_moment": lambda _, inner: inner.update(exp_avg=torch.zeros(3, dtype=torch.complex64)),
    "float8_moment": lambda _, inner: inner.update(exp_avg=torch.zeros(3, dtype=torch.float8_e4m3fn)),
    "freed_moment": lambda _, inner: inner["exp_avg"].untyped_storage().resize_(0),
    "moment_is_no_tensor": lambda _, inner: inner.update(exp_avg=[0.0, 0.0, 0.0]),
    "step_is_a_float": lambda _, inner: inner.update(step=1.0),
    "step_is_bfloat16": lambda _, inner: inner.update(step=torch.zeros((), dtype=torch.bfloat16)),
    "step_of_two": lambda _, inner: inner.update(step=torch.zeros(2)),
    "grad_is_a_moment": lambda p, inner: inner.update(exp_avg=p.grad),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_the_kernels_do_not_take_is_left_to_torch(case: str) -> None:
    bench = Bench(param(3), param(3), param(3))
    second = bench.params[1]
    ELSEWHERE[case](second, bench.state[second])
    before = [bench.params[0].detach().clone()] if case == "freed_moment" else bench.snapshot()
    outcome = bench.step()
    assert outcome.elsewhere == [(0, 1)]
    assert (outcome.updated, outcome.problems, outcome.missing) == ([], [], [])
    assert torch.equal(bench.params[0], before[0])
    value = second.detach().clone()
    outcome = bench.step(elsewhere_squares=0.0)
    assert outcome.elsewhere == [(0, 1)]
    assert [id(p) for p in outcome.updated] == [id(bench.params[0]), id(bench.params[2])]
    assert torch.equal(second, value)
    assert not torch.equal(bench.params[0], before[0])


def elsewhere_parameters() -> dict[str, Tensor]:
    meta = nn.Parameter(torch.zeros(3, device="meta"))
    meta.grad = torch.zeros(3, device="meta")
    whole = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    whole.grad = torch.zeros(3, dtype=torch.complex64)
    conj = torch.zeros(3, dtype=torch.complex64).conj().requires_grad_()
    conj.grad = torch.zeros(3, dtype=torch.complex64)
    subclass = torch.zeros(3).as_subclass(Subclass).requires_grad_()
    subclass.grad = torch.zeros(3)
    scalar = nn.Parameter(torch.zeros(1))
    scalar.grad = conjugated(1)
    negated = nn.Parameter(torch.zeros(3)._neg_view())
    negated.grad = torch.zeros(3)
    return {"meta": meta, "complex": whole, "conj": conj, "subclass": subclass, "scalar": scalar, "negated": negated}


@pytest.mark.parametrize("case", ["meta", "complex", "conj", "subclass", "scalar", "negated"])
def test_a_parameter_the_kernels_do_not_take_is_left_to_torch_even_without_state(case: str) -> None:
    strange = elsewhere_parameters()[case]
    bench = Bench(param(3), strange)
    if case not in {"scalar", "negated"}:
        del bench.state[strange]
    outcome = bench.step(elsewhere_squares=0.0)
    assert outcome.elsewhere == [(0, 1)]
    assert outcome.missing == []
    assert len(outcome.updated) == 1


def test_a_functorch_wrapper_is_left_to_torch() -> None:
    seen = []

    def inside(x: Tensor) -> Tensor:
        seen.append(_core.sum_of_squares([x], threads=1))
        return x.sum()

    torch.func.grad(inside)(torch.ones(3))
    torch.func.vmap(inside)(torch.ones(2, 3))
    torch.func.functionalize(inside)(torch.ones(3))
    assert seen == [(0.0, [0])] * 3


def test_the_squares_of_gradients_elsewhere_count_in_the_norm() -> None:
    bench = Bench(param(3), param(3))
    bench.params[1].grad = torch.ones(3).to_sparse()
    norm = bench.params[0].grad.norm().item()  # type: ignore[union-attr]
    outcome = bench.step(max_grad_norm=1.0, elsewhere_squares=3.0)
    assert outcome.grad_norm == pytest.approx((norm**2 + 3) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("source", ["own", "other"])
def test_a_gradient_that_is_a_value_is_used_as_torch_uses_it(source: str) -> None:
    bench = Bench(param(70000), param(70000))
    first, second = bench.params
    second.grad = second.data if source == "own" else first.data
    other = torch.optim.Adam([nn.Parameter(p.detach().clone()) for p in bench.params], **bench.settings)
    a, b = other.param_groups[0]["params"]
    a.grad, b.grad = first.grad.clone(), (b if source == "own" else a).data  # type: ignore[union-attr]
    assert len(bench.step().updated) == 2
    other.step()
    torch.testing.assert_close(first, a)
    torch.testing.assert_close(second, b)
