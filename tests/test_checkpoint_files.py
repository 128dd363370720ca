"""A file of ``save`` is there whole or not at all, and what fits in none is refused."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from paramstate import AdamW, LoadError, SaveError, load, save
from paramstate.checkpoint import container, replacement, saving
from small_models import Net, assert_same_bits, state_by_name, train

POSIX = pytest.mark.skipif(os.name != "posix", reason="permissions and links as POSIX has them")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "opt.safetensors"


@pytest.fixture
def opt() -> AdamW:
    net = Net(("first",))
    opt = AdamW(net)
    train(net, opt, [1])
    return opt


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


# ---- whole or not at all


class DiskError(OSError):
    """What a system says in the middle of a write."""


def half_written(file: BinaryIO, *_: object) -> None:
    file.write(b"half")
    file.flush()
    raise DiskError


def failing(*_: object, **__: object) -> Any:
    raise DiskError


def interrupted(*_: object, **__: object) -> Any:
    raise KeyboardInterrupt


STAGES = [
    pytest.param(saving, "write", half_written, DiskError, id="write"),
    pytest.param(saving, "write", interrupted, KeyboardInterrupt, id="interrupt"),
    pytest.param(replacement.os, "fsync", failing, DiskError, id="fsync"),
    pytest.param(replacement.Path, "replace", failing, DiskError, id="rename"),
]


@pytest.mark.parametrize(("owner", "name", "fault", "error"), STAGES)
@pytest.mark.parametrize("there_before", [True, False])
def test_after_a_failure_at_any_stage_the_old_file_is_there_and_no_other(
    there_before: bool,
    owner: Any,
    name: str,
    fault: Any,
    error: type[BaseException],
    opt: AdamW,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if there_before:
        path.write_bytes(b"old")
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fault)
        with pytest.raises(error):
            save(opt, path)
    assert list(path.parent.iterdir()) == ([path] if there_before else [])
    assert not there_before or path.read_bytes() == b"old"
    save(opt, path)
    assert list(path.parent.iterdir()) == [path]


def test_the_bytes_are_on_the_disk_before_the_name_is_and_the_name_before_save_returns(
    opt: AdamW, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        done.append("rename")
        assert not path.exists()
        assert len(list(path.parent.iterdir())) == 1
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    save(opt, path)
    assert done == ["file", "rename", "folder"]


def test_a_system_that_cannot_sync_a_folder_saves_all_the_same(
    opt: AdamW, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", failing)
    save(opt, path)
    monkeypatch.undo()
    load(opt, path)


def test_a_folder_that_is_missing_and_a_path_that_is_a_folder_are_the_systems_errors(
    opt: AdamW, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        save(opt, tmp_path / "nowhere" / "opt.safetensors")
    with pytest.raises(OSError, match="directory"):
        save(opt, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load(opt, tmp_path / "nowhere.safetensors")
    with pytest.raises(OSError, match=str(tmp_path)):
        load(opt, tmp_path)
    assert list(tmp_path.iterdir()) == []


@POSIX
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_a_file_has_the_permissions_of_any_new_file(
    mask: int, mode: int, opt: AdamW, path: Path, umask: Callable[[int], int]
) -> None:
    umask(mask)
    for _ in range(2):
        save(opt, path)
        assert stat.S_IMODE(path.stat().st_mode) == mode


@POSIX
def test_a_symbolic_link_stays_one_and_what_it_points_to_is_replaced(opt: AdamW, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    link, target = tmp_path / "latest", tmp_path / "runs" / "opt.safetensors"
    target.write_bytes(b"old")
    link.symlink_to(target)
    save(opt, link)
    assert link.is_symlink()
    load(opt, str(target))


# ---- what a file cannot hold


class Wrapped(torch.Tensor):
    """A tensor of somebody's own class."""


