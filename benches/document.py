"""docs/benchmarks.md: each run of a whole set writes its own part between two marks, and leaves the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from environment import environment
from growth import Growth, Point
from outcome import BANDWIDTH_TARGET, OURS, Outcome, Row
from picture import draw_growth, draw_ratios
from report import TORCHS, bandwidth_verdict, notes_on, number, order, seconds, share

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "benchmarks"


def table(headers: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table."""
    head = list(headers)
    rows = ("| " + " | ".join(cell.replace("|", "&#124;") for cell in line) + " |" for line in lines)
    return ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |", *rows, ""]


def where() -> list[str]:
    """The machine and the versions."""
    found = environment()
    return table(found, [found.values()])


def shortfalls(outcomes: Mapping[Row, Outcome]) -> list[str]:
    """What misses its target, and what was not measured."""
    lines = []
    for row, outcome in outcomes.items():
        if row.verdict(outcome) == "missed":
            lines.append(f"- {row.title}: {number(row, outcome)}, the target is {row.target}.")
        if bandwidth_verdict(outcome) == "missed":
            lines.append(
                f"- {row.title}: {share(outcome)} of the machine's bandwidth, the target is {BANDWIDTH_TARGET}."
            )
        if "" in outcome.missing:
            lines.append(f"- {row.title}: not measured: {outcome.missing['']}.")
    return ["Shortfalls:", "", *lines, ""] if lines else ["Every target is met.", ""]


def notes(outcomes: Mapping[Row, Outcome]) -> list[str]:
    """What is to be said of the rows, a line for each."""
    found = {row: [note.removeprefix(f"{row.name}: ") for note in notes_on(row, outcomes[row])] for row in outcomes}
    return [*(f"- `{row.name}`: {'; '.join(said)}." for row, said in found.items() if said), ""]


def against_torch(outcomes: Mapping[Row, Outcome]) -> list[str]:
    """The part of our own rows."""
    draw_ratios(outcomes, PICTURES / "ratios.png")
    headers = ("row", *TORCHS, OURS, "number: median [min, max]", "target", "", "of the machine's bandwidth")
    lines = (
        (
            row.title,
            *(seconds(outcome.others.get(name)) for name in TORCHS),
            seconds(outcome.ours),
            number(row, outcome),
            str(row.target or ""),
            row.verdict(outcome),
            share(outcome),
        )
        for row, outcome in outcomes.items()
    )
    picture = "![ratios of the rows with their targets](benchmarks/ratios.png)"
    return [*where(), *table(headers, lines), *shortfalls(outcomes), picture, "", *notes(outcomes)]


def against_others(outcomes: Mapping[Row, Outcome]) -> list[str]:
    """The part of the optimizers of others."""

    def lines() -> Iterable[tuple[str, ...]]:
        for row, outcome in outcomes.items():
            yield (row.title, OURS, seconds(outcome.ours) or "not measured", "", "")
            for name, ratio in outcome.over_ours.items():
                shown = f"{ratio.median:.2f} × [{ratio.least:.2f}, {ratio.greatest:.2f}]"
                target = f"{row.target}: {row.verdict(outcome)}" if row.target and name == outcome.against else ""
                yield ("", name, seconds(outcome.others[name]), shown, target)
            yield from (("", name, "not measured", "", "") for name in filter(None, outcome.missing))

    headers = ("row", "optimizer", "step", "over ours: median [min, max]", "target")
    return [*where(), *table(headers, lines()), *shortfalls(outcomes), *notes(outcomes)]


def of_growth(growth: Growth) -> list[str]:
    """The part of the curves."""
    draw_growth(growth, PICTURES / "growth.png")
    names = sorted({name for point in (*growth.tensors, *growth.elements) for name in point.seconds}, key=order)

    def lines(points: list[Point]) -> Iterable[tuple[str, ...]]:
        for point in points:
            missing = (f"not measured: {point.missing[name]}" if name in point.missing else "" for name in names)
            cells = (seconds(point.seconds.get(name)) or why for name, why in zip(names, missing, strict=True))
            yield (f"{point.count:,}", str(point.rounds), *cells)

    picture = "![milliseconds a step against tensors and elements](benchmarks/growth.png)"
    tensors = table(("tensors of 64", "rounds", *names), lines(growth.tensors))
    elements = table(("elements of one tensor", "rounds", *names), lines(growth.elements))
    return [*where(), picture, "", *tensors, *elements]


def replaced(document: str, part: str, lines: Iterable[str]) -> str:
    """The document with one part written anew."""
    marked = re.compile(rf"(<!-- {part}: begin -->\n).*?(<!-- {part}: end -->)", re.DOTALL)
    text = "\n".join(lines).strip()
    document, count = marked.subn(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", document)
    if count != 1:
        raise ValueError(f"docs/benchmarks.md has {count} places for {part}, not one")
    return document


def write(part: str, lines: Iterable[str]) -> Path:
    """Write one part."""
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(encoding="utf-8"), part, lines), encoding="utf-8")
    return DOCUMENT
