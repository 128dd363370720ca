"""transformers.Trainer: a tiny Llama, trained by the Trainer's own loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

import paramstate
from same_training import OPTIMIZERS, Training, assert_same_run, assert_same_to_rounding, whose
from small_models import assert_same_bits, state_by_name

STEPS = 9
OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-6}
DECAY = 0.1


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            attention_dropout=0.1,  # so that a resumed run needs the saved state of the random numbers, too
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    )


def corpus() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(7)
    rows = torch.randint(0, 48, (24, 8), generator=draw)
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(**given: Any) -> TrainingArguments:
    """Two rows a batch and two batches a step: an epoch has six steps, and the run ends in the middle of the second."""
    settings: dict[str, Any] = {
        "output_dir": "run",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "weight_decay": DECAY,
        "warmup_steps": 2,
        "learning_rate": OPTIONS["lr"],
        "seed": 3,
    }
    return TrainingArguments(**(settings | given))


Build = Callable[[type[torch.optim.AdamW], TrainingArguments, int], Trainer]


def by_optimizers(adamw: type[torch.optim.AdamW], args: TrainingArguments, seed: int = 0) -> Trainer:
    """``optimizers=(optimizer, scheduler)``, with groups as fine-tuning scripts make them."""
    model = tiny_model(seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = adamw(groups, **OPTIONS)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    return Trainer(model, args, train_dataset=corpus(), optimizers=(optimizer, scheduler))


def by_class(adamw: type[torch.optim.AdamW], args: TrainingArguments, seed: int = 0) -> Trainer:
    """``optimizer_cls_and_kwargs=(class, kwargs)``: the Trainer makes groups, optimizer and scheduler."""
    return Trainer(tiny_model(seed), args, train_dataset=corpus(), optimizer_cls_and_kwargs=(adamw, dict(OPTIONS)))


def by_override(adamw: type[torch.optim.AdamW], args: TrainingArguments, seed: int = 0) -> Trainer:
    """A subclass with a ``create_optimizer`` of its own, over bare parameters."""

    class Own(Trainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            parameters = (self.model if model is None else model).parameters()
            self.optimizer = adamw(parameters, weight_decay=DECAY, **OPTIONS)
            return self.optimizer

    return Own(tiny_model(seed), args, train_dataset=corpus())


def train(
    build: Build, adamw: type[torch.optim.AdamW], *, resume: str | None = None, seed: int = 0, **given: Any
) -> tuple[Trainer, Training]:
    """The whole script; only the optimizer's class differs between two calls that are compared."""
    trainer = build(adamw, arguments(**given), seed)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, Training.of(losses, trainer.model, trainer.optimizer)


WAYS = pytest.mark.parametrize("build", [by_optimizers, by_class, by_override])


@WAYS
def test_every_way_of_passing_an_optimizer_trains_as_torchs(build: Build) -> None:
    """`optimizers=`, `optimizer_cls_and_kwargs=` and a `create_optimizer` override train as torch's AdamW does."""
    (_, torchs), (trainer, ours) = (train(build, adamw) for adamw in OPTIMIZERS)
    assert_same_to_rounding(ours, torchs)
    assert type(trainer.optimizer.optimizer) is paramstate.AdamW  # the Trainer's Accelerator wraps it
    assert all(entry["grad_norm"] > 0.5 for entry in trainer.state.log_history if "grad_norm" in entry)


@WAYS
def test_a_run_resumed_in_the_middle_of_an_epoch_ends_bit_equal(build: Build) -> None:
    """A run resumed from a checkpoint in the middle of an epoch gives the bits of the run that never stopped."""
    _, whole = train(build, paramstate.AdamW, save_strategy="steps", save_steps=4)
    _, resumed = train(build, paramstate.AdamW, resume="run/checkpoint-4", seed=1)
    assert_same_run(resumed, whole)


@pytest.mark.parametrize(("first", "then"), [OPTIMIZERS, OPTIMIZERS[::-1]], ids=whose)
@WAYS
def test_a_checkpoint_of_the_trainer_is_resumed_by_the_other_optimizer(
    build: Build, first: type[torch.optim.AdamW], then: type[torch.optim.AdamW]
) -> None:
    """A Trainer's checkpoint that was saved with torch's AdamW is resumed with ours, and the other way round."""
    _, whole = train(build, first, save_strategy="steps", save_steps=4)
    _, resumed = train(build, then, resume="run/checkpoint-4", seed=1)
    assert_same_to_rounding(resumed, whole)


