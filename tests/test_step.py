"""The step against torch.optim: the same numbers for every setting, dtype and number of threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import paramstate
from reference import MOMENTS, Settings, adam, same_bits
from small_models import give_gradient


def settings_of_adam(betas: list[tuple[float, float]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({
        "lr": st.sampled_from([1e-3, 0.1, 1.0]),
        "betas": st.sampled_from(betas),
        "eps": st.sampled_from([1e-8, 1e-15, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    })  # fmt: skip


USUAL = [(0.9, 0.999), (0.8, 0.95)]
ILL_CONDITIONED = [(0.0, 0.0), (0.9, 0.0)]  # over one gradient alone: where that is small, rounding is enlarged
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
PAIRS = {"Adam": (paramstate.Adam, torch.optim.Adam), "AdamW": (paramstate.AdamW, torch.optim.AdamW)}


def step_both(ours: Any, theirs: Any, a: nn.Parameter, b: nn.Parameter, steps: int, dtype: torch.dtype) -> None:
    """The same gradients to both, for some steps."""
    for seed in range(steps):
        grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        a.grad, b.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()


@given(shape=shapes, options=settings_of_adam(USUAL), name=st.sampled_from(sorted(PAIRS)), seed=st.integers(0, 2**20))
def test_fp32_is_torchs_within_rounding(shape: tuple[int, ...], options: dict[str, Any], name: str, seed: int) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    a, b = nn.Parameter(value.clone()), nn.Parameter(value.clone())
    ours, theirs = (cls([p], **options) for cls, p in zip(PAIRS[name], (a, b), strict=True))
    step_both(ours, theirs, a, b, 5, torch.float32)
    # L2 decay may cancel a gradient almost wholly; the rounding that is left is enlarged by the division by its size.
    enlarged = options["weight_decay"] > 0 and name == "Adam"
    torch.testing.assert_close(a, b, rtol=1.3e-6, atol=1e-5 + (1e-3 * options["lr"] if enlarged else 0.0))
    assert ours.state[a].keys() == theirs.state[b].keys()
    for key, moment in theirs.state[b].items():
        torch.testing.assert_close(ours.state[a][key], moment, rtol=1e-5, atol=1e-5)


@given(
    shape=shapes,
    options=settings_of_adam(USUAL + ILL_CONDITIONED),
    name=st.sampled_from(sorted(PAIRS)),
    seed=st.integers(0, 2**20),
)
def test_fp32_is_the_references_bit_for_bit(
    shape: tuple[int, ...], options: dict[str, Any], name: str, seed: int
) -> None:
    parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    opt = PAIRS[name][0]([parameter], **options)
    rest = {key: value for key, value in options.items() if key != "betas"}
    settings = Settings(beta1=options["betas"][0], beta2=options["betas"][1], decoupled=name == "AdamW", **rest)
    value = parameter.detach().clone()
    moments = {key: torch.zeros_like(value) for key in MOMENTS[: 3 if options["amsgrad"] else 2]}
    for step in (1, 2, 3):
        give_gradient(parameter, f"{seed}{step}")
        opt.step()
        value, moments = adam(value, parameter.grad, moments, step, settings)
        assert same_bits(parameter, value)
        for key, moment in moments.items():
            assert same_bits(opt.state[parameter][key], moment), key


@pytest.mark.parametrize("elements", [1, 7, 8, 9, 31, 33, 255, 1023, 1024, 1025, 4099])
def test_every_length_of_a_lanes_tail_is_the_references_bit_for_bit(elements: int) -> None:
    base = torch.randn(elements + 3)
    for shift in (0, 1, 3):  # memory that starts off a vector's border
        parameter = nn.Parameter(base.clone()[shift : shift + elements])
        opt = paramstate.AdamW([parameter], amsgrad=True)
        parameter.grad = torch.randn(elements + 3)[shift : shift + elements]
        value, grad = parameter.detach().clone(), parameter.grad.clone()
        opt.step()
        moments = {key: torch.zeros(elements) for key in MOMENTS}
        wanted, moments = adam(value, grad, moments, 1, Settings(weight_decay=0.01, decoupled=True, amsgrad=True))
        assert same_bits(parameter, wanted)
        assert all(same_bits(opt.state[parameter][key], moments[key]) for key in MOMENTS)


def test_special_values_are_torchs() -> None:
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-38, 1e-45, 3e38, 1e20, -1e-30])
    for cls, stock in PAIRS.values():
        for decay in (0.0, 0.1):
            value = torch.linspace(-1, 1, 10)
            a, b = nn.Parameter(value.clone()), nn.Parameter(value.clone())
            ours, theirs = cls([a], weight_decay=decay), stock([b], weight_decay=decay)
            a.grad, b.grad = special.clone(), special.clone()
            ours.step()
            theirs.step()
            torch.testing.assert_close(a, b, equal_nan=True)


def test_weight_decay_zero_leaves_an_infinite_value_out_of_the_gradient() -> None:
    parameter = nn.Parameter(torch.tensor([math.inf, 1.0]))
    opt = paramstate.Adam([parameter], weight_decay=0.0)
    parameter.grad = torch.ones(2)
    opt.step()
    assert torch.isfinite(opt.state[parameter]["exp_avg"]).all()


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("value_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moment_dtype", DTYPES, ids=str)
def test_every_mixture_of_value_and_moment_dtypes_is_the_references(
    value_dtype: torch.dtype, moment_dtype: torch.dtype
) -> None:
    """Torch raises for all of these on the host. What is found in `state` is used with the dtype that it has.

    Moments of 16 bits that are narrower than the value are rounded at random: each to one of its two neighbours.
    """
    if torch.float64 in (value_dtype, moment_dtype) and {value_dtype, moment_dtype} & set(DTYPES[2:]):
        pytest.skip("float64 to a 16-bit type may be rounded at once or, as torch does, by way of float32")
    parameter = nn.Parameter(torch.randn(33).to(value_dtype))
    opt = paramstate.AdamW([parameter], lr=0.01, weight_decay=0.1)
    moments = {"exp_avg": torch.randn(33).to(moment_dtype), "exp_avg_sq": torch.randn(33).square().to(moment_dtype)}
    opt.state[parameter] = {"step": torch.tensor(3.0), **{key: m.clone() for key, m in moments.items()}}
    give_gradient(parameter, "m")
    settings = Settings(0.01, weight_decay=0.1, decoupled=True)
    wanted, moments = adam(parameter.detach().clone(), parameter.grad, moments, 4.0, settings)
    opt.step()
    assert same_bits(parameter, wanted)
    for key, moment in moments.items():
        held = opt.state[parameter][key]
        if moment_dtype.itemsize == 2 < value_dtype.itemsize:
            apart = (held.view(torch.int16).int() - moment.view(torch.int16).int()).abs()
            assert apart.max() == 1, key  # codes of neighbours follow each other
        else:
            assert same_bits(held, moment), key


def test_a_bf16_parameter_with_an_fp32_gradient() -> None:
    parameter = nn.Parameter(torch.randn(33).bfloat16())
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.randn(33)
    value, grad = parameter.detach().clone(), parameter.grad.clone()
    opt = paramstate.Adam([parameter], lr=0.01)
    opt.step()
    zeros = {key: torch.zeros(33, dtype=torch.bfloat16) for key in MOMENTS[:2]}
    assert same_bits(parameter, adam(value, grad, zeros, 1, Settings(0.01))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_identical_for_1_2_and_7_threads(dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        draw = torch.Generator().manual_seed(1)
        sizes = [300_001, 65_536, 17, 1, 70_000]
        parameters = [nn.Parameter(torch.randn(n, generator=draw).to(dtype)) for n in sizes]
        opt = paramstate.AdamW(parameters, amsgrad=True, max_grad_norm=0.5)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=draw).to(dtype)
            opt.step()
        results.append([opt.grad_norm, *parameters, *(opt.state[p][key] for p in parameters for key in MOMENTS)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_small_parameters_are_each_stepped_once() -> None:
    parameters = [nn.Parameter(torch.randn(n % 13 + 1)) for n in range(400)]
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    ours, theirs = paramstate.Adam(parameters, lr=0.1), torch.optim.Adam(twins, lr=0.1)
    for a, b in zip(parameters, twins, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    for _ in range(2):
        ours.step()
        theirs.step()
    for a, b in zip(parameters, twins, strict=True):
        torch.testing.assert_close(a, b)


def test_groups_step_with_their_own_settings() -> None:
    values = [torch.randn(4, 5) for _ in range(3)]
    pairs = []
    for cls in (paramstate.Adam, torch.optim.Adam):
        params = [nn.Parameter(v.clone()) for v in values]
        groups = [
            {"params": [params[0]], "lr": 0.1, "betas": (0.5, 0.6)},
            {"params": [params[1]], "weight_decay": 0.2, "maximize": True},
            {"params": [params[2]], "amsgrad": True, "eps": 0.1, "decoupled_weight_decay": True},
        ]
        opt = cls(groups, lr=0.01)
        for seed in range(4):
            for parameter in params:
                parameter.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
            opt.step()
        pairs.append(params)
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)
