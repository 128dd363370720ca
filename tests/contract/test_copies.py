"""Pickles and deep copies of an optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import paramstate
from small_models import Net, assert_same_bits, assert_trains, state_by_name, train

PAIRS = [(paramstate.Adam, torch.optim.Adam), (paramstate.AdamW, torch.optim.AdamW)]
OURS = [ours for ours, _ in PAIRS]
CLASSES = [cls for pair in PAIRS for cls in pair]

Pair = tuple[Net, Any]


def by_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": by_torch_save,
}


class Tagged(paramstate.AdamW):
    """A user's subclass, with attributes of its own."""

    kind = "class attribute"

    def __init__(self, params: Any, tag: str, **options: Any) -> None:
        super().__init__(params, **options)
        self.tag = tag
        self.seen = [torch.ones(2)]
        self._secret = "private"

    @property
    def loud(self) -> str:
        return self.tag.upper()


def trained(cls: type, **options: Any) -> Pair:
    torch.manual_seed(5)
    net = Net()
    opt = cls([{"params": net.first.parameters()}, {"params": net.second.parameters(), "lr": 0.02}], **options)
    opt.add_param_group({"params": net.third.parameters(), "tag": "mine"})
    train(net, opt, range(3))
    return net, opt


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_copy_of_model_and_optimizer_goes_on_alike_and_alone(cls: type, way: str) -> None:
    """A model and its optimizer, copied or pickled together, go on as the originals would, and share nothing."""
    net, opt = trained(cls)
    other, other_opt = WAYS[way]((net, opt))
    assert type(other_opt) is cls
    assert [group.get("tag") for group in other_opt.param_groups] == [None, None, "mine"]
    before = state_by_name(net, opt)
    train(other, other_opt, [10, 11])
    assert_same_bits(state_by_name(net, opt), before)
    train(net, opt, [10, 11])
    assert_same_bits(state_by_name(other, other_opt), state_by_name(net, opt))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_copy_of_the_optimizer_alone_has_parameters_of_its_own(cls: type, way: str) -> None:
    """An optimizer copied alone holds copies of the parameters, under which its own state stands."""
    net, opt = trained(cls)
    other = WAYS[way](opt)
    params = [parameter for group in other.param_groups for parameter in group["params"]]
    assert list(other.state) == params
    assert not set(params) & set(net.parameters())
    for mine, source in zip(params, net.parameters(), strict=True):
        assert torch.equal(mine, source)
        torch.testing.assert_close(other.state[mine], opt.state[source], rtol=0, atol=0)
        mine.grad = torch.ones_like(mine)
    other.step()
    assert float(other.state[params[0]]["step"]) == 4
    assert float(opt.state[net.first.weight]["step"]) == 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_copy_drops_what_torchs_copy_drops(ours: type, theirs: type, way: str) -> None:
    """A copy has no hooks, no `step` that a scheduler wrapped, no flag for scalers and no other private attribute."""
    kept = []
    for cls in (ours, theirs):
        _, opt = trained(cls, fused=True)
        torch.optim.lr_scheduler.StepLR(opt, 3)
        opt.register_step_pre_hook(_hook)
        opt._mine = 3
        opt.found_inf = torch.tensor(1.0)
        other = WAYS[way](opt)
        other.step()
        assert not any(getattr(other, f"_optimizer_{name}_hooks") for name in HOOKS)
        names = ("step", "_step_supports_amp_scaling", "_opt_called", "_mine", "found_inf", "grad_scale")
        kept.append([name for name in names if name in other.__dict__])
    assert kept == [[], []]


