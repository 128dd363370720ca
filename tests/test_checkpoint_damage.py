"""``load`` tells what is wrong with a file, and an error changes nothing, whatever the file says."""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from paramstate import AdamW, Box, LoadError, UnsupportedError, load, save
from small_models import Net, assert_same_bits, state_by_name, train


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "opt.safetensors"


@pytest.fixture
def opt() -> AdamW:
    net = Net(("first",))
    opt = AdamW(net)
    train(net, opt, [1])
    return opt


def refused(opt: AdamW, path: Path, match: str) -> str:
    """A load raises a LoadError that names the path and matches, and changes nothing."""
    before, ids = {key: dict(held) for key, held in opt.state.items()}, dict(opt.ids)
    with pytest.raises(LoadError, match=match) as caught:
        load(opt, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert {key: dict(held) for key, held in opt.state.items()} == before
    assert dict(opt.ids) == ids
    return str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"name,value\n" * 20, pickle.dumps({"state": {}}), b"\0" * 100])
def test_a_file_of_another_kind_is_refused(content: bytes, opt: AdamW, path: Path) -> None:
    path.write_bytes(content)
    message = refused(opt, path, rf"is no safetensors file \({len(content)} bytes; .*give a file that paramstate\.save")
    assert "\n" not in message


def test_a_file_of_torchs_is_refused(opt: AdamW, path: Path) -> None:
    torch.save(opt.state_dict(), path)
    refused(opt, path, "is no safetensors file")


