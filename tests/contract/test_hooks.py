"""Hooks, profiling, closures and the forms in which a step is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import paramstate
from small_models import Net, give_gradient, set_gradients

PAIRS = [(paramstate.Adam, torch.optim.Adam), (paramstate.AdamW, torch.optim.AdamW)]
OURS = [ours for ours, _ in PAIRS]
CLASSES = [cls for pair in PAIRS for cls in pair]

Recorder = Callable[..., Any]


def recorder(fired: list[str], name: str) -> Recorder:
    """A hook that notes that it was called, and changes nothing."""
    return lambda *_: fired.append(name)


@pytest.fixture
def global_hooks() -> Iterator[list[str]]:
    """What the two hooks that every optimizer has in common have noted."""
    fired: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(recorder(fired, "global pre")),
        register_optimizer_step_post_hook(recorder(fired, "global post")),
    ]
    yield fired
    for handle in handles:
        handle.remove()


def stepping(cls: type[torch.optim.Optimizer], **options: Any) -> tuple[nn.Parameter, Any]:
    """A parameter with a gradient, and its optimizer."""
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return parameter, cls([parameter], lr=0.1, **options)


@pytest.mark.parametrize("cls", CLASSES)
def test_step_hooks_fire_once_and_in_torchs_order(cls: type, global_hooks: list[str]) -> None:
    """A step fires global pre-, local pre-, local post- and global post-hooks, in that order and once each."""
    _, opt = stepping(cls)
    opt.register_step_pre_hook(recorder(global_hooks, "pre"))
    opt.register_step_pre_hook(recorder(global_hooks, "second pre"))
    opt.register_step_post_hook(recorder(global_hooks, "post"))
    opt.step()
    assert global_hooks == ["global pre", "pre", "second pre", "post", "global post"]


@pytest.mark.parametrize("cls", OURS)
def test_a_removed_hook_is_not_called(cls: type) -> None:
    """The handle that registering a hook returns removes it."""
    fired: list[str] = []
    _, opt = stepping(cls)
    handles = [
        register(recorder(fired, "any")) for register in (opt.register_step_pre_hook, opt.register_step_post_hook)
    ]
    opt.step()
    for handle in handles:
        handle.remove()
    opt.step()
    assert fired == ["any", "any"]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_subclasses_fire_hooks_as_often_as_subclasses_of_torchs_class(ours: type, theirs: type) -> None:
    """Subclasses, also ones given by assigning `__class__`, fire hooks as often as they do on torch's class."""

    def counts(base: type) -> list[int]:
        plain, overriding = type("Plain", (base,), {}), type("Overriding", (base,), {})
        overriding.step = lambda self, closure=None: base.step(self, closure)
        found = []
        for cls in (plain, overriding, base):
            fired: list[str] = []
            _, opt = stepping(base if cls is plain else cls)
            opt.__class__ = cls  # as Lightning does
            opt.register_step_pre_hook(recorder(fired, "pre"))
            opt.step()
            found.append(len(fired))
        return found

    assert counts(ours) == counts(theirs)


@pytest.mark.parametrize("cls", OURS)
def test_hooks_are_given_the_optimizer_and_the_arguments_of_the_call(cls: type) -> None:
    """A hook is called with the optimizer, the positional and the keyword arguments of the step."""
    _, opt = stepping(cls)
    seen: list[tuple[Any, Any, Any]] = []
    for register in (opt.register_step_pre_hook, opt.register_step_post_hook):
        register(lambda optimizer, args, kwargs: seen.append((optimizer, args, kwargs)))
    opt.step(closure=None)
    opt.step(None)
    assert seen == [(opt, (opt,), {"closure": None})] * 2 + [(opt, (opt, None), {})] * 2


