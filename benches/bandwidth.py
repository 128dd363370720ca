"""What the machine itself can move: plain read-modify-write loops over as many bytes as a row moves.

Each loop reads and writes far more memory than the caches hold, on as many threads as the row uses, and does one
operation per element. The fastest one is the yardstick: better code cannot make a row much faster than it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from timing import Contestant

FLOAT = 4
PAGE = 1_024  # elements; parts of the pool begin on a page, as tensors of this size do


def parts(pool: Tensor, count: int, length: int) -> list[Tensor]:
    """Cut so many parts of one length out of the pool."""
    stride = -(-length // PAGE) * PAGE
    return [pool[index * stride :][:length] for index in range(count)]


def loops(total_bytes: int) -> dict[str, Contestant]:
    """Name the loops, each of which moves so many bytes in one run, over one pool of random numbers."""
    pool = torch.rand(total_bytes * 2 // (3 * FLOAT) + 4 * PAGE)
    (alone,) = parts(pool, 1, total_bytes // (2 * FLOAT))
    value, other = parts(pool, 2, total_bytes // (3 * FLOAT))
    mixed, first, second, read = parts(pool, 4, total_bytes // (7 * FLOAT))

    def mix_of_adam() -> None:
        mixed.add_(read)
        first.add_(1.0)
        second.add_(1.0)

    return {
        "x += 1": Contestant(lambda: alone.add_(1.0)),
        "x *= c": Contestant(lambda: alone.mul_(0.999)),
        "x += y": Contestant(lambda: value.add_(other)),
        "x += y; z += 1; w += 1": Contestant(mix_of_adam),
    }
