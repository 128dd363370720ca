"""`paramstate.Store` needs no torch: in an environment that holds NumPy and this package alone it registers, steps,
clips and reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import paramstate


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with NumPy and paramstate in it, and nothing else."""
    packages = tmp_path_factory.mktemp("packages")
    numpy = Path(np.__file__).parent
    for source in (numpy, numpy.parent / "numpy.libs", Path(paramstate.__file__).parent):
        if source.exists():
            (packages / source.name).symlink_to(source, target_is_directory=True)
    return packages


def run(environment: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run a program with these packages and the standard library alone."""
    program = f"import sys\nsys.path.append({str(environment)!r})\n{body}"
    command = [sys.executable, "-I", "-S", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_environment_has_no_torch(environment: Path) -> None:
    result = run(environment, "import torch")
    assert result.returncode != 0
    assert "No module named 'torch'" in result.stderr


def test_a_store_works_without_torch(environment: Path) -> None:
    result = run(
        environment,
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
""",
    )
    assert result.returncode == 0, result.stderr


def test_a_torch_name_says_what_to_install(environment: Path) -> None:
    result = run(environment, "import paramstate\nparamstate.AdamW")
    assert result.returncode != 0
    assert "pip install 'paramstate[torch]'" in result.stderr.splitlines()[-1]


def test_a_store_does_not_import_torch_where_it_is_installed() -> None:
    program = "import sys, paramstate\nparamstate.Store()\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
