"""Measure and report: `run.py [rows | peers | growth | ROW ...]`. `make bench` calls it.

Without names: the rows, and those against the optimizers of others where any of these is installed. A whole set writes
its part of docs/benchmarks.md; single rows never do.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterable

from rich.console import Console

import document
import growth
import peers
import report
import sides
from outcome import NotMeasuredError, Outcome, Row, not_measured
from rows import PEERS, ROWS, pick
from scale import QUICK

WIDTH = 150  # where the output goes into a file, whose width nobody knows


def measured(row: Row) -> Outcome:
    """One row, or why it cannot be measured here."""
    try:
        return row.measure()
    except NotMeasuredError as reason:
        return not_measured(str(reason))


def measure_all(rows: Iterable[Row], console: Console) -> dict[Row, Outcome]:
    """Measure rows, one after another."""
    outcomes = {}
    for row in rows:
        start = time.perf_counter()
        with console.status(f"measuring: {row.title}"):
            outcomes[row] = measured(row)
        gc.collect()
        console.print(
            f"[dim]{row.name}: {report.number(row, outcomes[row])}, {time.perf_counter() - start:.0f} s[/dim]"
        )
    return outcomes


def write(part: str, lines: Callable[[], list[str]], console: Console) -> None:
    """Write a part of the document, and say so."""
    if QUICK:
        console.print("docs/benchmarks.md: left as it is, since the quick run measures nothing")
        return
    document.write(part, lines())
    console.print(f"docs/benchmarks.md: this full run of '{part}' wrote its part of it")


def run_rows(console: Console, name: str, rows: Iterable[Row]) -> None:
    """Measure a set of rows, or some rows of any set; only a set is written into the document."""
    outcomes = measure_all(rows, console)
    own = {row: outcome for row, outcome in outcomes.items() if row not in PEERS}
    others = {row: outcome for row, outcome in outcomes.items() if row in PEERS}
    tables = [report.table_against_torch(own)] * bool(own) + [report.table_against_others(others)] * bool(others)
    notes = [note for row, outcome in outcomes.items() for note in report.notes_on(row, outcome)]
    report.show(tables, notes, console)
    console.print(f"every time: {report.save(name, {'rows': report.rows_as_data(outcomes)})}", soft_wrap=True)
    if name == "rows":
        write(name, lambda: document.against_torch(own), console)
    elif name == "peers":
        write(name, lambda: document.against_others(others), console)
    else:
        console.print("docs/benchmarks.md: left as it is, since only some rows were measured")


def run_growth(console: Console) -> None:
    """Measure the curves."""
    with console.status("measuring") as status:
        curves = growth.run(lambda what: status.update(f"measuring: {what}"))
    report.show([report.table_of_growth(curves)], [], console)
    console.print(f"every time: {report.save('growth', dataclasses.asdict(curves))}", soft_wrap=True)
    write("growth", lambda: document.of_growth(curves), console)


def main() -> None:
    """Measure what is asked for."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    asked = sys.argv[1:] or (["rows", "peers"] if peers.versions() else ["rows"])
    sets = {"rows": ROWS, "peers": PEERS}
    for name in [name for name in asked if name in sets]:
        run_rows(console, name, sets[name])
    some = pick([name for name in asked if name not in {*sets, "growth"}])
    if some:
        run_rows(console, "some", some)
    if "growth" in asked:
        sides.random_numbers.cache_clear()
        run_growth(console)


if __name__ == "__main__":
    main()
