"""What goes into a file comes out of it, bit for bit: dtypes, shapes, rows, what was declared, and plain data."""

from __future__ import annotations

import copy
import math
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor, nn

from paramstate import AdamW, Box, MaxNorm, UnitNorm, load, save
from paramstate.checkpoint.loading import state_dict_at
from paramstate.precision.blockwise import BlockwiseTensor
from reference import same_bits

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8]
EIGHTS = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [*FLOATS, *INTEGERS, *EIGHTS, torch.bool, torch.complex64, torch.complex128]
SHAPES = [(), (0,), (1,), (5,), (3, 0), (0, 4), (3, 4), (2, 1, 3), (64, 80)]


def alike(a: Any, b: Any) -> bool:
    """Whether two trees of plain data and tensors are the same, kinds and bits."""
    if isinstance(a, Tensor):
        parts = (a.codes, a.scales) if isinstance(a, BlockwiseTensor) else (a,)
        others = (b.codes, b.scales) if isinstance(b, BlockwiseTensor) else (b,)
        return type(a) is type(b) and all(
            x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y) for x, y in zip(parts, others, strict=True)
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return bool(a == b)


def bits(tensor: Tensor) -> list[int]:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).tolist()


def through_a_file(opt: AdamW) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "opt")
        save(opt, path)
        return copy.deepcopy(state_dict_at(path))


# ---- tensors and plain data of clients


def of_any_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=draw).bool()
    size = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=draw).view(dtype).reshape(shape)


tensors = st.builds(of_any_bits, st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.integers(0, 2**32))
keys = st.text(max_size=4) | st.sampled_from(["$tensor", "$", "a/b", "a%2Fb", "codes"]) | st.integers() | st.none()
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors
plain = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(st.tuples(keys, keys), inner, max_size=2)
    ),
    max_leaves=8,
)


@given(state=plain, option=plain, extra=plain, key=st.text(min_size=1, max_size=6))
@example(state={"$tensor": "x"}, option=(1, [2, (3,)]), extra=-0.0, key="$tensor")
@example(state={1: {"1": torch.ones(2)}, "1": torch.zeros(1)}, option=[], extra=(), key="mine/")
def test_what_clients_keep_comes_back_as_it_was(state: Any, option: Any, extra: Any, key: str) -> None:
    net = nn.Linear(2, 1)
    opt = AdamW(net)
    opt.materialize_state()
    opt.state[net.weight].setdefault(key, state)
    opt.param_groups[0].setdefault(key, option)
    opt.register_state_dict_post_hook(lambda _, state_dict: {key: extra, **state_dict})
    opt.state[key] = {"of": extra}
    assert alike(through_a_file(opt), opt.state_dict(compact=True))


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda tensor: tensor.t(), id="transposed"),
        pytest.param(lambda tensor: tensor[:, ::2], id="strided"),
        pytest.param(lambda tensor: tensor[0].expand(3, 4), id="expanded"),
        pytest.param(lambda tensor: torch.complex(tensor, -tensor).conj(), id="conjugated"),
        pytest.param(lambda tensor: torch.complex(tensor, -tensor).conj().imag, id="negated"),
        pytest.param(lambda tensor: torch.complex(tensor, tensor)[:1, :1].conj().imag, id="one negated"),
        pytest.param(lambda tensor: tensor[:1, 1:2].expand(1, 2)[:, ::2], id="one of a stride"),
        pytest.param(nn.Parameter, id="parameter"),
    ],
)
def test_a_view_comes_back_as_an_ordinary_tensor_of_the_same_values(view: Any) -> None:
    net = nn.Linear(2, 1)
    opt = AdamW(net)
    opt.materialize_state()
    seen = view(torch.randn(3, 4))
    opt.state[net.weight]["mine"] = {"one": seen, "again": seen}
    mine = through_a_file(opt)["state"][0]["mine"]
    for back in mine.values():
        assert type(back) is Tensor
        assert back.is_contiguous()
        assert same_bits(torch.view_as_real(back) if back.is_complex() else back, _plain(seen))
    assert mine["one"].data_ptr() != mine["again"].data_ptr()


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous()


