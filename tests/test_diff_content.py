"""``diff`` where names do not meet: partners are found by content, and by the company they keep."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import paramstate
from paramstate import diff
from paramstate.comparison import DiffReport
from small_models import train

HEADS, WIDTH = 2, 4


def pairs(report: DiffReport) -> dict[str, tuple[str | None, str]]:
    """What each name of the second side was matched with, and how it was judged."""
    return {row.b: (row.label(row.a, row.a_part), row.kind) for row in report.rows if row.b is not None}


def layers(count: int = 3, width: int = 6) -> dict[str, Tensor]:
    """A little stack of layers, with biases that are zero as most are before training."""
    tensors: dict[str, Tensor] = {}
    for layer in range(count):
        tensors[f"h.{layer}.norm.weight"] = torch.ones(width)
        tensors[f"h.{layer}.norm.bias"] = torch.zeros(width)
        tensors[f"h.{layer}.up.weight"] = torch.randn(2 * width, width)
        tensors[f"h.{layer}.up.bias"] = torch.zeros(2 * width)
        tensors[f"h.{layer}.down.weight"] = torch.randn(width, 2 * width)
        tensors[f"h.{layer}.down.bias"] = torch.zeros(width)
    return tensors


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of another library, in another order."""
    words = {"h": "blocks", "norm": "ln", "up": "mlp_in", "down": "mlp_out", "weight": "w", "bias": "b"}
    names = {name: ".".join(words.get(word, word) for word in name.split(".")) for name in tensors}
    return {names[name]: tensor.clone() for name, tensor in reversed(tensors.items())}


def partner_of(tensors: dict[str, Tensor]) -> dict[str, str]:
    return dict(zip(reversed(tensors), renamed(tensors), strict=True))


def test_renamed_parameters_meet_by_content_and_constant_ones_by_their_neighbours() -> None:
    a = layers()
    report = diff(a, renamed(a))
    assert {row.a: row.b for row in report.rows} == partner_of(a)
    assert report.identical
    assert {row.matched_by for row in report.rows if row.a.endswith("up.weight")} == {"content"}
    assert {row.matched_by for row in report.rows if row.a.endswith("bias")} == {"structure"}


def test_transposed_under_other_names_is_found_in_both_directions() -> None:
    a = layers()
    b = {name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in renamed(a).items()}
    for report in (diff(a, b), diff(b, a)):
        assert {kind: len(rows) for kind, rows in report.by_kind.items()} == {"equal": 12, "re-laid-out": 6}
        assert {row.layout for row in report.by_kind["re-laid-out"]} == {"transposed"}


def test_a_changed_parameter_is_found_by_its_neighbours_and_measured() -> None:
    a = layers()
    b = renamed(a)
    b["blocks.1.mlp_in.b"] = torch.randn(12)
    report = diff(a, b)
    (row,) = [row for row in report.rows if row.kind != "equal"]
    assert (row.a, row.b, row.kind, row.matched_by) == ("h.1.up.bias", "blocks.1.mlp_in.b", "changed", "structure")
    assert row.max_abs == float(b["blocks.1.mlp_in.b"].abs().max())


def test_changed_biases_of_one_module_go_where_the_weights_that_are_their_kin_went() -> None:
    a = {"attn.b_O": torch.randn(4), "attn.b_Q": torch.randn(4)}
    a |= {"attn.W_O": torch.randn(4, 6), "attn.W_Q": torch.randn(4, 6)}
    b = {"c_attn.bias": torch.randn(4), "c_attn.weight": a["attn.W_Q"].T}
    b |= {"c_proj.bias": torch.randn(4), "c_proj.weight": a["attn.W_O"].T}
    for report in (diff(a, b), diff(b, a)):
        found = {frozenset((row.a, row.b)) for row in report.by_kind["changed"]}
        assert found == {frozenset(("attn.b_Q", "c_attn.bias")), frozenset(("attn.b_O", "c_proj.bias"))}


def test_of_two_equal_tensors_each_meets_one() -> None:
    values = torch.randn(3, 4)
    a = {"one.weight": values, "two.weight": values.clone()}
    b = {"first.kernel": values.T, "second.kernel": values.T.clone()}
    assert {row.a for row in diff(a, b).rows} == {"one.weight", "two.weight"}
    assert {row.a for row in diff(a, {"only.kernel": values.T}).by_kind["missing"]} == {"two.weight"}


