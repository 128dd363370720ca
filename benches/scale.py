"""How much is measured: all of it, or, to try the benchmark itself, very little.

With PARAMSTATE_BENCH_QUICK set everything runs on small sizes for few rounds: the numbers mean nothing, and nothing but
the terminal and a file of their own sees them.
"""

from __future__ import annotations

import os

QUICK = bool(os.environ.get("PARAMSTATE_BENCH_QUICK"))

WARM_UPS = 1 if QUICK else 3
ROUNDS = 3 if QUICK else 15
SLOW_EVERY = 3  # a contestant that is far from the best runs in every third round only
SMALLER = 50 if QUICK else 1  # by how much sizes are divided
