"""The document of what torch's users rely on says what the tests say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def compatibility() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compatibility", ROOT / "scripts" / "compatibility.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_is_what_the_tests_say(compatibility: ModuleType) -> None:
    document = compatibility.DOCUMENT.read_text(encoding="utf-8")
    assert compatibility.written(document) == document, "stale: run scripts/compatibility.py"


def test_a_test_without_a_statement_is_refused(compatibility: ModuleType, tmp_path: Path) -> None:
    silent = tmp_path / "test_silent.py"
    silent.write_text('"""A title."""\ndef test_it() -> None: ...\n', encoding="utf-8")
    with pytest.raises(compatibility.MissingStatementError, match="test_it has no docstring"):
        compatibility.section(silent)
