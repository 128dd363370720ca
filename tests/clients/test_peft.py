"""PEFT: low-rank adapters around a tiny Llama, from the start and in the middle of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import paramstate
from same_training import OPTIMIZERS, Training, assert_same_run, assert_same_to_rounding
from small_models import assert_same_bits, state_by_name

OPTIONS: dict[str, Any] = {"lr": 5e-3, "weight_decay": 0.1}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "saved_head": {"modules_to_save": ["lm_head"]},
    "trainable_tokens": {"trainable_token_indices": {"embed_tokens": [1, 2, 3]}},
}
TOKENS = torch.randint(0, 48, (4, 8), generator=torch.Generator().manual_seed(7))


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            attn_implementation="eager",
        )
    )


def adapted(model: nn.Module, kind: str = "plain") -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **KINDS[kind]))


def unadapted(wrapped: PeftModel) -> nn.Module:
    model = wrapped.merge_and_unload()
    model.requires_grad_(True)
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def take_in_by_hand(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """What a user of torch's optimizer writes for new parameters."""
    known = {param for group in optimizer.param_groups for param in group["params"]}
    new = [param for param in model.parameters() if param.requires_grad and param not in known]
    optimizer.param_groups[0]["params"] += new


def let_go_by_hand(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """What a user of torch's optimizer writes for parameters that are gone."""
    alive = set(model.parameters())
    for group in optimizer.param_groups:
        group["params"] = [param for param in group["params"] if param in alive]
    for param in set(optimizer.state) - alive:
        del optimizer.state[param]


def rebind_and_adopt(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """What a user of ours writes, for either."""
    assert isinstance(optimizer, paramstate.AdamW)
    optimizer.rebind(model, group=0)


Edit = Callable[[torch.optim.Optimizer, nn.Module], None]


def there_and_back(adamw: type[torch.optim.AdamW], kind: str, *, wrapped: Edit, unwrapped: Edit) -> Training:
    """Train the model, then adapters around it, then the model with the adapters merged in."""
    model = tiny_model()
    optimizer = adamw(model.parameters(), **OPTIONS)
    losses = steps(model, optimizer, 3)
    peft_model = adapted(model, kind)
    wrapped(optimizer, peft_model)
    losses += steps(peft_model, optimizer, 4)
    model = unadapted(peft_model)
    unwrapped(optimizer, model)
    losses += steps(model, optimizer, 3)
    return Training.of(losses, model, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_from_the_start_train_as_torchs(kind: str) -> None:
    """`AdamW(peft_model.parameters())` trains LoRA, DoRA, a saved head and trainable tokens as torch's AdamW."""
    runs = []
    for adamw in OPTIMIZERS:
        model = adapted(tiny_model(), kind)
        optimizer = adamw(model.parameters(), **OPTIONS)
        runs.append(Training.of(steps(model, optimizer, 6), model, optimizer))
    assert_same_to_rounding(runs[1], runs[0])
    assert len(optimizer.state) == sum(param.requires_grad for param in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_in_the_middle_of_training_and_merged_again(kind: str) -> None:
    """Wrapped mid-training, trained, merged, trained on: `rebind` does what edits by hand do to torch's AdamW."""
    torchs = there_and_back(OPTIMIZERS[0], kind, wrapped=take_in_by_hand, unwrapped=let_go_by_hand)
    by_hand = there_and_back(OPTIMIZERS[1], kind, wrapped=take_in_by_hand, unwrapped=let_go_by_hand)
    rebound = there_and_back(OPTIMIZERS[1], kind, wrapped=rebind_and_adopt, unwrapped=rebind_and_adopt)
    assert_same_to_rounding(by_hand, torchs)
    assert_same_run(rebound, by_hand)
    assert rebound.tensors["model.norm.weight"]["step"] == 6


@pytest.mark.parametrize("kind", KINDS)
def test_training_adapters_leaves_the_base_and_its_state_alone(kind: str) -> None:
    """While adapters train, the base's values, moments and steps stay as they were, bit for bit, without a call."""
    model = tiny_model()
    optimizer = paramstate.AdamW(model, **OPTIONS)
    steps(model, optimizer, 3)
    before, base = state_by_name(model, optimizer), list(model.parameters())
    peft_model = adapted(model, kind)
    optimizer.rebind(peft_model, group={"lr": 1e-2})
    steps(peft_model, optimizer, 3)
    names = {param: name for name, param in paramstate.canonical_names(peft_model).items()}
    now = {names[param]: {"value": param.detach(), **optimizer.state[param]} for param in base}
    assert_same_bits(now, before)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_names_of_the_base_stay_through_wrapping_and_merging(kind: str) -> None:
    """The base's canonical names and IDs are the same while it is wrapped, and after the adapters were merged."""
    model = tiny_model()
    optimizer = paramstate.AdamW(model, **OPTIONS)
    base, ids = dict(model.named_parameters()), dict(optimizer.ids)
    peft_model = adapted(model, kind)
    steps(peft_model, optimizer, 1)
    assert {name: optimizer.name_of(param) for name, param in base.items()} == {name: name for name in base}
    report = optimizer.rebind(peft_model, group=0)
    assert set(report.kept) == set(base)
    assert set(report.adopted) == optimizer.ids.keys() - base.keys()
    assert all(optimizer.id_of(param) == ids[name] for name, param in base.items())
    model = unadapted(peft_model)
    optimizer.rebind(model)
    head = {"lm_head.weight"} if kind == "saved_head" else set()  # the copy that PEFT trained took its place
    assert optimizer.ids.keys() == ids.keys()
    assert {name for name in ids if optimizer.ids[name] != ids[name]} == head
    assert all(optimizer.name_of(param) == name for name, param in model.named_parameters())


def test_adapters_that_left_the_model_are_named_by_step() -> None:
    """After `merge_and_unload` `step()` names the adapters that left, before anything is written."""
    model = tiny_model()
    optimizer = paramstate.AdamW(model, **OPTIONS)
    peft_model = adapted(model)
    optimizer.rebind(peft_model, group=0)
    steps(peft_model, optimizer, 2)
    model = unadapted(peft_model)
    before = state_by_name(model, optimizer)
    with pytest.raises(paramstate.ReplacedParameterError, match=r"self_attn\.q_proj\.lora_A\.default\.weight"):
        steps(model, optimizer, 1)
    assert_same_bits(state_by_name(model, optimizer), before)
    report = optimizer.rebind(model)
    assert len(report.vanished) == 8
    steps(model, optimizer, 1)


def test_a_second_adapter_is_adopted_and_the_first_deleted() -> None:
    """`add_adapter`, `set_adapter` and `delete_adapter` mid-training are followed as by hand with torch's AdamW."""

    def run(adamw: type[torch.optim.AdamW], added: Edit, deleted: Edit) -> Training:
        model = adapted(tiny_model())
        optimizer = adamw(model.parameters(), **OPTIONS)
        losses = steps(model, optimizer, 3)
        torch.manual_seed(2)
        model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj", "q_proj"]))
        model.set_adapter("second")
        added(optimizer, model)
        losses += steps(model, optimizer, 3)
        model.set_adapter("default")
        losses += steps(model, optimizer, 2)
        model.set_adapter("second")
        model.delete_adapter("default")
        deleted(optimizer, model)
        losses += steps(model, optimizer, 3)
        return Training.of(losses, model, optimizer)

    torchs = run(OPTIMIZERS[0], take_in_by_hand, let_go_by_hand)
    by_hand = run(OPTIMIZERS[1], take_in_by_hand, let_go_by_hand)
    rebound = run(OPTIMIZERS[1], rebind_and_adopt, rebind_and_adopt)
    assert_same_to_rounding(by_hand, torchs)
    assert_same_run(rebound, by_hand)


def test_state_saved_under_adapters_loads_into_the_bare_model() -> None:
    """State saved while adapters are there loads by name into the bare model, and the adapters are reported."""
    model = tiny_model()
    optimizer = paramstate.AdamW(model, **OPTIONS)
    steps(model, optimizer, 3)
    before = state_by_name(model, optimizer)
    optimizer.rebind(adapted(model, "saved_head"), group=0)
    fresh = tiny_model()
    other = paramstate.AdamW(fresh, **OPTIONS)
    report = other.load_state_dict(optimizer.state_dict(), strict=False)
    assert (report.matched_by, report.missing) == ("name", [])
    assert all("lora_" in name or "modules_to_save" in name for name in report.unexpected)
    assert len(report.unexpected) == 9
    for name, held in state_by_name(fresh, other).items():
        assert torch.equal(held["exp_avg_sq"], before[name]["exp_avg_sq"])
