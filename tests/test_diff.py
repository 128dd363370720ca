"""``diff`` where names meet or are mapped: what became of each parameter, its state, and the outputs."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import paramstate
from paramstate import UnknownParameterError, diff
from paramstate.comparison import Row
from small_models import Net, train


def only(rows: list[Row]) -> Row:
    (row,) = rows
    return row


def one(a: Tensor, b: Tensor) -> Row:
    """What is said of one tensor that became another under the same name."""
    return only(diff({"p": a}, {"p": b}).rows)


# ---- what is said of a pair -----------------------------------------------------------------------------------------


def test_a_copy_is_equal_bit_for_bit() -> None:
    model = Net()
    report = diff(model, copy.deepcopy(model))
    assert report.equal
    assert report.identical
    assert str(report) == "6 equal"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_not_a_number_and_infinities_are_equal_to_themselves(dtype: torch.dtype) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0], dtype=dtype)
    assert one(values, values.clone()).exact


def test_the_two_zeros_are_equal_but_not_identical() -> None:
    report = diff({"p": torch.tensor([0.0, 1.0])}, {"p": torch.tensor([-0.0, 1.0])})
    assert report.equal
    assert not report.identical


def test_a_rounded_copy_is_equal_to_rounding_and_says_so() -> None:
    values = torch.randn(5, 4)
    for a, b in ((values, values.bfloat16()), (values.bfloat16(), values.bfloat16().float())):
        row = one(a, b)
        assert (row.kind, row.exact) == ("equal", False)
        assert "to rounding" in row.details
    assert one(values, (values + 0.5).bfloat16()).kind != "equal"


def test_the_smallest_change_is_a_change() -> None:
    values = torch.ones(4, 3)
    changed = values.clone()
    changed[2, 1] = torch.nextafter(changed[2, 1], torch.tensor(2.0))
    row = one(values, changed)
    assert row.kind == "changed"
    assert row.max_abs == pytest.approx(1.19e-7, rel=1e-2)


def test_a_change_is_measured() -> None:
    row = one(torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, 4.0, 1.0]))
    assert (row.kind, row.max_abs, row.relative) == ("changed", 1.0, pytest.approx(0.2))


def test_a_transposed_matrix_is_laid_out_anew() -> None:
    values = torch.randn(4, 3)
    row = one(values, values.T)
    assert (row.kind, row.layout, row.max_abs) == ("re-laid-out", "transposed", 0.0)
    square = torch.randn(4, 4)
    assert one(square, square.T).layout == "transposed"


def test_split_and_permuted_dimensions_are_told_as_a_pattern() -> None:
    values = torch.randn(6, 8)
    heads = values.reshape(6, 2, 4).permute(1, 0, 2)
    row = one(values, heads)
    assert (row.kind, row.layout) == ("re-laid-out", "a (b c) -> b a c, a=6 b=2 c=4")
    assert one(heads, values).layout == "a b c -> b (a c), a=2 b=6 c=4"
    assert one(values, values.reshape(48)).layout == "reshaped [6, 8] -> [48]"
    kernel = torch.randn(2, 3, 4, 5)
    assert one(kernel, kernel.permute(2, 3, 1, 0)).layout == "a b c d -> c d b a"


def test_reordered_rows_are_told_with_their_order() -> None:
    values, order = torch.randn(5, 3), torch.tensor([3, 0, 4, 1, 2])
    row = one(values, values[order])
    assert (row.kind, row.layout) == ("re-laid-out", "reordered along dim 0")
    assert torch.equal(row.order, order)
    assert one(values.T, values[order].T).layout == "reordered along dim 1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reordered_elements_of_a_vector_are_told_with_their_order(dtype: torch.dtype) -> None:
    values, order = torch.randn(5), torch.tensor([3, 0, 4, 1, 2])
    row = one(values, values[order].to(dtype))
    assert (row.kind, row.layout) == ("re-laid-out", "reordered along dim 0")
    assert torch.equal(row.order, order)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_centred_tensor_names_the_dimension(dim: int, dtype: torch.dtype) -> None:
    values = torch.randn(6, 5, 7, dtype=dtype) + 1
    row = one(values, values - values.mean(dim, keepdim=True))
    assert (row.kind, row.centred) == ("centred", (dim,))
    back = one(values - values.mean(dim, keepdim=True), values)
    assert (back.kind, back.centred, back.inverse) == ("centred", (dim,), True)


def test_a_shift_that_leaves_a_mean_is_no_centring() -> None:
    values = torch.randn(6, 5)
    assert one(values, values - values.mean(1, keepdim=True) + 0.1).kind == "changed"


def test_one_factor_is_told() -> None:
    values = torch.randn(4, 5)
    row = one(values, values * -0.37)
    assert (row.kind, row.scale) == ("scaled", pytest.approx(-0.37))
    assert one(torch.randn(7), torch.zeros(7)).kind == "changed"


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_factor_for_each_slice_is_told(dim: int) -> None:
    values = torch.randn(6, 5, 7)
    factors = torch.rand(values.shape[dim]) + 0.5
    shape = [-1 if place == dim else 1 for place in range(3)]
    row = one(values, values * factors.reshape(shape))
    assert (row.kind, row.scale_dim) == ("scaled", dim)
    assert torch.allclose(row.scales, factors.double(), rtol=1e-5)


def test_scaling_and_centring_together_are_told_apart() -> None:
    values, factors = torch.randn(8, 30), torch.rand(8) + 0.5
    scaled = values * factors[:, None]
    folded = scaled - scaled.mean(0, keepdim=True)
    row = one(values, folded)
    assert (row.kind, row.scale_dim, row.centred) == ("scaled", 0, (0,))
    assert torch.allclose(row.scales, factors.double(), rtol=1e-4)
    both = one(values, folded - folded.mean(1, keepdim=True))
    assert (both.scale_dim, both.centred) == (0, (0, 1))
    assert torch.allclose(both.scales, factors.double(), rtol=1e-4)


def test_a_channel_that_was_zeroed_is_a_factor_of_zero() -> None:
    values, kept = torch.randn(5, 6), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    row = one(values, values * kept[:, None])
    assert (row.kind, row.scale_dim) == ("scaled", 0)
    assert torch.equal(row.scales.round(), kept.double())


def test_noise_on_a_scaled_tensor_is_a_change() -> None:
    values = torch.randn(20, 30)
    assert one(values, 2 * values + 1e-3 * torch.randn(20, 30)).kind == "changed"


def test_a_small_change_in_a_coarse_dtype_is_not_taken_for_a_centring() -> None:
    values = torch.randn(20, 30)
    values -= values.mean(0, keepdim=True)
    changed = values * (1 + 0.01 * torch.randn(20, 30))
    assert one(values.bfloat16(), (changed - changed.mean(0, keepdim=True)).bfloat16()).kind == "changed"


def test_another_size_is_told_with_both_shapes_and_has_no_difference() -> None:
    report = diff({"p": torch.randn(4, 3)}, {"p": torch.randn(5, 3)})
    (row,) = report.rows
    assert (row.kind, row.note) == ("changed", "shape [4, 3] -> [5, 3]")
    assert math.isnan(row.max_abs)
    assert str(report).splitlines()[2].split("changed")[1].strip() == "shape [4, 3] -> [5, 3]", "no number before it"


def test_integers_and_empty_tensors_are_compared_too() -> None:
    assert one(torch.arange(4), torch.arange(4)).exact
    assert one(torch.arange(4), torch.arange(4) + 1).max_abs == 1.0
    assert one(torch.tensor([True, False]), torch.tensor([True, True])).kind == "changed"
    assert one(torch.empty(0, 3), torch.empty(0, 3)).exact


# ---- sides ----------------------------------------------------------------------------------------------------------


def test_wrapped_models_and_their_buffers_are_compared_under_canonical_names() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    wrapped = nn.DataParallel(copy.deepcopy(model))
    wrapped(torch.randn(4, 2))
    report = diff(model, wrapped)
    assert {row.a for row in report.rows if row.kind != "equal"} == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }


def test_a_model_is_compared_with_a_state_dict() -> None:
    model = Net()
    assert diff(model, model.state_dict()).identical


@pytest.mark.parametrize("kind", [torch.optim.AdamW, paramstate.AdamW])
def test_two_optimizers_are_compared_with_their_moments(kind: type[torch.optim.AdamW]) -> None:
    model = Net(("first",))
    optimizer = kind(model.named_parameters())
    train(model, optimizer, range(2))
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert diff(optimizer, twin).identical
    twin.state[twin_model.first.weight]["exp_avg"].mul_(2)
    row = only([row for row in diff(optimizer, twin).rows if row.kind != "equal"])
    assert (row.a, row.role, row.kind, row.scale) == ("first.weight", "exp_avg", "scaled", pytest.approx(2.0))
    train(twin_model, twin, [9])
    steps = [row for row in diff(optimizer, twin).rows if row.role == "step"]
    assert [row.max_abs for row in steps] == [1.0, 1.0]


def test_state_dicts_of_optimizers_meet_by_name_in_whatever_order_they_are() -> None:
    model = Net()
    optimizer = paramstate.AdamW(model)
    train(model, optimizer, range(2))
    other = paramstate.AdamW(reversed(list(model.named_parameters())))
    other.load_state_dict(optimizer.state_dict())
    report = diff(optimizer.state_dict(), other.state_dict())
    assert report.identical
    assert {row.role for row in report.rows} == {"step", "exp_avg", "exp_avg_sq"}


def test_state_that_one_side_lacks_is_missing_or_new() -> None:
    model = Net(("first",))
    optimizer = paramstate.AdamW(model)
    before = copy.deepcopy(optimizer)
    train(model, optimizer, range(1))
    assert {row.role for row in diff(before, optimizer).by_kind["new"]} == {"step", "exp_avg", "exp_avg_sq"}
    assert {row.role for row in diff(optimizer, before).by_kind["missing"]} == {"step", "exp_avg", "exp_avg_sq"}


def test_anything_that_gives_its_tensors_is_a_side() -> None:
    class Session:
        def tensors(self) -> Mapping[str, Tensor]:
            return {"p": torch.ones(3)}

    assert diff(Session(), {"p": torch.ones(3)}).identical


def test_what_has_no_named_tensors_is_refused() -> None:
    with pytest.raises(TypeError, match="got list"):
        diff([torch.ones(2)], {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model"):
        diff({"model": {"p": torch.ones(2)}}, {})


def test_nothing_is_changed_by_looking() -> None:
    model, other = Net(), Net()
    before = [parameter._version for parameter in (*model.parameters(), *other.parameters())]
    diff(model, other)
    assert [parameter._version for parameter in (*model.parameters(), *other.parameters())] == before


def test_missing_and_new_parameters_are_listed() -> None:
    values = torch.randn(2, 2)
    report = diff({"p": values, "old": torch.randn(3, 5)}, {"p": values, "fresh": torch.randn(4)})
    assert {kind: [row.a or row.b for row in rows] for kind, rows in report.by_kind.items()} == {
        "equal": ["p"],
        "missing": ["old"],
        "new": ["fresh"],
    }
    assert not report.equal


# ---- map ------------------------------------------------------------------------------------------------------------


def test_a_map_of_names_decides() -> None:
    a = {"x": torch.zeros(3), "y": torch.ones(3)}
    b = {"x": torch.ones(3), "z": torch.zeros(3)}
    report = diff(a, b, map={"x": "z", "y": "x"})
    assert report.identical
    assert {row.matched_by for row in report.rows} == {"map"}
    assert diff(a, b, map=lambda name: {"x": "z", "y": "x"}[name]).identical


def test_a_map_with_a_function_splits_a_fused_parameter() -> None:
    fused = torch.randn(4, 6)
    b = {"left": fused[:, :3].T, "right": fused[:, 3:].T + 1}
    split = (["left", "right"], lambda value: [part.T for part in value.split(3, dim=1)])
    left, right = diff({"fused": fused}, b, map={"fused": split}).rows
    assert (left.kind, left.matched_by) == ("re-laid-out", "map")
    assert (right.kind, right.max_abs) == ("changed", pytest.approx(1.0))


def test_a_map_to_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownParameterError, match=r"'weigth'.*'weight'"):
        diff({"weight": torch.ones(1)}, {"weight": torch.ones(1)}, map={"weigth": "weight"})
    with pytest.raises(UnknownParameterError, match="second side"):
        diff({"weight": torch.ones(1)}, {"weight": torch.ones(1)}, map={"weight": "w"})


# ---- outputs --------------------------------------------------------------------------------------------------------


def test_outputs_are_compared_in_evaluation_mode_and_the_mode_comes_back() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5))
    other = copy.deepcopy(model)
    other[1].eval()
    x = torch.randn(4, 3)
    for inputs in (x, (x,), {"input": x}):
        (row,) = diff(model, other, inputs=inputs).outputs
        assert (row.name, row.max_abs) == ("output", 0.0)
    assert (model.training, model[1].training, other[0].training, other[1].training) == (True, True, True, False)


def test_centring_the_last_layer_changes_logits_but_not_their_log_softmax() -> None:
    model = nn.Linear(3, 5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.weight -= other.weight.mean(0, keepdim=True)
        other.bias -= other.bias.mean()
    report = diff(model, other, inputs=torch.randn(4, 3))
    (row,) = report.outputs
    assert row.max_abs > 1e-3
    assert row.log_softmax is not None
    assert row.log_softmax < 1e-6
    assert [row.kind for row in report.rows] == ["centred", "centred"]
    assert "its log-softmax by" in str(report)


def test_outputs_by_name_or_place_are_compared_one_by_one() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"logits": super().forward(x), "hidden": (x, None)}

    model, plain = Two(2, 3), nn.Linear(2, 3)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 2)
    assert [row.name for row in diff(model, model, inputs=x).outputs] == ["logits", "hidden.0"]
    assert [(row.name, row.max_abs) for row in diff(model, plain, inputs=x).outputs] == [("logits", 0.0)]


def test_inputs_need_models() -> None:
    with pytest.raises(TypeError, match="two models"):
        diff(Net(), Net().state_dict(), inputs=torch.ones(1, 3))


# ---- printing -------------------------------------------------------------------------------------------------------


def test_a_report_prints_what_differs_and_counts_what_is_equal() -> None:
    a = {"p": torch.ones(2), "q": torch.tensor([1.0, 2.0, 4.0])}
    b = {"p": torch.ones(2), "q": torch.tensor([1.0, 2.0, 4.5])}
    assert str(diff(a, b)).splitlines() == [
        "a  b  kind     max |b - a|  details",
        "-  -  -------  -----------  -------",
        "q  q  changed  0.5",
        "1 equal, 1 changed",
    ]


def test_a_report_is_a_table_where_rich_prints_it() -> None:
    console = pytest.importorskip("rich.console")
    screen = console.Console(width=120, record=True, file=io.StringIO())
    screen.print(diff({"[bold]": torch.ones(2, 3)}, {"[bold]": torch.randn(2, 3)}))
    assert "[bold]" in screen.export_text()


def test_a_report_is_given_as_plain_data() -> None:
    a, b = {"p": torch.randn(4, 3), "q": torch.ones(1)}, {}
    b["p"] = a["p"] * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    plain = json.loads(json.dumps(diff(a, b).as_dict()))
    assert [row["kind"] for row in plain["rows"]] == ["scaled", "missing"]
    assert plain["rows"][0]["scales"] == pytest.approx([1, 2, 3, 4])
    assert plain["rows"][1]["max_abs"] is None
    assert plain["equal"] is False
