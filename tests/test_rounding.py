"""Rounding at random: what it depends on, what it does not, and that nothing is lost on average."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from paramstate import Adam, AdamW
from precision_models import FLOATS, KINDS, SHORT, floats, step, two_layers
from reference import same_bits
from small_models import assert_same_bits, give_gradient, state_by_name

Bits = dict[str, dict[str, Tensor]]


def trained(
    *seeds: int,
    rounding: Any = "stochastic",
    seed: int = 0,
    kind: Any = None,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[nn.Sequential, AdamW]:
    model = two_layers(dtype)
    opt = AdamW(model, lr=1e-4, rounding=rounding, rounding_seed=seed, state_dtype=kind)
    step(model, opt, *(seeds or (1, 2, 3)))
    return model, opt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_same_seed_gives_the_same_bits_whatever_the_threads(dtype: torch.dtype, kind: Any) -> None:
    found: list[Bits] = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(state_by_name(*trained(kind=kind, dtype=dtype, seed=9)))
    for other in found[1:]:
        assert_same_bits(found[0], other)


@pytest.mark.parametrize("dtype", SHORT)
def test_another_seed_gives_other_bits_where_something_is_random(dtype: torch.dtype) -> None:
    one, other = trained(seed=1, dtype=dtype), trained(seed=2, dtype=dtype)
    for key in ("value", "exp_avg", "exp_avg_sq"):
        a, b = (state_by_name(*pair)["0.weight"][key] for pair in (one, other))
        assert 0.01 < (a != b).double().mean() < 0.9, key


def test_another_seed_changes_no_value_that_is_not_rounded_at_random() -> None:
    one, other = (state_by_name(*trained(seed=seed, dtype=torch.float32)) for seed in (1, 2))
    assert_same_bits(one, other)
    one, other = (state_by_name(*trained(seed=seed, rounding="nearest")) for seed in (1, 2))
    assert_same_bits(one, other)
    one, other = (state_by_name(*trained(1, seed=seed, dtype=torch.float32, kind="8bit")) for seed in (1, 2))
    assert same_bits(one["0.weight"]["value"], other["0.weight"]["value"])
    assert not same_bits(one["0.weight"]["exp_avg"], other["0.weight"]["exp_avg"])


def test_elements_parameters_and_steps_are_rounded_independently() -> None:
    first, second = (nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16)) for _ in range(2))
    opt = Adam([("first", first), ("second", second)], lr=0.3 * 2**-7, eps=1e-30, rounding="stochastic")
    ups = []
    for _ in range(2):
        for param in (first, second):
            param.data.fill_(1.0)
            param.grad = -torch.ones_like(param)
            opt.state.pop(param, None) if not ups else None
        opt.step()
        ups += [first.detach() > 1, second.detach() > 1]
    for up in ups:
        assert 0.25 < up.double().mean() < 0.35
    for number, one in enumerate(ups):
        for other in ups[:number]:
            assert 0.06 < (one & other).double().mean() < 0.12, "as two coins of 0.3"


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_parameters_and_groups_does_not_matter(kind: Any) -> None:
    found: list[Bits] = []
    for order in (slice(None), slice(None, None, -1)):
        model = two_layers(torch.bfloat16)
        named = list(model.named_parameters())[order]
        halves = [{"params": named[:1]}, {"params": named[1:]}]
        opt = AdamW(halves, model=model, rounding="stochastic", rounding_seed=3, state_dtype=kind)
        step(model, opt, 1, 2, 3)
        found.append(state_by_name(model, opt))
    assert_same_bits(*found)


PROCESS = """
import hashlib, torch
from paramstate import AdamW
from precision_models import floats, step, two_layers
model = two_layers(torch.bfloat16)
opt = AdamW(model, rounding="stochastic", rounding_seed=5, state_dtype="8bit")
step(model, opt, 1, 2, 3)
held = [model[0].weight.detach().float(), floats(opt.state_of("0.weight")["exp_avg_sq"])]
print(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in held)).hexdigest())
"""


def test_another_process_gives_the_same_bits() -> None:
    found = set()
    for hash_seed in ("1", "2"):
        environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": hash_seed}
        ran = subprocess.run(
            [sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True, check=True
        )
        found.add(ran.stdout)
    assert len(found) == 1
    assert len(found.pop().strip()) == 64


@settings(max_examples=20)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    order=st.permutations(range(3)),
    kind=st.sampled_from(["none", "bfloat16"]),
    dtype=st.sampled_from(SHORT),
)
def test_bits_belong_to_the_logical_index_whatever_the_layout(
    rows: int, columns: int, order: list[int], kind: Any, dtype: torch.dtype
) -> None:
    shape = (rows, 3, columns)
    values, gradient = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    ends = []
    for permutation in (order, [0, 1, 2]):
        inverse = [permutation.index(dim) for dim in range(3)]
        param = nn.Parameter(values.permute(permutation).contiguous().permute(inverse))
        opt = AdamW([("p", param)], rounding="stochastic", state_dtype=None if kind == "none" else kind)
        for _ in range(2):
            param.grad = gradient.clone()
            opt.step()
        ends.append([param.detach(), opt.state[param]["exp_avg"], opt.state[param]["exp_avg_sq"]])
    for one, other in zip(*ends, strict=True):
        assert same_bits(one.contiguous(), other.contiguous())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", SHORT)
def test_a_learning_rate_of_zero_changes_no_value(dtype: torch.dtype, kind: Any, rounding: Any) -> None:
    model, opt = trained(rounding=rounding, kind=kind, dtype=dtype)
    before = model[0].weight.detach().clone()
    opt.param_groups[0]["lr"] = 0.0
    step(model, opt, *range(10, 20))
    assert same_bits(model[0].weight.detach(), before)
    if rounding == "kahan":
        left = opt.state_of("0.weight")["compensation"].clone()
        step(model, opt, 20)
        assert same_bits(opt.state_of("0.weight")["compensation"], left)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_resumed_goes_on_as_one_that_was_not_stopped(kind: Any, rounding: Any, compact: bool) -> None:
    model, opt = trained(1, 2, 3, rounding=rounding, kind=kind, seed=4)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(compact=compact)))
    step(model, opt, 4, 5)
    again = two_layers(torch.bfloat16)
    again.load_state_dict(saved[0])
    resumed = AdamW(again, lr=1e-4, rounding=rounding, rounding_seed=4, state_dtype=kind)
    resumed.load_state_dict(saved[1])
    step(again, resumed, 4, 5)
    assert_same_bits(state_by_name(model, opt), state_by_name(again, resumed))


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_rounds_as_the_original(copied: Callable[[Any], Any], rounding: Any) -> None:
    model, opt = trained(rounding=rounding, seed=11)
    other, twin = copied((model, opt))
    step(model, opt, 4, 5)
    step(other, twin, 4, 5)
    assert_same_bits(state_by_name(model, opt), state_by_name(other, twin))


def moved_by_tiny_updates(rounding: Any, dtype: torch.dtype, steps: int = 300) -> tuple[Tensor, float]:
    """How far 1.0 has come by updates of a hundredth of the distance to the next number, and how far it should."""
    place = torch.finfo(dtype).eps
    param = nn.Parameter(torch.ones(64, 64, dtype=dtype))
    opt = Adam([("p", param)], lr=place / 100, eps=1e-30, rounding=rounding)
    for _ in range(steps):
        param.grad = -torch.ones_like(param)
        opt.step()
    return param.detach().double() - 1, steps * place / 100


@pytest.mark.parametrize("dtype", SHORT)
def test_tiny_updates_are_kept_on_average_where_the_nearest_loses_all(dtype: torch.dtype) -> None:
    lost, _ = moved_by_tiny_updates("nearest", dtype)
    assert not lost.any()
    kept, exact = moved_by_tiny_updates("stochastic", dtype)
    assert kept.mean().item() == pytest.approx(exact, rel=0.05)
    assert kept.std() > 0
    carried, exact = moved_by_tiny_updates("kahan", dtype)
    assert bool(((carried - exact).abs() <= 0.51 * torch.finfo(dtype).eps).all())


def test_short_moments_of_wider_values_are_kept_on_average_too() -> None:
    param = nn.Parameter(torch.zeros(128, 64))
    opt = Adam([("p", param)], lr=0.0, state_dtype="bfloat16")
    for _ in range(500):
        param.grad = torch.ones_like(param)
        opt.step()
    assert floats(opt.state[param]["exp_avg_sq"]).float().mean().item() == pytest.approx(1 - 0.999**500, rel=2e-3)


def test_every_value_becomes_one_of_its_two_neighbours() -> None:
    ends = {}
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(64, 64).bfloat16())
        opt = Adam([("p", param)], lr=1e-3, rounding=rounding, state_dtype="float32")
        give_gradient(param, "a")
        opt.step()
        ends[rounding] = param.detach()
    apart = (ends["nearest"].view(torch.int16).int() - ends["stochastic"].view(torch.int16).int()).abs()
    assert int(apart.max()) == 1
    assert 0.1 < apart.double().mean() < 0.4


@pytest.mark.parametrize("wrong", ["round", None, 1, "NEAREST", True])
def test_a_rounding_that_there_is_not_is_refused_with_those_that_there_are(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"nearest.*stochastic.*kahan"):
        AdamW(two_layers(), rounding=wrong)


@pytest.mark.parametrize("wrong", [-1, 2**64, 1.5, "7", None])
def test_a_seed_is_an_unsigned_integer(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"rounding_seed must be an integer from 0 to 2\*\*64 - 1"):
        AdamW(two_layers(), rounding="stochastic", rounding_seed=wrong)


def test_the_largest_seed_is_one_as_any_other() -> None:
    one, other = trained(seed=2**64 - 1), trained(seed=0)
    assert not same_bits(one[0][0].weight.detach(), other[0][0].weight.detach())
