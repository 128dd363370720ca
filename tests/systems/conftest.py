"""The systems that this project learns from, run offline on tiny random models where they run at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from frameworks import leave_their_warnings_be, stay_offline

stay_offline()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leave_their_warnings_be(items, Path(__file__).parent)