def test_bf16_autocast_on_the_host_trains_as_torchs() -> None:
    """With `bf16=True` on a host the losses are those of torch's AdamW, to bfloat16's rounding."""
    (_, torchs), (_, ours) = (train(by_class, adamw, bf16=True) for adamw in OPTIMIZERS)
    _, full = train(by_class, paramstate.AdamW)
    assert full.losses != ours.losses, "autocast was off"
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(torchs.losses), rtol=1e-3, atol=0.0)
    assert {tensor.dtype for held in ours.tensors.values() for tensor in held.values()} == {torch.float32}


def in_bfloat16(adamw: type[torch.optim.AdamW], args: TrainingArguments, seed: int = 0) -> Trainer:
    """A model whose weights are bfloat16, as large ones are fine-tuned."""
    options = OPTIONS | {"eps": 1e-5}
    model = tiny_model(seed).to(torch.bfloat16)
    return Trainer(model, args, train_dataset=corpus(), optimizer_cls_and_kwargs=(adamw, options))


def test_bfloat16_weights_train_as_torchs_and_resume() -> None:
    """A bfloat16 model trains as with torch's AdamW, to bfloat16's rounding, and resumes bit-equal."""
    _, torchs = train(in_bfloat16, torch.optim.AdamW)
    _, ours = train(in_bfloat16, paramstate.AdamW, save_strategy="steps", save_steps=4)
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(torchs.losses), rtol=5e-3, atol=0.0)
    assert {held["value"].dtype for held in ours.tensors.values()} == {torch.bfloat16}
    _, resumed = train(in_bfloat16, paramstate.AdamW, resume="run/checkpoint-4", seed=1)
    assert_same_run(resumed, ours)


def by_model(adamw: type[torch.optim.AdamW], args: TrainingArguments, seed: int = 0) -> Trainer:
    """Ours alone: the model in the place of the parameters, and the scheduler left to the Trainer."""
    model = tiny_model(seed)
    optimizer = adamw(model, weight_decay=DECAY, **OPTIONS)
    return Trainer(model, args, train_dataset=corpus(), optimizers=(optimizer, None))


def test_an_optimizer_that_knows_the_model_resumes_by_name() -> None:
    """An optimizer made from the model trains bit-equal to one made from its parameters, and is resumed by name."""
    _, bare = train(by_override, paramstate.AdamW)
    trainer, named = train(by_model, paramstate.AdamW, save_strategy="steps", save_steps=4)
    assert_same_run(named, bare)
    optimizer = trainer.optimizer.optimizer
    saved = torch.load("run/checkpoint-4/optimizer.pt", weights_only=True)
    assert optimizer.load_state_dict(saved).matched_by == "name"
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= optimizer.ids.keys()  # tied: two names, one ID
    _, resumed = train(by_model, paramstate.AdamW, resume="run/checkpoint-4", seed=1)
    assert_same_run(resumed, named)


def clipped_in_the_step(adamw: type[torch.optim.AdamW], args: TrainingArguments, seed: int = 0) -> Trainer:
    """As ``by_class``, with the clipping left to the optimizer."""
    options = OPTIONS | {"max_grad_norm": 0.5}
    return Trainer(tiny_model(seed), args, train_dataset=corpus(), optimizer_cls_and_kwargs=(adamw, options))


def test_clipping_inside_the_step_is_the_trainers_clipping() -> None:
    """`max_grad_norm` given to the optimizer in place of the Trainer gives the same training, to rounding."""
    _, trainers = train(by_class, torch.optim.AdamW)
    trainer, ours = train(clipped_in_the_step, paramstate.AdamW, max_grad_norm=0.0)
    assert_same_to_rounding(ours, trainers)
    assert float(trainer.optimizer.optimizer.grad_norm) > 0.5
    _, unclipped = train(by_class, torch.optim.AdamW, max_grad_norm=0.0)
    assert unclipped.losses[-1] != pytest.approx(ours.losses[-1], rel=1e-5), "clipping made no difference"


