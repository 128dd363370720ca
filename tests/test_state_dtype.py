"""State of a declared dtype: what is kept in what, for which parameters, and how it is declared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import paramstate
from paramstate import Adam, AdamW, UnknownParameterError, select
from paramstate.precision.blockwise import BlockwiseTensor
from paramstate.precision.state_dtype import kept_as
from precision_models import FLOATS, KINDS, MOMENTS, floats, kept, step, two_layers
from small_models import give_gradient

EXPECTED = {torch.float32: "float32", torch.bfloat16: "bfloat16", "8bit": "8bit"}


@pytest.mark.parametrize("optimizer_class", [Adam, AdamW])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_kept_in_what_is_declared_whatever_the_value(
    optimizer_class: type[Adam], amsgrad: bool, dtype: torch.dtype, kind: Any
) -> None:
    model = two_layers(dtype)
    opt = optimizer_class(model, amsgrad=amsgrad, state_dtype=kind)
    step(model, opt, 1, 2)
    value = str(dtype).removeprefix("torch.")
    for key in MOMENTS[: 3 if amsgrad else 2]:
        assert kept(opt, "0.weight", key) == EXPECTED.get(kind, value)
        expected_small = "float32" if kind == "8bit" else EXPECTED.get(kind, value)
        assert kept(opt, "0.bias", key) == expected_small
    assert ("max_exp_avg_sq" in opt.state_of("0.weight")) is amsgrad
    assert model[0].weight.dtype == dtype
    assert opt.state_of("0.weight")["step"].dtype == torch.float32


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_training_goes_where_the_same_with_float_state_goes(kind: Any, dtype: torch.dtype, amsgrad: bool) -> None:
    ends = []
    for state_dtype in (torch.float32, kind):
        model = two_layers(dtype)
        opt = AdamW(model, lr=1e-2, amsgrad=amsgrad, state_dtype=state_dtype)
        step(model, opt, *range(20))
        ends.append(model[0].weight.detach().double())
    start = two_layers(dtype)[0].weight.detach().double()
    assert (ends[0] - ends[1]).norm() < 0.07 * (ends[0] - start).norm()


def gpt2_like(hidden: int = 192, layers: int = 4, tokens: int = 2000, places: int = 256) -> list[nn.Parameter]:
    """Zeros in the shapes of a small GPT-2, in the proportions of the real one."""
    block = [
        (hidden,), (hidden,), (hidden, 3 * hidden), (3 * hidden,), (hidden, hidden), (hidden,),
        (hidden,), (hidden,), (hidden, 4 * hidden), (4 * hidden,), (4 * hidden, hidden), (hidden,),
    ]  # fmt: skip
    shapes = [(tokens, hidden), (places, hidden), *block * layers, (hidden,), (hidden,)]
    return [nn.Parameter(torch.zeros(shape)) for shape in shapes]


@pytest.mark.parametrize(("kind", "most"), [(None, 8.0), ("float32", 8.0), ("bfloat16", 4.0), ("8bit", 2.1)])
def test_the_bytes_of_a_language_model_s_moments_are_those_that_are_promised(kind: Any, most: float) -> None:
    params = gpt2_like()
    opt = Adam(params, state_dtype=kind)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    held = sum(opt.state[param][key].nbytes for param in params for key in MOMENTS[:2])
    assert held <= most * sum(param.numel() for param in params)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 64), "8bit"),
        ((16, 4, 8, 8), "8bit"),
        ((4096, 1), "8bit"),
        ((63, 65), "float32"),
        ((10_000,), "float32"),
        ((), "float32"),
        ((0, 9), "float32"),
    ],
)
def test_small_parameters_and_vectors_stay_in_float32(shape: tuple[int, ...], expected: str) -> None:
    param = nn.Parameter(torch.zeros(shape))
    opt = AdamW([("p", param)], state_dtype="8bit")
    param.grad = torch.ones(shape)
    opt.step()
    assert kept(opt, "p") == kept(opt, "p", "exp_avg_sq") == expected


def test_a_shard_counts_as_the_whole_parameter_that_it_is_of() -> None:
    """One process of two holds less than 4,096 elements of a parameter that has more: the rule is the whole's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        large, small = (distribute_tensor(torch.ones(64, n), mesh, [Shard(0)]) for n in (96, 63))
        assert large.to_local().numel() < 4096 <= large.numel()
        assert [kept_as("8bit", shard) for shard in (large, small)] == ["8bit", "float32"]
        assert kept_as("8bit", distribute_tensor(torch.ones(9000), mesh, [Shard(0)])) == "float32"
    finally:
        dist.destroy_process_group()


