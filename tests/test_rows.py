"""Rows are exact: a new or reset row steps as a fresh parameter does, a frozen or skipped one keeps its bits."""

from __future__ import annotations

import copy
import gc
import pkgutil
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import paramstate
from paramstate import Box, RowIndexError, StateShapeError, UnsupportedError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
"""Complex parameters are stepped by torch operations, the others by the kernels."""


class Table(nn.Module):
    """A model of one table, with a buffer that has an element for each of its rows."""

    def __init__(self, rows: int = 5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 3, dtype=dtype))
        self.register_buffer("seen", torch.arange(float(rows)))


def step(table: Table, opt: torch.optim.Optimizer, grad: torch.Tensor, **options: object) -> None:
    table.weight.grad = grad.to(table.weight.dtype)
    opt.step(**options)


def grads(count: int, rows: int = 5, start: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(start)
    return [torch.randn(rows, 3, generator=generator) for _ in range(count)]


class RowByRow:
    """The twin: every row is a parameter with an optimizer of its own."""

    def __init__(self, table: Table, **options: object) -> None:
        self.options = options
        self.rows = [self.fresh(row) for row in table.weight.detach()]

    def fresh(self, value: torch.Tensor) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        row = nn.Parameter(value.clone())
        return row, paramstate.AdamW([row], **self.options)

    def step(self, grad: torch.Tensor, active: torch.Tensor | None = None) -> None:
        for index, (row, opt) in enumerate(self.rows):
            if active is None or active[index]:
                row.grad = grad[index].to(row.dtype)
                opt.step()

    def assert_equals(self, table: Table, opt: paramstate.AdamW) -> None:
        state = opt.state_of(table.weight)
        for index, (row, own) in enumerate(self.rows):
            assert torch.equal(table.weight[index], row), f"row {index}"
            for key in ("exp_avg", "exp_avg_sq"):
                held = own.state[row].get(key, torch.zeros_like(row)) if own.state else torch.zeros_like(row)
                assert torch.equal(state[key][index], held), f"row {index}, {key}"


OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "amsgrad": True, "maximize": True},
    {"lr": 0.1, "weight_decay": 0.0, "betas": (0.5, 0.9)},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=["decay", "amsgrad", "short memory"])
def test_edited_rows_step_as_parameters_of_their_own(dtype: torch.dtype, options: dict[str, object]) -> None:
    if dtype.is_complex and "amsgrad" in options:
        options = {key: value for key, value in options.items() if key != "amsgrad"}
    table = Table(dtype=dtype)
    opt = paramstate.AdamW(table, **options)
    twin = RowByRow(table, **options)
    for grad in grads(4):
        step(table, opt, grad)
        twin.step(grad)
    new = torch.randn(2, 3, dtype=dtype)
    with opt.edit_rows() as rows:
        rows.keep(["weight", "seen"], torch.tensor([True, False, True, True, False]))
        rows.append("weight", new)
        rows.append("seen", 2)
        rows.gather(["weight", "seen"], [4, 0, 0, 2])
        rows.reset(["weight"], [3])
    kept = [twin.rows[index] for index in (0, 2, 3)]
    twin.rows = [twin.fresh(new[1]), kept[0], copy.deepcopy(kept[0]), twin.fresh(kept[2][0].detach())]
    assert table.seen.tolist() == [0.0, 0.0, 0.0, 3.0]
    assert opt.row_steps("weight").tolist() == [0, 4, 4, 0]
    for grad in grads(6, rows=4, start=1):
        step(table, opt, grad)
        twin.step(grad)
    if dtype.is_complex:
        for index, (row, _) in enumerate(twin.rows):
            assert torch.allclose(table.weight[index], row, rtol=1e-5, atol=1e-6)
    else:
        twin.assert_equals(table, opt)


def test_append_rows_step_a_new_row_moves_by_lr_while_the_old_ones_have_aged() -> None:
    table = Table()
    opt = paramstate.Adam(table, lr=0.01)
    for _ in range(100):
        step(table, opt, torch.ones(5, 3))
    with opt.edit_rows() as rows:
        rows.append("weight", 2)
    start = table.weight.detach().clone()
    for _ in range(10):
        step(table, opt, torch.ones(7, 3))
    moved = (table.weight - start).abs() / 0.01
    assert torch.allclose(moved[5:], torch.full((2, 3), 10.0), rtol=1e-3), "about lr a step, 10 lr in 10 steps"
    assert torch.allclose(moved[:5], torch.full((5, 3), 10.0), rtol=1e-2)


def test_zero_moments_keep_step_is_what_a_reset_row_is_spared() -> None:
    def drift(reset: object) -> float:
        torch.manual_seed(0)
        table = Table()
        opt = paramstate.Adam(table, lr=0.01)
        for grad in grads(200):
            step(table, opt, grad)
        fresh = Table()
        fresh.load_state_dict(table.state_dict())
        fresh_opt = paramstate.Adam(fresh, lr=0.01)
        reset(table, opt)
        for grad in grads(20, start=9):
            step(table, opt, grad)
            step(fresh, fresh_opt, grad)
        return float((table.weight - fresh.weight).detach().abs().max())

    def by_hand(table: Table, opt: paramstate.Adam) -> None:
        for key in ("exp_avg", "exp_avg_sq"):
            opt.state[table.weight][key].zero_()

    def by_rows(_: Table, opt: paramstate.Adam) -> None:
        with opt.edit_rows() as rows:
            rows.reset("weight", slice(None))

    assert drift(by_rows) == 0.0
    assert drift(by_hand) > 0.1, "what a client writes by hand is taken literally, as torch does"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_frozen_rows_keep_their_bits_through_1000_steps_of_adamw(dtype: torch.dtype, dim: int) -> None:
    table = Table(dtype=dtype)
    opt = paramstate.AdamW(table, lr=1e-2, weight_decay=0.1)
    for grad in grads(3):
        step(table, opt, grad)
    opt.freeze_rows("weight", [0, 2], dim=dim)
    state = opt.state_of("weight")
    before = {key: state[key].index_select(dim, torch.tensor([0, 2])).clone() for key in ("exp_avg", "exp_avg_sq")}
    before["value"] = table.weight.detach().index_select(dim, torch.tensor([0, 2])).clone()
    count = 1000 if not dtype.is_complex else 50
    for grad in grads(count, start=2):
        step(table, opt, grad)
    after = {**{key: state[key] for key in ("exp_avg", "exp_avg_sq")}, "value": table.weight.detach()}
    for key, held in before.items():
        assert torch.equal(after[key].index_select(dim, torch.tensor([0, 2])), held), key
    ages = opt.row_steps("weight")
    assert ages.tolist() == [3, 3 + count, 3, *([3 + count] * 2)][: len(ages)]


