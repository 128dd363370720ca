"""torch.compile, tracing, modes and transforms.

Where something looks into every operation the kernels are out of place, and the step is torch's own. What that step
cannot honour raises, and names the feature.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import lr_scheduler
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import paramstate
from reference import same_bits
from small_models import Net, set_gradients, state_by_name

Optimizer = torch.optim.Optimizer
PAIRS = [(paramstate.Adam, torch.optim.Adam), (paramstate.AdamW, torch.optim.AdamW)]
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def begin(cls: type[Optimizer], **options: Any) -> tuple[Net, Any]:
    torch.manual_seed(5)
    net = Net()
    return net, cls(net.parameters(), **{"lr": 0.1, **options})


# ---- torch.compile --------------------------------------------------------------------------------------------------


def training_step(net: nn.Module, opt: Optimizer) -> Callable[[torch.Tensor], torch.Tensor]:
    def train(x: torch.Tensor) -> torch.Tensor:
        opt.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        opt.step()
        return loss.detach()

    return train


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}], ids=str)
def test_a_compiled_step_is_torchs(ours: type, theirs: type, options: dict[str, Any]) -> None:
    """`torch.compile(opt.step)` gives the values and moments of torch's compiled step, for every choice of loop."""
    runs = []
    for cls in (ours, theirs):
        torch._dynamo.reset()
        net, opt = begin(cls, **options)
        step = torch.compile(opt.step, backend="eager")
        for seed in range(3):
            set_gradients(net, seed)
            step()
        runs.append(state_by_name(net, opt))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo's own, with torch's class as well
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_wholly_compiled_training_step_is_torchs(ours: type, theirs: type) -> None:
    """A compiled function of `zero_grad`, forward, backward and step trains as torch's class does in it."""
    runs = []
    for cls in (ours, theirs):
        torch._dynamo.reset()
        net, opt = begin(cls)
        compiled = torch.compile(training_step(net, opt), backend="eager")
        losses = [float(compiled(X)) for _ in range(4)]
        runs.append((losses, state_by_name(net, opt)))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-7)
    assert runs[0][0][0] > runs[0][0][-1]


def test_compiled_and_eager_steps_take_turns() -> None:
    """An optimizer may be stepped compiled and eagerly in turns: moments and counts are shared."""
    net, opt = begin(paramstate.AdamW)
    twin, stock = begin(torch.optim.AdamW)
    compiled = torch.compile(opt.step, backend="eager")
    for seed in range(6):
        set_gradients(net, seed)
        set_gradients(twin, seed)
        (compiled if seed % 2 else opt.step)()
        stock.step()
    # A compiled step computes the bias correction in float32, which is torch's way: hence the tolerance.
    torch.testing.assert_close(state_by_name(net, opt), state_by_name(twin, stock), rtol=1e-4, atol=1e-5)
    assert float(opt.state[net.first.weight]["step"]) == 6


def test_a_scheduled_tensor_rate_does_not_compile_anew() -> None:
    """With a tensor rate a scheduler changes it at every step, and the step is compiled once, as torch's is."""
    counts, runs = [], []
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        net, opt = begin(cls, lr=torch.tensor(0.1))
        scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
        step = torch.compile(opt.step, backend=counter)
        for seed in range(5):
            set_gradients(net, seed)
            step()
            scheduler.step()
        counts.append(counter.frame_count)
        runs.append(state_by_name(net, opt))
    assert counts[0] == counts[1]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-7)


def replace_unseen_and_step(model: Net, opt: paramstate.Adam, step: Callable[[], Any]) -> None:
    """Only the step itself can notice: no hook sees the replacement, and `zero_grad` is called before it."""
    opt.zero_grad()
    state = opt.state_of("first.weight")
    model.first._parameters["weight"] = nn.Parameter(torch.ones(2, 3))
    step()
    assert opt.state[model.first.weight] is state


def known(net: nn.Module) -> tuple[paramstate.AdamW, Callable[[], Any]]:
    opt = paramstate.AdamW(net, lr=0.1)
    return opt, torch.compile(opt.step, backend="eager")


