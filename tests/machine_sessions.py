"""Edit sessions, as actions of the state machine: whatever else happens goes on inside them."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable
from unittest import mock

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import nn

import paramstate
from identity_machine import IdentityMachine, meanings, which
from reference import same_bits
from reference_limits import RefusedError
from reference_model import Entry
from reference_sessions import Point, Session

MAX_SESSIONS = 3
Standing = tuple[dict[str, nn.Parameter], dict[int, torch.Tensor | None]]
"""The object in each slot, and the gradient that each object of a history has of its own."""


def same_state(one: Entry, other: Entry) -> bool:
    """Whether two accounts of a parameter agree in all that a session carries beside the value."""
    return (
        one.step == other.step
        and one.moments.keys() == other.moments.keys()
        and all(same_bits(one.moments[key], other.moments[key]) for key in one.moments)
        and one.compact == other.compact
        and (one.frozen, one.trained, one.limit, one.rows) == (other.frozen, other.trained, other.limit, other.rows)
        and one.kind == other.kind
    )


class Sessions(IdentityMachine):
    """Opened, nested, marked, undone, redone, toggled, restored, committed, closed, given up."""

    @precondition(lambda self: len(self.sessions) < MAX_SESSIONS)
    @rule(index=which, how=meanings, policy=st.sampled_from(["keep", "snapshot", "reset", "of the model"]))
    def open_a_session(self, index: int, how: str, policy: str) -> None:
        argument, keys = self.meant(index, how)
        owner = "model" if policy == "of the model" else "optimizer"
        if any(session.owner != owner and session.names.keys() & set(keys) for session in self.sessions):
            return  # sessions of a model and of its optimizer do not know of each other
        names = {key: self.entry(key).name for key in keys}
        carries_state = policy in ("snapshot", "reset")
        base = self.point(keys, carries_state=carries_state)
        if owner == "model":
            chosen = argument if isinstance(argument, (list, tuple)) else [argument]
            session = paramstate.edit(self.net, *chosen)
        else:
            session = self.opt.edit(argument, state=policy)
        self.sessions.append(Session(session, names, owner, carries_state, [base]))
        if policy == "reset":
            for key in keys:
                self.entry(key).forget()

    @precondition(lambda self: self.sessions)
    @rule(index=which)
    def mark(self, index: int) -> None:
        mine, refusal = self.chosen_session(index)
        with self.refused(refusal):
            mine.session.mark("a change")
        if refusal is None:
            self.mark_in_the_reference(mine)

    @precondition(lambda self: self.sessions)
    @rule(index=which, way=st.sampled_from(["undo", "redo", "toggle"]))
    def go(self, index: int, way: str) -> None:
        mine, refusal = self.chosen_session(index)
        target = 0
        if refusal is None:
            self.mark_in_the_reference(mine)
            here, last = mine.position, len(mine.history) - 1
            target = {"undo": here - 1, "redo": here + 1, "toggle": last if here == 0 else 0}[way]
            if not 0 <= target <= last or last == 0:
                refusal = RefusedError(paramstate.EditError)
        standing = self.standing(mine)
        with self.refused(refusal):
            getattr(mine.session, way)()
        if refusal is None:
            self.put(mine, mine.history[target], mine.names, standing)
            mine.position = target

    @precondition(lambda self: self.sessions)
    @rule(index=which, which_keys=st.sets(st.integers(0, 3), max_size=2))
    def restore(self, index: int, which_keys: set[int]) -> None:
        mine, refusal = self.chosen_session(index)
        keys = [key for number, key in enumerate(mine.names) if number in which_keys]
        if refusal is None:
            self.mark_in_the_reference(mine)
        standing = self.standing(mine)
        with self.refused(refusal):
            mine.session.restore(*(mine.names[key] for key in keys))
        if refusal is None:
            self.put(mine, mine.history[0], keys or mine.names, standing)
            if keys:
                self.mark_in_the_reference(mine)
            else:
                mine.position = 0

    @precondition(lambda self: self.sessions)
    @rule(index=which)
    def commit(self, index: int) -> None:
        mine, refusal = self.chosen_session(index)
        with self.refused(refusal):
            mine.session.commit()
        if refusal is None:
            self.mark_in_the_reference(mine)
            mine.history, mine.position = [mine.history[mine.position]], 0

    @precondition(lambda self: self.sessions)
    @rule(index=which)
    def close(self, index: int) -> None:
        mine, refusal = self.chosen_session(index)
        with self.refused(refusal):
            self.close_in_both(mine)

    @precondition(lambda self: self.sessions)
    @rule(index=which)
    def leave_the_block(self, index: int) -> None:
        """Also that of one that is not the innermost, as an exception may: what was opened inside is closed first."""
        mine = self.sessions[index % len(self.sessions)]
        own = [session for session in self.sessions if session.owner == mine.owner]
        with contextlib.ExitStack() as stack:
            for session in own[own.index(mine) :]:
                followed = functools.partial(self.close_in_both, session)
                stack.enter_context(mock.patch.object(session.session, "close", followed))
            mine.session.__exit__(None, None, None)
        assert mine not in self.sessions

    @precondition(lambda self: self.sessions)
    @rule(index=which)
    def give_a_session_up(self, index: int) -> None:
        """Nobody closed it, and nobody holds it any more: its edit stays, and what was around it goes on."""
        gone = weakref.ref(self.sessions.pop(index % len(self.sessions)).session)
        assert gone() is None

    @precondition(lambda self: self.sessions)
    @rule(index=which)
    def look_at_a_session(self, index: int) -> None:
        mine = self.sessions[index % len(self.sessions)]
        changed = [name for key, name in mine.names.items() if not self.is_still(mine.history[0], key)]
        assert sorted(change.name for change in mine.session.changes()) == sorted(changed)
        assert mine.session.is_edited == bool(changed)
        assert len(mine.session.history) == len(mine.history)
        for key, name in mine.names.items():
            assert same_bits(mine.session.base()[name], mine.history[0].held[key][1])
            assert mine.session.tensors()[name] is self.held(key)
        mine.session.diff()

    def close_in_both(self, mine: Session) -> None:
        standing = self.standing(mine)
        paramstate.EditSession.close(mine.session)
        self.put(mine, mine.history[0], mine.names, standing)
        self.sessions.remove(mine)
        assert not mine.session.is_open

    # ---- the reference's account ------------------------------------------------------------------------------------

    def chosen_session(self, index: int) -> tuple[Session, RefusedError | None]:
        """One of the open sessions, and the refusal where it is not the innermost of its owner's."""
        mine = self.sessions[index % len(self.sessions)]
        innermost = [session for session in self.sessions if session.owner == mine.owner][-1]
        return mine, None if mine is innermost else RefusedError(paramstate.EditError)

    def point(self, keys: Iterable[str], *, carries_state: bool) -> Point:
        held = {key: (self.held(key), self.entry(key).value.clone(), self.entry(key).trains) for key in keys}
        return Point(held, {key: self.entry(key).copied() for key in held} if carries_state else None)

    def is_still(self, point: Point, key: str) -> bool:
        """Whether object, value and `requires_grad` are those of that point."""
        tensor, value, trains = point.held[key]
        entry = self.entry(key)
        return self.held(key) is tensor and same_bits(entry.value, value) and entry.trains == trains

    def mark_in_the_reference(self, mine: Session) -> None:
        last = mine.history[mine.position]
        still = all(self.is_still(last, key) for key in mine.names)
        if last.states is not None:
            still = still and all(same_state(self.entry(key), state) for key, state in last.states.items())
        if not still:
            del mine.history[mine.position + 1 :]
            mine.history.append(self.point(mine.names, carries_state=mine.carries_state))
            mine.position += 1

    def standing(self, mine: Session) -> Standing:
        """What stands in the slots before a session is moved."""
        objects = [held[0] for point in mine.history for held in point.held.values()]
        grads = {id(tensor): None if tensor.grad is None else tensor.grad.clone() for tensor in objects}
        return {key: self.held(key) for key in mine.names}, grads

    def put(self, mine: Session, point: Point, keys: Iterable[str], standing: Standing) -> None:
        """What the reference holds after these went back to that point."""
        before, grads = standing
        for key in keys:
            entry, (tensor, value, trains) = self.entry(key), point.held[key]
            entry.value, entry.trains = value.clone(), trains
            if mine.owner == "optimizer" and not self.knows_model:
                tensor = before[key]  # nothing tells which slots an optimizer of bare parameters is to put another into
            assert self.held(key) is tensor
            if tensor is not before[key]:
                own, grad = grads[id(tensor)], entry.grad
                follows = grad is not None and (grad.shape, grad.dtype) == (value.shape, value.dtype)
                entry.grad = own if own is not None else grad if follows else None
            if entry.grad is not None:
                entry.grad = entry.grad.to(value.dtype) if entry.grad.shape == value.shape else None
            if point.states is not None:
                state = point.states[key].copied()
                entry.step, entry.moments, entry.rows = state.step, state.moments, state.rows
                entry.frozen, entry.trained, entry.limit = state.frozen, state.trained, state.limit
                entry.kind, entry.compact = state.kind, state.compact
        self.allow_widening()