class ClampHead(TrainerCallback):
    """After each step the last layer's weight is held in bounds, in place or by a new parameter."""

    def __init__(self, *, in_place: bool) -> None:
        self._in_place = in_place

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        layer = model.model.layers[-1].mlp.down_proj
        if self._in_place:
            layer.weight.data.clamp_(-0.02, 0.02)
        else:
            layer.weight = torch.nn.Parameter(layer.weight.detach().clamp(-0.02, 0.02))


def test_a_callback_that_replaces_a_weight_goes_on_training_it() -> None:
    """A callback that replaces a weight by a clamped copy after each step trains as one that clamps in place."""

    def clamped(*, in_place: bool) -> Build:
        def build(adamw: type[torch.optim.AdamW], args: TrainingArguments, seed: int = 0) -> Trainer:
            trainer = by_class(adamw, args, seed)
            trainer.add_callback(ClampHead(in_place=in_place))
            return trainer

        return build

    _, expected = train(clamped(in_place=True), torch.optim.AdamW)
    _, in_place = train(clamped(in_place=True), paramstate.AdamW)
    _, replaced = train(clamped(in_place=False), paramstate.AdamW)
    assert_same_run(replaced, in_place)
    assert_same_to_rounding(replaced, expected)
    weight = replaced.tensors["model.layers.1.mlp.down_proj.weight"]
    assert float(weight["step"]) == STEPS
    assert int((weight["value"].abs() == 0.02).sum()) > 0


def with_adapters(adamw: type[torch.optim.AdamW], args: TrainingArguments, seed: int = 0) -> Trainer:
    """The Trainer around a PEFT model: it saves and loads the adapters alone."""
    base = tiny_model(5)
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    return Trainer(model, args, train_dataset=corpus(), optimizer_cls_and_kwargs=(adamw, dict(OPTIONS)))


def test_adapters_train_and_resume_as_with_torchs() -> None:
    """A PEFT model in the Trainer trains as with torch's AdamW, and resumes in the middle of an epoch bit-equal."""
    _, torchs = train(with_adapters, torch.optim.AdamW)
    _, whole = train(with_adapters, paramstate.AdamW, save_strategy="steps", save_steps=4)
    assert_same_to_rounding(whole, torchs)
    assert {name for name, held in whole.tensors.items() if "step" in held} == {
        name for name in whole.tensors if "lora_" in name
    }
    _, resumed = train(with_adapters, paramstate.AdamW, resume="run/checkpoint-4", seed=1)
    assert_same_run(resumed, whole)


def test_resized_embeddings_are_named_and_trained_on() -> None:
    """After `resize_token_embeddings` `step()` names the tied embedding; once it is reset, all train on."""
    model = tiny_model()
    optimizer = paramstate.AdamW(model, **OPTIONS)
    batch = torch.arange(8).repeat(2, 1)

    def backward() -> None:
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()

    backward()
    optimizer.step()
    ids = dict(optimizer.ids)
    model.resize_token_embeddings(50)
    backward()
    before = state_by_name(model, optimizer)
    with pytest.raises(paramstate.StateShapeError, match=r"'model\.embed_tokens\.weight'.*\[48, 16\].*\[50, 16\]"):
        optimizer.step()
    assert_same_bits(state_by_name(model, optimizer), before)
    optimizer.reset("lm_head.weight")  # the other name of the tied parameter
    optimizer.step()
    after = state_by_name(model, optimizer)
    assert after["model.embed_tokens.weight"]["exp_avg"].shape == (50, 16)
    assert {name for name, held in after.items() if held["step"] == 1} == {"model.embed_tokens.weight"}
    assert {float(held["step"]) for held in after.values()} == {1, 2}
    assert optimizer.ids == ids


def test_the_trainer_takes_model_among_the_kwargs_for_the_parameters() -> None:
    """`model` in `optimizer_cls_and_kwargs` stands, by the Trainer, in the place of its decay and no-decay groups."""
    model = tiny_model()
    options = OPTIONS | {"weight_decay": DECAY, "model": model}
    trainer = Trainer(model, arguments(), optimizer_cls_and_kwargs=(paramstate.AdamW, options))
    optimizer = trainer.create_optimizer()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY]
    assert set(optimizer.ids) == set(paramstate.canonical_names(model))
    groups = by_class(paramstate.AdamW, arguments()).create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [DECAY, 0.0]
