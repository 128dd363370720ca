"""The table in the terminal and the file for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from environment import environment
from growth import Growth, Point
from outcome import BANDWIDTH_TARGET, OURS, Outcome, Row
from scale import QUICK
from timing import Spread

RESULTS = Path(__file__).parent / "results"
TORCHS = ("torch for-loop", "torch foreach", "torch fused")
COLOURS = {"met": "[green]met[/green]", "missed": "[bold red]missed[/bold red]", "": ""}


def seconds(spread: Spread | None) -> str:
    """A median time in a unit that suits it."""
    if spread is None:
        return ""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if spread.median * factor >= 1 or unit == "µs":
            break
    return (
        f"{spread.median * factor:.3g} {unit}"
        if spread.median * factor < 999.5
        else f"{spread.median * factor:.0f} {unit}"
    )


def number(row: Row, outcome: Outcome) -> str:
    """The row's number: median, least and greatest; or why there is none."""
    if outcome.number is None:
        return "not measured"
    unit = row.target.unit if row.target else "×"
    median, least, greatest = outcome.number.median, outcome.number.least, outcome.number.greatest
    return f"{median:.2f} {unit}" + (f" [{least:.2f}, {greatest:.2f}]" if least < greatest else "")


def share(outcome: Outcome) -> str:
    """The part of the machine's bandwidth that is reached."""
    return "" if outcome.bandwidth is None else f"{outcome.bandwidth.median:.2f}"


def bandwidth_verdict(outcome: Outcome) -> str:
    """Whether that is enough."""
    if outcome.bandwidth is None:
        return ""
    return "met" if outcome.bandwidth.median >= BANDWIDTH_TARGET else "missed"


def notes_on(row: Row, outcome: Outcome) -> Iterable[str]:
    """Everything to be said of a row beside its numbers."""
    for name, reason in outcome.missing.items():
        yield f"{row.name}: {name + ' ' if name else ''}not measured: {reason}"
    yield from (f"{row.name}: {note}" for note in outcome.notes)


def table_against_torch(outcomes: Mapping[Row, Outcome]) -> Table:
    """Our own rows, side by side with torch's three settings."""
    table = Table(title="paramstate against torch.optim.AdamW", title_justify="left")
    table.add_column("row", no_wrap=True)
    headers = (*(name.replace(" ", "\n") for name in TORCHS), OURS, "number\n[min, max]", "target", "bandwidth")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for row, outcome in outcomes.items():
        table.add_row(
            row.title,
            *(seconds(outcome.others.get(name)) for name in TORCHS),
            seconds(outcome.ours),
            escape(number(row, outcome)),
            f"{row.target} {COLOURS[row.verdict(outcome)]}",
            f"{share(outcome)} {COLOURS[bandwidth_verdict(outcome)]}",
        )
    return table


def table_against_others(outcomes: Mapping[Row, Outcome]) -> Table:
    """One line for each of the others in each row."""
    table = Table(title="paramstate against the optimizers of others", title_justify="left")
    for header in ("row", "optimizer", "step", "over ours [min, max]", "target"):
        table.add_column(header, justify="left" if header in {"row", "optimizer"} else "right")
    for row, outcome in outcomes.items():
        table.add_section()
        table.add_row(row.title, OURS if outcome.ours else "[dim]not measured[/dim]", seconds(outcome.ours))
        for name, ratio in outcome.over_ours.items():
            target = f"{row.target} {COLOURS[row.verdict(outcome)]}" if row.target and name == outcome.against else ""
            shown = f"{ratio.median:.2f} × [{ratio.least:.2f}, {ratio.greatest:.2f}]"
            table.add_row("", name, seconds(outcome.others[name]), escape(shown), target)
        for name in filter(None, outcome.missing):
            table.add_row("", name, "[dim]not measured[/dim]")
    return table


def table_of_growth(growth: Growth) -> Table:
    """One line for each count."""
    names = sorted({name for point in (*growth.tensors, *growth.elements) for name in point.seconds}, key=order)
    table = Table(title="time of a step", title_justify="left")
    for header in ("", *names):
        table.add_column(header, justify="right")

    def add(points: list[Point], what: str) -> None:
        table.add_section()
        for point in points:
            cells = (seconds(point.seconds.get(name)) or "[dim]not measured[/dim]" for name in names)
            table.add_row(f"{point.count:,} {what}", *cells)

    add(growth.tensors, "tensors")
    add(growth.elements, "elements")
    return table


def order(name: str) -> tuple[bool, str]:
    """Ours first, then by name."""
    return (name != OURS, name)


def show(tables: Iterable[Table], notes: Iterable[str], console: Console) -> None:
    """Print tables, notes and the machine."""
    for table in tables:
        console.print(table)
    for note in notes:
        console.print(f"[dim]{escape(note)}[/dim]", soft_wrap=True)
    console.print(
        "[dim]" + ", ".join(f"{key} {value}" for key, value in environment().items()) + "[/dim]", soft_wrap=True
    )


def rows_as_data(outcomes: Mapping[Row, Outcome]) -> list[dict[str, object]]:
    """Everything that was measured, each round included."""
    return [
        {
            "name": row.name,
            "title": row.title,
            "target": row.target and dataclasses.asdict(row.target),
            "verdict": row.verdict(outcome),
            **dataclasses.asdict(outcome),
        }
        for row, outcome in outcomes.items()
    ]


def save(name: str, content: Mapping[str, object]) -> Path:
    """Write one run's numbers under a name."""
    path = RESULTS / f"{'quick-' if QUICK else ''}{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **content}, indent=1) + "\n", encoding="utf-8")
    return path