def test_a_file_that_was_cut_off_anywhere_is_refused(opt: AdamW, path: Path) -> None:
    save(opt, path)
    whole = path.read_bytes()
    for length in range(9, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(opt, path, r"is damaged, or only the beginning of a file \(\d+ bytes; ")
    path.write_bytes(whole)
    load(opt, path)


def test_a_safetensors_file_of_somebody_else_is_refused(opt: AdamW, path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)
    refused(opt, path, "its metadata says format None, a file that paramstate.save wrote says 'paramstate.optimizer'")
    save_file({"weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    refused(
        opt, path, "its metadata says format 'pt', .*; what others wrote is read by what wrote it, and goes into opt"
    )


def altered(path: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None, **metadata: str) -> None:
    """Change the content of a file, or its metadata."""
    with safe_open(path, framework="pt") as file:
        known = file.metadata()
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    content = json.loads(known["content"])
    change({"content": content, "tensors": tensors})
    save_file(tensors, path, metadata={**known, "content": json.dumps(content), **metadata})


def test_a_file_of_a_later_version_is_refused_and_that_altered_by_nobody_is_not(opt: AdamW, path: Path) -> None:
    save(opt, path)
    altered(path)
    load(opt, path)
    altered(path, version="2", content="[]")
    refused(opt, path, r"has version 2 of the format, this release reads up to 1; update paramstate$")


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a tensor is missing": lambda file: file["tensors"].pop("state/first.weight/exp_avg"),
    "a tensor is too many": lambda file: file["tensors"].update(more=torch.zeros(1)),
    "a tensor is used twice": lambda file: file["content"]["rest"].update(more={"$tensor": "state/first.bias/step"}),
    "the groups are missing": lambda file: file["content"].pop("param_groups"),
    "a group is a number": lambda file: file["content"]["param_groups"].append(5),
    "an ID is missing": lambda file: file["content"]["paramstate"]["ids"].pop("first.bias"),
    "the names of a parameter are a number": lambda file: file["content"]["paramstate"]["names"].update(
        {"first.bias": 5}
    ),
    "a given name is a list": lambda file: file["content"]["param_groups"][0]["param_names"].append([]),
    "the state of a parameter is a number": lambda file: (
        file["content"]["state"].update({"first.bias": 1}),
        [file["tensors"].pop(f"state/first.bias/{key}") for key in ("step", "exp_avg", "exp_avg_sq")],
    ),
    "a parameter is in no group": lambda file: file["content"]["state"].update({"second.bias": {}}),
    "a mark is unknown": lambda file: file["content"]["rest"].update(more={"$object": "os.system"}),
    "two marks": lambda file: file["content"]["rest"].update(more={"$tuple": [], "$items": []}),
    "a float is text": lambda file: file["content"]["rest"].update(more={"$float": "one"}),
    "a key is a list": lambda file: file["content"]["rest"].update(more={"$items": [[[], 1]]}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_whose_content_does_not_hang_together_is_refused(damage: str, opt: AdamW, path: Path) -> None:
    save(opt, path)
    altered(path, DAMAGE[damage])
    refused(opt, path, r"is damaged \(\w+\(.*; give a file as paramstate\.save wrote it$")


@pytest.mark.parametrize(
    "metadata", [{"content": "{"}, {"content": "[]"}, {"content": "[" * 100_000}, {"version": "one"}, {"version": ""}]
)
def test_a_file_whose_metadata_cannot_be_read_is_refused(metadata: dict[str, str], opt: AdamW, path: Path) -> None:
    save(opt, path)
    altered(path, **metadata)
    refused(opt, path, "is damaged")


def declared() -> AdamW:
    """An optimizer for which all kinds of things are declared."""
    net = Net(("first",))
    opt = AdamW(net, constraints={"first.weight": Box(-1.0, 1.0)}, state_dtype="bfloat16")
    train(net, opt, [1])
    opt.freeze_rows("first.weight", [0])
    opt.freeze("first.bias")
    return opt


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything within a tree."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from nodes(value[key], (*path, key))


with tempfile.TemporaryDirectory() as folder:
    save(declared(), Path(folder, "opt"))
    with safe_open(Path(folder, "opt"), framework="pt") as file:
        METADATA: dict[str, str] = file.metadata()
    TENSORS = {key: tensor.clone() for key, tensor in load_file(Path(folder, "opt")).items()}
CONTENT = json.loads(METADATA["content"])
OTHER = [None, True, -1, 5, 1.5, "text", [], [1], {}, {"a": 1}, {"$tuple": [1]}, {"$float": "nan"}]


@given(path=st.sampled_from(list(nodes(CONTENT))[1:]), other=st.sampled_from([*OTHER, ...]))
def test_whatever_a_file_says_an_error_changes_nothing(path: tuple[Any, ...], other: Any) -> None:
    content = copy.deepcopy(CONTENT)
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    if other is ...:
        del owner[path[-1]]
    else:
        owner[path[-1]] = other
    net = Net(("first",))
    opt = AdamW(net, lr=0.5)
    train(net, opt, [7])
    before, ids, group = state_by_name(net, opt), dict(opt.ids), dict(opt.param_groups[0])
    with tempfile.TemporaryDirectory() as folder:
        save_file(TENSORS, Path(folder, "opt"), metadata={**METADATA, "content": json.dumps(content)})
        try:
            load(opt, Path(folder, "opt"))
        except (LoadError, UnsupportedError):
            assert_same_bits(state_by_name(net, opt), before)
            assert (dict(opt.ids), dict(opt.param_groups[0])) == (ids, group)
            assert net.first.bias.requires_grad


@pytest.mark.parametrize(
    ("name", "trait", "value", "cause"),
    [
        ("first.bias", "frozen", {}, "KeyError"),
        ("first.bias", "frozen", {"trained": 5}, "'trained' is 5"),
        ("first.weight", "constraint", {"kind": "box", "min": 2, "max": 1}, "Box: min 2 is above max 1"),
        (
            "first.weight",
            "constraint",
            {"kind": "box", "min": 0, "zero_exp_avg": 5},
            "zero_exp_avg must be True or Fal",
        ),
        ("first.weight", "rows", {"dim": -1, "offsets": torch.zeros(2, dtype=torch.int64)}, "the dim of rows is -1"),
        ("first.weight", "rows", {"dim": 0, "offsets": torch.zeros(2)}, "the offsets of rows are torch.float32"),
        (
            "first.weight",
            "rows",
            {"dim": 0, "offsets": torch.zeros(2, dtype=torch.int64), "frozen": torch.zeros(2)},
            "the frozen rows are torch.float32",
        ),
        ("first.weight", "state_dtype", "float8", "state_dtype must be"),
    ],
)
def test_what_is_declared_in_a_way_that_nobody_can_read_is_refused_by_name(
    name: str, trait: str, value: Any, cause: str
) -> None:
    saved = declared().state_dict()
    saved["paramstate"]["traits"][saved["paramstate"]["names"].index([name])][trait] = value
    with pytest.raises(
        LoadError, match=f"^parameter '{name}': what the state dict declares for it cannot be read"
    ) as e:
        AdamW(Net(("first",))).load_state_dict(saved)
    assert cause in str(e.value)