@pytest.mark.parametrize("cls", CLASSES)
def test_a_pre_hook_may_give_the_step_other_arguments(cls: type) -> None:
    """A step takes the arguments that a pre-hook returns in place of its own."""
    _, opt = stepping(cls)
    opt.register_step_pre_hook(lambda optimizer, _args, kwargs: ((optimizer, lambda: 7.0), kwargs))
    assert opt.step() == 7.0


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_pre_hook_that_returns_anything_else_is_refused(ours: type, theirs: type) -> None:
    """A pre-hook that returns neither None nor a pair is refused with torch's text, and nothing is stepped."""
    texts = []
    for cls in (ours, theirs):
        parameter, opt = stepping(cls)
        opt.register_step_pre_hook(lambda *_: "neither")
        with pytest.raises(RuntimeError, match="must return None or a tuple") as caught:
            opt.step()
        texts.append(str(caught.value).partition("must return")[2])
        assert parameter.tolist() == [1.0, 1.0]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("cls", OURS)
def test_what_a_pre_hook_changes_is_what_the_step_uses(cls: type) -> None:
    """A gradient, an option or a value that a pre-hook changes is the one the step uses."""
    parameter, opt = stepping(cls, weight_decay=0.0)

    def change(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameter.grad = -torch.ones(2)
        optimizer.param_groups[0]["lr"] = 0.5
        parameter.data = torch.zeros(2)

    opt.register_step_pre_hook(change)
    opt.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 0.5))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_a_pre_hook_may_make_the_state_itself_in_bfloat16(ours: type, theirs: type) -> None:
    """State that a pre-hook makes before the first step, in any dtype, is taken as it is: torchtitan's way."""
    moments = []
    for cls, dtype in ((ours, torch.bfloat16), (theirs, torch.float32)):
        parameter = nn.Parameter(torch.linspace(-1, 1, 5))
        opt = cls([parameter], lr=0.1)

        def make(optimizer: torch.optim.Optimizer, *_: object, parameter: Any = parameter, dtype: Any = dtype) -> None:
            if not optimizer.state[parameter]:
                empty = {key: torch.zeros(5, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter].update(step=torch.tensor(0.0), **empty)

        opt.register_step_pre_hook(make)
        for seed in range(3):
            give_gradient(parameter, str(seed))
            opt.step()
        assert opt.state[parameter]["exp_avg"].dtype == opt.state[parameter]["exp_avg_sq"].dtype == dtype
        assert float(opt.state[parameter]["step"]) == 3
        moments.append((parameter.detach(), opt.state[parameter]["exp_avg"].float()))
    torch.testing.assert_close(moments[0], moments[1], rtol=2e-2, atol=2e-3)


# ---- hooks around state dicts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_hooks_around_saving_and_loading_fire_in_order_and_may_be_prepended(cls: type) -> None:
    """State-dict hooks fire in the order of registration, prepended ones first."""
    fired: list[str] = []
    _, opt = stepping(cls)
    opt.step()
    for name in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        register = getattr(opt, f"register_{name}_hook")

        def note(*_: object, name: str = name) -> None:
            fired.append(name)

        def note_first(*_: object, name: str = name) -> None:
            fired.append(f"{name} first")

        register(note)
        register(note_first, prepend=True)
    opt.load_state_dict(opt.state_dict())
    wanted = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
    assert fired == [text for name in wanted for text in (f"{name} first", name)]


@pytest.mark.parametrize("cls", OURS)
def test_a_state_dict_post_hook_sees_all_of_it_and_what_it_returns_is_returned(cls: type) -> None:
    """A state-dict post-hook is given the whole dict, names and IDs too, and may return another."""
    _, opt = stepping(cls)
    seen: list[list[str]] = []
    opt.register_state_dict_post_hook(lambda _, state_dict: seen.append(sorted(state_dict)))
    assert sorted(opt.state_dict()) == ["param_groups", "paramstate", "state"]
    other = {"param_groups": [], "mine": True}
    opt.register_state_dict_post_hook(lambda *_: other)
    assert opt.state_dict() is other
    assert sorted(other) == ["mine", "param_groups"]
    assert seen == [["param_groups", "paramstate", "state"]] * 2


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_dict_pre_hook_may_change_the_state(cls: type) -> None:
    """What a state-dict pre-hook changes in state or groups is in the dict."""
    parameter, opt = stepping(cls)
    opt.step()

    def change(optimizer: torch.optim.Optimizer) -> None:
        optimizer.state["global"] = {"seen": 3}
        optimizer.state[parameter]["exp_avg"] = torch.full((2,), 9.0)
        optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(3)))

    opt.register_state_dict_pre_hook(change)
    saved = opt.state_dict()
    assert saved["state"]["global"] == {"seen": 3}
    assert saved["state"][0]["exp_avg"].tolist() == [9.0, 9.0]
    assert saved["param_groups"][0]["params"] == [0, 1]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_load_pre_hook_is_given_a_copy_and_may_return_another_dict(cls: type) -> None:
    """A load pre-hook works on a shallow copy of the dict that was passed, and the one it returns is loaded."""
    parameter, opt = stepping(cls)
    opt.step()
    saved, other = opt.state_dict(), opt.state_dict()
    other["state"] = {0: {**saved["state"][0], "exp_avg": torch.full((2,), 5.0)}}

    def exchange(_: torch.optim.Optimizer, loading: dict[str, Any]) -> dict[str, Any]:
        loading["tag"] = "mine"
        return other

    opt.register_load_state_dict_pre_hook(exchange)
    opt.load_state_dict(saved)
    assert "tag" not in saved
    assert opt.state[parameter]["exp_avg"].tolist() == [5.0, 5.0]


