"""A moment in eight bits reads as float32, and takes what is written to it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paramstate import UnsupportedError
from paramstate.precision.blockwise import BlockwiseTensor

ROWS, COLUMNS = 6, 50


def made(seed: int = 0) -> BlockwiseTensor:
    """300 numbers: two whole blocks, and a part of one; a block ends within a row."""
    draw = torch.Generator().manual_seed(seed)
    return BlockwiseTensor.of(torch.randn(ROWS, COLUMNS, generator=draw), signed=True)


MASK = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) % 3 == 0
ONES = torch.ones(ROWS, COLUMNS)

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda held: held.mul_(0.5),
    "zero_": lambda held: held.zero_(),
    "copy_": lambda held: held.copy_(ONES),
    "fill_": lambda held: held.fill_(2.0),
    "add_ of itself": lambda held: held.add_(held),
    "sub_ of itself": lambda held: held.sub_(held),
    "addcmul_": lambda held: held.mul_(0.5).addcmul_(ONES, ONES, value=0.25),
    "masked_fill_": lambda held: held.masked_fill_(MASK, 0.0),
    "index_put_": lambda held: held.index_put_((torch.tensor([1, 4]),), torch.tensor(3.0)),
    "index_fill_": lambda held: held.index_fill_(0, torch.tensor([2]), 0.0),
    "a row": lambda held: held.__setitem__(1, 0.0),
    "rows by mask": lambda held: held.__setitem__(torch.arange(ROWS) > 3, 1.0),
    "elements by mask": lambda held: held.__setitem__(MASK, -1.0),
    "every other column": lambda held: held.__setitem__((slice(None), slice(None, None, 2)), 0.0),
    "a product in a slice": lambda held: held[:, ::2].mul_(2.0),
    "a view of a view": lambda held: held[2:5][1].zero_(),
    "a transposed row": lambda held: held.t()[5].fill_(1.0),
    "a flat element": lambda held: held.view(-1)[7].fill_(4.0),
    "a row from another": lambda held: held[0].copy_(held[1]),
    "a chunk": lambda held: held.chunk(2)[1].zero_(),
    "unbound rows": lambda held: [row.mul_(0.5) for row in held.unbind()],
    "an out= argument": lambda held: torch.add(ONES, 1.0, out=held),
    "foreach": lambda held: torch._foreach_mul_([held], 0.5),
    "foreach copy": lambda held: torch._foreach_copy_([held], [ONES]),
    "foreach lerp": lambda held: torch._foreach_lerp_([held], [torch.zeros(ROWS, COLUMNS)], 0.5),
    "data": lambda held: held.data.mul_(2.0),
    "detached": lambda held: held.detach().zero_(),
    "assigned data": lambda held: setattr(held, "data", ONES),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_in_place_is_there(write: Callable[[Tensor], Any]) -> None:
    held, twin = made(), made().dense()
    codes = held.codes
    write(held)
    write(twin)
    assert torch.equal(held.dense(), BlockwiseTensor.of(twin, signed=True).dense())
    assert held.codes is codes, "whoever holds the codes sees it as well"
    assert not torch.equal(twin, made().dense()), "the write changes something"


READS: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda held: held.norm(),
    "sum": lambda held: held.sum(0),
    "sqrt": lambda held: held.abs().sqrt(),
    "arithmetic": lambda held: 1 - held * 2 + held,
    "cat with zeros": lambda held: torch.cat([held, torch.zeros(2, COLUMNS)]),
    "cat with itself": lambda held: torch.cat([held, held], dim=1),
    "stack": lambda held: torch.stack([held, held]),
    "rows by index": lambda held: held[[1, 4]],
    "rows by mask": lambda held: held[torch.arange(ROWS) > 2],
    "elements by mask": lambda held: held[MASK],
    "a slice": lambda held: held[1:3, ::2] + 0,
    "transposed": lambda held: held.T.contiguous(),
    "flattened": lambda held: held.flatten() + 0,
    "iterated": lambda held: torch.stack(list(held)),
    "split": lambda held: torch.cat(held.split(2)[::-1]),
    "where": lambda held: torch.where(MASK, held, 0.0),
    "max": lambda held: held.max(0).values,
    "comparison": lambda held: held > 0,
    "isfinite": lambda held: held.isfinite(),
    "double": lambda held: held.double(),
    "to bfloat16": lambda held: held.to(torch.bfloat16),
    "zeros_like": torch.zeros_like,
    "foreach": lambda held: torch._foreach_add([held], 1.0)[0],
    "foreach_norm": lambda held: torch._foreach_norm([held])[0],
    "numpy": lambda held: torch.from_numpy(held.numpy().copy()),
    "NumPy's array": lambda held: torch.from_numpy(np.asarray(held).copy()),
    "DLPack": torch.from_dlpack,
    "DLPack of a part": lambda held: torch.from_dlpack(held[2]),
    "tolist": lambda held: torch.tensor(held.tolist()),
    "tolist of a part": lambda held: torch.tensor(held[3].tolist()),
    "item": lambda held: torch.tensor(held[3, 4].item()),
    "copied in": lambda held: torch.zeros(ROWS, COLUMNS).copy_(held),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_reads_it_reads_floats_and_gets_ordinary_tensors(read: Callable[[Tensor], Any]) -> None:
    held = made()
    found, expected = read(held), read(made().dense())
    assert type(found) is Tensor
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert torch.equal(held.dense(), made().dense())


def test_it_is_a_float32_tensor_equal_to_its_floats_and_prints_them() -> None:
    held = made()
    assert torch.is_tensor(held)
    assert (held.dtype, held.shape, held.is_floating_point(), held.is_contiguous()) == (
        torch.float32, (ROWS, COLUMNS), True, True
    )  # fmt: skip
    assert torch.equal(held, held.dense())
    assert torch.equal(held.dense(), held)
    assert torch.allclose(held, held.dense())
    assert repr(held) == f"BlockwiseTensor({held.dense()!r})"
    assert repr(held[1, :2]) == repr(held.dense()[1, :2])
    assert held.nbytes == ROWS * COLUMNS + 3


def test_a_view_sees_what_is_written_to_the_whole_later() -> None:
    held = made()
    row, column = held[2], held.t()[3]
    held.zero_()
    assert row.sum() == column.sum() == 0
    held[2] = 1.0
    assert row.sum() == COLUMNS
    assert column.tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert repr(row) == repr(torch.ones(COLUMNS))


def test_reading_any_part_does_not_change_the_rest_and_writing_one_rounds_only_that() -> None:
    held = made()
    before = held.dense()
    held[0, :3] = torch.tensor([0.3, 0.5, -0.7])
    after = held.dense()
    assert torch.equal(after.flatten()[3:], before.flatten()[3:])
    assert after[0, :3].tolist() == [0.3125, 0.5, -0.6875]


def test_copies_are_apart_and_as_compact() -> None:
    held = made()
    copies: list[Tensor] = [
        copy.deepcopy(held),
        pickle.loads(pickle.dumps(held)),
        held.clone(),
        held.to("cpu", copy=True),
        held.to(torch.float32, copy=True),
    ]
    file = io.BytesIO()
    torch.save(held, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    for twin in copies:
        assert isinstance(twin, BlockwiseTensor)
        assert torch.equal(twin.codes, held.codes)
        twin.zero_()
    assert torch.equal(held.dense(), made().dense())


def test_parts_are_copied_and_pickled_as_ordinary_tensors() -> None:
    part = made()[2]
    for twin in (copy.deepcopy(part), pickle.loads(pickle.dumps(part)), part.clone()):
        assert type(twin) is Tensor
        assert torch.equal(twin, made().dense()[2])


def test_what_has_no_meaning_in_place_is_refused_and_changes_nothing() -> None:
    held = made()
    with pytest.raises(UnsupportedError, match=r"shape \[6, 50\] on cpu, .* of shape \[2, 2\] on cpu; assign to"):
        held.data = torch.zeros(2, 2)
    with pytest.raises(UnsupportedError, match="on meta"):
        held.data = torch.zeros(ROWS, COLUMNS, device="meta")
    with pytest.raises(RuntimeError, match="size of tensor"):
        held.resize_(2, 2)
    assert torch.equal(held.dense(), made().dense())


def test_shared_memory_holds_codes_and_scales() -> None:
    held = made()
    assert held.share_memory_() is held
    assert held.codes.is_shared()
    assert held.scales.is_shared()
    assert torch.equal(held.dense(), made().dense())


def test_it_counts_versions_as_a_tensor_does_and_works_in_inference_mode() -> None:
    held = made()
    before = held._version
    held.mul_(2.0)
    assert held._version > before
    with torch.inference_mode():
        inside = made()
        inside.mul_(2.0)
        assert torch.equal(inside.dense(), held.dense())


def test_an_empty_one_works() -> None:
    held = BlockwiseTensor.of(torch.zeros(0, 5), signed=False)
    assert held.sum() == 0
    assert held.mul_(2.0).shape == (0, 5)
    assert held.nbytes == 0