def test_a_compiled_step_follows_a_replaced_parameter_and_gives_the_eager_numbers() -> None:
    """A parameter that was replaced where no hook sees it is followed by a compiled step as by an eager one."""
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    opt, step = known(net)
    other = paramstate.AdamW(twin, lr=0.1)
    for seed in range(4):
        for model, stepper, take in ((net, opt, step), (twin, other, other.step)):
            if seed == 2:
                replace_unseen_and_step(model, stepper, take)
            set_gradients(model, seed)
            take()
    torch.testing.assert_close(state_by_name(net, opt), state_by_name(twin, other))
    assert not torch.equal(net.first.weight.detach(), torch.ones(2, 3))
    assert float(opt.state_of("first.weight")["step"]) == 4


def test_a_compiled_step_raises_for_a_parameter_that_left_the_model() -> None:
    """A compiled step raises and names a parameter that has left the model, and changes no other."""
    net = Net()
    _opt, step = known(net)
    set_gradients(net, 0)
    step()
    before = net.second.weight.detach().clone()
    del net.first.weight
    with pytest.raises(paramstate.ReplacedParameterError, match=r"first\.weight"):
        step()
    assert torch.equal(net.second.weight.detach(), before)


# ---- what torch's step cannot honour --------------------------------------------------------------------------------

OWN_FEATURES: list[tuple[dict[str, Any], str]] = [
    ({"constraints": paramstate.Box(0.0, 1.0)}, "constraints"),
    ({"max_grad_norm": 1.0}, "max_grad_norm"),
]


class Recorder(TorchDispatchMode):
    """A dispatch mode that writes down every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def compiled_step(opt: paramstate.Adam) -> None:
    torch.compile(opt.step, backend="eager")()


def step_in_a_mode(opt: paramstate.Adam) -> None:
    with Recorder():
        opt.step()


def step_in_a_transform(opt: paramstate.Adam) -> None:
    def inside(x: torch.Tensor) -> torch.Tensor:
        opt.step()
        return x

    torch.vmap(inside)(torch.ones(2))


def plain_step(opt: paramstate.Adam) -> None:
    opt.step()


WAYS: list[tuple[Callable[[paramstate.Adam], None], dict[str, Any]]] = [
    (compiled_step, {}),
    (step_in_a_mode, {}),
    (step_in_a_transform, {}),
    (plain_step, {"differentiable": True}),
    (plain_step, {"capturable": True}),
]


@pytest.mark.parametrize(("options", "feature"), OWN_FEATURES, ids=["constraints", "max_grad_norm"])
@pytest.mark.parametrize(
    ("way", "asked"), WAYS, ids=["compiled", "dispatch mode", "transform", "differentiable", "capturable"]
)
def test_what_torchs_step_cannot_honour_is_named(
    way: Callable[[paramstate.Adam], None], asked: dict[str, Any], options: dict[str, Any], feature: str
) -> None:
    """Compiled, traced, differentiable and capturable steps refuse constraints and `max_grad_norm` by name."""
    module = nn.Linear(3, 2)
    opt = paramstate.Adam(module, **options, **asked)
    before = module.weight.detach().clone()
    module.weight.grad = torch.ones(2, 3)
    with pytest.raises(Exception, match=feature) as caught:
        way(opt)
    assert isinstance(caught.value, paramstate.UnsupportedError)
    assert torch.equal(module.weight.detach(), before)
    assert not opt.state


# ---- modes, transforms, tracing -------------------------------------------------------------------------------------


def test_a_dispatch_mode_sees_torchs_operations() -> None:
    """Under a dispatch mode the step runs exactly the operations of torch's, and gives its numbers."""
    seen, runs = [], []
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        net, opt = begin(cls)
        for seed in range(2):
            set_gradients(net, seed)
            with Recorder() as recorder:
                opt.step()
        seen.append(recorder.operations)
        runs.append(state_by_name(net, opt))
    assert seen[0] == seen[1] != []
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-7)


def test_a_step_inside_a_transform_is_torchs() -> None:
    """A step taken inside a functorch transform, over tensors from outside it, is torch's step."""
    runs = []
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        net, opt = begin(cls)
        set_gradients(net, 0)
        step_in_a_transform(opt)
        set_gradients(net, 1)
        opt.step()
        runs.append(state_by_name(net, opt))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-7)


def test_a_step_over_fake_tensors_makes_fake_state() -> None:
    """Under FakeTensorMode no memory is read: the step makes state of the right shapes, all of it fake."""
    with FakeTensorMode():
        module = nn.Linear(3, 2)
        opt = paramstate.AdamW(module, fused=True)
        for _ in range(2):
            module(torch.ones(1, 3)).sum().backward()
            opt.step()
    for parameter in module.parameters():
        assert isinstance(parameter, FakeTensor)
        state = opt.state[parameter]
        assert all(isinstance(tensor, FakeTensor) for tensor in state.values())
        assert state["exp_avg"].shape == parameter.shape


