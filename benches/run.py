"""Measure rows and report: `run.py [ROW ...]`; no names mean all. `make bench` calls it."""

from __future__ import annotations

import gc
import sys

from rich.console import Console

from report import save, show
from rows import pick


def main() -> None:
    """Measure, show, save."""
    console = Console()
    outcomes = {}
    for row in pick(sys.argv[1:]):
        with console.status(f"measuring: {row.title}"):
            outcomes[row] = row.measure()
        gc.collect()
    show(outcomes, console)
    console.print("all numbers:")
    console.print(str(save(outcomes)), soft_wrap=True)


if __name__ == "__main__":
    main()
