"""The table for people and the file for programs."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import paramstate
from outcome import BANDWIDTH_TARGET, Outcome, Row
from timing import ROUNDS, WARM_UPS, Spread

RESULTS = Path(__file__).parent / "results" / "latest.json"


def processor() -> str:
    """Name the processor as the system does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def machine() -> dict[str, str | int]:
    """Say where the numbers come from."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "paramstate": paramstate.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "warm_ups": WARM_UPS,
        "rounds": ROUNDS,
    }


def milliseconds(seconds: Spread | None) -> str:
    """Show a median time."""
    return "" if seconds is None else f"{seconds.median * 1e3:.2f} ms"


def spread(value: Spread, unit: str) -> str:
    """Show a median, and under it least and greatest."""
    return f"{value.median:.2f} {unit}\n[dim]{value.least:.2f}-{value.greatest:.2f}[/dim]"


def verdict(*, met: bool) -> str:
    """Show whether a target is met."""
    return "[green]met[/green]" if met else "[bold red]missed[/bold red]"


def bandwidth(outcome: Outcome) -> str:
    """Show the share of the machine's bandwidth, and whether it is enough."""
    if outcome.bandwidth is None:
        return ""
    return f"{outcome.bandwidth.median:.2f}\n{verdict(met=outcome.bandwidth.median >= BANDWIDTH_TARGET)}"


def table_of(outcomes: Mapping[Row, Outcome]) -> Table:
    """Set the rows side by side."""
    table = Table(title="paramstate against torch.optim.AdamW", title_justify="left", show_lines=True)
    table.add_column("row")
    for header in ("torch", "paramstate", "median\nmin-max", "target", f"bandwidth\n≥ {BANDWIDTH_TARGET}"):
        table.add_column(header, justify="right", no_wrap=True)
    for row, outcome in outcomes.items():
        table.add_row(
            row.title,
            milliseconds(outcome.theirs),
            milliseconds(outcome.ours),
            spread(outcome.number, row.target.unit),
            f"{row.target}\n{verdict(met=row.target.met(outcome.number.median))}",
            bandwidth(outcome),
        )
    return table


def show(outcomes: Mapping[Row, Outcome], console: Console) -> None:
    """Print the table, its notes and the machine."""
    console.print(table_of(outcomes))
    for row, outcome in outcomes.items():
        setting = (f"torch with: {outcome.setting}",) if outcome.setting else ()
        for note in (*setting, *outcome.notes):
            console.print(f"[dim]{row.name}: {note}[/dim]")
    console.print("[dim]" + ", ".join(f"{key} {value}" for key, value in machine().items()) + "[/dim]")


def save(outcomes: Mapping[Row, Outcome]) -> Path:
    """Write everything that was measured, each round included."""
    rows = [
        {
            "name": row.name,
            "title": row.title,
            "target": dataclasses.asdict(row.target),
            "met": row.target.met(outcome.number.median),
            **dataclasses.asdict(outcome),
        }
        for row, outcome in outcomes.items()
    ]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return RESULTS
