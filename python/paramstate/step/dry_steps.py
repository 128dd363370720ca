"""Steps that a checkpointing library takes only in order that state exists.

``torch.distributed.checkpoint.state_dict`` reads the state of an optimizer, and loads into it, and for that it must be
there. One that was never stepped it steps: with all gradients and all rates zero, by ``step(closure=None)``. Taken as a
step, that leaves a trace: ``step`` is 1, so that the first real step is bias-corrected like a second one, and L2 decay
has put the values into the moments. What is asked for is what ``materialize_state()`` does.

A real first step may look the same from the inside: a warm-up begins at a rate of zero, and gradients may happen to be
zero; it counts, as in torch. So the call itself is looked for: torch's function, which other libraries have copied
under its name, is among the callers. Only an optimizer without any state looks, that is, once in its life.
"""

from __future__ import annotations

import sys

import torch

_CALLERS = frozenset({
    "_init_optim_state",  # torch.distributed.checkpoint.state_dict, and whoever calls that
    "init_optim_state",  # torchtitan's copy
})  # fmt: skip


def is_asked_for_state_alone(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that is being taken is such a one."""
    return not optimizer.state and _is_called() and all(float(group["lr"]) == 0.0 for group in optimizer.param_groups)


def _is_called() -> bool:
    frame = sys._getframe()
    while frame.f_code.co_name not in _CALLERS:
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return True