@pytest.mark.parametrize("cls", CLASSES)
def test_load_post_hooks_see_the_loaded_state(cls: type) -> None:
    """A load post-hook sees every loaded entry and option."""
    _, opt = stepping(cls)
    opt.step()
    saved = opt.state_dict()
    saved["param_groups"][0]["lr"] = 0.25
    _, fresh = stepping(cls)
    seen: list[Any] = []
    fresh.register_load_state_dict_post_hook(
        lambda optimizer: seen.append((len(optimizer.state), optimizer.param_groups[0]["lr"]))
    )
    fresh.load_state_dict(state_dict=saved)
    assert seen == [(1, 0.25)]


# ---- profiling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_step_and_zero_grad_appear_in_a_profile_under_torchs_names(cls: type) -> None:
    """A profile shows `Optimizer.step#AdamW.step` and `Optimizer.zero_grad#AdamW.zero_grad`, once for each call."""
    _, opt = stepping(cls)
    with torch.autograd.profiler.profile() as profile:
        opt.step()
        opt.zero_grad()
    calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith("Optimizer.")}
    assert calls == {f"Optimizer.{call}#{cls.__name__}.{call}": 1 for call in ("step", "zero_grad")}


@pytest.mark.parametrize("cls", CLASSES)
def test_the_profilers_entry_point_is_called_after_the_update(cls: type) -> None:
    """`_optimizer_step_code` is called between the update, which has made the state, and the post-hooks."""
    parameter, opt = stepping(cls)
    seen: list[Any] = []
    opt._optimizer_step_code = lambda: seen.append(float(opt.state[parameter]["step"]))
    opt.register_step_post_hook(recorder(seen, "post"))
    opt.step()
    assert seen == [1.0, "post"]


