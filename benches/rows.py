"""All rows with their targets, in the order of the tables: our own, and those against the optimizers of others."""

from __future__ import annotations

import large
import overhead
import peers
import small
from outcome import Row, Target

ROWS = (
    Row("step", "fp32 step, GPT-2's shapes", Target("at least", 0.97), large.step),
    Row("clip", "clip by norm + step", Target("at least", 1.3), large.clip_step),
    Row("clamp", "clip by norm + step + clamp", Target("at least", 1.7), large.clip_step_clamp),
    Row("bf16", "bf16 values and moments", Target("at least", 1.0), large.bf16),
    Row("bf16-stochastic", "the same, stochastic rounding", Target("at least", 0.95), large.bf16_stochastic),
    Row("bf16-moments", "fp32 values, bf16 moments", Target("at least", 1.35), large.bf16_moments),
    Row("8bit", "fp32 values, 8-bit moments", Target("at least", 1.3), large.eight_bit_moments),
    Row("8bit-state", "state of 8-bit moments", Target("at most", 2.1, "B"), overhead.state_of_eight_bit_moments),
    Row("row-steps", "row steps in 10 % of parameters", Target("at most", 1.05), large.row_steps),
    Row("row-steps-48", "row steps alone, rows of 48", Target("at most", 1.05), large.row_steps_alone(48)),
    Row("row-steps-3", "row steps alone, rows of 3", Target("at most", 1.05), large.row_steps_alone(3)),
    Row("row-steps-1", "row steps alone, rows of 1", Target("at most", 1.05), large.row_steps_alone(1)),
    Row("1000", "1,000 × 1,024, real backward", Target("at least", 2.5), small.thousand),
    Row("5000", "5,000 × 64, real backward", Target("at least", 3.0), small.five_thousand),
    Row("construction", "construction over 1,000 parameters", Target("at most", 2.0), overhead.construction),
    Row("import", "import beyond torch", Target("at most", 60.0, "ms"), overhead.import_time),
    Row("peak", "memory that a step needs", Target("at most", 1.0, "MiB"), overhead.peak),
)
PEERS = (
    Row("peers-fp32", "fp32 step, 33.6M elements", None, peers.plain),
    Row("peers-bf16", "bf16 values and moments", None, peers.bf16),
    Row("peers-bf16-stochastic", "the same, stochastic rounding", None, peers.bf16_stochastic),
    Row("peers-bf16-kahan", "the same, Kahan summation", None, peers.bf16_kahan),
    Row("peers-8bit", "fp32 values, 8-bit moments", Target("at least", 8.0), peers.eight_bits),
    Row("peers-1000", "1,000 × 1,024, real backward", None, peers.thousand),
)


def pick(names: list[str]) -> list[Row]:
    """Find rows by name."""
    by_name = {row.name: row for row in (*ROWS, *PEERS)}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        sets = "rows, peers, growth"
        raise SystemExit(f"no such row: {', '.join(unknown)}. Rows: {', '.join(by_name)}. Sets of them: {sets}")
    return [by_name[name] for name in names]
