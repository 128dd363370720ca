"""What `import paramstate` brings: torch and a feature's files only where they are used, and every public name."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import paramstate

FEATURES = (
    "checkpoint.loading", "checkpoint.saving", "comparison", "diagnosis", "editing.session", "loading.load",
    "selection.backbones", "selection.expressions", "selection.preview", "surgery.relayout_run", "surgery.row_edits",
    "table",
)  # fmt: skip
"""Files that plain training has no use for."""
TRAINING = """
model = torch.nn.Linear(2, 1)
opt = paramstate.AdamW(model, max_grad_norm=1.0, constraints=paramstate.Box(-1.0, 1.0))
model(torch.ones(1, 2)).sum().backward()
opt.step()
opt.zero_grad()
"""


def test_plain_training_loads_no_feature_that_it_does_not_use() -> None:
    program = f"import sys, torch, paramstate\n{TRAINING}\nprint(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(shown.stdout.split())
    assert "paramstate.optim" in loaded
    assert loaded.isdisjoint(f"paramstate.{name}" for name in FEATURES)
    assert "safetensors" not in loaded


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_that_plain_training_does_not_load_is_there(name: str) -> None:
    assert importlib.util.find_spec(f"paramstate.{name}") is not None


def test_every_public_name_is_listed_before_any_is_used() -> None:
    program = "import paramstate\nassert set(paramstate.__all__) <= set(dir(paramstate))\nprint(*paramstate.__all__)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == paramstate.__all__


def test_a_star_import_brings_exactly_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from paramstate import *", names)
    assert set(names) - {"__builtins__"} == set(paramstate.__all__)
    assert all(names[name] is getattr(paramstate, name) for name in paramstate.__all__)