HOOKS = [f"{call}_{when}" for call in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")]


def _hook(*_: object) -> None:
    """A hook that pickle could find."""
    raise AssertionError("a copy has no hooks")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_copy_takes_hooks_and_schedulers_of_its_own(cls: type, way: str) -> None:
    """Hooks may be registered on a copy, and a scheduler drives it."""
    net, other = WAYS[way](trained(cls))
    fired: list[str] = []
    other.register_step_post_hook(lambda *_: fired.append("step"))
    other.register_load_state_dict_post_hook(lambda *_: fired.append("load"))
    scheduler = torch.optim.lr_scheduler.StepLR(other, 1)
    other.load_state_dict(other.state_dict())
    train(net, other, [7])
    scheduler.step()
    assert fired == ["load", "step"]
    assert other.param_groups[1]["lr"] == pytest.approx(0.002)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", OURS)
def test_a_copy_has_all_public_attributes(cls: type, way: str) -> None:
    """Every public attribute of an optimizer is in its copy, where torch's copy has only the three of its own."""
    _, opt = trained(cls)
    opt.tag, opt.nested = "mine", {"mean": torch.ones(2)}
    other = WAYS[way](opt)
    public = {name for name in opt.__dict__ if not name.startswith("_")}
    assert {name for name in other.__dict__ if not name.startswith("_")} == public
    assert public >= {"defaults", "state", "param_groups", "tag", "nested"}
    assert other.tag == "mine"
    assert torch.equal(other.nested["mean"], opt.nested["mean"])
    assert other.nested["mean"] is not opt.nested["mean"]


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_a_subclass_has_its_public_attributes(way: str) -> None:
    """The public attributes that a subclass adds are in a copy; its private ones are the subclass's to carry."""
    net, opt = trained(Tagged, tag="mine")
    other_net, other = WAYS[way]((net, opt))
    assert type(other) is Tagged
    assert (other.tag, other.loud, other.kind) == ("mine", "MINE", "class attribute")
    assert torch.equal(other.seen[0], torch.ones(2))
    assert other.seen[0] is not opt.seen[0]
    assert not hasattr(other, "_secret")
    assert_trains(other_net, other)


@pytest.mark.parametrize("way", WAYS)
def test_an_attribute_that_refers_to_a_parameter_refers_to_the_copied_one(way: str) -> None:
    """A parameter that a public attribute refers to is, in the copy, the one that the copy trains."""
    net, opt = trained(paramstate.Adam)
    opt.watched = net.first.weight
    other = WAYS[way](opt)
    assert other.watched is other.param_groups[0]["params"][0]
    assert other.watched is not net.first.weight


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", OURS)
def test_a_copy_has_the_options_names_and_ids(cls: type, way: str) -> None:
    """Names, IDs, `max_grad_norm`, constraints and the policy for replacements are in a copy."""
    net = Net()
    opt = cls(net, max_grad_norm=0.5, constraints={"first.weight": paramstate.Box(-0.1, 0.1)}, on_replace="error")
    train(net, opt, range(2))
    other, other_opt = WAYS[way]((net, opt))
    assert other_opt.ids == opt.ids
    assert [other_opt.name_of(parameter) for parameter in other.parameters()] == list(opt.ids)
    train(other, other_opt, [3])
    assert float(other_opt.grad_norm) > 0.5
    assert float(other.first.weight.detach().abs().max()) <= 0.1 + 1e-7
    if way == "deepcopy":  # which knows the copied model; a pickle is told by rebind
        with pytest.raises(paramstate.ReplacedParameterError, match="on_replace='error'"):
            other.first.weight = nn.Parameter(other.first.weight.detach().clone())


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_of_copies_and_before_the_first_step(cls: type) -> None:
    """An optimizer that never stepped copies, a copy copies, and a copy pickles."""
    net = Net()
    pair = copy.deepcopy((net, cls(net.parameters())))
    other, other_opt = pickle.loads(pickle.dumps(copy.deepcopy(pair)))
    assert not other_opt.state
    assert_trains(other, other_opt)
    assert float(other_opt.state[other.first.weight]["step"]) == 1


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_getstate_holds_torchs_three_and_setstate_takes_them(ours: type, theirs: type) -> None:
    """`__getstate__` has torch's three keys, and `__setstate__` takes the state of a pickled torch optimizer."""
    net, stock = trained(theirs)
    opt = ours.__new__(ours)
    opt.__setstate__(copy.deepcopy(stock.__getstate__()))
    params = [parameter for group in opt.param_groups for parameter in group["params"]]
    for mine, source in zip(params, net.parameters(), strict=True):
        mine.grad = torch.ones_like(mine)
        source.grad = torch.ones_like(source)
    opt.step()
    stock.step()
    for mine, source in zip(params, net.parameters(), strict=True):
        torch.testing.assert_close(mine, source, rtol=1e-5, atol=1e-7)
    assert opt.__getstate__().keys() >= stock.__getstate__().keys()
