"""The stub is compared with the compiled module: names, kinds, parameters, their order and their defaults."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import paramstate
from paramstate import _core

PACKAGE = Path(paramstate.__file__).parent


def compare(source: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MYPYPATH": str(source), "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "mypy.stubtest", "paramstate._core", "--concise"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_stub_says_what_the_module_is() -> None:
    pytest.importorskip("mypy")
    result = compare(PACKAGE.parent)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("def isa() -> str: ...", "def isa(wide: bool) -> str: ..."),
        ("lr: float = 1e-3,", "lr: float = 1e-2,"),
        ("    def reset(self, key: int | str) -> None: ...\n", ""),
    ],
    ids=["parameter", "default", "method"],
)
def test_a_stub_that_differs_is_found(right: str, wrong: str, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    stub = (PACKAGE / "_core.pyi").read_text()
    assert right in stub
    copy = tmp_path / "paramstate"
    copy.mkdir()
    (copy / "__init__.pyi").touch()
    (copy / "_core.pyi").write_text(stub.replace(right, wrong))
    assert compare(tmp_path).returncode != 0


@pytest.mark.parametrize("name", sorted(_core.__all__))
def test_everything_in_the_module_is_documented(name: str) -> None:
    item = getattr(_core, name)
    members = (
        [item, *(value for key, value in vars(item).items() if key[0] != "_")] if inspect.isclass(item) else [item]
    )
    assert [member for member in members if not inspect.getdoc(member)] == []
