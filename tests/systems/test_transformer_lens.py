"""TransformerLens: going on with training in another layout of the same checkpoint

Three steps in Hugging Face's layout and three in TransformerLens's are compared with six steps in one place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramstate
from lens_models import HEADS, LAYERS, RAW, TOKENS, WIDTH, bridged, gpt2, hooked, loss_of, neo, train_on_tokens
from paramstate import RelayoutError, StateShapeError, diff, doctor, select

pytest.importorskip("transformers")
pytest.importorskip("transformer_lens")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::paramstate")]

Make = Callable[..., Any]
FAMILIES = pytest.mark.parametrize("make", [neo, gpt2], ids=["neo", "gpt2"])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def trained(make: Make, steps: int = 3, **settings: Any) -> tuple[Any, paramstate.AdamW]:
    """A model of Hugging Face after some steps, input and output embedding apart unless said otherwise."""
    torch.manual_seed(0)
    model = make(**{"tie_word_embeddings": False, **settings}).eval()
    optimizer = paramstate.AdamW(model, lr=1e-2)
    train_on_tokens(model, optimizer, steps)
    return model, optimizer


def stayed(make: Make) -> tuple[Any, paramstate.AdamW]:
    """Six steps in Hugging Face's layout, brought into TransformerLens's only then."""
    model, optimizer = trained(make, 6)
    made = hooked(model, **RAW)
    optimizer.relayout(made)
    return made, optimizer


def certain(optimizer: paramstate.AdamW) -> list[str]:
    """The parameters whose gradient is more than rounding: attention does not depend on a bias of the keys."""
    return sorted(name for name in optimizer.ids if not name.endswith("attn.b_K"))


def furthest(one: paramstate.AdamW, other: paramstate.AdamW, key: str) -> float:
    """The largest difference of two optimizers in the values or in one kind of moments."""

    def tensor(optimizer: paramstate.AdamW, name: str) -> Tensor:
        held = optimizer.param(optimizer.ids[name]) if key == "value" else optimizer.state_of(name)[key]
        return held.detach()

    assert certain(one) == certain(other)
    return max(float((tensor(one, name) - tensor(other, name)).abs().max()) for name in certain(one))


@FAMILIES
def test_three_steps_there_and_three_here_are_six_in_one_place(make: Make) -> None:
    """3 steps in Hugging Face and 3 in TransformerLens: values and moments are those of 6 in one place to 1e-6."""
    model, optimizer = trained(make)
    made = hooked(model, **RAW)
    optimizer.relayout(made)
    train_on_tokens(made, optimizer, 3)
    _, expected = stayed(make)
    assert furthest(optimizer, expected, "value") < 1e-6
    assert furthest(optimizer, expected, "exp_avg") < 1e-6
    assert furthest(optimizer, expected, "exp_avg_sq") < 1e-6
    assert {float(optimizer.state_of(name)["step"]) for name in optimizer.ids} == {6.0}


@FAMILIES
def test_fresh_state_would_be_far_away(make: Make) -> None:
    """The same 3+3 steps with fresh state in TransformerLens end more than 1e-2 away from 6 in one place."""
    model, _ = trained(make)
    made, (_, expected) = hooked(model, **RAW), stayed(make)
    named = [(name, param) for name, param in made.named_parameters() if name in expected.ids]
    fresh = paramstate.AdamW(named, lr=1e-2)
    train_on_tokens(made, fresh, 3)
    assert furthest(fresh, expected, "value") > 1e-2


def test_a_fused_projection_is_taken_apart_into_heads() -> None:
    """GPT-2's `c_attn` goes to W_Q, W_K and W_V: its moments with it, under new IDs; all others keep theirs."""
    model, optimizer = trained(gpt2)
    ids = optimizer.ids
    fused = optimizer.state_of("transformer.h.1.attn.c_attn.weight")["exp_avg"].clone()
    report = optimizer.relayout(hooked(model, **RAW))
    for number, head in enumerate("QKV"):
        part = fused[:, number * WIDTH : (number + 1) * WIDTH].reshape(WIDTH, HEADS, -1).transpose(0, 1)
        assert torch.equal(optimizer.state_of(f"blocks.1.attn.W_{head}")["exp_avg"], part)
        row = report.of(f"blocks.1.attn.W_{head}")
        assert (row.sources, row.keeps_id) == (("transformer.h.1.attn.c_attn.weight",), False)
    assert optimizer.ids["unembed.W_U"] == ids["lm_head.weight"]
    assert optimizer.ids["blocks.0.mlp.W_in"] == ids["transformer.h.0.mlp.c_fc.weight"]
    assert report.unmanaged == ["unembed.b_U"]


