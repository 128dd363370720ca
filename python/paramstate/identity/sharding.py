"""State of a parameter that was sharded, or made whole again: distributed as its value is.

FSDP2 puts a DTensor in the place of each parameter; arithmetic between that and a plain moment raises.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def placed_like(held: Any, param: Any) -> Tensor:
    """``held`` as it must be beside ``param``: both sharded over the same devices, or neither.

    Every process has the whole of a plain tensor and cuts out its own shard, so sharding needs no communication;
    making a sharded one whole needs it, in all processes.
    """
    if is_sharded(param) == is_sharded(held):
        placed = held
    elif is_sharded(held):
        placed = held.full_tensor()
    else:
        from torch.distributed.tensor import distribute_tensor

        placed = distribute_tensor(held, param.device_mesh, param.placements, src_data_rank=None)
    assert isinstance(placed, Tensor)
    return placed


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked without importing what only distributed training needs."""
    return hasattr(tensor, "placements")
