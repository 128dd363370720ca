"""Going on in another layout: which maps carry state, and what follows a model into another form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paramstate
from paramstate import Box, ConstraintError, MaxNorm, RelayoutError, StateShapeError, UnitNorm, UnknownParameterError
from reference import same_bits
from small_models import give_gradient

WIDTH, HEADS = 4, 2
DATA = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3))


class Fused(nn.Module):
    """Queries, keys and values in one projection, as GPT-2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(1, (HEADS, -1)) for part in self.qkv(self.norm(x)).chunk(3, 1))
        return self.out((torch.tanh(query * key) * value).flatten(1))


class Split(nn.Module):
    """The same function, with a projection for each head, as TransformerLens writes it."""

    def __init__(self) -> None:
        super().__init__()
        for head in "QKV":
            self.register_parameter(f"W_{head}", nn.Parameter(torch.randn(HEADS, WIDTH, WIDTH // HEADS)))
            self.register_parameter(f"b_{head}", nn.Parameter(torch.randn(HEADS, WIDTH // HEADS)))
        self.W_O = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.ln = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        def project(head: str) -> Tensor:
            weight, bias = getattr(self, f"W_{head}"), getattr(self, f"b_{head}")
            return torch.einsum("bm,hmd->bhd", self.ln(x), weight) + bias

        return (torch.tanh(project("Q") * project("K")) * project("V")).flatten(1) @ self.W_O


def part(number: int, *, bias: bool = False) -> Callable[[Tensor], Tensor]:
    """The map from the fused projection to one of the split ones."""

    def carry(fused: Tensor) -> Tensor:
        heads = fused.chunk(3)[number].unflatten(0, (HEADS, -1))
        return heads if bias else heads.transpose(1, 2)

    return carry


MAPS: dict[str, Any] = {
    **{f"W_{head}": ("qkv.weight", part(number)) for number, head in enumerate("QKV")},
    **{f"b_{head}": ("qkv.bias", part(number, bias=True)) for number, head in enumerate("QKV")},
    "W_O": ("out.weight", lambda weight: weight.T),
    "ln.weight": "norm.weight",
    "ln.bias": "norm.bias",
}


def split_of(fused: Fused) -> Split:
    """The same values in the other layout."""
    made, old = Split(), dict(fused.named_parameters())
    with torch.no_grad():
        for name, origin in MAPS.items():
            source, carry = origin if isinstance(origin, tuple) else (origin, lambda tensor: tensor)
            made.get_parameter(name).copy_(carry(old[source]))
    return made


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(DATA).square().sum().backward()
        optimizer.step()


def trained(steps: int = 3, **options: Any) -> tuple[Fused, paramstate.AdamW]:
    torch.manual_seed(0)
    model = Fused()
    optimizer = paramstate.AdamW(model, lr=0.05, **options)
    train(model, optimizer, steps)
    return model, optimizer


def bits(optimizer: paramstate.AdamW) -> dict[str, dict[str, Tensor]]:
    """Copies of value and state of every parameter, under its name."""
    return {
        name: {"value": optimizer.param(id).detach().clone(), **copy.deepcopy(optimizer.state_of(name))}
        for name, id in optimizer.ids.items()
    }


def assert_close(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> None:
    assert one.keys() == other.keys()
    for name, held in one.items():
        assert held.keys() == other[name].keys()
        for key, tensor in held.items():
            assert torch.allclose(tensor, other[name][key], rtol=1e-5, atol=1e-6), f"{name}, {key}"


# ---- which maps are pure --------------------------------------------------------------------------------------------

MIXING = {
    "adds": lambda t: t + t.flip(0),
    "scales": lambda t: 2 * t,
    "negates": lambda t: t.max() - t,
    "sorts": lambda t: t.flatten().sort().values.reshape(t.shape),
    "averages neighbours": lambda t: torch.cat([t[:1], (t[:-2] + t[2:]) / 2, t[-1:]]),
    "centres": lambda t: t - t.mean(),
    "gives nothing": lambda t: torch.full_like(t, torch.nan),
    "writes into its argument": lambda t: t.mul_(0.5),
}


@pytest.mark.parametrize("carry", MIXING.values(), ids=MIXING)
def test_a_map_that_mixes_elements_is_refused(carry: Callable[[Tensor], Tensor]) -> None:
    vector = nn.Parameter(torch.randn(7))
    opt = paramstate.Adam([("vector", vector)])
    give_gradient(vector, "a")
    opt.step()
    with pytest.raises(StateShapeError, match=r"'vector'.*mixes or changes elements"):
        opt.replace_("vector", torch.randn(7), state=carry)


def test_a_map_that_sorts_is_told_by_two_elements() -> None:
    opt = paramstate.Adam([("pair", nn.Parameter(torch.randn(2)))])
    with pytest.raises(StateShapeError, match=r"'pair'.*mixes or changes elements"):
        opt.replace_("pair", torch.randn(2), state=lambda t: t.sort().values)


@pytest.mark.parametrize(
    ("carry", "shape", "message"),
    [
        (lambda t: t[:2], (2, 3), r"drops elements: 3 of 9, the first at \[2, 0\]"),
        (lambda t: t[[0, 0, 1]], (3, 3), r"repeats elements: 3 of 9, the first at \[0, 0\]"),
        (lambda t: t.T, (9,), r"gives shape \[3, 3\], the new value has \[9\]"),
        (lambda t: t.view(5, 2), (5, 2), r"fails on shape \[3, 3\]: RuntimeError"),
        (lambda _: [1, 2], (2,), "must return a tensor, got list"),
    ],
    ids=["drops", "repeats", "shape", "fails", "no tensor"],
)
def test_a_map_that_is_no_re_layout_is_refused(carry: Any, shape: tuple[int, ...], message: str) -> None:
    opt = paramstate.Adam([("square", nn.Parameter(torch.randn(3, 3)))])
    with pytest.raises(StateShapeError, match=message):
        opt.replace_("square", torch.randn(shape), state=carry)


def test_probing_leaves_the_random_numbers_of_the_user_alone() -> None:
    model = nn.Linear(3, 3)
    opt = paramstate.Adam(model)
    before = torch.random.get_rng_state()
    opt.replace_("weight", model.weight.T, state=lambda t: t.T)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- replace_ with a map --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_object", [False, True], ids=["value", "parameter"])
def test_a_pending_gradient_goes_through_the_map(*, as_object: bool) -> None:
    model = nn.Linear(3, 3, bias=False)
    opt = paramstate.Adam(model)
    give_gradient(model.weight, "a")
    gradient, value = model.weight.grad.clone(), model.weight.detach().T.clone()
    opt.replace_("weight", nn.Parameter(value) if as_object else value, state=lambda t: t.T)
    assert torch.equal(model.weight.grad, gradient.T)


def test_steps_of_rows_and_frozen_rows_go_through_the_map() -> None:
    table = nn.Embedding(4, 2)
    opt = paramstate.Adam(table, lr=0.1)
    give_gradient(table.weight, "a")
    opt.step()
    with opt.edit_rows() as rows:
        rows.reset("weight", [1])
    opt.freeze_rows("weight", [3])
    opt.replace_("weight", table.weight.detach()[[2, 1, 0, 3]].T.clone(), state=lambda t: t[[2, 1, 0, 3]].T)
    assert opt.row_steps("weight").tolist() == [1, 0, 1, 1]
    before = table.weight.detach().clone()
    give_gradient(table.weight, "b")
    opt.step()
    assert (table.weight != before).all(0).tolist() == [True, True, True, False]
    assert opt.row_steps("weight").tolist() == [2, 1, 2, 1]


def test_rows_that_would_differ_along_two_dimensions_are_refused() -> None:
    table = nn.Embedding(4, 2)
    opt = paramstate.Adam(table)
    opt.freeze_rows("weight", [0])
    with pytest.raises(paramstate.UnsupportedError, match=r"'weight'.*more than one dimension"):
        opt.replace_("weight", torch.randn(2, 4), state=lambda t: t.reshape(2, 4))


def test_a_reset_does_not_forget_which_rows_are_frozen() -> None:
    table = nn.Embedding(4, 2)
    opt = paramstate.Adam(table)
    opt.freeze_rows("weight", [0])
    with pytest.raises(StateShapeError, match=r"'weight'.*4 rows along dim 0 are frozen.*unfreeze_rows"):
        opt.replace_("weight", torch.randn(3, 2), state="reset")


@pytest.mark.parametrize(
    ("before", "carry", "after"),
    [
        (MaxNorm(0.5, dim=1), lambda t: t.T, MaxNorm(0.5, dim=0)),
        (MaxNorm(0.5), lambda t: t.T, MaxNorm(0.5)),
        (UnitNorm(dim=1), lambda t: t.unflatten(1, (2, 3)).permute(1, 0, 2), UnitNorm(dim=(0, 2))),
    ],
    ids=["transposed", "one norm", "split"],
)
def test_a_norm_is_taken_over_the_same_elements_as_before(
    before: paramstate.Constraint, carry: Callable[[Tensor], Tensor], after: paramstate.Constraint
) -> None:
    layer = nn.Linear(6, 4, bias=False)
    opt = paramstate.Adam(layer, constraints={"weight": before})
    opt.replace_("weight", carry(layer.weight.detach()).contiguous(), state=carry)
    assert opt._find("weight").constraint == after
    assert after.holds(layer.weight)


def test_a_norm_of_no_elements_stays_where_nothing_moves_and_is_refused_where_something_might() -> None:
    table = nn.Embedding(0, 3)
    opt = paramstate.Adam(table, constraints={"weight": UnitNorm(dim=0)})
    opt.replace_("weight", nn.Parameter(torch.zeros(0, 3)), state=torch.clone)
    assert opt._find("weight").constraint == UnitNorm(dim=0)
    with pytest.raises(ConstraintError, match=r"'weight'.*no dimensions of the new layout"):
        opt.replace_("weight", torch.zeros(3, 0), state=lambda t: t.T)


def test_a_norm_whose_elements_lie_along_no_dimension_is_refused() -> None:
    layer = nn.Linear(6, 4, bias=False)
    opt = paramstate.Adam(layer, constraints={"weight": MaxNorm(0.5, dim=1)})
    with pytest.raises(ConstraintError, match=r"'weight'.*no dimensions of the new layout"):
        opt.replace_("weight", torch.zeros(6, 4), state=lambda t: t.reshape(6, 4))


def test_a_function_of_the_values_does_not_go_through_a_map() -> None:
    layer = nn.Linear(3, 3, bias=False)
    opt = paramstate.Adam(layer, constraints={"weight": torch.tril})
    with pytest.raises(ConstraintError, match=r"'weight'.*function of the values in their old layout"):
        opt.replace_("weight", layer.weight.T, state=lambda t: t.T)


# ---- a whole model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maps", [None, MAPS], ids=["by content", "by map"])
def test_training_goes_on_in_the_other_layout_as_it_would_have_in_the_old(maps: dict[str, Any] | None) -> None:
    model, opt = trained()
    made = split_of(model)
    values = {name: param.detach().clone() for name, param in made.named_parameters()}
    report = opt.relayout(made, maps)
    assert all(same_bits(param, values[name]) for name, param in made.named_parameters())
    train(made, opt, 3)
    stayed, expected = trained(6)
    expected.relayout(split_of(stayed), MAPS)
    assert_close(bits(opt), bits(expected))
    assert {row.matched_by for row in report.carried} == {"content" if maps is None else "map"}
    assert report.differing == report.unmanaged == []


def test_one_for_one_keeps_the_id_and_a_part_gets_one_of_its_name() -> None:
    model, opt = trained()
    before = opt.ids
    report = opt.relayout(split_of(model))
    assert opt.ids["W_O"] == before["out.weight"]
    assert opt.ids["ln.bias"] == before["norm.bias"]
    assert {row.name for row in report.carried if not row.keeps_id} == {
        f"{kind}_{head}" for kind in "Wb" for head in "QKV"
    }
    assert opt.ids["W_Q"] == paramstate.Store().register("W_Q")
    assert not {before["qkv.weight"], before["qkv.bias"]} & set(opt.ids.values())


def test_parts_are_put_together_and_taken_apart_again_without_a_trace() -> None:
    model, opt = trained()
    before, made = bits(opt), split_of(model)
    opt.relayout(made)
    again = Fused()
    again.load_state_dict(model.state_dict())
    report = opt.relayout(again)
    assert report.of("qkv.weight").sources == ("W_Q", "W_K", "W_V")
    after = bits(opt)
    assert after.keys() == before.keys()
    assert all(same_bits(after[name][key], before[name][key]) for name in before for key in before[name])


def test_several_are_joined_by_a_map() -> None:
    model, opt = trained()
    opt.relayout(split_of(model))
    joined = Fused()
    joined.load_state_dict(model.state_dict())
    opt.relayout(
        joined,
        {
            "qkv.weight": (
                ["W_Q", "W_K", "W_V"],
                lambda *heads: torch.cat([head.transpose(1, 2).flatten(0, 1) for head in heads]),
            ),
            "qkv.bias": (["b_Q", "b_K", "b_V"], lambda *heads: torch.cat([head.flatten() for head in heads])),
        },
    )
    _, expected = trained()
    assert_close(bits(opt), bits(expected))


def test_the_report_is_a_table() -> None:
    model, opt = trained()
    lines = str(opt.relayout(split_of(model))).splitlines()
    assert lines[0].split() == ["new", "from", "by", "layout", "ID"]
    assert any(line.split()[:3] == ["W_K", "qkv.weight", "content"] for line in lines)
    assert lines[-1] == "9 carried"


def test_a_pending_gradient_is_carried_too() -> None:
    model, opt = trained()
    made = split_of(model)
    model.zero_grad()
    model(DATA).square().sum().backward()
    opt.relayout(made)
    got = {name: param.grad.clone() for name, param in made.named_parameters()}
    made.zero_grad()
    made(DATA).square().sum().backward()
    assert all(torch.allclose(got[name], param.grad, atol=1e-5) for name, param in made.named_parameters())


def test_state_takes_the_memory_layout_and_the_width_of_the_new_parameter() -> None:
    model, opt = trained()
    made = split_of(model).double()
    made.W_O = nn.Parameter(made.W_O.detach().T.contiguous().T)
    opt.relayout(made)
    moment = opt.state_of("W_O")["exp_avg"]
    assert (moment.dtype, moment.stride()) == (torch.float64, made.W_O.stride())
    train(made.float(), opt, 1)


def test_a_value_that_was_rounded_on_the_way_is_the_same_value() -> None:
    model, opt = trained()
    made = split_of(model).bfloat16()
    opt.relayout(made)
    assert opt.state_of("W_O")["exp_avg"].dtype is torch.float32


def test_before_the_first_step_there_is_no_state_to_carry() -> None:
    model, opt = trained(0)
    made = split_of(model)
    opt.relayout(made, MAPS)
    assert not opt.state
    train(made, opt, 1)
    assert float(opt.state_of("W_Q")["step"]) == 1.0


def test_a_parameter_without_elements_is_found_by_its_name() -> None:
    model = nn.ParameterDict({"table": torch.randn(0, 3), "rest": torch.randn(2, 3)})
    opt = paramstate.Adam(model)
    give_gradient(model["rest"], "a")
    opt.step()
    again = copy.deepcopy(model)
    report = opt.relayout(again)
    assert {(row.name, row.sources, row.keeps_id) for row in report.carried} == {
        ("table", ("table",), True),
        ("rest", ("rest",), True),
    }
    assert opt.param(opt.ids["table"]) is again["table"]


def test_bare_parameters_are_carried_by_content() -> None:
    torch.manual_seed(0)
    model = Fused()
    opt = paramstate.AdamW(model.parameters(), lr=0.05)
    train(model, opt, 3)
    made = split_of(model)
    opt.relayout(made)
    train(made, opt, 1)
    assert opt.ids.keys() == dict(made.named_parameters()).keys()


def test_after_it_everything_else_works_as_ever() -> None:
    model, opt = trained()
    made = split_of(model)
    opt.relayout(made)
    assert paramstate.doctor(made, opt).healthy
    train(made, opt, 1)
    assert paramstate.doctor(made, opt).healthy
    twin_model, twin = copy.deepcopy((made, opt))
    other = paramstate.AdamW(Split(), lr=0.05)
    assert other.load_state_dict(opt.state_dict()).matched_by == "name"
    made.W_Q = nn.Parameter(made.W_Q.detach().clamp(-1, 1))
    twin_model.W_Q = nn.Parameter(twin_model.W_Q.detach().clamp(-1, 1))
    for one, optimizer in ((made, opt), (twin_model, twin)):
        train(one, optimizer, 1)
    after, also = bits(opt), bits(twin)
    assert all(same_bits(after[name][key], also[name][key]) for name in after for key in after[name])
    assert opt.rebind(made).kept == list(opt.ids)


def test_what_others_write_after_it_is_seen_by_the_doctor() -> None:
    model, opt = trained()
    made = split_of(model)
    opt.relayout(made)
    train(made, opt, 1)
    with torch.no_grad():
        made.W_K.mul_(2.0)
    (finding,) = paramstate.doctor(made, opt).processed_under_old_moments
    assert (finding.name, finding.note) == ("W_K", "written once by others since step 3")


def test_a_model_that_was_changed_in_place_is_followed() -> None:
    model, opt = trained()
    fused = model.qkv
    for number, name in enumerate(("query", "key", "value")):
        model.add_module(name, nn.Linear(WIDTH, WIDTH))
        with torch.no_grad():
            for kind in ("weight", "bias"):
                model.get_submodule(name).get_parameter(kind).copy_(fused.get_parameter(kind).chunk(3)[number])
    del model.qkv
    moments = opt.state_of("qkv.weight")["exp_avg"].clone()
    report = opt.relayout(model)
    assert report.kept == ["norm.weight", "norm.bias", "out.weight"]
    assert torch.equal(opt.state_of("key.weight")["exp_avg"], moments[WIDTH : 2 * WIDTH])
    opt.zero_grad()
    model.value(DATA).sum().backward()
    opt.step()
    assert float(opt.state_of("value.bias")["step"]) == 4.0


def test_names_that_change_places_do_not_confuse_it() -> None:
    model = nn.ParameterDict({"a": torch.randn(2, 3), "b": torch.randn(2, 3)})
    opt = paramstate.Adam(model)
    for name, param in model.items():
        give_gradient(param, name)
    opt.step()
    moments, ids = {name: opt.state_of(name)["exp_avg"].clone() for name in "ab"}, opt.ids
    crossed = nn.ParameterDict({"a": model["b"].detach().clone(), "b": model["a"].detach().clone()})
    opt.relayout(crossed, {"a": "b", "b": "a"})
    assert torch.equal(opt.state_of("a")["exp_avg"], moments["b"])
    assert opt.ids == {"a": ids["b"], "b": ids["a"]}


# ---- what goes along ------------------------------------------------------------------------------------------------


def test_a_new_parameter_joins_the_group_of_what_it_comes_from() -> None:
    torch.manual_seed(0)
    model = Fused()
    opt = paramstate.AdamW(
        [
            {"params": [("qkv.weight", model.qkv.weight), ("out.weight", model.out.weight)], "lr": 0.1},
            {
                "params": [(n, p) for n, p in model.named_parameters() if p.dim() == 1],
                "weight_decay": 0.0,
                "name": "1d",
            },
        ],
        model=model,
    )
    train(model, opt, 1)
    made = split_of(model)
    opt.relayout(made)
    assert [group["param_names"] for group in opt.param_groups] == [
        ["W_Q", "W_K", "W_V", "W_O"],
        ["ln.weight", "ln.bias", "b_Q", "b_K", "b_V"],
    ]
    for group in opt.param_groups:
        named = zip(group["param_names"], group["params"], strict=True)
        assert all(param is made.get_parameter(name) for name, param in named)
    assert [group["lr"] for group in opt.param_groups] == [0.1, 1e-3]
    train(made, opt, 1)


def test_a_group_that_was_a_selection_is_what_it_holds_from_then_on() -> None:
    model = Fused()
    matrices = paramstate.select(model, "*.weight") - paramstate.select(model, nn.LayerNorm)
    opt = paramstate.AdamW([{"params": matrices}, {"params": ~matrices, "weight_decay": 0.0}])
    train(model, opt, 1)
    made = split_of(model)
    opt.relayout(made)
    made.later = nn.Parameter(torch.zeros(1))
    assert opt.rebind(made).unmanaged == ["later"], "the rest of the old model would have claimed it"
    assert [len(group["params"]) for group in opt.param_groups] == [4, 5]


def test_bounds_go_along_with_their_elements() -> None:
    low = torch.arange(12.0)[:, None].expand(12, WIDTH) / -12 - 0.1
    model, opt = trained(constraints={"qkv.weight": Box(min=low.clone()), "qkv.bias": Box(-0.3, 0.3)})
    made = split_of(model)
    opt.relayout(made)
    assert torch.equal(opt._find("W_V").constraint.min, part(2)(low))
    assert opt._find("b_K").constraint == Box(-0.3, 0.3)
    train(made, opt, 3)
    assert bool(torch.ge(made.W_V, part(2)(low)).all())
    again = Fused()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        again.qkv.weight.copy_(torch.cat([w.transpose(1, 2).flatten(0, 1) for w in (made.W_Q, made.W_K, made.W_V)]))
        again.qkv.bias.copy_(torch.cat([b.flatten() for b in (made.b_Q, made.b_K, made.b_V)]))
        again.out.weight.copy_(made.W_O.T)
        again.norm.load_state_dict(made.ln.state_dict())
    opt.constrain("W_Q", None)
    opt.relayout(again)
    held = opt._find("qkv.weight").constraint.min
    assert torch.equal(held[WIDTH:], low[WIDTH:])
    assert bool(held[:WIDTH].isneginf().all())


def test_a_norm_over_all_that_is_split_is_refused_and_one_of_each_output_is_kept() -> None:
    model, opt = trained(constraints={"qkv.weight": MaxNorm(3.0, dim=1)})
    opt.relayout(split_of(model))
    assert opt._find("W_Q").constraint == MaxNorm(3.0, dim=1)
    model, opt = trained(constraints={"qkv.weight": MaxNorm(9.0)})
    with pytest.raises(ConstraintError, match=r"'W_Q'.*MaxNorm"):
        opt.relayout(split_of(model))


def test_what_was_frozen_is_frozen() -> None:
    model, opt = trained()
    opt.freeze("qkv.weight")
    made = split_of(model)
    opt.relayout(made)
    before = made.W_Q.detach().clone()
    assert opt.frozen == ["W_Q", "W_K", "W_V"]
    assert not made.W_K.requires_grad
    train(made, opt, 2)
    assert torch.equal(made.W_Q, before)
    opt.unfreeze("W_Q")
    train(made, opt, 1)
    assert made.W_Q.requires_grad
    assert float(opt.state_of("W_Q")["step"]) == 4.0


def test_rows_of_their_own_age_go_where_their_elements_go() -> None:
    model, opt = trained()
    with opt.edit_rows() as rows:
        rows.reset("qkv.bias", [0, 1])
    opt.freeze_rows("qkv.bias", [10, 11])
    made = split_of(model)
    opt.relayout(made)
    assert opt.row_steps("b_Q").tolist() == [0, 3]
    assert opt._find("b_V").rows.frozen.tolist() == [False, True]
    assert opt._find("b_K").rows is None
    assert float(opt.state_of("b_K")["step"]) == 3.0


def test_a_frozen_row_that_would_be_half_a_row_is_refused() -> None:
    model, opt = trained()
    opt.freeze_rows("qkv.bias", [11])
    with pytest.raises(paramstate.UnsupportedError, match=r"'b_V'.*more than one dimension"):
        opt.relayout(split_of(model))


def test_parts_of_different_ages_become_rows_of_different_ages() -> None:
    model = nn.ParameterDict({"old": torch.randn(2, 3), "young": torch.randn(1, 3), "unborn": torch.randn(1, 3)})
    opt = paramstate.Adam(model, lr=0.1)
    for step in range(3):
        for name in ("old", "young") if step == 2 else ("old",):
            give_gradient(model[name], f"{name}:{step}")
        opt.step()
        opt.zero_grad()
    names = ["old", "young", "unborn"]
    joined = nn.ParameterDict({"all": torch.cat([model[name].detach() for name in names])})
    twin = copy.deepcopy((model, opt))
    opt.relayout(joined, {"all": (names, lambda *rows: torch.cat(rows))})
    assert opt.row_steps("all").tolist() == [3, 3, 1, 0]
    give_gradient(joined["all"], "next")
    gradient = joined["all"].grad.split([2, 1, 1])
    opt.step()
    apart, other = twin
    for name, grad in zip(names, gradient, strict=True):
        apart[name].grad = grad.clone()
    other.step()
    assert torch.allclose(joined["all"], torch.cat([apart[name].detach() for name in names]), atol=1e-7)


def test_state_of_the_clients_own_goes_along() -> None:
    model, opt = trained()
    opt.state[model.out.weight].update(mask=torch.ones(WIDTH, WIDTH).tril(), seen=7)
    opt.relayout(split_of(model))
    assert torch.equal(opt.state_of("W_O")["mask"], torch.ones(WIDTH, WIDTH).triu())
    assert opt.state_of("W_O")["seen"] == 7


def test_a_value_that_is_not_what_the_map_gives_is_reported() -> None:
    model, opt = trained()
    made = split_of(model)
    with torch.no_grad():
        made.W_K[0, 0, 0] += 1.0
    assert opt.relayout(made, MAPS).differing == ["W_K"]


def test_new_parameters_are_named_or_adopted() -> None:
    for group in (None, 0):
        model, opt = trained()
        made = split_of(model)
        made.scale = nn.Parameter(torch.tensor(0.5))
        report = opt.relayout(made, group=group)
        assert (report.unmanaged, report.adopted) == ((["scale"], []) if group is None else ([], ["scale"]))
        assert ("scale" in opt.ids) == (group == 0)


def test_what_is_to_go_goes() -> None:
    model, opt = trained()
    made = split_of(model)
    bare = nn.ParameterDict({name: param.detach() for name, param in made.named_parameters() if "ln" not in name})
    report = opt.relayout(bare, drop="norm.*")
    assert report.dropped == ["norm.weight", "norm.bias"]
    assert len(opt.ids) == len(opt.state) == 7


def test_another_model_is_left_alone() -> None:
    torch.manual_seed(0)
    model, critic = Fused(), nn.Linear(WIDTH, 1)
    opt = paramstate.AdamW([{"params": model, "name": "g"}, {"params": critic, "name": "c"}])
    train(nn.Sequential(model, critic), opt, 2)
    made = split_of(model)
    opt.relayout(made)
    assert [len(group["params"]) for group in opt.param_groups] == [9, 2]
    train(nn.Sequential(made, critic), opt, 1)
    assert {float(opt.state_of(name)["step"]) for name in opt.ids} == {3.0}


def test_two_models_of_one_form_are_told_apart_by_content_or_label() -> None:
    torch.manual_seed(0)
    one, two = Fused(), Fused()
    opt = paramstate.AdamW([{"params": one, "name": "one"}, {"params": two, "name": "two"}])
    train(nn.Sequential(one, two), opt, 2)
    opt.relayout(split_of(two), label="two")
    assert opt.ids.keys() >= {"one:qkv.weight", "W_Q"}
    assert opt.param(opt.ids["one:qkv.weight"]) is one.qkv.weight


# ---- what is refused, and leaves everything as it was ---------------------------------------------------------------


def processed(model: Fused) -> Split:
    made = split_of(model)
    with torch.no_grad():
        made.W_O.sub_(made.W_O.mean(1, keepdim=True))
    return made


def lacking(model: Fused, name: str) -> Split:
    made = split_of(model)
    delattr(made, name)
    return made


def shared(model: Fused) -> Split:
    made = split_of(model)
    memory = torch.cat([made.b_Q.detach(), made.b_K.detach()])
    made.b_Q, made.b_K = nn.Parameter(memory[:HEADS]), nn.Parameter(memory[HEADS - 1 : -1])
    return made


REFUSED: dict[str, tuple[Callable[[Fused, paramstate.AdamW], Any], type[Exception], str]] = {
    "processed": (
        lambda model, opt: opt.relayout(processed(model)),
        RelayoutError,
        r"'out\.weight' -> 'W_O': centred, transposed; centred over dim 1",
    ),
    "a part has no place": (
        lambda model, opt: opt.relayout(lacking(model, "b_K")),
        RelayoutError,
        r"'qkv\.bias\[4:8\]': missing",
    ),
    "an old one has no place": (
        lambda model, opt: opt.relayout(lacking(model, "W_O")),
        RelayoutError,
        r"'out\.weight': missing",
    ),
    "dropped by the maps": (
        lambda model, opt: opt.relayout(split_of(model), {**MAPS, "W_V": None}),
        StateShapeError,
        r"'qkv\.weight'.*drops elements: 16 of 48, the first at \[8, 0\], used by none of 'W_Q', 'W_K'",
    ),
    "repeated by the maps": (
        lambda model, opt: opt.relayout(split_of(model), {**MAPS, "W_V": ("qkv.weight", part(0))}),
        StateShapeError,
        r"'qkv\.weight'.*repeats elements: 16 of 48, the first at \[0, 0\], used by 'W_Q' and 'W_V'",
    ),
    "mixed by a map": (
        lambda model, opt: opt.relayout(
            split_of(model), {**MAPS, "W_V": ("qkv.weight", lambda w: part(2)(w - w.mean()))}
        ),
        StateShapeError,
        r"'W_V' from 'qkv\.weight'.*mixes or changes elements",
    ),
    "another shape": (
        lambda model, opt: opt.relayout(split_of(model), {**MAPS, "W_V": "qkv.weight"}),
        StateShapeError,
        r"'W_V' from 'qkv\.weight'.*gives shape \[12, 4\], the new value has \[2, 4, 2\]",
    ),
    "an unknown new name": (
        lambda model, opt: opt.relayout(split_of(model), {"W_q": "out.weight"}),
        UnknownParameterError,
        "the new model has no parameter 'W_q'; the nearest names there are .*'W_Q'",
    ),
    "an unknown old name": (
        lambda model, opt: opt.relayout(split_of(model), {"W_O": "out.wait"}),
        UnknownParameterError,
        r"'out\.wait'; the nearest names are 'out\.weight'",
    ),
    "an unknown group": (
        lambda model, opt: opt.relayout(split_of(model), group="heads"),
        UnknownParameterError,
        "no group 'heads'",
    ),
    "shared memory": (
        lambda model, opt: opt.relayout(shared(model), MAPS),
        paramstate.OverlapError,
        "'b_Q' and 'b_K' of the new model share memory",
    ),
    "dropped and used": (
        lambda model, opt: opt.relayout(split_of(model), MAPS, drop="norm.*"),
        ValueError,
        r"drop: parameter 'norm\.weight' is what 'ln\.weight' comes from",
    ),
    "dropped and kept": (
        lambda model, opt: opt.relayout(model, drop="norm.bias"),
        ValueError,
        r"drop: parameter 'norm\.bias' is in the new model",
    ),
    "one that is there already": (
        lambda model, opt: opt.relayout(model, {"out.weight": "qkv.weight"}),
        ValueError,
        r"'out\.weight' of the new model is trained already",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_everything_as_it_was(case: str) -> None:
    act, error, message = REFUSED[case]
    model, opt = trained()
    before, ids, names = bits(opt), opt.ids, list(dict(model.named_parameters()))
    with pytest.raises(error, match=message):
        act(model, opt)
    after = bits(opt)
    assert opt.ids == ids
    assert all(same_bits(after[name][key], before[name][key]) for name in before for key in before[name])
    assert [opt.name_of(param) for param in opt.param_groups[0]["params"]] == names
    train(model, opt, 1)
    stayed, expected = trained(4)
    assert_close(bits(opt), bits(expected))
    assert paramstate.doctor(stayed, expected).healthy
    assert paramstate.doctor(model, opt).healthy


def test_sources_in_different_groups_are_refused_by_name() -> None:
    model = nn.ParameterDict({"a": torch.randn(3), "b": torch.randn(3)})
    opt = paramstate.Adam([{"params": [model["a"]]}, {"params": [model["b"]], "lr": 0.1}], model=model)
    joined = nn.ParameterDict({"ab": torch.cat([model["a"].detach(), model["b"].detach()])})
    with pytest.raises(StateShapeError, match="'ab' comes from 'a' and 'b', which are in different groups"):
        opt.relayout(joined)


def test_sources_of_which_one_is_frozen_are_refused_by_name() -> None:
    model = nn.ParameterDict({"a": torch.randn(3), "b": torch.randn(3)})
    opt = paramstate.Adam(model)
    opt.freeze("a")
    joined = nn.ParameterDict({"ab": torch.cat([model["a"].detach(), model["b"].detach()])})
    with pytest.raises(StateShapeError, match="'ab' comes from 'a' and 'b', of which some are frozen"):
        opt.relayout(joined)


def test_constraints_of_different_kinds_are_not_joined() -> None:
    opt, joined = joining(a=MaxNorm(1.0), b=Box(-1.0, 1.0))
    with pytest.raises(ConstraintError, match=r"'ab': the parameters that it comes from have different constraints"):
        opt.relayout(joined)


def test_bounds_that_treat_momentum_differently_are_not_joined() -> None:
    opt, joined = joining(a=Box(-9.0, 9.0, zero_exp_avg=True), b=Box(-9.0, 9.0))
    with pytest.raises(ConstraintError, match=r"'ab': the bounds of its sources differ in zero_exp_avg"):
        opt.relayout(joined)
    opt.constrain("b", None)
    opt.relayout(joined)
    assert opt._find("ab").constraint.zero_exp_avg
    assert opt._find("ab").constraint.max.tolist() == [9.0] * 3 + [torch.inf] * 3


def joining(**constraints: paramstate.Constraint) -> tuple[paramstate.Adam, nn.ParameterDict]:
    """An optimizer of two parameters, and the model in which they are one."""
    model = nn.ParameterDict({"a": torch.randn(3), "b": torch.randn(3)})
    opt = paramstate.Adam(model, constraints=constraints)
    return opt, nn.ParameterDict({"ab": torch.cat([model["a"].detach(), model["b"].detach()])})


def test_what_is_sharded_is_refused_by_name() -> None:
    opt, joined = joining()
    joined["ab"].placements = ()  # what tells a DTensor
    with pytest.raises(paramstate.UnsupportedError, match=r"'ab' is sharded, or comes from one that is"):
        opt.relayout(joined)


def test_the_report_says_of_which_parameters_it_knows() -> None:
    opt, joined = joining()
    report = opt.relayout(joined)
    assert report.of("ab").sources == ("a", "b")
    with pytest.raises(UnknownParameterError, match=r"no state was carried to a parameter 'a'.*'ab'"):
        report.of("a")
    with pytest.raises(UnknownParameterError, match="none"):
        paramstate.RelayoutReport().of("a")


def test_a_constant_value_with_a_state_of_its_own_is_not_guessed() -> None:
    model = nn.ModuleDict({"one": nn.LayerNorm(3, bias=False), "two": nn.LayerNorm(3, bias=False)})
    opt = paramstate.Adam(model, lr=0.0)
    for name, param in model.named_parameters():
        give_gradient(param, name)
    opt.step()
    made = nn.ModuleDict({"h_one": nn.LayerNorm(3, bias=False), "h_two": nn.LayerNorm(3, bias=False)})
    held = opt.state_of("one.weight")["exp_avg"].clone()
    with pytest.raises(StateShapeError, match=r"'two\.weight' holds the same values and another state"):
        opt.relayout(made)
    opt.relayout(made, {"h_one.weight": "one.weight", "h_two.weight": "two.weight"})
    assert torch.equal(opt.state_of("h_one.weight")["exp_avg"], held)


def test_twins_with_different_moments_are_not_guessed() -> None:
    value = torch.randn(4)
    model = nn.ParameterDict({"a": value.clone(), "b": value.clone()})
    opt = paramstate.Adam(model, lr=0.0)
    for name, param in model.items():
        give_gradient(param, name)
    opt.step()
    with pytest.raises(StateShapeError, match="holds the same values and another state"):
        opt.relayout(nn.ParameterDict({"x": value.clone(), "y": value.clone()}))


class Tied(nn.Module):
    """Two names, for one parameter or for two of the same value."""

    def __init__(self, names: tuple[str, str], *, tied: bool = True) -> None:
        super().__init__()
        one = nn.Parameter(torch.randn(3, 2, generator=torch.Generator().manual_seed(5)))
        self.register_parameter(names[0], one)
        self.register_parameter(names[1], one if tied else nn.Parameter(one.detach().clone()))


def test_a_tied_parameter_stays_tied_or_is_refused() -> None:
    model = Tied(("embed", "head"))
    opt = paramstate.Adam(model, lr=0.0)
    give_gradient(model.embed, "a")
    opt.step()
    with pytest.raises(StateShapeError, match=r"'embed' is tied to 'head'.*unties it into 'W_E', 'W_U'.*'W_U': None"):
        opt.relayout(Tied(("W_E", "W_U"), tied=False))
    id = opt.ids["embed"]
    opt.relayout(Tied(("W_E", "W_U")))
    assert opt.ids == {"W_E": id, "W_U": id}


def test_parameters_that_become_one_are_refused() -> None:
    opt = paramstate.Adam(Tied(("embed", "head"), tied=False))
    with pytest.raises(StateShapeError, match=r"'head' goes nowhere in the new model; name it in drop="):
        opt.relayout(Tied(("W_E", "W_U")))
    assert opt.relayout(Tied(("W_E", "W_U")), drop="head").dropped == ["head"]