def test_unfrozen_rows_resume_exactly() -> None:
    table = Table()
    opt = paramstate.AdamW(table, lr=0.1)
    twin = RowByRow(table, lr=0.1)
    active = torch.tensor([True, False, True, True, False])
    for number, grad in enumerate(grads(9)):
        if number == 3:
            opt.freeze_rows("weight", ~active)
        if number == 6:
            opt.unfreeze_rows("weight")
        step(table, opt, grad)
        twin.step(grad, active if 3 <= number < 6 else None)
    twin.assert_equals(table, opt)


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_rows_updates_only_the_rows_named(dtype: torch.dtype) -> None:
    table = Table(dtype=dtype)
    opt = paramstate.AdamW(table, lr=0.1)
    twin = RowByRow(table, lr=0.1)
    for seed, grad in enumerate(grads(8)):
        mask = torch.rand(5, generator=torch.Generator().manual_seed(seed)) > 0.5
        step(table, opt, grad, rows={"weight": mask if seed % 2 else mask.nonzero().flatten().tolist()})
        twin.step(grad, mask)
    if dtype.is_complex:
        for index, (row, _) in enumerate(twin.rows):
            assert torch.allclose(table.weight[index], row, rtol=1e-5, atol=1e-6)
    else:
        twin.assert_equals(table, opt)


@pytest.mark.parametrize("way", ["freeze", "step", "layout"])
def test_rows_of_a_parameter_whose_state_a_client_deleted_have_taken_no_step(way: str) -> None:
    table = Table()
    opt = paramstate.AdamW(table, lr=0.1)
    opt.freeze_rows("weight", [0], dim=1)
    step(table, opt, torch.ones(5, 3))
    opt.unfreeze_rows("weight")
    with pytest.raises(paramstate.UnsupportedError):
        opt.freeze_rows("weight", [0])
    del opt.state[table.weight]
    if way == "freeze":
        opt.freeze_rows("weight", [0])
        step(table, opt, torch.ones(5, 3))
        assert opt.row_steps("weight").tolist() == [0, 1, 1, 1, 1]
    elif way == "step":
        step(table, opt, torch.ones(5, 3), rows={"weight": [0]})
        assert opt.row_steps("weight").tolist() == [1, 0, 0, 0, 0]
    else:
        opt.replace_("weight", table.weight.reshape(3, 5), state=lambda t: t.reshape(3, 5))
        assert opt.row_steps("weight").tolist() == [0] * 3


@pytest.mark.parametrize("has_gradient", [False, True])
@pytest.mark.parametrize("constraint", [paramstate.Box(-0.5), paramstate.MaxNorm(0.1, dim=1), lambda w: w.clamp(0)])
def test_rows_that_sit_out_are_not_brought_to_a_constraint(constraint: object, has_gradient: bool) -> None:
    table = Table()
    opt = paramstate.AdamW(table, lr=0.1)
    opt.constrain("weight", constraint)
    with torch.no_grad():
        table.weight.fill_(-3.0)  # by somebody who knows of no constraint
    table.weight.grad = torch.ones(5, 3) if has_gradient else None
    opt.step(rows={"weight": [1, 3]})
    assert (table.weight == -3.0).all(dim=1).tolist() == [True, False, True, False, True]


def test_rows_that_sit_out_are_not_in_the_norm_that_clips() -> None:
    table = Table()
    opt = paramstate.AdamW(table, max_grad_norm=1.0)
    opt.freeze_rows("weight", [1])
    (grad,) = grads(1)
    step(table, opt, grad, rows={"weight": [0, 1]})
    assert opt.grad_norm.item() == pytest.approx(grad[0].norm().item())


def test_rows_of_any_dimension_may_be_edited() -> None:
    table = Table()
    opt = paramstate.AdamW(table, lr=0.1)
    for grad in grads(2):
        step(table, opt, grad)
    before = opt.state_of("weight")["exp_avg"].clone()
    with opt.edit_rows() as rows:
        rows.permute("weight", [2, 0, 1], dim=1)
        rows.pad("weight", before=1, after=2, value=7.0, dim=-1)
    assert list(table.weight.shape) == [5, 6]
    assert torch.equal(table.weight[:, 0], torch.full((5,), 7.0))
    assert torch.equal(opt.state_of("weight")["exp_avg"][:, 1:4], before[:, [2, 0, 1]])
    assert opt.row_steps("weight").tolist() == [0, 2, 2, 2, 0, 0]


