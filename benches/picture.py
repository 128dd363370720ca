"""The pictures: ratios with their targets, and the cost of a step against its size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from growth import Growth, Point
from outcome import OURS, Outcome, Row

MET, MISSED, NEUTRAL = "#2a7f62", "#b5483a", "#7a8794"
COLOURS = {OURS: "#2a7f62", "torch fused": "#c27a1a", "torch foreach": "#7a8794"}
LESS_IS_BETTER = "at most"
EDGE = 1.25  # of the greatest median or target
DOTS = 110

mpl.rcParams.update(
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "paramstate"}
)


def save(figure: Figure, path: Path) -> None:
    """Write a picture, without the date or the program that made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS, bbox_inches="tight", metadata={"Software": None})


def bars(axes: Axes, outcomes: Mapping[Row, Outcome]) -> None:
    """One bar for each row, a line from least to greatest, and a mark at the target; a line ends at the edge."""
    far = [row.target.number for row in outcomes if row.target]
    far += [outcome.number.median for outcome in outcomes.values() if outcome.number]
    axes.set_xlim(0, EDGE * max(far, default=1.0))
    for place, (row, outcome) in enumerate(outcomes.items()):
        if row.target is not None:
            axes.plot([row.target.number] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2)
        if outcome.number is None:
            axes.annotate(" not measured", (0, place), va="center", fontsize=8, color=NEUTRAL)
            continue
        found = outcome.number
        axes.barh(place, found.median, height=0.6, color=MET if row.verdict(outcome) == "met" else MISSED)
        axes.plot([found.least, found.greatest], [place, place], color="black", linewidth=0.8)
        axes.annotate(
            f"{found.median:.2f} ", (0, place), (4, 0), textcoords="offset points", va="center", color="white"
        )
    axes.set_yticks(range(len(outcomes)), [row.title for row in outcomes])
    axes.invert_yaxis()


def draw_ratios(outcomes: Mapping[Row, Outcome], path: Path) -> None:
    """Two pictures side by side: where more is better, and where less is. What has no number has no bar."""
    ratios = {row: outcome for row, outcome in outcomes.items() if row.target and row.target.unit == "×"}
    more = {row: outcome for row, outcome in ratios.items() if row.target and row.target.bound != LESS_IS_BETTER}
    less = {row: outcome for row, outcome in ratios.items() if row not in more}
    figure = Figure(figsize=(8.5, 0.42 * len(ratios) + 1.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[len(more), max(len(less), 1)])
    bars(upper, more)
    upper.axvline(1.0, color=NEUTRAL, linewidth=0.8, linestyle=":")
    upper.set_title("torch's best setting over paramstate: more is better; thick mark: target", loc="left", fontsize=9)
    bars(lower, less)
    lower.set_title("paramstate over the other side: less is better", loc="left", fontsize=9)
    lower.set_xlabel("ratio of times, median; thin line: least to greatest of all rounds")
    save(figure, path)


def curve(axes: Axes, points: list[Point]) -> None:
    """The medians of everybody."""
    for name, colour in COLOURS.items():
        own = [(point.count, 1e3 * point.seconds[name].median) for point in points if name in point.seconds]
        axes.plot(*zip(*own, strict=True), "o-", color=colour, label=name, markersize=3.5)
    axes.set(xscale="log", yscale="log", ylabel="milliseconds a step, median")
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)


def draw_growth(growth: Growth, path: Path) -> None:
    """Cost of a step against the number of tensors, and against the number of elements."""
    figure = Figure(figsize=(8.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    curve(left, growth.tensors)
    left.set(xlabel="tensors of 64 elements, gradients from a real backward")
    left.legend(frameon=False)
    curve(right, growth.elements)
    right.set(xlabel="elements of one tensor", ylabel="")
    save(figure, path)
