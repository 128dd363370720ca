"""Rows are exact: a new or reset row steps as a fresh parameter does, a frozen or skipped one keeps its bits."""

from __future__ import annotations

import copy

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
    ("paramstate.row_targets.successor", 0),
    ("paramstate.row_targets.successor", 1),
    ("paramstate.membership.Membership._exchange", 0),
    ("paramstate.membership.Membership._exchange", 1),
    ("paramstate.membership.Membership._traits_changed", 0),
    ("paramstate.membership.Membership._traits_changed", 1),
    ("paramstate.membership.Membership._put_into_slots", 0),
    ("paramstate.membership.Membership._put_into_slots", 1),
    ("paramstate.row_targets.EditedBuffer.install", 0),
    ("paramstate.row_edits.EditRows._renew_side", 0),
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
    owner = _resolve(module_name)
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


def _resolve(path: str) -> object:
    parts = path.split(".")
    module = __import__(".".join(parts[:2]), fromlist=["_"])
    return getattr(module, parts[2]) if len(parts) > 2 else module


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


def test_a_step_inside_the_block_is_noticed() -> None:
    table = Table()
    opt = paramstate.AdamW(table)

    def edit() -> None:
        with opt.edit_rows() as rows:
            rows.keep("weight", [0])
            step(table, opt, torch.ones(5, 3))

    with pytest.raises(paramstate.ReplacedParameterError, match="'weight' was changed while its rows were edited"):
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
        (lambda rows: rows.pad("weight", -1), ValueError, r"at least 0, got -1 and 0"),
        (lambda rows: rows.resize("weight", -1), ValueError, r"got -1"),
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
