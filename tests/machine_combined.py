"""Actions that depend on one another, in a row: each alone is rare, and what one leaves the next must carry."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from identity_machine import kinds, seeds, which
from machine_declarations import Declarations
from machine_precision import Precision
from machine_rows import LAYOUTS, OPERATIONS, Rows
from machine_sessions import MAX_SESSIONS, Sessions
from reference_precision import Kind

differences = st.sampled_from(["frozen", "stepped alone", "bounded", "another dtype of state"])


class Combined(Declarations, Rows, Precision, Sessions):
    """Rows that differ and are edited; edits that are trained, undone and redone."""

    def let_differ(self, index: int, how: str, kind: Kind | None, seed: int) -> None:
        """Something of a parameter becomes other from row to row, or its state is kept otherwise."""
        if how == "frozen":
            self.freeze_rows(index, "tensor", 0, seed)
        elif how == "stepped alone":
            self.step_of_some_rows(index, index, seed, "mask")
        elif how == "bounded":
            bounds = ("box of each row", "box of each element")[seed % 2]
            self.constrain(index, "tensor", bounds, zero=seed % 3 == 0, seed=seed)
        else:
            self.set_state_dtype(index, "tensor", kind)

    @rule(
        index=which, how=differences, kind=kinds, seed=seeds,
        operations=st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=2),
    )  # fmt: skip
    def edit_rows_that_differ(
        self, index: int, how: str, kind: Kind | None, seed: int, operations: list[str]
    ) -> None:  # fmt: skip
        self.let_differ(index, how, kind, seed)
        self.edit_rows(index, index, operations, seed, None, 0)
        self.train(seed, set(), 1)

    @rule(index=which, how=differences, kind=kinds, seed=seeds, layout=st.sampled_from(LAYOUTS))
    def lay_out_what_differs(self, index: int, how: str, kind: Kind | None, seed: int, layout: str) -> None:
        self.let_differ(index, how, kind, seed)
        self.replace_by_another_layout(index, layout, seed, fresh=seed % 2 == 0)

    @precondition(lambda self: len(self.sessions) < MAX_SESSIONS)
    @rule(
        index=which, policy=st.sampled_from(["keep", "snapshot", "reset", "of the model"]), how=differences,
        kind=kinds, seed=seeds, ways=st.lists(st.sampled_from(["undo", "redo", "toggle"]), min_size=1, max_size=3),
    )  # fmt: skip
    def edit_train_and_go(
        self, index: int, policy: str, how: str, kind: Kind | None, seed: int, ways: list[str]
    ) -> None:  # fmt: skip
        self.open_a_session(index, "tensor", policy)
        last = len(self.sessions) - 1
        self.train(seed, set(), 1)
        if self.sessions:
            self.mark(last)
            self.let_differ(index, how, kind, seed)
            self.train(seed + 1, set(), 1)
            for way in ways:
                self.go(last, way)
