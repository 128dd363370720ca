from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "benches" / "memory.py"
ELEMENTS = 124_439_808  # GPT-2's
MIB = 1 << 20
STATE = {"float32": 2 * 4 * ELEMENTS, "bfloat16": 2 * 2 * ELEMENTS}
CASES = {
    "plain": {},
    "clipping": {"max_grad_norm": 1.0},
    "clipping in bfloat16": {"max_grad_norm": 1.0, "dtype": "bfloat16"},
}

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux counts resident pages and forgets their peak"
)


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    """What the cases need, by case: two steps of each, in one process of their own."""
    options = [json.dumps(case) for case in CASES.values()]
    shown = subprocess.run([sys.executable, PROGRAM, *options], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    return dict(zip(CASES, map(json.loads, shown.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_first_step_of_124_million_elements_needs_less_than_a_mebibyte_beyond_its_state(
    measured: dict[str, dict[str, int]], case: str
) -> None:
    state = STATE[str(CASES[case].get("dtype", "float32"))]
    assert measured[case]["kept_by_first"] >= state  # else something was counted that is not the state
    assert measured[case]["peak_of_first"] - state < MIB


@pytest.mark.parametrize("case", CASES)
def test_a_later_step_of_124_million_elements_needs_less_than_a_mebibyte(
    measured: dict[str, dict[str, int]], case: str
) -> None:
    assert measured[case]["peak_of_second"] < MIB
