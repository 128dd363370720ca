"""1.1 Constructors."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramstate
from paramstate import _core
from small_models import Net, train

BOTH = pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param(paramstate.Adam, torch.optim.Adam, id="Adam"),
        pytest.param(paramstate.AdamW, torch.optim.AdamW, id="AdamW"),
    ],
)
OURS = pytest.mark.parametrize("ours", [paramstate.Adam, paramstate.AdamW])
HYPERPARAMETERS = ["lr", "betas", "eps", "weight_decay", "amsgrad"]
FLAGS = ["maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"]
EXTRAS = {
    "model",
    "store",
    "max_grad_norm",
    "constraints",
    "on_replace",
    "state_dtype",
    "rounding",
    "rounding_seed",
}


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]


def with_every_extra(ours: type[paramstate.Adam]) -> paramstate.Adam:
    net = Net()
    return ours(
        net.parameters(),
        model=net,
        store=paramstate.AdamW(net).store,
        max_grad_norm=1.0,
        constraints=paramstate.Box(-1.0, 1.0),
        on_replace="reset",
        state_dtype="8bit",
        rounding="stochastic",
        rounding_seed=7,
    )


# ---- signatures -----------------------------------------------------------------------------------------------------


def by_kind(cls: type, kind: Any) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(cls).parameters.items() if p.kind is kind}


@BOTH
def test_arguments_by_position_are_torchs(ours: type, theirs: type) -> None:
    """Names, order and defaults of the positional arguments, up to `amsgrad`, are torch's."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert list(by_kind(ours, kind).items()) == list(by_kind(theirs, kind).items())
    assert list(by_kind(ours, kind)) == ["params", *HYPERPARAMETERS]


@BOTH
def test_arguments_by_keyword_are_torchs_and_our_own(ours: type, theirs: type) -> None:
    """Torch's keyword-only arguments are there with its defaults; our own are keyword-only, too, and optional."""
    mine, stock = (by_kind(cls, inspect.Parameter.KEYWORD_ONLY) for cls in (ours, theirs))
    assert {name: mine[name] for name in stock} == stock
    assert mine.keys() - stock.keys() == EXTRAS
    assert inspect.Parameter.empty not in mine.values()


@BOTH
def test_there_are_no_arguments_of_another_kind(ours: type, theirs: type) -> None:
    """No `*args` and no `**kwargs`: a misspelt option is a TypeError."""
    for cls in (ours, theirs):
        kinds = {p.kind for p in inspect.signature(cls).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
        with pytest.raises(TypeError, match="weight_decai"):
            cls(params(), weight_decai=0.1)


@BOTH
def test_options_given_by_position_arrive_where_torch_puts_them(ours: type, theirs: type) -> None:
    """Five options by position make the groups that torch makes of them; a sixth is a TypeError in both."""
    given = (1e-2, (0.8, 0.9), 1e-7, 0.3, True)
    assert ours(params(), *given).defaults == theirs(params(), *given).defaults
    for cls in (ours, theirs):
        with pytest.raises(TypeError, match="positional argument"):
            cls(params(), *given, False)


def test_only_adam_takes_decoupled_weight_decay() -> None:
    """`Adam(decoupled_weight_decay=True)` is AdamW bit for bit; AdamW itself has no such argument, as in torch."""
    nets = []
    for cls, options in ((paramstate.Adam, {"decoupled_weight_decay": True}), (paramstate.AdamW, {})):
        torch.manual_seed(3)
        net = Net()
        train(net, cls(net.parameters(), weight_decay=0.1, **options), range(3))
        nets.append(net)
    for one, two in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, two)
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        with pytest.raises(TypeError, match="decoupled_weight_decay"):
            cls(params(), decoupled_weight_decay=True)


@OURS
def test_fused_is_found_by_inspection_and_can_be_passed(ours: type[paramstate.Adam]) -> None:
    """Code that looks for `fused` in the signature before it passes it, as nanoGPT's does, finds it."""
    extra = {"fused": True} if "fused" in inspect.signature(ours).parameters else {}
    assert ours(params(), lr=1e-3, betas=(0.9, 0.95), **extra).defaults["fused"] is True


# ---- errors ---------------------------------------------------------------------------------------------------------