REFUSED = {
    "function": (lambda step: step, "is a function; a file holds tensors, numbers, text, None"),
    "set": ({1}, "is a set; a file holds"),
    "dtype": (torch.float32, "is a dtype; a file holds"),
    "subclass": (torch.zeros(2).as_subclass(Wrapped), "is a Wrapped; put the ordinary tensor there"),
    "sparse": (torch.eye(2).to_sparse(), r"has the layout torch.sparse_coo; put tensor.to_dense\(\) there"),
    "meta": (torch.zeros(2, device="meta"), "is on the meta device, which keeps no values; materialize it"),
    "float8": (torch.zeros(2).to(torch.float8_e4m3fnuz), "has dtype torch.float8_e4m3fnuz, which the format lacks"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_file_cannot_hold_is_refused_by_name_before_anything_is_written(
    kind: str, opt: AdamW, path: Path
) -> None:
    value, message = REFUSED[kind]
    opt.state_of("first.weight")["mine"] = {"deep": [0, value]}
    with pytest.raises(SaveError, match=f"^parameter 'first.weight': its state 'mine/deep/1' {message}"):
        save(opt, path)
    del opt.state_of("first.weight")["mine"]
    opt.param_groups[0]["mine"] = value
    with pytest.raises(SaveError, match=f"^group 0: its 'mine' {message}"):
        save(opt, path)
    del opt.param_groups[0]["mine"]
    handle = opt.register_state_dict_post_hook(lambda _, state_dict: state_dict.update(mine=value))
    with pytest.raises(SaveError, match=f"^the state dict's 'rest/mine' {message}"):
        save(opt, path)
    assert list(path.parent.iterdir()) == []
    handle.remove()
    save(opt, path)


def test_state_of_a_tensor_in_no_group_is_refused(opt: AdamW, path: Path) -> None:
    opt.state[nn.Parameter(torch.zeros(3))] = {"step": torch.tensor(1.0)}
    with pytest.raises(KeyError, match=r"of shape \[3\] that is in no group"):
        save(opt, path)
    assert list(path.parent.iterdir()) == []


def test_more_names_than_the_format_holds_are_refused(opt: AdamW, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "_LONGEST_HEADER", 1000)
    with pytest.raises(SaveError, match=r"settings of 6 tensors take \d+ bytes, a safetensors file holds 1000 of them"):
        save(opt, path)
    assert list(path.parent.iterdir()) == []


def test_the_longest_header_is_what_the_package_reads(tmp_path: Path) -> None:
    for excess, fits in ((0, True), (1, False)):
        header = b"{}".ljust(container._LONGEST_HEADER + excess)
        (tmp_path / "empty").write_bytes(len(header).to_bytes(8, "little") + header)
        if fits:
            assert container.read(tmp_path / "empty") == ({}, {})
        else:
            with pytest.raises(LoadError):
                container.read(tmp_path / "empty")


# ---- what others do with it


def test_a_reader_that_knows_nothing_of_us_reads_every_tensor(opt: AdamW, path: Path) -> None:
    save(opt, path)
    tensors = load_file(path)
    for name in ("first.weight", "first.bias"):
        for key, held in opt.state_of(name).items():
            assert torch.equal(tensors[f"state/{name}/{key}"], held)
    assert len(tensors) == 6


def test_every_tensor_is_aligned_where_a_file_is_mapped(path: Path) -> None:
    mixed = [torch.zeros(3, dtype=dtype) for dtype in (torch.bool, torch.float64, torch.bfloat16, torch.float32)]
    with path.open("wb") as file:
        container.write(file, {str(number): tensor for number, tensor in enumerate(mixed)}, {"some": "text"})
    tensors, _ = container.read(path)
    assert all(tensors[str(number)].data_ptr() % tensor.element_size() == 0 for number, tensor in enumerate(mixed))
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_the_file_that_is_loaded_may_be_saved_over(opt: AdamW, path: Path) -> None:
    save(opt, path)
    before = path.read_bytes()
    net = Net(("first",))
    fresh = AdamW(net)
    fresh.register_load_state_dict_post_hook(lambda _: save(opt, path))
    load(fresh, path)
    assert path.read_bytes() == before
    assert_same_bits(
        {"weight": state_by_name(net, fresh)["first.weight"]},
        {"weight": {**opt.state_of("first.weight"), "value": net.first.weight.detach()}},
    )