def test_centred_and_scaled_matrices_are_found_under_other_names_and_in_other_layers() -> None:
    a = {f"h.{i}.weight": torch.randn(6, 9) for i in range(3)}
    b = {
        "blocks.0.w": a["h.2.weight"].T - a["h.2.weight"].T.mean(0, keepdim=True),
        "blocks.1.w": a["h.1.weight"] * 3,
        "blocks.2.w": a["h.0.weight"] * torch.rand(9).add(0.5),
    }
    expected = {
        "blocks.0.w": ("h.2.weight", "centred"),
        "blocks.1.w": ("h.1.weight", "scaled"),
        "blocks.2.w": ("h.0.weight", "scaled"),
    }
    assert pairs(diff(a, b)) == expected
    back = {row.a: (row.b, row.kind) for row in diff(b, a).rows}
    assert back == expected


def fused_and_parts() -> tuple[Tensor, dict[str, Tensor]]:
    fused = torch.randn(5, 3 * HEADS * WIDTH)
    heads = [part.reshape(5, HEADS, WIDTH).permute(1, 0, 2) for part in fused.chunk(3, dim=1)]
    return fused, dict(zip(("attn.W_Q", "attn.W_K", "attn.W_V"), heads, strict=True))


def test_a_fused_parameter_is_taken_apart() -> None:
    fused, parts = fused_and_parts()
    report = diff({"c_attn.weight": fused}, parts)
    assert pairs(report) == {
        "attn.W_Q": ("c_attn.weight[:, 0:8]", "re-laid-out"),
        "attn.W_K": ("c_attn.weight[:, 8:16]", "re-laid-out"),
        "attn.W_V": ("c_attn.weight[:, 16:24]", "re-laid-out"),
    }


def test_parts_are_put_together_to_a_fused_parameter() -> None:
    fused, parts = fused_and_parts()
    report = diff(parts, {"c_attn.weight": fused})
    assert [(row.a, row.b_part, row.kind) for row in report.rows] == [
        ("attn.W_Q", "[:, 0:8]", "re-laid-out"),
        ("attn.W_K", "[:, 8:16]", "re-laid-out"),
        ("attn.W_V", "[:, 16:24]", "re-laid-out"),
    ]


def test_a_part_of_a_fused_parameter_that_nobody_has_is_missing() -> None:
    fused, parts = fused_and_parts()
    del parts["attn.W_K"]
    report = diff({"c_attn.weight": fused}, parts)
    (row,) = report.by_kind["missing"]
    assert (row.a, row.a_part) == ("c_attn.weight", "[:, 8:16]")
    (row,) = diff(parts, {"c_attn.weight": fused}).by_kind["new"]
    assert (row.b, row.b_part) == ("c_attn.weight", "[:, 8:16]")


def test_parts_of_different_sizes_are_found() -> None:
    query, key, value = torch.randn(8, 5), torch.randn(2, 5), torch.randn(2, 5)
    report = diff({"qkv": torch.cat((query, key, value))}, {"q_proj": query, "k_proj": key, "v_proj": value})
    assert pairs(report) == {
        "q_proj": ("qkv[0:8]", "re-laid-out"),
        "k_proj": ("qkv[8:10]", "re-laid-out"),
        "v_proj": ("qkv[10:12]", "re-laid-out"),
    }


def test_parts_that_are_interleaved_by_head_are_found() -> None:
    fused = torch.randn(HEADS, 3, WIDTH, 5)
    parts = {f"W_{name}": fused[:, place] for place, name in enumerate("QKV")}
    report = diff({"query_key_value": fused.reshape(-1, 5)}, parts)
    assert pairs(report)["W_K"] == ("query_key_value[4:8] of each of 2 blocks", "re-laid-out")


def test_a_table_that_was_cut_is_found() -> None:
    positions = torch.randn(16, 4)
    report = diff({"wpe.weight": positions}, {"W_pos": positions[:8]})
    assert pairs(report) == {"W_pos": ("wpe.weight[0:8]", "re-laid-out")}
    assert [row.a_part for row in report.by_kind["missing"]] == ["[8:16]"]


def test_a_tied_parameter_meets_both_of_its_untied_copies() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    weight = model.embed.weight.detach()
    report = diff(model, {"W_E": weight - weight.mean(1, keepdim=True), "W_U": weight.T.clone()})
    assert {name: kind for name, (_, kind) in pairs(report).items()} == {"W_E": "centred", "W_U": "re-laid-out"}
    assert {name for name, _ in pairs(report).values()} == {"embed.weight", "head.weight"}


def test_unrelated_models_have_nothing_in_common() -> None:
    a = {"encoder.weight": torch.randn(6, 8), "encoder.bias": torch.randn(6), "scale": torch.ones(8)}
    b = {"left.w": torch.randn(6, 8), "left.b": torch.randn(6), "shift": torch.zeros(8)}
    report = diff(a, b)
    assert {row.kind for row in report.rows} == {"missing", "new"}
    assert len(report.rows) == 6