def error(cls: type, options: dict[str, Any], given: Callable[[], Any] = params) -> Exception:
    with pytest.raises((KeyError, RuntimeError, TypeError, ValueError)) as caught:
        cls(given(), **options)
    return caught.value


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
    ({"lr": torch.tensor(-0.5)}, ValueError, "Invalid learning rate: -0.5"),
    ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
    ({"lr": torch.ones(0)}, ValueError, "Tensor lr must be 1-element"),
    (
        {"lr": torch.tensor(0.1), "foreach": True},
        ValueError,
        "lr as a Tensor is not supported for capturable=False and foreach=True",
    ),
    ({"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08"),
    ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    ({"betas": (-0.1, 0.9)}, ValueError, "Invalid beta parameter at index 0: -0.1"),
    ({"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
    ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
    ({"betas": (0.9, torch.tensor(0.9))}, ValueError, "betas must be either both floats or both Tensors"),
    ({"betas": (torch.tensor(0.9), 0.9)}, ValueError, "betas must be either both floats or both Tensors"),
    ({"betas": (0, 0.9)}, ValueError, "betas must be either both floats or both Tensors"),
    (
        {"betas": (torch.tensor(0.9), torch.tensor(0.9)), "foreach": True},
        ValueError,
        "betas[0] as a Tensor is not supported for capturable=False and foreach=True",
    ),
    ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
    ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together."),
]


def by_options(wrong: list[tuple[dict[str, Any], type[Exception], str]]) -> pytest.MarkDecorator:
    """One test for each row, called after its options."""
    return pytest.mark.parametrize(("options", "kind", "text"), wrong, ids=[str(options) for options, *_ in wrong])


@by_options(WRONG)
@BOTH
def test_wrong_options_raise_torchs_texts(
    ours: type, theirs: type, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    """Each wrong option raises torch's class of error with torch's text, word for word."""
    for cls in (ours, theirs):
        caught = error(cls, options)
        assert type(caught) is kind
        assert str(caught) == text


@pytest.mark.parametrize(
    "betas",
    [(torch.ones(2) / 2, torch.tensor(0.9)), (torch.tensor(0.9), torch.ones(2) / 2)],
    ids=["the first", "the second"],
)
@BOTH
def test_tensor_betas_of_several_elements_raise_as_in_torch(
    ours: type, theirs: type, betas: tuple[Tensor, ...]
) -> None:
    """Betas of two elements raise what torch raises of them."""
    one, two = (error(cls, {"betas": betas}) for cls in (ours, theirs))
    assert (type(one), str(one)) == (type(two), str(two))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda: torch.ones(2), id="a tensor"),
        pytest.param(list, id="an empty list"),
        pytest.param(lambda: [1.0], id="a number in a list"),
        pytest.param(lambda: None, id="None"),
        pytest.param(lambda: [torch.ones(2, requires_grad=True) * 2], id="a tensor that is no leaf"),
        pytest.param(lambda: [{"params": params()}, {"lr": 0.1}], id="a group without parameters"),
    ],
)
@BOTH
def test_wrong_parameters_raise_as_in_torch(ours: type, theirs: type, given: Callable[[], Any]) -> None:
    """What is no collection of parameters raises torch's class of error with torch's text."""
    one, two = (error(cls, {}, given) for cls in (ours, theirs))
    assert type(one) is type(two)
    assert str(one) == str(two)


@pytest.mark.parametrize("flags", [{"fused": True, "foreach": True}, {"fused": True, "differentiable": True}])
@BOTH
def test_options_are_checked_in_torchs_order(ours: type, theirs: type, flags: dict[str, bool]) -> None:
    """A wrong number is told before wrong parameters, and these before flags that exclude each other."""
    for cls in (ours, theirs):
        with pytest.raises(ValueError, match="Invalid learning rate"):
            cls([], lr=-1.0, **flags)
        with pytest.raises(ValueError, match="empty parameter list"):
            cls([], **flags)


