from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHES = Path(__file__).parent.parent / "benches"
DOCUMENT = BENCHES.parent / "docs" / "benchmarks.md"
SAVED = BENCHES / "results" / "quick-some.json"
QUICK_ROWS = ["clamp", "row-steps", "1000", "construction"]
PARTS = "<!-- rows: begin -->\nold rows\n<!-- rows: end -->\n<!-- peers: begin -->\nold\n<!-- peers: end -->"
PROGRAM = """
import json, sys
import correctness, document, large, run
from outcome import OURS

run.main()
work = large.Work()
side = work.ours()
reference = correctness.Reference(side.parameters)
once = correctness.check(reference, {OURS: (side, side.optimizer.step)}, work.tolerance)
twice = {OURS: (side, lambda: [side.optimizer.step() for _ in range(2)])}
wrong = correctness.check(reference, twice, work.tolerance)
print(json.dumps({"once": once, "twice": wrong, "parts": document.replaced(sys.stdin.read(), "peers", ["new"])}))
"""

pytest.importorskip("rich")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def shown() -> list[str]:
    """What a process prints that measures some rows on small sizes, then tries parts of the benchmark."""
    env = {**os.environ, "PARAMSTATE_BENCH_QUICK": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(BENCHES), *sys.path])
    command = [sys.executable, "-c", PROGRAM, *QUICK_ROWS]
    SAVED.unlink(missing_ok=True)
    before = DOCUMENT.read_text(encoding="utf-8")
    done = subprocess.run(command, input=PARTS, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert DOCUMENT.read_text(encoding="utf-8") == before
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def found(shown: list[str]) -> dict[str, Any]:
    """What the process found of the benchmark's parts."""
    last: dict[str, Any] = json.loads(shown[-1])
    return last


def test_some_rows_are_timed_and_saved_and_the_document_is_left_alone(shown: list[str]) -> None:
    assert any("left as it is" in line for line in shown)
    saved = json.loads(SAVED.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in saved["rows"]}
    assert list(rows) == QUICK_ROWS
    assert all(row["number"]["least"] <= row["number"]["median"] <= row["number"]["greatest"] for row in rows.values())
    assert {"paramstate", "torch for-loop", "torch foreach", "torch fused"} <= set(rows["clamp"]["times"])
    assert rows["clamp"]["bandwidth"] is not None
    assert {"processor", "memory", "python", "torch", "rustc", "paramstate"} <= set(saved["environment"])


def test_a_side_that_computes_something_else_is_not_timed(found: dict[str, Any]) -> None:
    assert found["once"] == {}
    assert "not timed" in found["twice"]["paramstate"]


def test_a_run_writes_its_own_part_of_the_document_and_no_other(found: dict[str, Any]) -> None:
    assert found["parts"] == PARTS.replace("begin -->\nold\n<", "begin -->\n\nnew\n\n<")
    document = DOCUMENT.read_text(encoding="utf-8")
    assert all(document.count(f"<!-- {part}: begin -->") == 1 for part in ("rows", "peers", "growth"))
