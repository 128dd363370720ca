"""Liger-Kernel: find the base model in any model of Hugging Face

There the base model is ``getattr(model, model.base_model_prefix, model)``; its norms are then patched one by one. Here
that line is compared with ``base_model``, and the patch is done. All families in all wrappers are in
tests/clients/test_model_families.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from paramstate import AdamW, AmbiguousNameError, base_model, base_models, canonical_names, select
from small_models import assert_same_bits, state_by_name

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

WIDTH = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = torch.arange(16).reshape(2, 8)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDTH, vocab_size=32, num_key_value_heads=2))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def clip() -> nn.Module:
    text = {**WIDTH, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 16}
    vision = {**WIDTH, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def with_lora(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))


def by_prefix(model: Any) -> nn.Module:
    """Liger-Kernel's line."""
    return getattr(model, model.base_model_prefix, model)


# ---- where the line is wrong without a word --------------------------------------------------------------------------


def test_the_two_agree_on_a_bare_llama() -> None:
    """For a bare LlamaForCausalLM both find the LlamaModel inside, without its head."""
    model = llama()
    assert base_model(model) is by_prefix(model) is model.model


def test_a_t5_is_taken_for_its_own_base() -> None:
    """A T5 with its head has no attribute of that name: the line answers the whole model, base_model says why not."""
    model = t5()
    assert by_prefix(model) is model
    assert any(module is model.lm_head for module in by_prefix(model).modules()), "head included"
    assert base_models(model) == {"encoder": model.encoder, "decoder": model.decoder}
    with pytest.raises(AmbiguousNameError, match=r"T5For\w+ has several base models: 'encoder' \(.*'decoder' \("):
        base_model(model)


def test_a_clip_is_taken_for_its_own_base() -> None:
    """A CLIP has two towers: the line answers the whole model with its projections, base_model lists the two."""
    model = clip()
    assert by_prefix(model) is model
    assert base_models(model) == {"text_model": model.text_model, "vision_model": model.vision_model}
    with pytest.raises(AmbiguousNameError, match=r"CLIPModel has several base models: 'text_model' .*'vision_model' "):
        base_model(model)
    inside = select(model, *base_models(model).values())
    assert (~inside).names == ["logit_scale", "visual_projection.weight", "text_projection.weight"]


def test_a_llama_in_peft_is_taken_for_the_model_with_its_head() -> None:
    """Inside PEFT the line finds the causal model, head and all; base_model finds the same LlamaModel as before."""
    model = llama()
    inner = model.model
    wrapped = with_lora(model)
    assert type(by_prefix(wrapped)).__name__ == "LlamaForCausalLM"
    assert base_model(wrapped) is inner
    assert not hasattr(by_prefix(wrapped), "norm"), "what is to be patched is not there"


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: nn.DataParallel(with_lora(model))], ids=["", "LoRA"])
def test_a_parallel_wrapper_has_no_prefix_at_all(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """In a wrapper that forwards no attributes the line raises; base_model looks through it."""
    model = llama()
    inner = model.model
    wrapped = wrap(model)
    with pytest.raises(AttributeError, match="base_model_prefix"):
        by_prefix(wrapped)
    assert base_model(wrapped) is inner


def names_below_bases(model: nn.Module) -> dict[str, list[str]]:
    """The canonical names below each base model, without those of adapters; each leads to a parameter of the base."""
    named = {name: param for name, param in canonical_names(model).items() if ".lora_" not in name}
    found = {}
    for base, module in base_models(model).items():
        found[base] = [name for name in named if name.startswith(f"{base}.")]
        assert {named[name] for name in found[base]} <= {*module.parameters()}
    return found


@pytest.mark.parametrize("make", [llama, t5, clip])
def test_the_names_below_a_base_are_the_same_in_any_wrapper(make: Callable[[], nn.Module]) -> None:
    """Below each base model the canonical names are the same with and without LoRA, compile and DataParallel."""
    model = make()
    bare = names_below_bases(model)
    assert all(bare.values())
    wrapped = nn.DataParallel(torch.compile(with_lora(model)))
    assert names_below_bases(wrapped) == bare


# ---- what it is looked for: the norms of the base are patched in the midst of training -------------------------------


class Patched(nn.Module):
    """A norm of other code and the same weight, as a fused kernel is."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps, self.calls = norm.weight, norm.variance_epsilon, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def patch_norms(base: Any) -> list[Patched]:
    """What ``apply_liger_kernel_to_llama(model=...)`` does to a base model, in short."""
    base.norm = Patched(base.norm)
    for layer in base.layers:
        layer.input_layernorm = Patched(layer.input_layernorm)
        layer.post_attention_layernorm = Patched(layer.post_attention_layernorm)
    return [module for module in base.modules() if isinstance(module, Patched)]


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        opt.step()


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda model: model,
    "LoRA": with_lora,
    "DataParallel": nn.DataParallel,
    "LoRA in DataParallel": lambda model: nn.DataParallel(with_lora(model)),
}


@pytest.mark.parametrize("wrapping", WRAPS)
def test_the_norms_of_the_base_are_patched_in_the_midst_of_training(wrapping: str) -> None:
    """The base found in any wrapper is patched mid-training, and IDs, moments and steps go on as without the patch."""
    model = WRAPS[wrapping](llama())
    model.requires_grad_(True)
    opt = AdamW(model, lr=1e-2)
    train(model, opt, 3)
    straight, straight_opt = copy.deepcopy((model, opt))
    ids = opt.ids
    patched = patch_norms(base_model(model))
    train(model, opt, 3)
    train(straight, straight_opt, 3)
    assert len(patched) == 5
    assert all(norm.calls == 3 for norm in patched)
    assert opt.ids == ids
    assert_same_bits(state_by_name(model, opt), state_by_name(straight, straight_opt))


def test_the_line_patches_nothing_inside_peft() -> None:
    """Liger-Kernel's line leads to no norm inside PEFT: patching what it finds raises."""
    with pytest.raises(AttributeError, match="norm"):
        patch_norms(by_prefix(with_lora(llama())))