@OURS
def test_a_constructor_that_raised_leaves_nothing_behind(ours: type[paramstate.Adam]) -> None:
    """After an error the model can be given to another optimizer, and replacing its weights asks nobody."""
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="cannot be `True` together") as half_built:  # its traceback holds the object
        ours(module, fused=True, foreach=True)
    opt = ours(module, lr=0.1)
    module.weight = nn.Parameter(torch.ones(2, 2))
    del half_built
    module.weight.grad = torch.ones(2, 2)
    opt.step()
    torch.testing.assert_close(opt.state[module.weight]["exp_avg"], torch.full((2, 2), 0.1))


@by_options(
    [
        ({"max_grad_norm": -1.0}, ValueError, "Invalid max_grad_norm value: -1.0"),
        ({"max_grad_norm": float("nan")}, ValueError, "Invalid max_grad_norm value: nan"),
        ({"on_replace": "forget"}, ValueError, "on_replace"),
        ({"state_dtype": torch.int8}, ValueError, "state_dtype must be torch.float32.*got torch.int8"),
        ({"rounding": "up"}, ValueError, "rounding must be one of 'nearest', 'stochastic', 'kahan', got 'up'"),
        ({"rounding_seed": -1}, ValueError, "rounding_seed must be an integer from 0 .*got -1"),
        ({"constraints": {"absent": paramstate.Box(0.0, 1.0)}}, paramstate.UnknownParameterError, "absent"),
    ]
)
@OURS
def test_wrong_options_of_our_own_are_named(
    ours: type[paramstate.Adam], options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    """A wrong value of an option of our own, or a wrong name of a constraint, raises and says it."""
    with pytest.raises(kind, match=text):
        ours(nn.Linear(2, 2), **options)


# ---- tensors as lr and betas ----------------------------------------------------------------------------------------


@OURS
def test_a_tensor_lr_is_one_object_in_all_groups_and_in_the_defaults(ours: type[paramstate.Adam]) -> None:
    """A tensor lr is neither copied nor converted: every group and `defaults` hold the very object that was given."""
    lr = torch.tensor([[0.1]])
    first, second = params()
    opt = ours([{"params": [first]}, {"params": [second]}], lr=lr)
    opt.add_param_group({"params": params()})
    assert all(group["lr"] is lr for group in opt.param_groups)
    assert opt.defaults["lr"] is lr


@BOTH
def test_a_scheduler_fills_a_tensor_lr_in_place(ours: type, theirs: type) -> None:
    """A scheduler writes into the tensor lr, which stays the object that was given, and the step reads it there."""
    found = []
    for cls in (ours, theirs):
        param = nn.Parameter(torch.zeros(2))
        lr = torch.tensor(0.1)
        opt = cls([param], lr=lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.5)
        for _ in range(3):
            param.grad = torch.ones(2)
            opt.step()
            scheduler.step()
        assert opt.param_groups[0]["lr"] is lr
        assert float(lr) == pytest.approx(0.0125)
        found.append(param)
    torch.testing.assert_close(*found)


@OURS
def test_a_tensor_lr_put_into_a_foreach_group_is_read(ours: type[paramstate.Adam]) -> None:
    """On the host `foreach` chooses no kernel, so a tensor lr set later steps where torch's step raises."""
    param = nn.Parameter(torch.zeros(2))
    opt = ours([param], lr=0.5, foreach=True, weight_decay=0.0)
    opt.param_groups[0]["lr"] = torch.tensor(0.1)
    param.grad = torch.ones(2)
    opt.step()
    torch.testing.assert_close(param.detach(), torch.full((2,), -0.1))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
@BOTH
def test_tensor_betas_are_squeezed_to_0_dim_and_kept_in_a_tuple(
    ours: type, theirs: type, shape: tuple[int, ...]
) -> None:
    """Tensor betas of any 1-element shape, in a list or a tuple, become a tuple of 0-dim tensors, as in torch."""
    betas = [torch.full(shape, 0.8), torch.full((1,), 0.9)]
    for cls in (ours, theirs):
        opt = cls(params(), betas=betas)
        for held in (opt.defaults["betas"], opt.param_groups[0]["betas"]):
            assert type(held) is tuple
            assert [beta.shape for beta in held] == [(), ()]
            assert [float(beta) for beta in held] == pytest.approx([0.8, 0.9])


@BOTH
def test_betas_given_as_a_list_become_a_tuple(ours: type, theirs: type) -> None:
    """Two floats in a list are kept as a tuple."""
    for cls in (ours, theirs):
        assert cls(params(), betas=[0.5, 0.75]).param_groups[0]["betas"] == (0.5, 0.75)


# ---- the flag of the gradient scaler --------------------------------------------------------------------------------


def flag(opt: torch.optim.Optimizer) -> Any:
    return getattr(opt, "_step_supports_amp_scaling", None)


@pytest.mark.parametrize("fused", [None, False, True])
@BOTH
def test_only_fused_true_lets_a_scaler_leave_unscaling_to_the_step(
    ours: type, theirs: type, fused: bool | None
) -> None:
    """`_step_supports_amp_scaling` is set by `fused=True`, and there is no such attribute otherwise."""
    for cls in (ours, theirs):
        assert flag(cls(params(), fused=fused)) is (True if fused else None)


@BOTH
def test_fused_in_a_group_or_in_a_checkpoint_does_not_set_the_scalers_flag(ours: type, theirs: type) -> None:
    """A group's own `fused=True` and a loaded fused checkpoint leave the flag alone, though the group is fused then."""
    for cls in (ours, theirs):
        in_group = cls([{"params": params(), "fused": True}])
        loaded = cls(params())
        loaded.load_state_dict(cls(params(), fused=True).state_dict())
        for opt in (in_group, loaded):
            assert opt.param_groups[0]["fused"] is True
            assert flag(opt) is None


@BOTH
def test_a_copy_of_a_fused_optimizer_has_the_scalers_flag_as_torchs_has(ours: type, theirs: type) -> None:
    """Deep copies and pickles lose the flag, as torch's do: a scaler then unscales before the step, which is right."""
    for cls in (ours, theirs):
        opt = cls(params(), fused=True)
        assert flag(copy.deepcopy(opt)) is None
        assert flag(pickle.loads(pickle.dumps(opt))) is None


# ---- defaults, groups, state ----------------------------------------------------------------------------------------


@BOTH
def test_defaults_are_torchs(ours: type, theirs: type) -> None:
    """`defaults` has torch's keys in torch's order, with torch's values."""
    assert list(ours(params()).defaults.items()) == list(theirs(params()).defaults.items())
    assert list(ours(params()).defaults) == HYPERPARAMETERS + FLAGS


@BOTH
def test_our_own_options_are_in_no_defaults_and_in_no_group(ours: type, theirs: type) -> None:
    """With every option of our own set, `defaults` and groups have torch's keys, and public attributes are torch's."""
    opt, stock = with_every_extra(ours), theirs(params())
    assert list(opt.defaults) == list(stock.defaults)
    assert list(opt.param_groups[0]) == list(stock.param_groups[0])
    public = [{key for key in vars(one) if not key.startswith("_")} for one in (opt, stock)]
    assert public[0] == public[1]


@BOTH
def test_names_travel_in_torchs_own_key_alone(ours: type, theirs: type) -> None:
    """Only an optimizer that was given names has `param_names` in its groups; one given the model is among them."""
    net = nn.Linear(2, 2)
    for cls in (ours, theirs):
        assert "param_names" not in cls(net.parameters()).param_groups[0]
        assert cls(net.named_parameters()).param_groups[0]["param_names"] == ["weight", "bias"]
    assert ours(net).param_groups[0]["param_names"] == ["weight", "bias"]


@OURS
def test_our_own_options_survive_copies(ours: type[paramstate.Adam]) -> None:
    """`max_grad_norm`, constraints and the policy for replaced tensors are in copies, pickles and copies of copies."""
    opt = with_every_extra(ours)
    once = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    for twin in (*once, *(copy.deepcopy(twin) for twin in once)):
        [first, *_] = twin.param_groups[0]["params"]
        first.grad = torch.full_like(first, 4.0)
        with torch.no_grad():
            first.fill_(3.0)
        twin.step()
        assert float(twin.grad_norm) > 1
        assert float(twin.state[first]["exp_avg"].norm()) == pytest.approx(0.1, rel=1e-4), "clipped to 1"
        assert float(first.detach().max()) == 1, "constrained"
        assert twin._on_replace == "reset"


@OURS
def test_the_state_is_an_empty_defaultdict_until_the_first_step(ours: type[paramstate.Adam]) -> None:
    """`state` is a real `defaultdict(dict)` that holds nothing before the first step, and may be assigned."""
    opt = with_every_extra(ours)
    assert type(opt.state) is defaultdict
    assert opt.state.default_factory is dict
    assert not opt.state
    opt.state = other = defaultdict(dict)
    for param in opt.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    opt.step()
    assert opt.state is other
    assert set(other) == set(opt.param_groups[0]["params"])
    assert all(type(tensor) is Tensor for entry in other.values() for tensor in entry.values())


# ---- classes --------------------------------------------------------------------------------------------------------


@BOTH
def test_the_classes_are_subclasses_of_torchs_under_its_names(ours: type, theirs: type) -> None:
    """`isinstance` with torch's class holds, `AdamW` is an `Adam` in both, and the names are torch's."""
    assert issubclass(ours, theirs)
    assert issubclass(ours, paramstate.Adam)
    assert (ours.__name__, ours.__qualname__) == (theirs.__name__, theirs.__qualname__)
    assert repr(ours(params())) == repr(theirs(params()))


@BOTH
def test_no_compiled_class_is_among_the_bases(ours: type, theirs: type) -> None:
    """All bases are Python classes, and the object's layout is that of torch's, so `__class__` can be assigned."""
    assert not set(ours.__mro__) & {cls for cls in vars(_core).values() if isinstance(cls, type)}
    assert (ours.__basicsize__, ours.__dictoffset__) == (theirs.__basicsize__, theirs.__dictoffset__)


@OURS
def test_the_class_can_be_assigned_to_a_dynamic_subclass(ours: type[paramstate.Adam]) -> None:
    """An optimizer whose `__class__` becomes a subclass made at run time steps on with its state."""
    net = Net()
    opt = ours(net)
    train(net, opt, [0])
    opt.__class__ = type("Strategy" + ours.__name__, (ours,), {"is_wrapped": True})
    train(net, opt, [1])
    assert opt.is_wrapped
    assert float(opt.state_of("first.weight")["step"]) == 2


@OURS
def test_a_wrapper_that_takes_over_class_and_attributes_is_an_optimizer(ours: type[paramstate.Adam]) -> None:
    """A wrapper may derive its class from the optimizer's and share its `__dict__`, as Fabric's wrapper does."""

    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.__dict__ = dict(vars(optimizer))
            self.__class__ = type("Wrapped" + type(optimizer).__name__, (Wrapper, type(optimizer)), {})
            self._optimizer = optimizer

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            return self._optimizer.step(closure)

    net = Net()
    wrapped = Wrapper(ours(net))
    assert isinstance(wrapped, ours)
    assert isinstance(wrapped, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(wrapped, step_size=1)
    train(net, wrapped, [0])
    scheduler.step()
    assert wrapped.state is wrapped._optimizer.state
    assert wrapped._optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert len(wrapped.state_dict()["state"]) == len(list(net.parameters()))


@BOTH
def test_a_subclass_that_overrides_step_runs_the_hooks_as_in_torch(ours: type, theirs: type) -> None:
    """A step runs each hook once; in a subclass that calls `super().step()` as often as torch's own does."""
    counts = []
    for cls in (ours, theirs):
        for step in ({}, {"step": lambda self, closure=None, base=cls: base.step(self, closure)}):
            [param, _] = given = params()
            opt = type("Derived", (cls,), step)(given)
            fired: list[int] = []
            opt.register_step_post_hook(lambda *_, fired=fired: fired.append(1))
            param.grad = torch.ones(2)
            opt.step()
            assert float(opt.state[param]["step"]) == 1
            counts.append(len(fired))
    assert counts[:2] == counts[2:]
    assert counts[0] == 1


@OURS
def test_methods_that_others_probe_for_are_absent(ours: type[paramstate.Adam]) -> None:
    """No `train` or `eval`, which the HF Trainer would call, and no `grad_scaler` argument of `step`."""
    opt = ours(params())
    assert not hasattr(opt, "train")
    assert not hasattr(opt, "eval")
    assert "grad_scaler" not in inspect.signature(opt.step).parameters
    assert "set_to_none" in inspect.signature(opt.zero_grad).parameters
