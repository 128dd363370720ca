from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "benches" / "memory.py"
ELEMENTS = 124_439_808  # GPT-2's
MIB = 1 << 20
CASES: dict[str, tuple[float, dict[str, str | float]]] = {
    "plain": (8, {}),
    "clipping": (8, {"max_grad_norm": 1.0}),
    "clipping in bfloat16": (4, {"max_grad_norm": 1.0, "dtype": "bfloat16"}),
    "8 bits": (2, {"state_dtype": "8bit"}),
    "Kahan summation": (6, {"rounding": "kahan", "dtype": "bfloat16"}),
    "stochastic rounding, 8 bits": (2, {"rounding": "stochastic", "dtype": "bfloat16", "state_dtype": "8bit"}),
}
"""Bytes of state an element at least, and options."""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux counts resident pages and forgets their peak"
)


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    """What the cases need, by case: two steps of each, in one process of their own."""
    options = [json.dumps(case) for _, case in CASES.values()]
    shown = subprocess.run([sys.executable, PROGRAM, *options], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    return dict(zip(CASES, map(json.loads, shown.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_first_step_of_124_million_elements_needs_less_than_a_mebibyte_beyond_its_state(
    measured: dict[str, dict[str, int]], case: str
) -> None:
    state = CASES[case][0] * ELEMENTS
    kept = measured[case]["kept_by_first"]
    assert kept >= state  # else something was counted that is not the state
    if "8 bits" in case:  # scales, and small parameters in float32, come on top of two bytes an element
        assert kept <= 2.03 * ELEMENTS
        state = kept
    assert measured[case]["peak_of_first"] - state < MIB


@pytest.mark.parametrize("case", CASES)
def test_a_later_step_of_124_million_elements_needs_less_than_a_mebibyte(
    measured: dict[str, dict[str, int]], case: str
) -> None:
    assert measured[case]["peak_of_second"] < MIB