def test_what_hugging_face_never_had_is_named_and_adopted_on_request() -> None:
    """Biases that a GPT-Neo never had are reported as unmanaged, or adopted by `group=` with fresh state."""
    biases = [f"blocks.{layer}.attn.b_{head}" for layer in range(LAYERS) for head in "QKV"]
    model, optimizer = trained(neo)
    assert optimizer.relayout(hooked(model, **RAW)).unmanaged == [*biases, "unembed.b_U"]
    model, optimizer = trained(neo)
    made = hooked(model, **RAW)
    assert optimizer.relayout(made, group=0).adopted == [*biases, "unembed.b_U"]
    train_on_tokens(made, optimizer, 1)
    assert float(optimizer.state_of("unembed.b_U")["step"]) == 1.0
    assert float(optimizer.state_of("unembed.W_U")["step"]) == 4.0


@FAMILIES
@pytest.mark.parametrize(
    ("processing", "name", "kind"),
    [
        ({}, "embed.W_E", "centred"),
        ({**RAW, "fold_ln": True}, "blocks.0.attn.W_K", "scaled"),
        ({**RAW, "center_unembed": True}, "unembed.W_U", "centred"),
    ],
    ids=["all", "fold_ln", "center_unembed"],
)
def test_processed_weights_are_refused_by_name(make: Make, processing: dict[str, bool], name: str, kind: str) -> None:
    """Folded, centred and scaled weights are no re-layout: refused, with what `diff` found of each of them."""
    model, optimizer = trained(make)
    before, ids = copy.deepcopy(optimizer.state_dict()), optimizer.ids
    with pytest.raises(RelayoutError, match=f"'{name}': {kind}") as caught:
        optimizer.relayout(hooked(model, **processing))
    assert [row.kind for row in caught.value.report.of(name)] == [kind]
    assert optimizer.ids == ids
    assert diff(optimizer.state_dict(), before).identical
    train_on_tokens(model, optimizer, 1)


def test_a_tied_embedding_is_not_shared_out() -> None:
    """TransformerLens unties input and output embedding: refused, unless `maps` lets one of them start afresh."""
    model, optimizer = trained(neo, tie_word_embeddings=True)
    made, held = hooked(model, **RAW), optimizer.state_of("lm_head.weight")["exp_avg"].clone()
    with pytest.raises(StateShapeError, match=r"'transformer\.wte\.weight' is tied to 'lm_head\.weight'.*W_U'?: None"):
        optimizer.relayout(made)
    report = optimizer.relayout(made, {"unembed.W_U": None}, group=0)
    assert "unembed.W_U" in report.adopted
    assert torch.equal(optimizer.state_of("embed.W_E")["exp_avg"], held)
    train_on_tokens(made, optimizer, 1)


def test_the_converter_of_transformer_lens_can_be_said_as_a_map() -> None:
    """A map by name carries the same state as content finds."""
    (model, by_map), (_, by_content) = trained(neo), trained(neo)
    said = {
        f"blocks.{layer}.attn.W_{head}": (
            f"transformer.h.{layer}.attn.attention.{head.lower()}_proj.weight",
            lambda weight: weight.unflatten(0, (HEADS, -1)).transpose(1, 2),
        )
        for layer in range(LAYERS)
        for head in "QKV"
    }
    made = hooked(model, **RAW)
    report = by_map.relayout(made, said)
    by_content.relayout(hooked(model, **RAW))
    assert report.of("blocks.1.attn.W_V").matched_by == "map"
    assert report.differing == []
    assert furthest(by_map, by_content, "exp_avg") == 0.0


# ---- TransformerBridge, the only model of version 4 -----------------------------------------------------------------


