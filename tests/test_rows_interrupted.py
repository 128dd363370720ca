"""An edit of rows is applied as a whole or not at all, at whichever line of it something fails."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import paramstate
from paramstate.identity.membership import Membership

PACKAGE = str(Path(paramstate.__file__).parent)
Line = tuple[str, int]


class InterruptionError(Exception):
    """Raised where nothing of the library's raises."""


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.register_buffer("seen", torch.arange(5.0))


class Training:
    """Two tables, one of them tied, in the midst of training, with all that an edit of rows takes along."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"a": Table(), "b": Table(), "twin": Table()})
        self.model["twin"].weight = self.model["a"].weight
        bounds = {"b.weight": paramstate.Box(torch.full((5, 1), -0.5), 1.0), "a.weight": paramstate.MaxNorm(1.0, 1)}
        self.opt = paramstate.AdamW(self.model, lr=0.1, amsgrad=True, constraints=bounds)
        self.step()
        self.opt.freeze_rows("a.weight", [0])
        for param in self.model.parameters():
            param.grad = torch.randn_like(param)
        self.side = {"count": torch.ones(5), "table": self.model["a"].weight}

    def step(self) -> None:
        for param in self.model.parameters():
            param.grad = torch.ones_like(param)
        self.opt.step()

    def edited(self) -> paramstate.EditRows:
        """The edit, about to be applied."""
        rows = self.opt.edit_rows(side=self.side).__enter__()
        rows.keep(["a.weight", "a.seen", "count", "b.weight", "b.seen"], [0, 1])
        rows.append("a.weight", 2)
        rows.append("b.weight", 2, state_of=[0, 1])
        return rows

    def objects(self) -> list[object]:
        """Which objects stand where, in which order."""
        opt, tables = self.opt, list(self.model.values())
        return [
            *(id(tensor) for table in tables for tensor in (table.weight, table.seen, table.weight.grad)),
            *(id(tensor) for tensor in self.side.values()),
            *(id(param) for group in opt.param_groups for param in group["params"]),
            *(
                (id(param), id(held), {key: id(value) for key, value in held.items()})
                for param, held in opt.state.items()
            ),
            {**opt.ids},
        ]

    def values(self) -> list[torch.Tensor]:
        tables = [tensor for table in self.model.values() for tensor in (table.weight, table.seen, table.weight.grad)]
        state = [value for held in self.opt.state.values() for value in held.values()]
        steps = [self.opt.row_steps(name) for name in ("a.weight", "b.weight")]
        return [tensor.detach().clone() for tensor in (*tables, *self.side.values(), *state, *steps)]


@contextmanager
def traced(look: Callable[[Line], None]) -> Iterator[None]:
    """`look` at each line of the package that is about to run."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            look((frame.f_code.co_filename[len(PACKAGE) + 1 :], frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupted(training: Training, at: int) -> bool:
    """Apply the edit, with an error before line number `at` of all that run; whether it was reached."""
    rows, count = training.edited(), 0

    def look(_: Line) -> None:
        nonlocal count
        count += 1
        if count == at:
            sys.settrace(None)
            raise InterruptionError

    try:
        with traced(look):
            rows.__exit__(None, None, None)
    except InterruptionError:
        return True
    return False


def lines_of_the_edit() -> list[Line]:
    """All lines that run while the edit is applied; what is done once in a process was done before."""
    Training().edited().__exit__(None, None, None)
    rows, lines = Training().edited(), list[Line]()
    with traced(lines.append):
        rows.__exit__(None, None, None)
    return lines


def test_a_failure_at_any_line_leaves_everything_as_it_was() -> None:
    lines = lines_of_the_edit()
    first, last = (
        {line: number for number, line in order} for order in (reversed([*enumerate(lines, 1)]), enumerate(lines, 1))
    )
    places = sorted({*first.values(), *last.values()})
    files = {line[0] for line in lines}
    assert {
        "surgery/row_edits.py",
        "surgery/row_targets.py",
        "identity/succession.py",
        "identity/enrolment.py",
    } <= files
    applied = []
    for place in places:
        training = Training()
        objects, values = training.objects(), training.values()
        assert interrupted(training, place), lines[place - 1]
        if len(training.model["a"].weight) == 4:
            applied.append(lines[place - 1])
        else:
            assert training.objects() == objects, lines[place - 1]
            assert all(map(torch.equal, training.values(), values)), lines[place - 1]
        before = training.opt.row_steps("a.weight")
        training.step()
        expected = before + (torch.arange(len(before)) > 0)  # row 0 is frozen
        assert training.opt.row_steps("a.weight").tolist() == expected.tolist(), lines[place - 1]
    assert {file for file, _ in applied} <= {"surgery/row_edits.py"}, "only what tidies up comes after"
    assert len(applied) <= 2


def test_what_an_undone_edit_noted_of_a_tensor_does_not_count_when_the_tensor_leaves() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    opt = paramstate.AdamW(model.named_parameters())  # knows no slots: a tensor that left may still be used
    model(torch.randn(2, 4)).sum().backward()
    put = Membership._put_into_slots

    def put_and_fail(*arguments: Any) -> None:
        put(*arguments)
        raise InterruptionError

    with (
        pytest.raises(InterruptionError),
        mock.patch.object(Membership, "_put_into_slots", put_and_fail),
        opt.edit_rows() as rows,
    ):
        rows.permute("1.weight", [2, 1, 0])
    smaller = copy.deepcopy(model[:1])
    opt.relayout(smaller, drop=["1.weight", "1.bias"])
    smaller(torch.randn(2, 4)).sum().backward()
    opt.step()
    assert float(opt.state_of("0.weight")["step"]) == 1.0


def test_a_tensor_before_an_edit_is_nobodys_once_its_parameter_was_dropped() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    opt = paramstate.AdamW(model.named_parameters())
    model(torch.randn(2, 4)).sum().backward()
    before = model[1].weight
    with opt.edit_rows() as rows:
        rows.permute("1.weight", [2, 1, 0])
    smaller = copy.deepcopy(model[:1])
    opt.relayout(smaller, drop=["1.weight", "1.bias"])
    before.grad = torch.ones_like(before)
    opt.step()
