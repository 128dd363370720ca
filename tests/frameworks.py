"""How tests that run other packages are run: offline, and with those packages' own warnings let be."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

OFFLINE = {
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "JAX_PLATFORMS": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}


def stay_offline() -> None:
    """Before any of the packages is imported: they read these variables then."""
    os.environ.update(OFFLINE)


def leave_their_warnings_be(items: Iterable[pytest.Item], folder: Path) -> None:
    """A package's own warnings are not ours to mend; one that our code causes is still an error."""
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings("error:::paramstate"))
