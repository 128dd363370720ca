"""TransformerLens: which weights were processed, and how

A checkpoint of Hugging Face is compared with the HookedTransformer that was made from it. No name is shared.
"""

from __future__ import annotations

import pytest
import torch

import paramstate
from lens_models import LAYERS, RAW, TOKENS, as_trained, gpt2, hooked, neo
from paramstate import diff, doctor
from paramstate.comparison import DiffReport, Row

pytest.importorskip("transformers")
pytest.importorskip("transformer_lens")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::paramstate")]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def kinds(report: DiffReport) -> dict[str, str]:
    """The judgement of each parameter of the HookedTransformer; its masks are no parameters."""
    return {row.b: row.kind for row in report.rows if row.b is not None and not row.b.endswith(("mask", "IGNORE"))}


def row_of(report: DiffReport, name: str) -> Row:
    (row,) = report.of(name)
    return row


def expected_raw(layer: int) -> dict[str, str]:
    block = f"blocks.{layer}."
    moved = dict.fromkeys([f"{block}attn.{kind}_{head}" for kind in "Wb" for head in "QKV"], "re-laid-out")
    kept = ["ln1.w", "ln1.b", "ln2.w", "ln2.b", "attn.b_O", "mlp.W_in", "mlp.b_in", "mlp.W_out", "mlp.b_out"]
    return {**moved, f"{block}attn.W_O": "re-laid-out", **dict.fromkeys([block + name for name in kept], "equal")}


def expected_processed(layer: int) -> dict[str, str]:
    block = f"blocks.{layer}."
    return {
        **dict.fromkeys([f"{block}attn.W_{head}" for head in "QKV"], "scaled"),
        **dict.fromkeys([f"{block}attn.b_{head}" for head in "QK"], "folded"),
        f"{block}attn.b_V": "changed",
        f"{block}attn.W_O": "centred",
        f"{block}attn.b_O": "folded",
        f"{block}mlp.W_in": "scaled",
        f"{block}mlp.b_in": "folded",
        f"{block}mlp.W_out": "centred",
        f"{block}mlp.b_out": "centred",
    }


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_a_raw_gpt2_is_accounted_for_in_one_call(*, trained: bool) -> None:
    """A GPT-2 and its unprocessed HookedTransformer: every tensor is equal, re-laid-out, or named as new."""
    model = as_trained(gpt2()) if trained else gpt2().eval()
    report = diff(model, hooked(model, **RAW), inputs=TOKENS)
    assert kinds(report) == {
        **expected_raw(0),
        **expected_raw(1),
        **dict.fromkeys(["embed.W_E", "pos_embed.W_pos", "ln_final.w", "ln_final.b"], "equal"),
        "unembed.W_U": "re-laid-out",
        "unembed.b_U": "new",
    }
    assert "missing" not in report.by_kind
    assert row_of(report, "unembed.b_U").note == "all zero"
    assert report.outputs[0].max_abs < 1e-6


def test_the_fused_attention_of_gpt2_is_taken_apart_into_heads() -> None:
    """The parts of `c_attn` are found in W_Q, W_K and W_V, and the pattern of the heads is told."""
    model = as_trained(gpt2())
    report = diff(model, hooked(model, **RAW))
    for head, part in zip("QKV", ("[:, 0:8]", "[:, 8:16]", "[:, 16:24]"), strict=True):
        row = row_of(report, f"blocks.1.attn.W_{head}")
        assert (row.a, row.a_part) == ("transformer.h.1.attn.c_attn.weight", part)
        assert row.layout == "a (b c) -> b a c, a=8 b=2 c=4"


def test_a_processed_gpt2_is_accounted_for_in_one_call() -> None:
    """A GPT-2 and its processed HookedTransformer: all that was centred, scaled, folded or dropped is told."""
    model = as_trained(gpt2())
    report = diff(model, hooked(model), inputs=TOKENS)
    assert kinds(report) == {
        **expected_processed(0),
        **expected_processed(1),
        "embed.W_E": "centred",
        "pos_embed.W_pos": "centred",
        "unembed.W_U": "scaled",
        "unembed.b_U": "folded",
    }
    norms = [f"transformer.h.{layer}.ln_{which}" for layer in range(LAYERS) for which in (1, 2)]
    assert {row.a for row in report.by_kind["missing"]} == {
        f"{norm}.{kind}" for norm in [*norms, "transformer.ln_f"] for kind in ("weight", "bias")
    }
    assert all(row.note.startswith("folded into") for row in report.by_kind["missing"])


