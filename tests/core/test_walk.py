"""`Walk` steps torch tensors of any layout as torch does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.walk_bench import KEYS, Bench, follows, param, twin

# ---- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_step_equals_torch(amsgrad: bool) -> None:
    bench = Bench(param(3, 4), param(5), param(), param(0), param(2000, 70), amsgrad=amsgrad)
    other = twin(bench)
    for _ in range(3):
        outcome = bench.step()
        assert [id(p) for p in outcome.updated] == [id(p) for p in bench.params]
        follows(bench, other)
    assert (outcome.stale, outcome.missing, outcome.problems, outcome.elsewhere) == (False, [], [], [])
    assert (outcome.retyped, outcome.written_grads, outcome.grad_norm) == ([], [], None)
    assert all(inner["step"].item() == 3 for inner in bench.state.values())


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    bench = Bench(param(3), param(3), param(3))
    bench.params[1].grad = None
    before = bench.params[1].detach().clone()
    assert len(bench.step().updated) == 2
    assert torch.equal(bench.params[1], before)
    assert bench.state[bench.params[1]]["step"] == 0


def test_the_norm_and_the_clip_are_torch_s() -> None:
    bench = Bench(param(30), param(4, 5))
    other = twin(bench)
    norm = torch.nn.utils.clip_grad_norm_(other.param_groups[0]["params"], 0.5)
    outcome = bench.step(max_grad_norm=0.5)
    assert outcome.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    follows(bench, other)


def test_the_gradient_scale_is_taken_out_and_written_back() -> None:
    shared = param(4)
    bench = Bench(param(3), shared, param(4))
    bench.params[2].grad = shared.grad
    grads = [p.grad.clone() for p in bench.params]  # type: ignore[union-attr]
    other = twin(bench)
    for p in {id(p.grad): p for p in bench.params}.values():
        p.grad *= 8  # type: ignore[operator]
    outcome = bench.step(grad_scale=8.0, max_grad_norm=1e9)
    assert outcome.grad_norm == pytest.approx(torch.cat(grads).norm().item(), rel=1e-6)
    assert [id(g) for g in outcome.written_grads] == [id(p.grad) for p in bench.params]
    for p, grad in zip(bench.params, grads, strict=True):
        assert torch.equal(p.grad, grad)  # type: ignore[arg-type]
    follows(bench, other)


def test_an_expanded_gradient_is_unscaled_once() -> None:
    bench = Bench(param(5))
    bench.params[0].grad = torch.full((1,), 8.0).expand(5)
    bench.step(grad_scale=4.0)
    assert bench.params[0].grad.tolist() == [2.0] * 5


def test_bounds_of_the_store_hold() -> None:
    bench = Bench(param(100))
    bench.step()
    bench.store.set_bounds(bench.ids[0], -0.1, 0.1)
    bench.step()
    assert bench.params[0].abs().max() <= 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.int32])
def test_the_step_counter_may_have_any_of_these_dtypes(dtype: torch.dtype) -> None:
    bench = Bench(param(3))
    bench.state[bench.params[0]]["step"] = torch.tensor([6], dtype=dtype)
    bench.step()
    assert bench.state[bench.params[0]]["step"].tolist() == [7]


def test_one_counter_for_all_parameters_counts_each() -> None:
    bench = Bench(*(param(3) for _ in range(50)))
    counter = torch.zeros(())
    for inner in bench.state.values():
        inner["step"] = counter
    assert len(bench.step().updated) == 50
    assert counter == 50


def test_one_object_listed_twice_steps_twice() -> None:
    p = param(70000)
    bench = Bench(p, p)
    expected = Bench(nn.Parameter(p.detach().clone()))
    expected.params[0].grad = p.grad
    expected.step()
    expected.step()
    assert len(bench.step().updated) == 2
    assert torch.equal(p, expected.params[0])
    assert bench.state[p]["step"] == 2


def test_moments_that_two_parameters_share_are_used_one_after_the_other() -> None:
    bench = Bench(param(70000), param(70000))
    first, second = bench.params
    bench.state[second]["exp_avg"] = bench.state[first]["exp_avg"]
    expected = 0.9 * (0.1 * (first.grad + 0.01 * first)) + 0.1 * (second.grad + 0.01 * second)  # type: ignore[operator]
    bench.step()
    torch.testing.assert_close(bench.state[first]["exp_avg"], expected.detach(), rtol=1e-4, atol=1e-6)


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["channels_last", "grad_transposed", "grad_expanded", "slice", "moments_contiguous"])
def test_a_step_in_any_layout_equals_torch(layout: str) -> None:
    p = param(4, 3, 5, 6)
    if layout == "channels_last":
        p = nn.Parameter(p.detach().to(memory_format=torch.channels_last))
        p.grad = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)
    elif layout == "grad_transposed":
        p.grad = torch.randn(6, 5, 3, 4).permute(3, 2, 1, 0)
    elif layout == "grad_expanded":
        p.grad = torch.randn(1, 3, 1, 6).expand(4, 3, 5, 6)
    elif layout == "slice":
        p = nn.Parameter(torch.randn(8, 3, 5, 12)[::2, :, :, ::2])
        p.grad = torch.randn(4, 3, 5, 6)
    bench = Bench(p)
    if layout == "moments_contiguous":
        p.data = p.data.to(memory_format=torch.channels_last)
    other = twin(bench)
    for _ in range(2):
        assert len(bench.step().updated) == 1
        follows(bench, other)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_moments_may_have_another_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    bench = Bench(param(10, dtype=dtypes[0]))
    inner = bench.state[bench.params[0]]
    inner.update({key: inner[key].to(dtypes[1]) for key in KEYS[:2]})
    before = bench.params[0].detach().clone()
    assert len(bench.step().updated) == 1
    assert not torch.equal(bench.params[0], before)
    assert inner["exp_avg"].dtype == dtypes[1]
