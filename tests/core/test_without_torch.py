"""`paramstate.Store` needs no torch: a process in which torch cannot be imported registers, steps, clips and reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import paramstate

PREAMBLE = """
import importlib.abc
import sys


class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")


sys.meta_path.insert(0, NoTorch())
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    source = Path(paramstate.__file__).parent.parent
    program = f"{PREAMBLE}sys.path.insert(0, {str(source)!r})\n{body}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_the_import_hook_of_this_file_works() -> None:
    result = run("import torch")
    assert result.returncode != 0
    assert "No module named 'torch'" in result.stderr


def test_a_store_works_without_torch() -> None:
    result = run(
        """
import numpy as np
import paramstate

store = paramstate.Store()
weight = np.array([[1.0, -2.0], [3.0, 4.0]], np.float32)
id = store.register("weight", weight)
store.step({"weight": np.ones((2, 2), np.float32)}, lr=0.5)
assert np.allclose(weight, [[0.5, -2.5], [2.5, 3.5]]), weight
store.clip("weight", 0.0, 3.0)
assert weight.min() == 0.0 and weight.max() == 3.0
store.clip(id, lambda values: values / 2)
assert weight.max() == 1.5
assert store.state("weight")["step"] == 1.0
assert store.value(id) is weight
assert "torch" not in sys.modules
"""
    )
    assert result.returncode == 0, result.stderr


def test_a_torch_name_says_what_is_missing() -> None:
    result = run("import paramstate\nparamstate.AdamW")
    assert result.returncode != 0
    assert "torch" in result.stderr.splitlines()[-1]
