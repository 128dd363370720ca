"""Tiny models of Hugging Face, and the HookedTransformers that are made from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LAYERS, HEADS, WIDTH, VOCABULARY, POSITIONS = 2, 2, 8, 29, 16
RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
TOKENS = torch.arange(14).reshape(2, 7)


def as_trained(model: nn.Module) -> nn.Module:
    """Norms and biases away from one and zero, as they are after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def gpt2(**settings: Any) -> Any:
    """A GPT-2 whose projections to queries, keys and values are one."""
    import transformers

    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": POSITIONS, "vocab_size": VOCABULARY}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **settings))


def neo(**settings: Any) -> Any:
    """A GPT-Neo, which has a projection for each of them."""
    import transformers

    config = transformers.GPTNeoConfig(
        num_layers=LAYERS,
        num_heads=HEADS,
        hidden_size=WIDTH,
        max_position_embeddings=POSITIONS,
        vocab_size=VOCABULARY,
        attention_types=[[["global"], LAYERS]],
        intermediate_size=32,
        **settings,
    )
    return transformers.GPTNeoForCausalLM(config)


def bridged(model: nn.Module) -> Any:
    """The TransformerBridge around a model of Hugging Face, as ``boot_transformers`` builds it for one from the hub."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config).eval()


def hooked(model: nn.Module, **processing: bool) -> Any:
    """The HookedTransformer of a model of Hugging Face."""
    import transformer_lens
    from transformer_lens.pretrained import weight_conversions

    family = type(model).__name__
    convert = weight_conversions.convert_gpt2_weights if "GPT2" in family else weight_conversions.convert_neo_weights
    config = transformer_lens.HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=WIDTH,
        d_head=WIDTH // HEADS,
        n_heads=HEADS,
        n_ctx=POSITIONS,
        d_vocab=VOCABULARY,
        d_mlp=32,
        act_fn="gelu_new",
        normalization_type="LN",
        use_attn_scale="GPT2" in family,
        eps=1e-5,
        device="cpu",
    )
    made = transformer_lens.HookedTransformer(config)
    made.load_and_process_state_dict(dict(convert(model, config)), **processing)
    return made.eval()


def loss_of(model: nn.Module) -> torch.Tensor:
    """The next-token loss on ``TOKENS``, of a model of either library."""
    answer = model(TOKENS)
    logits = answer if isinstance(answer, torch.Tensor) else answer.logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def train_on_tokens(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Some steps on ``TOKENS``."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