def test_fake_parameters_outside_their_mode_are_left_to_torch() -> None:
    """Fake parameters that are stepped after their mode has ended are not read as memory: torch's error comes."""
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        with FakeTensorMode():
            parameter = nn.Parameter(torch.ones(3))
            opt = cls([parameter], fused=True)
            parameter.grad = torch.ones(3)
        with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
            opt.step()


def test_a_traced_training_step_is_the_graph_of_torchs() -> None:
    """`make_fx` over a training step records the operations that it records of torch's class."""
    graphs = []
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        net, opt = begin(cls)
        graph = make_fx(training_step(net, opt))(X).graph
        graphs.append([str(node.target) for node in graph.nodes if node.op == "call_function"])
    assert graphs[0] == graphs[1]
    assert any("addcdiv" in target for target in graphs[0])


def fake(mode: FakeTensorMode, tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, mode.from_tensor, tree)


def traced_with_stand_ins(net: nn.Module, opt: Optimizer, tree: dict[str, Any]) -> list[str]:
    """The operations of a step over fake parameters, gradients and state in the place of the real ones."""
    from torch.optim._stateless import swap_in_optimizer_params_and_state

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        params = {name: mode.from_tensor(parameter) for name, parameter in net.named_parameters()}
        grads = {name: mode.from_tensor(parameter.grad) for name, parameter in net.named_parameters()}
        state = fake(mode, tree)

    def step(params: dict[str, Any], grads: dict[str, Any], state: dict[str, Any]) -> Any:
        with swap_in_optimizer_params_and_state(opt, params, state):
            for name, parameter in params.items():
                parameter.grad = grads[name]
            opt.step()
        return params, state

    graph = make_fx(step)(params, grads, state).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("known_by", ["parameters", "model"])
@pytest.mark.parametrize("on_replace", ["keep", "reset", "error"])
def test_a_step_traced_over_stand_ins_leaves_the_optimizer_as_it_was(known_by: str, on_replace: Any) -> None:
    """`swap_in_optimizer_params_and_state` traces a step with torch's graph, and IDs, names and state stay."""
    pytest.importorskip("torch.optim._stateless", reason="this release of torch has no swap_in_optimizer_params_...")
    twin, stock = begin(torch.optim.AdamW, fused=True)
    set_gradients(twin, 0)
    stock.step()
    net = Net()
    given = net if known_by == "model" else net.parameters()
    opt = paramstate.AdamW(given, lr=0.1, fused=True, on_replace=on_replace)
    set_gradients(net, 0)
    opt.step()
    if known_by == "model":
        opt.rename({"first.weight": "called otherwise"})
    names = [(opt.id_of(parameter), opt.name_of(parameter)) for parameter in net.parameters()]
    before = state_by_name(net, opt)
    operations = traced_with_stand_ins(net, opt, opt.state_dict())
    assert operations == traced_with_stand_ins(twin, stock, stock.state_dict())
    assert any("_fused_adamw_" in operation for operation in operations)
    assert [(opt.id_of(parameter), opt.name_of(parameter)) for parameter in net.parameters()] == names
    for name, held in state_by_name(net, opt).items():
        assert all(same_bits(tensor, before[name][key]) for key, tensor in held.items())
    opt.step()
    assert {float(state["step"]) for state in opt.state.values()} == {2.0}


def test_a_step_over_real_stand_ins_writes_those_alone() -> None:
    """Swapped-in real tensors are stepped, with the swapped-in state; the optimizer's own stay as they were."""
    stateless = pytest.importorskip("torch.optim._stateless", reason="this release of torch has no such swap")
    runs = []
    for cls in (paramstate.AdamW, torch.optim.AdamW):
        net, opt = begin(cls)
        set_gradients(net, 0)
        opt.step()
        before = state_by_name(net, opt)
        params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        for name, parameter in net.named_parameters():
            params[name].grad = parameter.grad.clone()
        state = copy.deepcopy(opt.state_dict())
        with stateless.swap_in_optimizer_params_and_state(opt, params, state):
            opt.step()
        after = state_by_name(net, opt)
        assert all(same_bits(t, before[name][key]) for name, held in after.items() for key, t in held.items())
        opt.step()
        runs.append((params, state["state"], state_by_name(net, opt)))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-7)
