"""The frameworks that drive an optimizer, run offline on tiny random models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from frameworks import leave_their_warnings_be, stay_offline

stay_offline()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leave_their_warnings_be(items, Path(__file__).parent)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frameworks write logs and checkpoints where they are run."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