def test_content_is_asked_only_where_names_do_not_meet() -> None:
    one, other = torch.randn(3, 3), torch.randn(3, 3)
    report = diff({"x": one, "y": other}, {"x": other, "y": one})
    assert {row.kind for row in report.rows} == {"changed"}
    assert {row.matched_by for row in report.rows} == {"name"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_partner_of_another_dtype_is_found(dtype: torch.dtype) -> None:
    a = {f"layer{i}.weight": torch.randn(4, 6) for i in range(3)}
    b = {f"w{i}": a[f"layer{i}.weight"].T.to(dtype) for i in range(3)}
    assert pairs(diff(a, b)) == {f"w{i}": (f"layer{i}.weight", "re-laid-out") for i in range(3)}


def test_moments_follow_the_partner_and_the_layout_of_their_value() -> None:
    class Transposed(nn.Module):
        def __init__(self, model: nn.Linear) -> None:
            super().__init__()
            self.kernel = nn.Parameter(model.weight.detach().T.clone())

    model = nn.Linear(3, 5, bias=False)
    optimizer = paramstate.AdamW(model)
    train(model, optimizer, range(2))
    other = Transposed(model)
    second = paramstate.AdamW(other)
    second.state[other.kernel] = {
        key: value.T.clone() if value.ndim else value.clone() for key, value in optimizer.state_of("weight").items()
    }
    report = diff(optimizer, second)
    assert {row.role: row.kind for row in report.rows} == {
        "value": "re-laid-out",
        "step": "equal",
        "exp_avg": "re-laid-out",
        "exp_avg_sq": "re-laid-out",
    }
    second.state[other.kernel]["exp_avg"].zero_()
    assert [row.note for row in diff(optimizer, second).rows if row.kind == "changed"] == ["all zero now"]


def layer_norm_before_two_maps() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LayerNorm that is folded into the map behind it, whose bias is folded into the next map's."""
    a = {
        "h.0.norm.weight": torch.rand(6) + 0.5,
        "h.0.norm.bias": torch.randn(6),
        "h.0.attn.value.weight": torch.randn(8, 6),
        "h.0.attn.value.bias": torch.randn(8),
        "h.0.attn.out.weight": torch.randn(6, 8),
        "h.0.attn.out.bias": torch.randn(6),
    }
    value = a["h.0.attn.value.weight"].T
    bias = a["h.0.attn.value.bias"] + a["h.0.norm.bias"] @ value
    folded = value * a["h.0.norm.weight"][:, None]
    out = a["h.0.attn.out.bias"] + bias @ a["h.0.attn.out.weight"].T
    b = {
        "blocks.0.attn.W_V": folded - folded.mean(0, keepdim=True),
        "blocks.0.attn.b_V": torch.zeros(8),
        "blocks.0.attn.W_O": a["h.0.attn.out.weight"].T.clone(),
        "blocks.0.attn.b_O": out - out.mean(),
    }
    return a, b


def test_what_was_folded_says_into_what_and_what_took_it_says_from_what() -> None:
    a, b = layer_norm_before_two_maps()
    report = diff(a, b)
    rows = {row.b or row.a: row for row in report.rows}
    assert (rows["blocks.0.attn.W_V"].kind, rows["blocks.0.attn.W_V"].folded) == ("scaled", ("h.0.norm.weight",))
    assert rows["h.0.norm.weight"].note == "folded into blocks.0.attn.W_V"
    assert rows["blocks.0.attn.b_V"].note == "all zero now; folded into blocks.0.attn.b_O"
    b_out = rows["blocks.0.attn.b_O"]
    assert (b_out.kind, b_out.centred) == ("folded", (0,))
    assert set(b_out.folded) == {"h.0.attn.value.bias", "h.0.norm.bias"}


def test_folding_is_seen_from_the_other_side_too() -> None:
    a, b = layer_norm_before_two_maps()
    forward, backward = diff(a, b), diff(b, a)
    turned = {"missing": "new", "new": "missing"}
    assert sorted((row.a or "", row.b or "", turned.get(row.kind, row.kind)) for row in forward.rows) == sorted(
        (row.b or "", row.a or "", row.kind) for row in backward.rows
    )
    assert {row.inverse for row in backward.rows if row.kind in {"scaled", "folded", "centred"}} == {True}
    assert not any(row.inverse for row in forward.rows)


def test_a_bias_with_a_little_noise_on_top_is_not_said_to_be_folded() -> None:
    a, b = layer_norm_before_two_maps()
    b["blocks.0.attn.b_O"] += 1e-3 * torch.randn(6)
    assert {row.kind for row in diff(a, b).of("blocks.0.attn.b_O")} == {"changed"}


def test_matching_by_content_changes_nothing() -> None:
    a = layers(1)
    b = renamed(a)
    kept = copy.deepcopy((a, b))
    diff(a, b)
    assert diff(kept[0], a).identical
    assert diff(kept[1], b).identical
