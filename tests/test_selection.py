"""Selections: what each kind of description means, how they combine, and what is an error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import paramstate
from paramstate import Selection, SelectionError, UnknownParameterError, select


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


class Model(nn.Module):
    """A hypernetwork beside its running average, and blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper_net = nn.Linear(2, 2)
        self.hyper_net_ema = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(11))
        self.act = nn.ReLU()


class Tied(nn.Module):
    """Embedding and head share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(3, 2)
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, 3)
        self.head.weight = self.wte.weight


def is_bias(name: str, param: torch.Tensor) -> bool:
    return name.endswith(".bias") and param.ndim == 1


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("hyper_net", ["hyper_net.weight", "hyper_net.bias"]),
        ("hyper_net.weight", ["hyper_net.weight"]),
        ("hyper_net*.bias", ["hyper_net.bias", "hyper_net_ema.bias"]),
        ("*.weight", ["hyper_net.weight", "hyper_net_ema.weight"]),
        ("blocks.1", ["blocks.1.attn.weight", "blocks.1.attn.bias", "blocks.1.norm.weight", "blocks.1.norm.bias"]),
        ("blocks.*.norm.bias", [f"blocks.{i}.norm.bias" for i in range(11)]),
        ("blocks.[0-1].attn.weight", ["blocks.0.attn.weight", "blocks.1.attn.weight"]),
        ("blocks.1?.*.weight", ["blocks.10.attn.weight", "blocks.10.norm.weight"]),
        ("**.attn.bias", [f"blocks.{i}.attn.bias" for i in range(11)]),
        ("blocks.**.0.**.bias", ["blocks.0.attn.bias", "blocks.0.norm.bias"]),
    ],
)
def test_a_pattern_is_matched_component_by_component_with_everything_below(
    model: Model, pattern: str, names: list[str]
) -> None:
    assert select(model, pattern).names == names


def test_two_stars_and_no_description_select_the_whole_model(model: Model) -> None:
    every = [name for name, _ in model.named_parameters()]
    assert select(model).names == select(model, "**").names == every


def test_characters_of_patterns_in_a_name_stand_for_themselves() -> None:
    model = nn.ModuleDict({"[ab]": nn.Linear(1, 1), "a": nn.Linear(1, 1)})
    assert select(model, "[ab]").names == ["[ab].weight", "[ab].bias"]
    assert select(model, "[a]").names == ["a.weight", "a.bias"]


def test_a_module_a_type_a_tensor_and_a_predicate_select(model: Model) -> None:
    assert select(model, model.blocks[3].norm).names == ["blocks.3.norm.weight", "blocks.3.norm.bias"]
    assert len(select(model, nn.LayerNorm)) == 22
    assert len(select(model, Block)) == 44
    assert select(model, model.hyper_net.bias).names == ["hyper_net.bias"]
    assert select(model, is_bias).names == [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert select(model, model).names == select(model).names


def test_several_descriptions_are_a_union_in_the_models_order(model: Model) -> None:
    selection = select(model, "blocks.0.norm", model.hyper_net.bias, select(model, "hyper_net_ema.bias"))
    assert selection.names == ["hyper_net.bias", "hyper_net_ema.bias", "blocks.0.norm.weight", "blocks.0.norm.bias"]


def test_selections_combine_by_and_or_not_and_minus(model: Model) -> None:
    blocks, norms = select(model, "blocks"), select(model, nn.LayerNorm)
    assert (blocks & norms).names == norms.names
    assert len(blocks | select(model, "hyper_net")) == 46
    assert (~blocks).names == ["hyper_net.weight", "hyper_net.bias", "hyper_net_ema.weight", "hyper_net_ema.bias"]
    assert (blocks - norms).names == (blocks & ~norms).names == select(model, "**.attn").names
    assert {*(~~blocks).names} == {*blocks.names}


def test_a_selection_goes_where_parameters_are_taken(model: Model) -> None:
    selection = select(model, "hyper_net")
    assert list(selection) == selection.params == [model.hyper_net.weight, model.hyper_net.bias]
    assert list(selection.named_parameters()) == [("hyper_net." + n, p) for n, p in model.hyper_net.named_parameters()]
    assert torch.optim.SGD(selection, lr=0.1).param_groups[0]["params"] == selection.params
    for param in selection:
        param.grad = torch.ones_like(param)
    paramstate.clip_grad_norm_(selection, 1.0)
    assert sum(float(p.grad.square().sum()) for p in selection) == pytest.approx(1.0, rel=1e-4)


def test_parameters_and_names_are_looked_up_in_a_selection(model: Model) -> None:
    selection = select(model, "hyper_net")
    assert "hyper_net.weight" in selection
    assert model.hyper_net.weight in selection
    assert "hyper_net_ema.weight" not in selection
    assert model.hyper_net_ema.weight not in selection
    assert 3 not in selection


def test_a_selection_is_resolved_anew_each_time(model: Model) -> None:
    by_pattern, by_module = select(model, "hyper_net"), select(model, model.hyper_net)
    by_tensor, by_type = select(model, model.hyper_net.weight), select(model, nn.Conv1d)
    model.hyper_net = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Linear(1, 1, bias=False))
    names = ["hyper_net.0.weight", "hyper_net.0.bias", "hyper_net.1.weight"]
    assert by_pattern.names == by_module.names == names
    assert by_type.names == names[:2]
    with pytest.raises(UnknownParameterError, match=r"'hyper_net\.weight' now; the nearest names are 'hyper_net"):
        by_tensor.names  # noqa: B018


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_names_are_canonical_whatever_wraps_the_model(model: Model, wrap: Callable[[nn.Module], nn.Module]) -> None:
    wrapped = wrap(model)
    assert select(wrapped, "hyper_net").params == [*model.hyper_net.parameters()]
    assert select(wrapped, model.hyper_net).names == ["hyper_net.weight", "hyper_net.bias"]
    assert select(wrapped, model).names == select(model).names
    model.blocks[0] = wrap(model.blocks[0])
    assert select(wrapped, "blocks.0.norm.bias").params == select(model, "blocks.*.norm.bias").params[:1]


def test_a_module_inside_a_wrapper_is_selected_without_what_the_wrapper_adds() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    inner = model[0]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=1))
    assert select(wrapped, inner).names == ["0.weight", "0.bias"]
    assert select(wrapped, model[0]).names == [*select(wrapped, inner).names, *select(wrapped, "0.lora_*").names]
    assert len(select(wrapped, "0")) == 4


def test_what_selects_nothing_is_an_error_that_suggests_the_nearest_names(model: Model) -> None:
    conv = nn.Conv2d(1, 1, 1)
    for what, message in [
        ("hypernet", r"'hypernet' matches no parameter; the nearest names are 'hyper_net'"),
        ("hyper_net.weigth", r"the nearest names are 'hyper_net\.weight'"),
        ("hyper_net.", r"'hyper_net\.' matches no parameter"),
        ("", r"'' matches no parameter"),
        (nn.Conv2d, r"no module of type Conv2d holds a parameter; the nearest names are '\w+'"),
        (lambda _, param: param.ndim == 5, r"the predicate <lambda> holds for no parameter.* 'hyper_net\.weight'"),
        (model.act, r"the module 'act' \(ReLU\) holds no parameter"),
    ]:
        selection = select(model, what)
        with pytest.raises(UnknownParameterError, match=message):
            list(selection)
    with pytest.raises(UnknownParameterError, match=r"this Conv2d is not in Model; of that type are none"):
        select(model, conv)
    with pytest.raises(UnknownParameterError, match=r"this Linear is not in Model; of that type are 'hyper_net'"):
        select(model, nn.Linear(2, 2))
    with pytest.raises(UnknownParameterError, match=r"shape \[2\] is no parameter of Model; .*'hyper_net\.bias'"):
        select(model, torch.zeros(2))


def test_each_description_must_select_something(model: Model) -> None:
    for selection in (
        select(model, "hyper_net", "typo"),
        ~select(model, "typo"),
        select(model, "hyper_net") - select(model, "typo"),
        select(model, "hyper_net") | select(model, "typo"),
    ):
        with pytest.raises(UnknownParameterError, match="'typo' matches no parameter"):
            len(selection)


def test_a_combination_that_is_empty_is_an_error_that_shows_it(model: Model) -> None:
    with pytest.raises(UnknownParameterError, match=r"\('hyper_net' & 'blocks'\) selects no parameter of Model"):
        len(select(model, "hyper_net") & select(model, "blocks"))
    with pytest.raises(UnknownParameterError, match=r"~\*\* selects no parameter of Model: \*\* selects all of them"):
        len(~select(model))


def test_a_combination_that_is_empty_shows_what_each_of_its_parts_selects(model: Model) -> None:
    with pytest.raises(UnknownParameterError) as raised:
        len(select(model, "blocks") & select(model, "*.bias"))
    assert str(raised.value).startswith(
        "('blocks' & '*.bias') selects no parameter of Model: 'blocks' selects 'blocks.0."
    )
    assert str(raised.value).endswith(", and '*.bias' selects 'hyper_net.bias', 'hyper_net_ema.bias'")


def test_an_empty_combination_is_an_error_inside_another_too(model: Model) -> None:
    empty = select(model, "hyper_net") & select(model, "blocks")
    for selection in (empty | select(model, "hyper_net"), select(model, "hyper_net") - empty, ~empty):
        with pytest.raises(UnknownParameterError, match=r"\('hyper_net' & 'blocks'\) selects no parameter of Model"):
            len(selection)


def test_a_tied_parameter_that_is_selected_by_half_is_an_error_that_names_both_names() -> None:
    model = Tied()
    for selection, inside, outside in (
        (select(model, "wte"), "wte.weight", "head.weight"),
        (select(model, "head"), "head.weight", "wte.weight"),
        (select(model, model.head), "head.weight", "wte.weight"),
        (select(model, nn.Linear), "head.weight", "wte.weight"),
        (~select(model, "head"), "wte.weight", "head.weight"),
        (select(model, lambda name, _: "wte" in name), "wte.weight", "head.weight"),
    ):
        with pytest.raises(SelectionError, match=f"'{inside}' is tied to '{outside}', which is not selected; name"):
            selection.params  # noqa: B018


def test_a_full_name_or_a_tensor_stands_for_a_tied_parameter_under_all_its_names() -> None:
    model = Tied()
    for selection in (
        select(model, "wte.weight"),
        select(model, "head.weight"),
        select(model, model.head.weight),
        select(model, "**.weight") - select(model, "body.weight"),
    ):
        assert selection.names == ["wte.weight"]
        assert selection.params == [model.wte.weight]
        assert "head.weight" in selection
        assert "wte.weight" in selection
    assert select(model, "wte", "head.weight").names == ["wte.weight"]
    assert (select(model, "head") - select(model, "wte.weight")).names == ["head.bias"]
    assert (select(model, "wte") | select(model, "head")).names == ["wte.weight", "head.bias"]
    assert (~select(model, "head.weight")).names == ["body.weight", "body.bias", "head.bias"]


def test_a_module_under_two_names_is_selected_under_both() -> None:
    shared = nn.Linear(1, 1)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert select(model, shared).names == ["a.weight", "a.bias"]
    with pytest.raises(SelectionError, match=r"'a\.weight' is tied to 'b\.weight'"):
        len(select(model, "a"))


def test_selections_of_two_models_do_not_mix(model: Model) -> None:
    other = Model()
    with pytest.raises(ValueError, match=r"another model object; selection\.on\(model\)"):
        select(model, "hyper_net") | select(other, "blocks")
    with pytest.raises(ValueError, match="another model object"):
        select(model, select(other, "blocks"))
    moved = select(other, "blocks").on(model) | select(model, "hyper_net")
    assert len(moved) == 46
    assert moved.params[0] is model.hyper_net.weight


def test_other_things_are_refused_by_type(model: Model) -> None:
    for wrong in (3, ["hyper_net"], None, int, nn.Parameter):
        with pytest.raises(TypeError, match="cannot select by"):
            select(model, wrong)
    with pytest.raises(TypeError, match="model must be"):
        select(model.state_dict(), "hyper_net")
    with pytest.raises(TypeError, match="unsupported operand"):
        select(model) & "hyper_net"


def test_the_preview_has_the_data_and_prints_as_a_table() -> None:
    model = Tied()
    model.body.bias.requires_grad_(False)
    model.body.to(torch.bfloat16)
    preview = select(model, "body", "wte.weight").preview()
    assert [(row.name, row.shape, row.numel) for row in preview] == [
        ("wte.weight", (3, 2), 6),
        ("body.weight", (2, 2), 4),
        ("body.bias", (2,), 2),
    ]
    assert [row.requires_grad for row in preview] == [True, True, False]
    assert preview.rows[1].dtype is torch.bfloat16
    assert preview.rows[0].tied == ("head.weight",)
    assert (len(preview), preview.numel) == (3, 12)
    assert str(preview).splitlines() == [
        "name                      shape  dtype     elements  requires_grad",
        "------------------------------------------------------------------",
        "wte.weight = head.weight  3 x 2  float32          6  yes",
        "body.weight               2 x 2  bfloat16         4  yes",
        "body.bias                 2      bfloat16         2  no",
        "3 of 4 parameters, 12 of 15 elements",
    ]
    assert repr(preview) == str(preview)


def test_a_selection_shows_what_it_was_made_of(model: Model) -> None:
    selection = select(model, "blocks", model.hyper_net) - select(model, nn.LayerNorm, is_bias)
    assert repr(selection) == (
        "select(Model: (('blocks' | 'hyper_net' (Linear)) & ~(LayerNorm | the predicate is_bias)))"
    )


def test_a_selection_is_immutable_and_can_be_a_key(model: Model) -> None:
    selection = select(model, "hyper_net")
    with pytest.raises(AttributeError):
        selection.model = Model()
    assert {selection: 1}[selection] == 1


def test_a_deep_copy_of_model_and_selection_selects_in_the_copy(model: Model) -> None:
    for pair in ((model, select(model, "hyper_net")), (select(model, "hyper_net"), model)):
        one, two = copy.deepcopy(pair)
        twin, selection = (one, two) if isinstance(two, Selection) else (two, one)
        assert selection.params == [*twin.hyper_net.parameters()]
        assert model.hyper_net.weight not in selection


def test_a_pickled_selection_comes_back_with_its_model(model: Model) -> None:
    selection = select(model, "hyper_net", nn.LayerNorm) - select(model, is_bias)
    again = pickle.loads(pickle.dumps(selection))
    assert again.names == selection.names
    assert again.model is not model