def trained_parts(bridge: Any) -> paramstate.Selection:
    """What of a bridge to a model with fused attention is trained: queries, keys and values are views of the fused."""
    return select(bridge) - select(bridge, *[block.attn.qkv for block in bridge.blocks])


def test_a_bridge_to_fused_attention_as_a_whole_is_refused() -> None:
    """A TransformerBridge over GPT-2 holds q, k, v and fused qkv in one storage: refused, with both names."""
    with pytest.raises(paramstate.OverlapError, match=r"attn\.q\..*attn\.qkv\."):
        paramstate.AdamW(bridged(gpt2()))


def test_the_selection_of_a_bridge_that_works_trains_as_hugging_face_does() -> None:
    """`select(bridge)` without `attn.qkv` trains a TransformerBridge over GPT-2 as GPT-2 itself is trained."""
    plain, _ = trained(gpt2)
    torch.manual_seed(0)
    bridge = bridged(gpt2(tie_word_embeddings=False).eval())
    bridge.unembed.original_component.bias.requires_grad_(False)  # the bridge's own, which GPT-2 has not
    optimizer = paramstate.AdamW(trained_parts(bridge), lr=1e-2)
    train_on_tokens(bridge, optimizer, 3)
    assert torch.allclose(bridge(TOKENS), plain(TOKENS).logits, atol=1e-6)
    fused, query = bridge.blocks[0].attn.qkv.original_component, bridge.blocks[0].attn.q.original_component
    assert torch.equal(fused.weight[:, :WIDTH], query.weight.T)


def test_a_bridge_without_fused_attention_needs_no_selection() -> None:
    """A TransformerBridge over GPT-Neo is given as a whole, and a training that began before goes on in it."""
    model, optimizer = trained(neo)
    ids, moments = set(optimizer.ids.values()), optimizer.state_of("lm_head.weight")["exp_avg"]
    bridge = bridged(model)
    optimizer.rebind(bridge)
    assert set(optimizer.ids.values()) == ids
    assert optimizer.state_of(bridge.unembed.original_component.weight)["exp_avg"] is moments
    train_on_tokens(bridge, optimizer, 3)
    expected, _ = trained(neo, 6)
    assert torch.allclose(bridge(TOKENS), expected(TOKENS).logits, atol=1e-6)


def test_training_goes_on_in_a_bridge_that_was_built_around_the_model() -> None:
    """3 steps of GPT-2, a TransformerBridge built around it, 3 steps in that: 6 steps in one place to 1e-6."""
    model, optimizer = trained(gpt2)
    bridge = bridged(model)
    with pytest.raises(paramstate.OverlapError, match=r"qkv.*share memory.*select\(model\)"):
        optimizer.relayout(bridge)
    report = optimizer.relayout(trained_parts(bridge))
    assert {row.sources for row in report.carried} == {
        (f"transformer.h.{layer}.attn.c_attn.{kind}",) for layer in range(LAYERS) for kind in ("weight", "bias")
    }
    assert report.unmanaged == ["unembed._original_component.bias"]
    train_on_tokens(bridge, optimizer, 3)
    expected, _ = trained(gpt2, 6)
    assert torch.allclose(bridge(TOKENS), expected(TOKENS).logits, atol=1e-6)
    assert not doctor(bridge, optimizer).processed_under_old_moments


def test_compatibility_mode_under_old_moments_is_refused_where_asked() -> None:
    """`enable_compatibility_mode()` assigns processed parameters: `on_replace="error"` refuses, by name."""
    bridge = bridged(gpt2(tie_word_embeddings=False).eval())
    optimizer = paramstate.AdamW(trained_parts(bridge), lr=1e-2, on_replace="error")
    train_on_tokens(bridge, optimizer, 1)
    with pytest.raises(paramstate.ReplacedParameterError, match="on_replace='error'"):
        bridge.enable_compatibility_mode(disable_warnings=True)


def test_the_loss_is_the_same_in_either_layout() -> None:
    """The models that are compared here compute the same loss before any step."""
    model = gpt2().eval()
    losses = [float(loss_of(other).detach()) for other in (model, hooked(model, **RAW), nn.Sequential(model))]
    assert max(losses) - min(losses) < 1e-6
