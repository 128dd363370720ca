"""The demonstration, in short: what it claims about the four ways of clipping holds."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def demonstration(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("clipped_classifier")


def test_only_torch_given_new_parameters_stops_training(demonstration: ModuleType, tmp_path: Path) -> None:
    digits = demonstration.load()
    results = {way.name: demonstration.train(way, digits, 3, lambda: None) for way in demonstration.WAYS}
    in_place, lost, followed, clipped = results.values()
    assert (lost.training, lost.with_state) == (0, 0)
    for result in (in_place, followed, clipped):
        assert (result.training, result.with_state) == (result.parameters, result.parameters)
        assert result.losses == pytest.approx(in_place.losses, rel=1e-3)
        assert result.losses[-1] < lost.losses[-1]
    assert followed.losses == clipped.losses

    picture = tmp_path / "curves.png"
    demonstration.draw_curves({name: result.losses for name, result in results.items()}, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
