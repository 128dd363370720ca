"""The reference's account of edit sessions: what stood where at each point of a history."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import paramstate
from reference_model import Entry

Held = tuple[nn.Parameter, torch.Tensor, bool]
"""An object, its value and `requires_grad`."""


@dataclass
class Point:
    """One point of a session's history."""

    held: dict[str, Held]
    states: dict[str, Entry] | None


@dataclass
class Session:
    """The reference's account of an open edit session."""

    session: paramstate.EditSession
    names: dict[str, str]
    """Key to the name that it had when the session was opened."""
    owner: str
    """"model" or "optimizer"."""
    carries_state: bool
    history: list[Point]
    position: int = 0