@pytest.mark.parametrize("dim", [0, 1])
def test_the_order_of_dimensions_in_memory_stays(dim: int) -> None:
    conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    opt = paramstate.AdamW(conv, lr=0.1)
    conv(torch.randn(2, 3, 5, 5)).square().sum().backward()
    opt.step()
    before, state = conv.weight.detach().clone(), opt.state_of("weight")["exp_avg"].clone()
    with opt.edit_rows() as rows:
        rows.gather("weight", [2, 0, 1], dim=dim)
        rows.append("weight", torch.ones_like(before.narrow(dim, 0, 1)), dim=dim)
        rows.pad("weight", before=1, dim=dim)
    moments = opt.state_of("weight")
    assert conv.weight.grad is not None
    for tensor in (conv.weight, conv.weight.grad, moments["exp_avg"], moments["exp_avg_sq"]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    index = torch.tensor([2, 0, 1])
    assert torch.equal(conv.weight.narrow(dim, 1, 3), before.index_select(dim, index))
    assert torch.equal(moments["exp_avg"].narrow(dim, 1, 3), state.index_select(dim, index))
    assert bool((conv.weight.narrow(dim, 4, 1) == 1).all())
    assert not conv.weight.narrow(dim, 0, 1).any()


def test_resize_cuts_or_fills_the_end() -> None:
    table = Table()
    opt = paramstate.AdamW(table)
    with opt.edit_rows() as rows:
        rows.resize(["weight", "seen"], 7, value=-1.0)
    assert table.seen.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, -1.0, -1.0]
    with opt.edit_rows() as rows:
        rows.resize(["weight", "seen"], 2)
    assert list(table.weight.shape) == [2, 3]
    assert table.seen.tolist() == [0.0, 1.0]


def test_all_rows_alike_again_cost_nothing() -> None:
    table = Table()
    opt = paramstate.AdamW(table)
    for grad in grads(3):
        step(table, opt, grad)
    with opt.edit_rows() as rows:
        rows.append("weight", 1)
    assert opt._find("weight").rows is not None
    with opt.edit_rows() as rows:
        rows.keep("weight", [5])
    assert opt._find("weight").rows is None
    assert opt.state_of("weight")["step"] == 0


def test_a_copied_row_has_the_state_of_its_source_or_fresh_state() -> None:
    table = Table()
    opt = paramstate.AdamW(table)
    for grad in grads(3):
        step(table, opt, grad)
    with opt.edit_rows() as rows:
        rows.append("weight", copy_of=[1, 1], state_of=[1, 2])
        rows.append("weight", copy_of=[0])
    held = opt.state_of("weight")
    assert torch.equal(table.weight[5], table.weight[1])
    assert torch.equal(held["exp_avg"][5:7], held["exp_avg"][1:3])
    assert not held["exp_avg"][7].any()
    assert opt.row_steps("weight").tolist() == [3] * 7 + [0]


def test_the_gradient_moves_with_its_rows() -> None:
    table = Table()
    opt = paramstate.AdamW(table)
    (grad,) = grads(1)
    table.weight.grad = grad
    with opt.edit_rows() as rows:
        rows.gather("weight", [3, 3, 0])
        rows.append("weight", 1)
    assert torch.equal(table.weight.grad, torch.cat([grad[[3, 3, 0]], torch.zeros(1, 3)]))


def test_every_place_has_the_new_parameter_with_its_hooks_and_attributes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    old = model.embed.weight
    old.tag = "mine"
    calls: list[int] = []
    handle = old.register_hook(lambda _: calls.append(1))
    opt = paramstate.AdamW(model)
    id_before = opt.id_of(old)
    with opt.edit_rows() as rows:
        rows.resize("embed.weight", 6)
        pending = rows["embed.weight"]
    assert model.embed.weight is model.head.weight
    assert model.embed.weight is opt.param(id_before)
    assert model.embed.weight is not old
    assert list(pending.shape) == [6, 3]
    assert model.embed.weight.tag == "mine"
    model.embed.weight.sum().backward()
    assert calls == [1]
    handle.remove()
    model.embed.weight.sum().backward()
    assert calls == [1]


def test_parameters_in_a_dict_of_the_users_are_exchanged_there() -> None:
    splats = {"means": nn.Parameter(torch.randn(3, 2)), "scales": nn.Parameter(torch.randn(3))}
    opt = paramstate.Adam([{"params": [param], "name": name} for name, param in splats.items()])
    counts = {"count": torch.ones(3)}
    side = {**splats, **counts}
    with opt.edit_rows(side=side) as rows:
        rows.keep([side["means"], side["scales"], "count"], [0, 2])
    assert [group["params"][0] for group in opt.param_groups] == [side["means"], side["scales"]]
    assert [list(side[key].shape) for key in ("means", "scales", "count")] == [[2, 2], [2], [2]]


def test_bounds_of_each_row_follow_it() -> None:
    low = torch.tensor([[-0.1], [-0.2], [-0.3], [-0.4], [-0.5]])
    table = Table()
    opt = paramstate.AdamW(table, lr=0.5, constraints={"weight": Box(min=low)})
    with opt.edit_rows() as rows:
        rows.gather("weight", [4, 1])
    for grad in grads(4, rows=2):
        step(table, opt, grad)
    assert bool((table.weight >= low[[4, 1]]).all())
    with pytest.raises(paramstate.ConstraintError, match=r"'weight'.*a new row has none"), opt.edit_rows() as rows:
        rows.append("weight", 1)
    with opt.edit_rows() as rows:
        rows.append("weight", torch.full((1, 3), -9.0), state_of=[0])
    assert torch.equal(table.weight[2], torch.full((3,), -0.5)), "a new row is brought within its bounds"