def test_a_mapping_declares_for_patterns_modules_selections_and_names() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)])
    opt = AdamW(
        model,
        state_dtype={
            "1.*": "bfloat16",
            model[2]: "8bit",
            select(model, "3.weight"): torch.bfloat16,
            model[4].weight: "8bit",
            "4.bias": "bfloat16",
        },
    )
    step(model, opt, 1)
    assert [kept(opt, f"{number}.weight") for number in range(5)] == ["float32", "bfloat16", "8bit", "bfloat16", "8bit"]
    assert [kept(opt, f"{number}.bias") for number in range(5)] == [
        "float32", "bfloat16", "float32", "float32", "bfloat16"
    ]  # fmt: skip


def test_a_later_declaration_wins_and_none_goes_back_to_the_constructor_s() -> None:
    model = two_layers()
    opt = AdamW(model, state_dtype="8bit")
    step(model, opt, 1)
    opt.set_state_dtype("0.weight", torch.bfloat16)
    assert [kept(opt, "0.weight"), kept(opt, "1.weight")] == ["bfloat16", "8bit"]
    step(model, opt, 2)
    assert [kept(opt, "0.weight"), kept(opt, "1.weight")] == ["bfloat16", "8bit"]
    opt.set_state_dtype(model, None)
    assert [kept(opt, "0.weight"), kept(opt, "1.weight")] == ["8bit", "8bit"]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_is_converted_at_once_there_and_back(amsgrad: bool) -> None:
    model = two_layers()
    opt = AdamW(model, amsgrad=amsgrad)
    step(model, opt, 1, 2, 3)
    keys = MOMENTS[: 3 if amsgrad else 2]
    before = {key: floats(opt.state_of("0.weight")[key]) for key in keys}
    opt.set_state_dtype("*.weight", "8bit")
    assert {kept(opt, "0.weight", key) for key in keys} == {"8bit"}
    opt.set_state_dtype("0.weight", torch.float32)
    for key in keys:
        after = opt.state_of("0.weight")[key]
        assert type(after) is torch.Tensor
        assert after.dtype == torch.float32
        assert torch.equal(after, BlockwiseTensor.of(before[key], signed=key == "exp_avg").dense())
    opt.set_state_dtype("0.weight", None)
    step(model, opt, 4)
    assert kept(opt, "0.weight") == "float32", "nothing is narrowed where nothing is declared"


def test_a_parameter_that_is_added_later_follows_what_holds_for_all() -> None:
    first, second = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(80, 64))
    opt = AdamW([first], state_dtype="8bit")
    opt.add_param_group({"params": [second]})
    for param in (first, second):
        give_gradient(param, "a")
    opt.step()
    assert isinstance(opt.state[second]["exp_avg"], BlockwiseTensor)


def test_materialized_state_is_what_the_first_step_would_make() -> None:
    model = two_layers(torch.bfloat16)
    opt = AdamW(model, state_dtype="8bit", rounding="kahan", amsgrad=True)
    opt.materialize_state()
    fresh = {key: (type(held), held.dtype, held.shape) for key, held in opt.state_of("0.weight").items()}
    opt.reset(model)
    step(model, opt, 1)
    assert fresh == {key: (type(held), held.dtype, held.shape) for key, held in opt.state_of("0.weight").items()}
    assert fresh["compensation"][1] == torch.bfloat16


@pytest.mark.parametrize("wrong", ["int8", torch.float16, torch.float64, 8, torch.uint8, ["8bit"]])
def test_a_dtype_that_moments_are_not_kept_in_is_refused_with_those_that_they_are(wrong: Any) -> None:
    model = two_layers()
    with pytest.raises(ValueError, match=r"torch\.float32, torch\.bfloat16 or '8bit'"):
        AdamW(model, state_dtype=wrong)
    with pytest.raises(ValueError, match=r"torch\.float32, torch\.bfloat16 or '8bit'"):
        AdamW(model, state_dtype={"0.weight": wrong})
    opt = AdamW(model)
    with pytest.raises(ValueError, match="state_dtype must be"):
        opt.set_state_dtype("0.weight", wrong)


def test_nothing_is_declared_where_one_parameter_is_not_known() -> None:
    model = two_layers()
    opt = AdamW(model)
    step(model, opt, 1)
    with pytest.raises(UnknownParameterError, match=r"0\.wieght"):
        opt.set_state_dtype(["0.weight", "0.wieght"], "8bit")
    step(model, opt, 2)
    assert kept(opt, "0.weight") == "float32"
    with pytest.raises(UnknownParameterError, match=r"0\.wieght"):
        AdamW(model, state_dtype={"0.wieght": "8bit"})


def test_complex_parameters_keep_complex_moments_and_are_refused_where_they_are_named() -> None:
    param = nn.Parameter(torch.zeros(64, 64, dtype=torch.complex64))
    opt = AdamW([("spectrum", param)], state_dtype="8bit")
    param.grad = torch.ones_like(param)
    opt.step()
    assert opt.state[param]["exp_avg"].dtype == torch.complex64
    with pytest.raises(paramstate.ConstraintError, match=r"'spectrum' is torch\.complex64"):
        opt.set_state_dtype("spectrum", "8bit")
