"""All rows with their targets, in the order of the table."""

from __future__ import annotations

import large
import overhead
import small
from outcome import Row, Target

ROWS = (
    Row("step", "fp32 step, GPT-2's shapes", Target("at least", 0.97), large.step),
    Row("clip", "clip by norm + step", Target("at least", 1.3), large.clip_step),
    Row("clamp", "clip by norm + step + clamp", Target("at least", 1.7), large.clip_step_clamp),
    Row("1000", "1,000 × 1,024, real backward", Target("at least", 2.5), small.thousand),
    Row("5000", "5,000 × 64, real backward", Target("at least", 3.0), small.five_thousand),
    Row("construction", "construction over 1,000 parameters", Target("at most", 2.0), overhead.construction),
    Row("import", "import beyond torch", Target("at most", 60.0, "ms"), overhead.import_time),
)


def pick(names: list[str]) -> list[Row]:
    """Find rows by name; no names mean all."""
    by_name = {row.name: row for row in ROWS}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise SystemExit(f"no such row: {', '.join(unknown)}. Rows: {', '.join(by_name)}")
    return [by_name[name] for name in names] or list(ROWS)