def test_a_processed_gpt2_says_what_went_where() -> None:
    """Each folded tensor names its sources, each scaled one the LayerNorm that scaled it."""
    model = as_trained(gpt2())
    report = diff(model, hooked(model))
    query, unembed = row_of(report, "blocks.0.attn.W_Q"), row_of(report, "unembed.W_U")
    assert (query.scale_dim, query.centred, query.folded) == (1, (1,), ("transformer.h.0.ln_1.weight",))
    assert (unembed.scale_dim, unembed.centred, unembed.folded) == (0, (0, 1), ("transformer.ln_f.weight",))
    assert torch.allclose(query.scales, model.transformer.h[0].ln_1.weight.double(), rtol=1e-4)
    out = row_of(report, "blocks.1.attn.b_O")
    assert set(out.folded) == {"transformer.h.1.attn.c_attn.bias", "transformer.h.1.ln_1.bias"}
    assert row_of(report, "blocks.1.attn.b_V").note == "all zero now; folded into blocks.1.attn.b_O"


def test_centring_changes_logits_but_not_log_probabilities() -> None:
    """With inputs, logits of a processed model differ and log-probabilities agree to rounding."""
    model = as_trained(gpt2())
    (row,) = diff(model, hooked(model), inputs=TOKENS).outputs
    assert row.name == "logits"
    assert row.max_abs > 1e-4
    assert row.log_softmax is not None
    assert row.log_softmax < 1e-6


def test_one_step_of_processing_is_told_alone() -> None:
    """Where only the unembedding was centred, only that is said."""
    model = as_trained(gpt2())
    report = diff(hooked(model, **RAW), hooked(model, **{**RAW, "center_unembed": True}))
    assert [(row.b, row.kind, row.centred) for row in report.rows if row.kind != "equal"] == [
        ("unembed.W_U", "centred", (1,)),
    ]


def test_a_processed_gpt2_is_read_from_the_other_side_too() -> None:
    """Compared the other way round, the same pairs get the same judgement, marked as inverse."""
    model = as_trained(gpt2())
    processed = hooked(model)
    forward, backward = diff(model, processed), diff(processed, model)
    turned = {"missing": "new", "new": "missing"}
    assert {(row.a, row.b, turned.get(row.kind, row.kind)) for row in forward.rows} == {
        (row.b, row.a, row.kind) for row in backward.rows
    }


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_a_raw_neo_is_accounted_for_in_one_call(*, trained: bool) -> None:
    """A GPT-Neo and its unprocessed HookedTransformer: only the biases it never had are new, and zero."""
    model = as_trained(neo()) if trained else neo().eval()
    report = diff(model, hooked(model, **RAW), inputs=TOKENS)
    biases = {f"blocks.{layer}.attn.b_{head}" for layer in range(LAYERS) for head in "QKV"}
    found = kinds(report)
    assert {name for name, kind in found.items() if kind == "new"} == {*biases, "unembed.b_U"}
    assert set(found.values()) == {"equal", "re-laid-out", "new"}
    assert not [row for row in report.by_kind.get("missing", []) if row.a in dict(model.named_parameters())]
    assert row_of(report, "blocks.0.attn.W_Q").layout == "(a b) c -> a c b, a=2 b=4 c=8"
    assert row_of(report, "blocks.0.mlp.W_in").layout == "transposed"


def test_a_processed_neo_is_accounted_for_in_one_call() -> None:
    """A GPT-Neo and its processed HookedTransformer: the biases it never had hold what was folded into them."""
    model = as_trained(neo())
    report = diff(model, hooked(model), inputs=TOKENS)
    found = kinds(report)
    assert found["blocks.0.attn.W_Q"] == "scaled"
    assert (found["blocks.0.attn.b_Q"], found["blocks.0.attn.b_K"]) == ("folded", "folded")
    assert row_of(report, "blocks.0.attn.b_Q").folded == ("transformer.h.0.ln_1.bias",)
    assert found["blocks.1.attn.W_O"] == "centred"
    (row,) = report.outputs
    assert row.log_softmax is not None
    assert row.log_softmax < 1e-6


def test_processing_in_place_under_old_moments_is_seen() -> None:
    """After `process_weights_()` in the middle of training, `doctor` names what was written and what is gone."""
    model = hooked(as_trained(gpt2()), **RAW)
    optimizer = paramstate.AdamW(model, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS).log_softmax(-1)[..., 0].sum().backward()
        optimizer.step()
    assert doctor(model, optimizer).healthy
    model.process_weights_()
    found = doctor(model, optimizer)
    written = {finding.name for finding in found.processed_under_old_moments}
    assert {"embed.W_E", "blocks.0.attn.W_Q", "blocks.1.mlp.W_out", "unembed.W_U"} <= written
    assert {finding.name for finding in found.trained_not_in_model} >= {"blocks.0.ln1.w", "ln_final.b"}
    assert not found.healthy