STAGES = [
    ("paramstate.surgery.row_targets.successor", 0),
    ("paramstate.surgery.row_targets.successor", 1),
    ("paramstate.identity.membership.Membership._exchange", 0),
    ("paramstate.identity.membership.Membership._exchange", 1),
    ("paramstate.identity.membership.Membership._traits_changed", 0),
    ("paramstate.identity.membership.Membership._traits_changed", 1),
    ("paramstate.identity.membership.Membership._put_into_slots", 0),
    ("paramstate.identity.membership.Membership._put_into_slots", 1),
    ("paramstate.surgery.row_targets.EditedBuffer.install", 0),
    ("paramstate.surgery.row_edits.EditRows._renew_side", 0),
]


@pytest.mark.parametrize(("place", "calls_before"), STAGES)
def test_a_failure_at_any_stage_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch, place: str, calls_before: int
) -> None:
    model = nn.ModuleDict({"a": Table(), "b": Table()})
    opt = paramstate.AdamW(model, lr=0.1)
    for table in model.values():
        table.weight.grad = torch.randn(5, 3)
    opt.step()
    opt.freeze_rows("a.weight", [0])
    side = {"count": torch.ones(5)}
    before = {
        "objects": [id(t) for t in (*model.parameters(), *model.buffers(), side["count"])],
        "grads": [id(p.grad) for p in model.parameters()],
        "groups": [[id(p) for p in group["params"]] for group in opt.param_groups],
        "state": {id(p): {k: id(v) for k, v in held.items()} for p, held in opt.state.items()},
        "ids": dict(opt.ids),
    }
    values = copy.deepcopy([*model.parameters(), *opt.state_of("a.weight").values()])
    module_name, attribute = place.rsplit(".", 1)
    owner = pkgutil.resolve_name(module_name)
    real, count = getattr(owner, attribute), [0]

    def failing(*args: object, **options: object) -> object:
        count[0] += 1
        if count[0] == calls_before + 1:
            if "install" not in attribute and "successor" not in attribute:
                real(*args, **options)  # fails after its work was done
            raise ZeroDivisionError
        return real(*args, **options)

    def edit() -> None:
        with opt.edit_rows(side=side) as rows:
            rows.keep(["a.weight", "a.seen", "count", "b.weight", "b.seen"], [0, 1])
            rows.append(["a.weight", "b.weight"], 2)

    monkeypatch.setattr(owner, attribute, failing)
    with pytest.raises(ZeroDivisionError):
        edit()
    monkeypatch.undo()
    after = {
        "objects": [id(t) for t in (*model.parameters(), *model.buffers(), side["count"])],
        "grads": [id(p.grad) for p in model.parameters()],
        "groups": [[id(p) for p in group["params"]] for group in opt.param_groups],
        "state": {id(p): {k: id(v) for k, v in held.items()} for p, held in opt.state.items()},
        "ids": dict(opt.ids),
    }
    assert after == before
    assert all(map(torch.equal, values, [*model.parameters(), *opt.state_of("a.weight").values()]))
    assert opt.row_steps("a.weight").tolist() == [1] * 5
    opt.step()
    assert opt.row_steps("a.weight").tolist() == [1, 2, 2, 2, 2], "it goes on, row 0 frozen still"


def test_an_exception_inside_the_block_applies_nothing() -> None:
    table = Table()
    opt = paramstate.AdamW(table)
    old = table.weight

    def edit() -> None:
        with opt.edit_rows() as rows:
            rows.keep("weight", [0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        edit()
    assert table.weight is old


def test_a_closed_edit_of_rows_refuses_work_and_shows_the_parameters_themselves() -> None:
    table = Table()
    model = nn.ModuleDict({"a": table, "b": Table()})
    opt = paramstate.AdamW(model)
    with opt.edit_rows() as rows:
        rows.keep(["a.weight", "a.seen"], [0, 2])
        with pytest.raises(ValueError, match=r"is one target, and '\*\.weight' stands for 2"):
            rows["*.weight"]
    assert rows["a.weight"] is table.weight
    assert rows["a.seen"] is table.seen
    assert rows["b.weight"] is opt.param(opt.ids["b.weight"])
    for closed in (rows.keep, rows.gather, rows.permute, rows.reset):
        with pytest.raises(paramstate.EditError, match="inside a block"):
            closed("a.weight", [0])
    assert list(table.weight.shape) == [2, 3]


def test_an_edit_of_rows_that_failed_shows_what_is_there_still() -> None:
    table = Table()
    opt = paramstate.AdamW(table)
    rows = opt.edit_rows()

    def edit() -> None:
        with rows:
            rows.keep(["weight", "seen"], [0])
            rows.append("weight", torch.zeros(1, 9))

    with pytest.raises(StateShapeError):
        edit()
    assert rows["weight"] is table.weight
    assert list(rows["seen"].shape) == [5]


def test_a_step_inside_the_block_is_noticed() -> None:
    table = Table()
    opt = paramstate.AdamW(table)

    def edit() -> None:
        with opt.edit_rows() as rows:
            rows.keep("weight", [0])
            step(table, opt, torch.ones(5, 3))

    with pytest.raises(paramstate.ReplacedParameterError, match=r"'weight' was changed while its rows were edited"):
        edit()
    assert list(table.weight.shape) == [5, 3]


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda rows: rows.keep("weight", [5]), RowIndexError, r"'weight' has 5 rows, the index 5 points beyond"),
        (lambda rows: rows.keep("weight", [1, 1]), RowIndexError, r"'weight': keep\(...\) names a row twice"),
        (lambda rows: rows.keep("weight", torch.ones(4) > 0), RowIndexError, r"has 5 rows, the mask has shape \[4\]"),
        (lambda rows: rows.keep("weight", torch.ones(2)), TypeError, r"boolean mask or by integers, got torch.float32"),
        (lambda rows: rows.keep("weight", [[0]]), RowIndexError, r"must be one-dimensional, got shape \[1, 1\]"),
        (lambda rows: rows.keep("weight", [0], dim=2), RowIndexError, r"'weight' has shape \[5, 3\], and no dim 2"),
        (lambda rows: rows.permute("weight", [0, 1]), RowIndexError, r"must name each of its rows exactly once"),
        (
            lambda rows: rows.append("weight", torch.ones(2, 4)),
            StateShapeError,
            r"must have shape \[n, 3\], got \[2, 4\]",
        ),
        (lambda rows: rows.append("weight"), TypeError, r"either values"),
        (lambda rows: rows.append("weight", 2, state_of=[0]), RowIndexError, r"2 rows are appended, state_of= names 1"),
        (lambda rows: rows.append("weight", -1), ValueError, r"append\(...\) .* must be at least 0, got -1"),
        (lambda rows: rows.append("weight", [[0.0] * 3]), TypeError, r"a tensor of new rows, or how many: .* got list"),
        (lambda rows: rows.append("weight", True), TypeError, r"got bool"),
        (lambda rows: rows.pad("weight", -1), ValueError, r"pad\(...\) adds rows: before must be at least 0, got -1"),
        (lambda rows: rows.pad("weight", after=1.5), TypeError, r"after must be a whole number, got float"),
        (lambda rows: rows.resize("weight", -1), ValueError, r"resize\(...\) .* got -1"),
        (lambda rows: rows.resize("weight", 2.5), TypeError, r"size must be a whole number, got float"),
        (lambda rows: rows.keep("wait", [0]), paramstate.UnknownParameterError, r"'wait'.*'weight'"),
    ],
)
def test_edits_that_do_not_fit_are_refused_by_name(edit: object, error: type[Exception], message: str) -> None:
    table = Table()
    opt = paramstate.AdamW(table)
    old = table.weight
    with pytest.raises(error, match=message), opt.edit_rows() as rows:
        edit(rows)
    assert table.weight is old


