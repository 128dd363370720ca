"""The tables of fidelity: in the terminal, and in the document between its marks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fidelity_pictures import draw
from fidelity_tasks import Task
from fidelity_training import BASELINE, SEEDS, Results, Run, Setting
from fidelity_verdict import Verdict, judge

DOCUMENT = Path(__file__).parent.parent / "docs" / "fidelity.md"
MEASURED = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- end of measured -->)", re.DOTALL)
HEADERS = ("values", "rounding", "state", "bytes", "held-out loss", "difference", "spreads", "verdict")


def _cells(setting: Setting, runs: list[Run], found: Verdict) -> tuple[str, ...]:
    is_baseline = setting == BASELINE
    return (
        setting.values,
        _rounding(setting),
        setting.state if setting.rounding is not None else f"{setting.state} (torch)",
        f"{runs[0].bytes_a_parameter:.2f}",
        f"{found.mean:.4f} ± {found.deviation:.4f}",
        "" if is_baseline else f"{found.difference:+.4f} ± {found.margin:.4f}",
        "" if is_baseline else f"{found.in_spreads:+.2f}",
        "baseline" if is_baseline else found.word,
    )


def _rounding(setting: Setting) -> str:
    return "" if setting.values == "float32" else setting.rounding or "nearest"


def _markdown(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headers = list(headers)
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _each_seed(rows: dict[Setting, list[Run]]) -> str:
    headers = ("row", *(f"seed {seed}" for seed in range(SEEDS)))
    return _markdown(headers, ([setting.name, *(f"{run.final:.4f}" for run in runs)] for setting, runs in rows.items()))


def _picture(task: Task) -> Path:
    return DOCUMENT.with_name(f"fidelity-{task.name}.png")


def _section(task: Task, rows: dict[Setting, list[Run]]) -> str:
    verdicts = {setting: judge(runs, rows[BASELINE]) for setting, runs in rows.items()}
    outside = [
        f"- {setting.name}: {found.in_spreads:+.1f} spreads\n"
        for setting, found in verdicts.items()
        if found.word != "within"
    ]
    return "\n".join(
        (
            f"### {task.title}\n",
            _markdown(HEADERS, (_cells(setting, runs, verdicts[setting]) for setting, runs in rows.items())),
            f"Outside the spread:\n\n{''.join(outside)}" if outside else "None is outside the spread.\n",
            f"![{task.title}: curves and last losses]({_picture(task).name})\n",
            "The last loss of every seed:\n",
            _each_seed(rows),
        )
    )


def show(results: Results, console: Console) -> None:
    """Print a table for each task."""
    for task, rows in results.items():
        table = Table(title=task.title, title_justify="left")
        for header in HEADERS:
            table.add_column(header, no_wrap=True)
        for setting, runs in rows.items():
            found = judge(runs, rows[BASELINE])
            table.add_row(*_cells(setting, runs, found), style=None if found.word == "within" else "bold red")
        console.print(table)


def write(results: Results, versions: dict[str, str]) -> Path:
    """Draw the pictures and put the tables into the document."""
    for task, rows in results.items():
        draw(task, rows, _picture(task))
    made_with = "Made with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".\n"
    measured = "\n".join(("", made_with, *(_section(task, rows) for task, rows in results.items()), ""))
    before = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(MEASURED.sub(lambda _: measured, before), encoding="utf-8")
    return DOCUMENT
