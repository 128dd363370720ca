"""Burn: clip a parameter after the step and keep Adam's state, or carry the state to new IDs

There, ``model.w = Param::from_tensor(clip(w))`` mints a new ID, and the moments stay behind under the old one. The same
line is run here; that it loses the state in Burn itself is shown by ``scripts/burn``, whose output docs/systems/burn.md
quotes.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fsrs import FSRS, ceiling, fsrs_adam, fsrs_bounds, largest_error
from paramstate import Adam, AdamW, Box, ConstraintError, StateShapeError, clip_
from reference import same_bits
from small_models import Net, assert_same_bits, give_gradient, state_by_name, train

Clip = Callable[[nn.Module, Adam, int], None]


class Trainer(nn.Module):
    """The trainer's 21 values."""

    def __init__(self, values: list[float] = FSRS["w0"]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


def replaced(module: nn.Module, _opt: Adam, relearning_steps: int) -> None:
    """Burn's line."""
    module.w = nn.Parameter(fsrs_bounds(relearning_steps)(module.w.detach()))


def in_place(module: nn.Module, _opt: Adam, relearning_steps: int) -> None:
    assert clip_(module.w, fsrs_bounds(relearning_steps)) is module.w


def through_the_optimizer(module: nn.Module, opt: Adam, relearning_steps: int) -> None:
    opt.replace_("w", fsrs_bounds(relearning_steps)(module.w.detach()))


def declared(_module: nn.Module, opt: Adam, relearning_steps: int) -> None:
    """Once is enough: from there on the step does it."""
    opt.constrain("w", fsrs_bounds(relearning_steps))


clips = pytest.mark.parametrize("clip", [replaced, in_place, through_the_optimizer, declared], ids=lambda f: f.__name__)


def fsrs_optimizer(module: nn.Module) -> Adam:
    opt = fsrs_adam(Adam, module.w)
    opt.rebind(module)
    return opt


def step(module: nn.Module, opt: torch.optim.Optimizer, grad: list[float]) -> None:
    module.w.grad = torch.tensor(grad)
    opt.step()


# ---- the task itself -------------------------------------------------------------------------------------------------


@clips
def test_two_steps_of_the_trainer_end_where_it_says(clip: Clip) -> None:
    """Two Adam steps of a real trainer with its clip after each end within 1e-6 of its own values, in four ways."""
    module = Trainer()
    opt = fsrs_optimizer(module)
    for number in (1, 2):
        step(module, opt, FSRS[f"grad{number}"])
        clip(module, opt, 1)
        assert largest_error(module.w, FSRS[f"w{number}"]) <= 1e-6
    assert float(opt.state[module.w]["step"]) == 2


def test_the_state_lost_is_an_error_of_five_hundredths() -> None:
    """With the moments lost, as in Burn, the second step ends 5.4e-2 from the trainer's values."""
    module = Trainer()
    step(module, fsrs_adam(torch.optim.Adam, module.w), FSRS["grad1"])
    step(module, fsrs_adam(torch.optim.Adam, module.w), FSRS["grad2"])
    assert largest_error(module.w, FSRS["w2"]) == pytest.approx(5.4e-2, rel=0.02)


@clips
def test_the_bounds_that_depend_on_other_values_bind(clip: Clip) -> None:
    """The real bounds, two of which depend on three other values, bind alike in each way of clipping."""
    case = FSRS["binding_case"]
    module = Trainer(case["values"])
    clip(module, fsrs_optimizer(module), case["n"])
    assert largest_error(module.w, case["clipped"]) <= 1e-6
    assert float(module.w[17]) == pytest.approx(ceiling(module.w.detach(), case["n"]), abs=1e-6)


def test_a_declared_function_is_the_clip_after_each_step() -> None:
    """A constraint declared as a function is, bit for bit, the callback of clip_ after every step."""
    case = FSRS["binding_case"]
    declared_once, by_hand = Trainer(case["values"]), Trainer(case["values"])
    clip_(by_hand.w, fsrs_bounds(case["n"]))
    opt = fsrs_optimizer(declared_once)
    opt.constrain("w", fsrs_bounds(case["n"]))
    other = fsrs_optimizer(by_hand)
    for number in (1, 2, 1):
        step(declared_once, opt, FSRS[f"grad{number}"])
        step(by_hand, other, FSRS[f"grad{number}"])
        before = by_hand.w.detach().clone()
        clip_(by_hand.w, fsrs_bounds(case["n"]))
        assert not torch.equal(before, by_hand.w), "nothing binds"
        assert_same_bits(state_by_name(declared_once, opt), state_by_name(by_hand, other))


@clips
def test_twenty_clips_leave_one_record(clip: Clip) -> None:
    """Twenty clips leave one parameter, one ID and one state: nothing is orphaned under an old identity."""
    module = Trainer()
    opt = fsrs_optimizer(module)
    step(module, opt, FSRS["grad1"])
    clip(module, opt, 1)
    identity, size = opt.id_of("w"), len(pickle.dumps(opt.state_dict()))
    for number in range(20):
        clip(module, opt, 1)
        step(module, opt, FSRS[f"grad{number % 2 + 1}"])
    assert opt.id_of(module.w) == identity
    assert len(opt.state) == len(opt.param_groups[0]["params"]) == 1
    assert len(pickle.dumps(opt.state_dict())) == size


# ---- section A: the state goes where the parameter goes --------------------------------------------------------------


def built_anew(net: nn.Module) -> nn.Module:
    other = Net(("third", "second", "first"))
    other.load_state_dict(net.state_dict())
    return other


def test_the_state_is_carried_to_objects_that_were_made_anew() -> None:
    """State goes by one call to a model that was built anew in another order, under the IDs that it had."""
    net = Net()
    opt = AdamW(net, lr=0.1)
    train(net, opt, range(3))
    ids, before = opt.ids, state_by_name(net, opt)
    other = built_anew(net)
    by_rebind, by_store = opt, AdamW(other, lr=0.1, store=opt.store)
    assert by_store.ids == ids
    assert_same_bits(state_by_name(other, by_store), before)
    by_rebind.rebind(other)
    assert by_rebind.ids == ids
    assert_same_bits(state_by_name(other, by_rebind), before)


def test_an_id_outlives_clip_replacement_conversion_rename_and_load() -> None:
    """A parameter's ID is the same after clip, replacement, conversion, rename, and a load elsewhere."""
    net = Net()
    opt = AdamW(net, lr=0.1)
    train(net, opt, range(2))
    identity = opt.id_of("first.weight")
    clip_(net.first.weight, -0.5, 0.5)
    assert opt.id_of(net.first.weight) == identity
    net.first.weight = nn.Parameter(net.first.weight.detach() / 2)
    assert opt.id_of(net.first.weight) == identity
    net.double()
    assert opt.id_of(net.first.weight) == identity
    opt.rename({"first.weight": "first.kernel"})
    assert opt.id_of("first.kernel") == identity
    loaded = AdamW(built_anew(net).double(), lr=0.1)
    loaded.rename({"first.weight": "first.kernel"})
    loaded.load_state_dict(opt.state_dict())
    assert loaded.id_of("first.kernel") == identity
    assert float(loaded.state_of("first.kernel")["step"]) == 2


# ---- section B: rows -------------------------------------------------------------------------------------------------


def test_a_value_that_is_added_steps_as_a_fresh_one() -> None:
    """A 22nd value that is appended mid-training moves by the learning rate; the 21 step as if it were not there."""
    module, alone = Trainer(), Trainer()
    opt, other = fsrs_optimizer(module), fsrs_optimizer(alone)
    for trainer, optimizer in ((module, opt), (alone, other)):
        step(trainer, optimizer, FSRS["grad1"])
        step(trainer, optimizer, FSRS["grad2"])
    with opt.edit_rows() as rows:
        rows.append("w", torch.tensor([1.0]))
    step(module, opt, [*FSRS["grad1"], 0.3])
    step(alone, other, FSRS["grad1"])
    assert same_bits(module.w[:21], alone.w)
    assert float(module.w[21]) == pytest.approx(1.0 - FSRS["optimizer"]["lr"], abs=1e-6)


def test_values_that_are_frozen_stay_and_age_not() -> None:
    """Frozen values of the trainer stay bit for bit while the others are trained, and go on from their own state."""
    module = Trainer()
    opt = fsrs_optimizer(module)
    step(module, opt, FSRS["grad1"])
    before = module.w.detach().clone()
    opt.freeze_rows("w", [17, 18])
    step(module, opt, FSRS["grad2"])
    assert same_bits(module.w[17:19], before[17:19])
    assert not (module.w[:17] == before[:17]).any()
    opt.unfreeze_rows("w", [17, 18])
    assert opt.row_steps("w").tolist() == [1 if row in {17, 18} else 2 for row in range(21)]
    step(module, opt, FSRS["grad2"])
    assert largest_error(module.w[17:19], FSRS["w2"][17:19]) <= 1e-6, "their second step, one step late"


# ---- section C: bounds and freezing ----------------------------------------------------------------------------------


def test_one_sided_and_wrong_bounds() -> None:
    """A bound may be one-sided; one that is reversed, NaN, or of another shape is refused by name, with its values."""
    net = Net()
    opt = AdamW(net)
    clip_(net.first.weight, min=0.0)
    assert float(net.first.weight.detach().min()) == 0.0
    for low, high, text in (
        (1.0, 0.5, r"'first\.weight'.*1\.0.*0\.5"),
        (float("nan"), None, r"'first\.weight'.*[Nn]a[Nn]"),
        (torch.zeros(5), None, r"'first\.weight'.*\[5\].*\[2, 3\]"),
    ):
        with pytest.raises(ConstraintError, match=text):
            clip_(net.first.weight, low, high)
    with pytest.raises(StateShapeError, match=r"'first\.weight'"):
        opt.replace_("first.weight", torch.zeros(3, 3), state="keep")


@pytest.mark.parametrize("zero", [False, True], ids=["kept", "zeroed"])
def test_momentum_at_a_bound(zero: bool) -> None:
    """Momentum that is kept holds a value at its bound long after the gradient turned; told to, the bound zeroes it."""
    weight = nn.Parameter(torch.zeros(1))
    opt = Adam([("w", weight)], lr=0.1, constraints=Box(max=0.5, zero_exp_avg=zero))
    for _ in range(20):
        weight.grad = torch.tensor([-1.0])
        opt.step()
    assert opt.at_bounds() == {"w": 1}
    held = 0
    while opt.at_bounds() == {"w": 1}:
        weight.grad = torch.tensor([1.0])
        opt.step()
        held += 1
    assert held == 1 if zero else held > 5


def test_freeze_train_another_set_unfreeze() -> None:
    """A frozen parameter is not clipped, stepped, or aged, and goes on afterwards as if nothing had happened."""
    net = Net()
    opt = AdamW(net, lr=0.1, weight_decay=0.1)
    train(net, opt, range(3))
    straight, straight_opt = copy.deepcopy((net, opt))
    before = state_by_name(net, opt)
    opt.freeze("first.weight")
    opt.constrain("first.weight", Box(-1e-3, 1e-3))
    for seed in range(3, 6):
        give_gradient(net.second.weight, f"second.weight:{seed}")
        opt.step()
    assert_same_bits(state_by_name(net, opt), before, ["first.weight"])
    opt.constrain("first.weight", None)
    opt.unfreeze("first.weight")
    for model, optimizer in ((net, opt), (straight, straight_opt)):
        optimizer.zero_grad()
        give_gradient(model.first.weight, "next")
        optimizer.step()
    assert_same_bits(state_by_name(net, opt), state_by_name(straight, straight_opt), ["first.weight"])