@pytest.mark.parametrize("cls", OURS)
def test_a_graph_capture_is_checked_before_anything_else(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check for graph capture raises comes before the closure and before any write."""
    parameter, opt = stepping(cls)

    def refuse(_: torch.optim.Optimizer) -> None:
        raise RuntimeError("Attempting CUDA graph capture")

    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        monkeypatch.setattr(torch.optim.Optimizer, name, refuse, raising=False)
    called: list[str] = []
    with pytest.raises(RuntimeError, match="Attempting CUDA graph capture"):
        opt.step(recorder(called, "closure"))
    assert called == []
    assert parameter.tolist() == [1.0, 1.0]
    assert not opt.state


# ---- closures and forms of the call ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_a_closure_runs_with_gradients_enabled_and_its_value_is_returned(cls: type) -> None:
    """A closure runs under `enable_grad`, even inside `no_grad`, and step returns its value."""
    parameter, opt = stepping(cls)

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = parameter.sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(opt.step(closure).detach()) == 2.0
        assert not torch.is_grad_enabled()
    assert parameter.grad_fn is None
    assert float(opt.step(closure=closure).detach()) < 2.0


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_gradients_are_read_after_the_closure(ours: type, theirs: type) -> None:
    """The gradients of a step are those that its closure left, also where there were none before it."""
    results = []
    for cls in (ours, theirs):
        torch.manual_seed(0)
        net = Net()
        opt = cls(net.parameters(), lr=0.1)
        for seed in range(3):
            opt.zero_grad()
            opt.step(lambda seed=seed, net=net: set_gradients(net, seed))
        results.append([parameter.detach() for parameter in net.parameters()])
        assert all(float(opt.state[parameter]["step"]) == 3 for parameter in net.parameters())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_closure_that_raises_leaves_everything_as_it_was(cls: type) -> None:
    """The error of a closure passes through, and neither values nor state have changed."""
    parameter, opt = stepping(cls)

    def closure() -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        opt.step(closure)
    assert parameter.tolist() == [1.0, 1.0]
    assert not opt.state


@pytest.mark.parametrize("cls", CLASSES)
def test_all_forms_of_the_call_are_taken(cls: type) -> None:
    """`step()`, `step(closure)`, `step(closure=None)` and `step(closure=closure)` each take one step."""
    parameter, opt = stepping(cls)
    given = [opt.step(), opt.step(lambda: 1.5), opt.step(closure=None), opt.step(closure=lambda: 2.5)]
    assert given == [None, 1.5, None, 2.5]
    assert float(opt.state[parameter]["step"]) == 4


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_step_has_torchs_signature(ours: type, theirs: type) -> None:
    """`step` takes a closure and no `grad_scaler`, for which a scaler would turn to its deprecated protocol."""
    mine, stock = (inspect.signature(cls.step).parameters for cls in (ours, theirs))
    shared = [p for p in mine.values() if p.name in stock]
    assert [(p.name, p.kind, p.default) for p in shared] == [(p.name, p.kind, p.default) for p in stock.values()]
    assert {p.kind for p in mine.values() if p.name not in stock} <= {inspect.Parameter.KEYWORD_ONLY}
    assert "grad_scaler" not in mine


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_zero_grad_has_torchs_signature(ours: type, theirs: type) -> None:
    """`zero_grad` takes `set_to_none`, for which Accelerate looks."""
    mine, stock = (inspect.signature(cls.zero_grad).parameters for cls in (ours, theirs))
    assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in stock.values()]


@pytest.mark.parametrize("cls", CLASSES)
def test_schedulers_wrap_the_step_and_hooks_still_fire_once(cls: type, global_hooks: list[str]) -> None:
    """A scheduler wraps `step` on the instance and marks it; hooks, closure and value go through it as before."""
    parameter, opt = stepping(cls)
    opt.register_step_pre_hook(recorder(global_hooks, "pre"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch)
    assert opt.step._wrapped_by_lr_sched
    assert opt.step(lambda: 4.0) == 4.0
    assert opt._opt_called
    scheduler.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.05)
    assert global_hooks == ["global pre", "pre", "global post"]
    assert float(opt.state[parameter]["step"]) == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_a_function_may_stand_in_the_place_of_step_for_a_while(cls: type) -> None:
    """A function assigned to `optimizer.step` is what is called, until the method is put back: Accelerate's scaler."""
    parameter, opt = stepping(cls)
    called: list[str] = []
    method = opt.step

    def patched(*args: Any, **kwargs: Any) -> Any:
        called.append("patched")
        return method(*args, **kwargs)

    opt.step = patched
    assert opt.step(lambda: 2.0) == 2.0
    opt.step = method
    opt.step()
    assert called == ["patched"]
    assert float(opt.state[parameter]["step"]) == 2