# ---- what an optimizer keeps


@st.composite
def optimizers(draw: st.DrawFn) -> tuple[nn.ParameterDict, AdamW, dict[str, Any]]:
    """A trained optimizer with whatever can be declared, and the arguments that are not part of a file."""
    dtype = draw(st.sampled_from([*FLOATS, torch.complex64]))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    values = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    net = nn.ParameterDict({f"p{number}": nn.Parameter(value) for number, value in enumerate(values)})
    short = dtype in (torch.bfloat16, torch.float16)
    chosen = {
        "amsgrad": draw(st.booleans()),
        "rounding": draw(st.sampled_from(["nearest", "stochastic", "kahan"] if short else ["nearest"])),
        "rounding_seed": draw(st.integers(0, 5)),
    }
    kinds = [None] if dtype.is_complex else [None, torch.float32, torch.bfloat16, "8bit"]
    opt = AdamW(net, lr=draw(st.floats(1e-6, 1e-1)), state_dtype=draw(st.sampled_from(kinds)), **chosen)
    stepped(net, opt, draw(st.integers(0, 2)))
    for name, param in net.items():
        if not dtype.is_complex:
            declare(draw, opt, name, param)
    stepped(net, opt, draw(st.integers(0, 2)))
    return net, opt, chosen


def declare(draw: st.DrawFn, opt: AdamW, name: str, param: Tensor) -> None:
    constraint = draw(st.sampled_from([None, Box(-1.0, math.inf), Box(min=torch.zeros(())), MaxNorm(2.0), UnitNorm()]))
    if constraint is not None:
        opt.constrain(name, constraint)
    if param.dim() and param.shape[0] > 1 and draw(st.booleans()):
        opt.freeze_rows(name, [0])
    if param.dim() and param.shape[0] > 1 and draw(st.booleans()):
        with opt.edit_rows() as rows:
            rows.reset(name, [1])
    if draw(st.booleans()):
        opt.freeze(name)


def stepped(net: nn.ParameterDict, opt: AdamW, times: int) -> None:
    for time in range(times):
        for name, param in net.items():
            if param.requires_grad:
                draw = torch.Generator().manual_seed(zlib.crc32(f"{name}:{time}".encode()))
                param.grad = torch.randn(param.shape, generator=draw).to(param.dtype)
        opt.step()


@given(made=optimizers())
@settings(max_examples=150)
def test_an_optimizer_goes_on_from_a_file_with_the_same_bits(
    made: tuple[nn.ParameterDict, AdamW, dict[str, Any]],
) -> None:
    net, opt, chosen = made
    other = nn.ParameterDict({name: nn.Parameter(net[name].detach().clone()) for name in reversed(list(net))})
    fresh = AdamW(other, **chosen)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "opt")
        save(opt, path)
        assert alike(copy.deepcopy(state_dict_at(path)), opt.state_dict(compact=True))
        report = load(fresh, path)
        assert sorted(report.loaded) == sorted(net)
        # Its own order again, that of the file.
        assert sorted_state(fresh) == sorted_state(opt)
    for after in range(2):
        for name in net:
            assert alike(net[name].data, other[name].data), f"{name}, {after} steps after the load"
            assert alike(dict(opt.state.get(net[name], {})), dict(fresh.state.get(other[name], {})))
            assert net[name].requires_grad == other[name].requires_grad
        stepped(net, opt, 1)
        stepped(other, fresh, 1)


def sorted_state(opt: AdamW) -> dict[str, Any]:
    """What was declared, by name, as text that can be compared."""
    ours: Mapping[str, Any] = opt.state_dict()["paramstate"]
    return {
        names[0]: repr((id, traits))
        for names, id, traits in zip(ours["names"], ours["ids"], ours["traits"], strict=True)
    }