def test_a_second_stepped_dimension_is_refused_by_name() -> None:
    table = Table()
    opt = paramstate.AdamW(table)
    step(table, opt, torch.ones(5, 3))
    with opt.edit_rows() as rows:
        rows.append("weight", 1)
    with (
        pytest.raises(UnsupportedError, match=r"'weight': its rows differ along dim 0 already"),
        opt.edit_rows() as rows,
    ):
        rows.append("weight", 1, dim=1)
    with pytest.raises(UnsupportedError, match="along dim 0 already"):
        opt.freeze_rows("weight", [0], dim=1)
    with opt.edit_rows() as rows:
        rows.permute("weight", [2, 1, 0], dim=1)  # without fresh rows another dimension is no matter
    assert opt.row_steps("weight").tolist() == [1] * 5 + [0]


@pytest.mark.parametrize("why", ["steps taken", "frozen rows", "steps taken and frozen rows"])
def test_the_advice_about_a_second_stepped_dimension_helps(why: str) -> None:
    table = Table()
    opt = paramstate.AdamW(table)
    step(table, opt, torch.ones(5, 3), **({"rows": {"weight": [0]}} if "steps" in why else {}))
    if "frozen" in why:
        opt.freeze_rows("weight", [2])
    with pytest.raises(UnsupportedError, match=rf"differ along dim 0 already \({why}\), and .*; use dim=0") as raised:
        opt.freeze_rows("weight", [1], dim=1)
    advice = str(raised.value)
    if "opt.reset(...)" in advice:
        opt.reset("weight")
    if "opt.unfreeze_rows(...)" in advice:
        opt.unfreeze_rows("weight")
    opt.freeze_rows("weight", [1], dim=1)
    before = table.weight.detach().clone()
    step(table, opt, torch.ones(5, 3))
    assert (table.weight != before).any(dim=0).tolist() == [True, False, True]


