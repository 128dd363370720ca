"""Where torch's own arithmetic steps, what it cannot honour about precision is refused by name, before anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from paramstate import AdamW, UnsupportedError
from precision_models import KINDS, SHORT, kept, step, two_layers
from reference import same_bits
from small_models import give_gradient, set_gradients


def by_capturable(model: nn.Sequential, **options: Any) -> AdamW:
    return AdamW(model, capturable=True, **options)


def by_differentiable(model: nn.Sequential, **options: Any) -> AdamW:
    return AdamW(model, differentiable=True, **options)


def by_a_group_of_its_own(model: nn.Sequential, **options: Any) -> AdamW:
    groups = [{"params": model[0], "foreach": False, "differentiable": True}, {"params": model[1]}]
    return AdamW(groups, model=model, **options)


class Gathering(AdamW):
    """One that looks at each group's parameters itself, and so is stepped by torch."""

    def _init_group(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's."""
        return super()._init_group(*args, **kwargs)


MAKES = [by_capturable, by_differentiable, by_a_group_of_its_own]
DECLARED: dict[str, tuple[dict[str, Any], torch.dtype, str]] = {
    "8bit": ({"state_dtype": "8bit"}, torch.float32, "state_dtype='8bit' cannot be honoured"),
    "bfloat16": ({"state_dtype": torch.bfloat16}, torch.float32, "state_dtype='bfloat16' cannot be honoured"),
    "float32": ({"state_dtype": "float32"}, torch.bfloat16, "state_dtype='float32' cannot be honoured"),
    "some": ({"state_dtype": {"0.weight": "8bit"}}, torch.float32, "state_dtype='8bit' cannot be honoured"),
    "stochastic": ({"rounding": "stochastic"}, torch.bfloat16, "rounding='stochastic' cannot be honoured"),
    "kahan": ({"rounding": "kahan"}, torch.float16, "rounding='kahan' cannot be honoured"),
}


@pytest.mark.filterwarnings("ignore:.*(capturable|capture)")
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("declared", DECLARED)
def test_a_step_that_is_torch_s_refuses_by_name_and_writes_nothing(declared: str, make: Callable[..., AdamW]) -> None:
    options, dtype, message = DECLARED[declared]
    model = two_layers(dtype)
    opt = make(model, **options)
    before = [param.detach().clone() for param in model.parameters()]
    set_gradients(model, 1)
    with pytest.raises(UnsupportedError, match=rf"parameter '0\.\w+' is stepped by torch .*{message}; .*(step|call)"):
        opt.step()
    assert all(same_bits(param.detach(), old) for param, old in zip(model.parameters(), before, strict=True))
    assert all(not held for held in opt.state.values())


@pytest.mark.parametrize("declared", DECLARED)
def test_a_compiled_step_refuses_by_name(declared: str) -> None:
    options, dtype, message = DECLARED[declared]
    model = two_layers(dtype)
    opt = AdamW(model, **options)
    before = model[0].weight.detach().clone()
    set_gradients(model, 1)
    torch.compiler.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(opt.step, backend="eager")()
    assert same_bits(model[0].weight.detach(), before)


def test_compact_state_without_a_policy_is_not_stepped_as_if_it_were_floats() -> None:
    model = two_layers()
    opt = AdamW(model, state_dtype={"0.weight": "8bit"})
    step(model, opt, 1)
    opt.param_groups[0]["differentiable"] = True
    codes = opt.state_of("0.weight")["exp_avg"].codes.clone()
    set_gradients(model, 2)
    with pytest.raises(UnsupportedError, match=r"'0\.weight' .*set_state_dtype\('0\.weight', None\)"):
        opt.step()
    assert torch.equal(opt.state_of("0.weight")["exp_avg"].codes, codes)


def test_what_the_message_says_helps() -> None:
    model = two_layers()
    opt = AdamW(model)
    opt.set_state_dtype("0.weight", "8bit")
    step(model, opt, 1)
    opt.param_groups[0]["differentiable"] = True
    set_gradients(model, 2)
    with pytest.raises(UnsupportedError, match=r"call opt\.set_state_dtype"):
        opt.step()
    opt.set_state_dtype("0.weight", None)
    opt.step()
    assert kept(opt, "0.weight") == "float32"
    assert opt.state_of("0.weight")["step"] == 2


@pytest.mark.parametrize("declared", ["8bit", "bfloat16"])
def test_another_device_refuses_by_name_before_the_host_is_written(declared: str) -> None:
    options = DECLARED[declared][0]
    host, meta = nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 64, device="meta"))
    opt = AdamW([("host", host), ("far", meta)], **options)
    host.grad, meta.grad = torch.ones_like(host), torch.ones_like(meta)
    with pytest.raises(UnsupportedError, match=r"'far' is stepped by torch \(device meta"):
        opt.step()
    assert bool((host == 1).all())
    assert not opt.state.get(host)
    opt.set_state_dtype("far", None)
    del opt.param_groups[0]["params"][1]
    opt.step()
    assert kept(opt, "host") == declared


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("dtype", SHORT)
def test_rounding_of_short_values_on_another_device_is_refused_and_of_wide_ones_means_nothing(
    dtype: torch.dtype, rounding: Any
) -> None:
    for value, refused in ((dtype, True), (torch.float32, False)):
        meta = nn.Parameter(torch.ones(4, 4, device="meta", dtype=value))
        opt = AdamW([("far", meta)], rounding=rounding)
        meta.grad = torch.ones_like(meta)
        if refused:
            with pytest.raises(UnsupportedError, match=f"rounding='{rounding}' cannot be honoured"):
                opt.step()
        else:
            opt.step()
            assert opt.state_of("far")["step"] == 1