def test_rows_that_are_alike_again_may_differ_along_another_dimension() -> None:
    table = Table()
    opt = paramstate.AdamW(table)
    step(table, opt, torch.ones(5, 3), rows={"weight": [0, 1, 2, 3, 4]})
    opt.freeze_rows("weight", [2])
    with opt.edit_rows() as rows:
        rows.keep("weight", [0, 1, 3])  # the frozen one goes
    step(table, opt, torch.ones(3, 3), rows={"weight": []})  # each of them sat one out
    opt.freeze_rows("weight", [], dim=0)
    opt.freeze_rows("weight", [1], dim=1)
    step(table, opt, torch.ones(3, 3))
    assert opt.row_steps("weight").tolist() == [2, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("how", ["del", "policy", "materialize"])
def test_rows_begin_anew_with_the_state(dtype: torch.dtype, how: str) -> None:
    table = Table(dtype=dtype)
    opt = paramstate.AdamW(table, on_replace="reset")
    step(table, opt, torch.ones(5, 3))
    with opt.edit_rows() as rows:
        rows.append("weight", 1)
    opt.freeze_rows("weight", [0])
    if how == "policy":
        table.weight = nn.Parameter(table.weight.detach().clone())
    else:
        del opt.state[table.weight]
    assert opt.row_steps("weight").tolist() == [0] * 6
    if how == "materialize":
        opt.materialize_state()
    step(table, opt, torch.ones(6, 3), rows={"weight": [0, 1, 2, 3]})
    assert opt.row_steps("weight").tolist() == [0, 1, 1, 1, 0, 0], "row 0 is frozen still"
    opt.unfreeze_rows("weight")
    del opt.state[table.weight]
    step(table, opt, torch.ones(6, 3), rows={"weight": [5]})
    assert opt.row_steps("weight").tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("how", ["reset", "rebind"])
def test_fresh_state_of_another_number_of_rows_has_nothing_of_the_rows_before(how: str) -> None:
    table = Table()
    opt = paramstate.AdamW(table)
    step(table, opt, torch.ones(5, 3))
    opt.freeze_rows("weight", [4])
    table.weight = nn.Parameter(torch.ones(2, 3))
    if how == "reset":
        opt.reset("weight")
    else:
        assert opt.rebind(table).reshaped == ["weight"]
    step(table, opt, torch.ones(2, 3))
    assert opt.row_steps("weight").tolist() == [1, 1]


def test_edits_leave_the_values_of_what_is_frozen_as_they_are() -> None:
    table = Table()
    opt = paramstate.AdamW(table)
    opt.freeze_rows("weight", [0])
    opt.constrain("weight", Box(-0.01, 0.01))
    before = table.weight.detach().clone()
    with opt.edit_rows() as rows:
        rows.gather("weight", [0, 1])
        rows.append("weight", torch.ones(1, 3))
    assert torch.equal(table.weight[0], before[0])
    assert bool((table.weight[1:].abs() <= 0.01).all())
    opt.freeze("weight")
    with opt.edit_rows() as rows:
        rows.append("weight", torch.ones(1, 3))
    assert torch.equal(table.weight[3], torch.ones(3))


def test_bounds_of_no_rows_are_none_for_a_new_one() -> None:
    table = Table()
    opt = paramstate.AdamW(table, constraints=Box(min=torch.arange(5.0)[:, None]))
    with opt.edit_rows() as rows:
        rows.keep("weight", [])
    with pytest.raises(paramstate.ConstraintError, match="a new row has none"), opt.edit_rows() as rows:
        rows.append("weight", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_function_that_constrains_leaves_rows_alone_that_a_step_leaves_out(dtype: torch.dtype) -> None:
    table = Table(dtype=dtype)
    opt = paramstate.AdamW(table, lr=0.1)
    step(table, opt, torch.ones(5, 3))
    opt.constrain("weight", torch.zeros_like)
    with torch.no_grad():
        table.weight.fill_(1.0)
    step(table, opt, torch.ones(5, 3), rows={"weight": [1, 2]})
    assert table.weight[:, 0].tolist() == [1.0, 0.0, 0.0, 1.0, 1.0]


def test_rows_survive_deepcopy_save_load_and_replacement() -> None:
    torch.manual_seed(0)
    table = Table()
    opt = paramstate.AdamW(table, lr=0.1)
    for grad in grads(3):
        step(table, opt, grad)
    with opt.edit_rows() as rows:
        rows.append(["weight", "seen"], 1)
    opt.freeze_rows("weight", [0])
    twin, twin_opt = copy.deepcopy((table, opt))
    other = Table(rows=6)
    other_opt = paramstate.AdamW(other, lr=0.1)
    other.load_state_dict(table.state_dict())
    other_opt.load_state_dict(opt.state_dict())
    table.weight = nn.Parameter(table.weight.detach().clone())
    for grad in grads(3, rows=6, start=4):
        for model, optimizer in ((table, opt), (twin, twin_opt), (other, other_opt)):
            step(model, optimizer, grad)
    for model, optimizer in ((twin, twin_opt), (other, other_opt)):
        assert optimizer.row_steps("weight").tolist() == opt.row_steps("weight").tolist() == [3, 6, 6, 6, 6, 3]
        assert torch.equal(model.weight, table.weight)


def test_a_client_that_changes_the_number_of_rows_by_hand_is_told() -> None:
    table = Table()
    opt = paramstate.AdamW(table)
    step(table, opt, torch.ones(5, 3))
    with opt.edit_rows() as rows:
        rows.append("weight", 1)
    held = opt.state[table.weight]
    new = nn.Parameter(table.weight.detach()[:2])
    opt.state[new] = {key: v[:2] if v.dim() else v for key, v in held.items()}
    del opt.state[table.weight]
    opt.param_groups[0]["params"] = [new]
    table.weight = new
    new.grad = torch.ones(2, 3)
    with pytest.raises(StateShapeError, match=r"'weight'.*rows.*edit_rows"):
        opt.step()


def test_a_handed_over_store_brings_rows_bounds_and_frozen_parameters_along() -> None:
    model = nn.ModuleDict({"a": Table(), "b": Table()})
    opt = paramstate.AdamW(model, lr=0.1, constraints={"a.weight": Box(torch.full((5, 1), -0.2), 0.3)})
    for table in model.values():
        table.weight.grad = torch.randn(5, 3)
    opt.step()
    with opt.edit_rows() as rows:
        rows.reset("a.weight", [1])
    opt.freeze("b.weight")
    again = paramstate.AdamW(model, lr=0.1, store=opt.store)
    assert again.row_steps("a.weight").tolist() == [1, 0, 1, 1, 1]
    assert again.frozen == ["b.weight"]
    before = model["b"].weight.detach().clone()
    for table in model.values():
        table.weight.grad = torch.ones(5, 3)
    again.step()
    assert again.row_steps("a.weight").tolist() == [2, 1, 2, 2, 2]
    assert torch.equal(model["b"].weight, before)
    assert model["a"].weight.min() >= -0.2


class Tied(nn.Module):
    """A table whose rows are the weights of a layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.table.weight


def test_a_target_that_is_named_twice_is_edited_once() -> None:
    tied = Tied()
    opt = paramstate.Adam(tied)
    with opt.edit_rows() as rows:
        rows.append(["table.weight", "head.weight"], 2)
        rows.keep([tied.table.weight, "*.weight"], [0, 1, 5])
    assert tied.table.weight.shape == (3, 3)
    assert tied.head.weight is tied.table.weight


def test_a_parameter_is_found_under_its_key_in_the_users_dict() -> None:
    table = Table()
    opt = paramstate.Adam(nn.ModuleDict({"scene": table}))
    side: dict[str, torch.Tensor] = {"means": table.weight}
    with opt.edit_rows(side) as rows:
        rows.keep("means", [1, 2])
    assert table.weight.shape == (2, 3)
    assert side["means"] is table.weight is rows["means"]


def test_a_parameter_beside_the_optimizers_stays_one() -> None:
    table = Table()
    opt = paramstate.Adam(table)
    side: dict[str, torch.Tensor] = {"extra": nn.Parameter(torch.ones(5, 2)), "leaf": torch.ones(5, requires_grad=True)}
    with opt.edit_rows(side) as rows:
        rows.keep(["weight", "extra", "leaf"], [1, 2])
    assert isinstance(side["extra"], nn.Parameter)
    assert side["extra"].shape == (2, 2)
    assert side["leaf"].requires_grad


def test_edits_outside_of_the_block_are_refused() -> None:
    table = Table()
    opt = paramstate.Adam(table)
    with pytest.raises(RuntimeError, match="inside a block"):
        opt.edit_rows().keep("weight", [0])
    with opt.edit_rows() as rows:
        rows.keep("weight", [0, 1])
    with pytest.raises(RuntimeError, match="inside a block"):
        rows.keep("weight", [0])
    with pytest.raises(RuntimeError, match="anew"), rows:
        pass
    assert table.weight.shape == (2, 3)


def test_what_is_edited_along_must_be_a_mapping_that_can_be_given_the_new_tensors() -> None:
    opt = paramstate.Adam(Table())
    with pytest.raises(TypeError, match=r"side= maps keys to tensors, as \{'count': count\}.*got list"):
        opt.edit_rows(side=[torch.ones(5)])


def test_numbers_of_rows_may_be_whole_numbers_of_any_kind() -> None:
    numpy = pytest.importorskip("numpy")
    table = Table()
    with paramstate.Adam(table).edit_rows() as rows:
        rows.append("weight", numpy.int64(1))
        rows.pad("weight", before=numpy.int32(1))
        rows.resize("weight", numpy.int64(6))
    assert table.weight.shape == (6, 3)


def test_a_call_that_fails_edits_none_of_its_targets() -> None:
    table = Table()
    opt = paramstate.Adam(table)
    with opt.edit_rows(side={"few": torch.ones(2)}) as rows, pytest.raises(RowIndexError, match="few"):
        rows.keep(["weight", "few"], [3, 4])
    assert table.weight.shape == (5, 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda opt: opt.zero_grad(),
        lambda opt: opt.param(opt.ids["weight"]).sum().backward(),
        lambda opt: opt.freeze_rows("weight", [1]),
        lambda opt: opt.constrain("weight", Box(-9.0, 9.0)),
    ],
    ids=["zero_grad", "backward", "freeze_rows", "constrain"],
)
def test_what_changes_inside_the_block_is_not_lost_but_noticed(change: Callable[..., object]) -> None:
    table = Table()
    opt = paramstate.Adam(table)
    step(table, opt, torch.ones(5, 3))

    def edit() -> None:
        with opt.edit_rows() as rows:
            rows.keep("weight", [0, 1])
            change(opt)

    with pytest.raises(paramstate.ReplacedParameterError, match="nothing was applied"):
        edit()
    assert table.weight.shape == (5, 3)


def test_an_edit_keeps_nothing_of_what_was_before_alive() -> None:
    table = Table()
    opt = paramstate.Adam(table)
    step(table, opt, torch.ones(5, 3))
    former = [weakref.ref(tensor.untyped_storage()) for tensor in (table.weight, table.weight.grad, table.seen)]
    former += [weakref.ref(opt.state_of("weight")[key].untyped_storage()) for key in ("exp_avg", "exp_avg_sq")]
    with opt.edit_rows() as rows:
        rows.keep(["weight", "seen"], [0, 1])
    gc.collect()
    assert [reference() for reference in former] == [None] * 5
    assert rows["weight"] is table.weight


def test_rows_go_through_the_map_that_carries_a_value() -> None:
    table = Table(rows=3)
    opt = paramstate.Adam(table, lr=0.1)
    step(table, opt, torch.ones(3, 3))
    step(table, opt, torch.ones(3, 3), rows={"weight": [0]})
    opt.freeze_rows("weight", [0])
    frozen = table.weight[0].clone()

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[[1, 2, 0]].T

    opt.replace_("weight", turned(table.weight.detach()), state=turned)
    step(table, opt, torch.ones(3, 3))
    assert torch.equal(table.weight[:, 2], frozen)
    assert opt.row_steps("weight").tolist() == [2, 2, 2]
    opt.unfreeze_rows("weight")
    step(table, opt, torch.ones(3, 3))
    assert opt.row_steps("weight").tolist() == [3, 3, 3]


def test_a_map_behind_which_rows_are_none_is_refused_and_nothing_changes() -> None:
    table = Table(rows=4)
    opt = paramstate.Adam(table)
    opt.freeze_rows("weight", [0])
    with pytest.raises(UnsupportedError, match=r"'weight'.*along more than one dimension"):
        opt.replace_("weight", table.weight.detach().reshape(2, 6), state=lambda t: t.reshape(2, 6))
    with pytest.raises(StateShapeError, match=r"'weight': some of its 4 rows .* are frozen"):
        opt.replace_("weight", torch.ones(2, 3), state="reset")
    assert table.weight.shape == (4, 3)


@pytest.mark.parametrize("saved_by", [torch.optim.Adam, paramstate.Adam])
def test_loaded_state_says_how_often_rows_were_stepped(saved_by: type[torch.optim.Optimizer]) -> None:
    table, other = Table(), Table()
    opt, source = paramstate.Adam(table, lr=0.1), saved_by(other.named_parameters(), lr=0.1)
    for grad in grads(3):
        step(table, opt, grad, rows={"weight": [0]})
    opt.freeze_rows("weight", [4])
    step(other, source, torch.ones(5, 3))
    opt.load_state_dict(source.state_dict())
    assert opt.row_steps("weight").tolist() == [1] * 5
    step(table, opt, torch.ones(5, 3))


def test_a_parameter_that_a_file_lacks_starts_afresh_with_all_rows() -> None:
    model = nn.ModuleDict({"a": Table(), "b": Table()})
    opt = paramstate.Adam(model)
    for table in model.values():
        step(table, opt, torch.ones(5, 3), rows={"a.weight": [0]})
    report = opt.load_state_dict(paramstate.Adam({"b": Table()}["b"]).state_dict(), strict=False)
    assert "a.weight" in report.missing
    assert opt.row_steps("a.weight").tolist() == [0] * 5
    opt.step()
    assert opt.row_steps("a.weight").tolist() == [1] * 5


def test_rows_are_alike_again_where_a_replacement_resets_the_state() -> None:
    table = Table()
    opt = paramstate.Adam(table, lr=0.1, on_replace="reset")
    for grad in grads(2):
        step(table, opt, grad, rows={"weight": [0]})
    table.weight = nn.Parameter(table.weight.detach().clone())
    step(table, opt, torch.ones(5, 3))
    assert opt.row_steps("weight").tolist() == [1] * 5


def test_rows_are_alike_again_where_a_rebound_model_has_others() -> None:
    table = Table()
    opt = paramstate.Adam(table, lr=0.1)
    for grad in grads(2):
        step(table, opt, grad, rows={"weight": [0]})
    wider = Table(rows=7)
    assert opt.rebind(wider).reshaped == ["weight"]
    step(wider, opt, torch.ones(7, 3))
    assert opt.row_steps("weight").tolist() == [1] * 7


def test_a_step_that_fails_or_takes_all_rows_lets_them_be_alike() -> None:
    table = Table()
    opt = paramstate.Adam(table)
    step(table, opt, torch.ones(5, 3))
    held = opt.state[table.weight]
    held["exp_avg"], kept = torch.zeros(2), held["exp_avg"]
    with pytest.raises(StateShapeError):
        step(table, opt, torch.ones(5, 3), rows={"weight": [0]})
    held["exp_avg"] = kept
    assert "rows" not in opt.state_dict()["paramstate"]["traits"][0]
    step(table, opt, torch.ones(5, 3), rows={"weight": range(5)})
    opt.freeze_rows("weight", [])
    assert "rows" not in opt.state_dict()["paramstate"]["traits"][0]


def test_a_step_that_names_a_parameter_twice_is_refused() -> None:
    tied = Tied()
    opt = paramstate.Adam(tied)
    tied.table.weight.grad = torch.ones(4, 3)
    with pytest.raises(paramstate.SelectionError, match=r"'table.weight'.*twice"):
        opt.step(rows={"table.weight": [0], "head.weight": [1]})
    assert not opt.state_of("table.weight")


@pytest.mark.parametrize("how", ["edit_rows", "replace_"])
def test_a_tensor_that_was_exchanged_where_no_model_is_known_and_is_still_used_is_noticed(how: str) -> None:
    table = Table()
    opt = paramstate.Adam(table.parameters())
    step(table, opt, torch.ones(5, 3))
    old = table.weight
    if how == "edit_rows":
        with opt.edit_rows() as rows:
            rows.keep(old, [0, 1])
        (new,) = opt.param_groups[0]["params"]
    else:
        new = opt.replace_(old, nn.Parameter(torch.ones(5, 3)))
        old.grad = None
    table.weight.sum().backward()
    with pytest.raises(paramstate.ReplacedParameterError, match=r"opt\.edit_rows\(\)"):
        opt.step()
    table.weight, old.grad = new, None
    step(table, opt, torch.ones_like(new))
    assert opt.state_of(new)["step"] == 2


def test_rows_are_edited_of_tensors_only() -> None:
    opt = paramstate.Adam(Table())
    with opt.edit_rows(side={"nothing": None}) as rows, pytest.raises(TypeError, match="'nothing' there is NoneType"):
        rows.keep("nothing", [0])


def test_freezing_rows_waits_for_a_step_of_another_thread() -> None:
    table = Table(rows=64)
    opt = paramstate.Adam(table, lr=1e-3)
    table.weight.grad = torch.ones(64, 3)
    failed: list[BaseException] = []

    def repeat(action: Callable[[int], object]) -> None:
        try:
            for number in range(64):
                action(number)
        except BaseException as error:  # noqa: BLE001  told below
            failed.append(error)

    def freeze(number: int) -> None:
        opt.freeze_rows("weight", [number])
        opt.unfreeze_rows("weight")

    actions = [lambda number: opt.step(rows={"weight": [number]}), lambda _: opt.step(), freeze]
    threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert opt.state_of("weight")["step"] == 128


def test_an_optimizer_whose_parameter_was_edited_by_another_says_so_by_name() -> None:
    table = nn.Embedding(4, 2)
    one, other = paramstate.Adam(table, lr=0.1), paramstate.Adam(table, lr=0.1)
    table.weight.sum().backward()
    one.step()
    other.step()
    with one.edit_rows() as rows:
        rows.keep("weight", [0, 2])
    table.weight.sum().backward()
    one.step()
    before = table.weight.detach().clone()
    with pytest.raises(StateShapeError, match=r"'weight'.*has shape \[4, 2\], the parameter has \[2, 2\].*opt\.reset"):
        other.step()
    assert torch.equal(table.weight, before)
    other.reset("weight")
    other.step()
    assert other.row_steps("weight").tolist() == [1, 1]