def test_a_dtype_that_is_torch_s_own_choice_is_no_obstacle() -> None:
    for dtype, kind in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        model = two_layers(dtype)
        opt = Gathering(model, state_dtype=kind)
        step(model, opt, 1)
        assert kept(opt, "0.weight") == kind


class Sum(nn.Module):
    """A parameter whose gradient may be sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 64, sparse=True)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_sparse_gradients_are_refused_as_by_torch(kind: Any) -> None:
    model = Sum()
    opt = AdamW(model, state_dtype=kind)
    before = model.table.weight.detach().clone()
    model.table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises((RuntimeError, UnsupportedError), match=r"sparse|'table\.weight'"):
        opt.step()
    assert same_bits(model.table.weight.detach(), before)


def test_complex_parameters_step_as_ever_beside_the_others() -> None:
    model = two_layers(torch.bfloat16)
    spectrum = nn.Parameter(torch.ones(64, 64, dtype=torch.complex64))
    opt = AdamW([*model.named_parameters(), ("spectrum", spectrum)], state_dtype="8bit", rounding="stochastic")
    spectrum.grad = torch.full_like(spectrum, 1j)
    step(model, opt, 1)
    twin = nn.Parameter(torch.ones(64, 64, dtype=torch.complex64))
    stock = torch.optim.AdamW([twin])
    twin.grad = torch.full_like(twin, 1j)
    stock.step()
    assert torch.allclose(spectrum, twin)
    assert kept(opt, "0.weight") == "8bit"


def test_a_subclass_that_gathers_by_itself_is_refused_too() -> None:
    model = two_layers()
    opt = Gathering(model, state_dtype="8bit")
    give_gradient(model[0].weight, "a")
    before: Tensor = model[0].weight.detach().clone()
    with pytest.raises(UnsupportedError, match="state_dtype='8bit' cannot be honoured"):
        opt.step()
    assert same_bits(model[0].weight.detach(), before)


def test_a_sharded_parameter_refuses_by_name_and_is_not_written() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = nn.Parameter(distribute_tensor(torch.ones(64, 64), mesh, [Shard(0)]))
        opt = AdamW([("weight", weight)], state_dtype="8bit")
        weight.grad = torch.ones_like(weight)
        with pytest.raises(UnsupportedError, match=r"'weight' is stepped by torch \(device cpu, DTensor.*'8bit'"):
            opt.step()
        assert bool((weight.to_local() == 1).all())
    finally:
        dist.destroy_process_group()
