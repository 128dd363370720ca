"""The picture of the demonstration: training loss over epochs, one line for each way to train and clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: no screen is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


class Style(NamedTuple):
    """How a line looks; `dashes` as matplotlib takes them."""

    color: str
    width: float
    dashes: tuple[int, tuple[int, ...]] | str = "solid"


TITLE = "Clip by putting in new Parameters: torch.optim stops training without a word, paramstate trains on"
# Three of the four lines lie on one another, so they differ in width and dashes and stay visible where they do.
STYLES = (
    Style("#6baed6", 9.0),
    Style("#d62728", 2.5),
    Style("#08519c", 3.5),
    Style("#fd8d3c", 1.5, (0, (4, 4))),
)


def draw_curves(curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw the curves in order and write the picture."""
    figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")
    for losses, style in zip(curves.values(), STYLES, strict=True):
        axes.plot(range(1, len(losses) + 1), losses, color=style.color, linewidth=style.width, linestyle=style.dashes)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss (cross-entropy, mean of the epoch, log scale)")
    axes.set_title(TITLE, loc="left", fontsize=12, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    label_lines(axes, curves)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def label_lines(axes: Axes, curves: Mapping[str, Sequence[float]]) -> None:
    """Write beside each line what it is; lines that end at one place share one block of text, in drawing order."""
    epochs = len(next(iter(curves.values())))
    ends: dict[float, list[int]] = {}
    for index, losses in enumerate(curves.values()):
        near = next((end for end in ends if abs(losses[-1] - end) <= 0.2 * end), losses[-1])
        ends.setdefault(near, []).append(index)
    names = list(curves)
    for end, indices in ends.items():
        heading = [] if len(indices) == 1 else [("(lines on one another)", "#555555")]
        entries = [(names[index], STYLES[index].color) for index in indices]
        for row, (text, color) in enumerate(entries + heading):
            below = -14.0 * row + 7.0 * (len(entries + heading) - 1)
            axes.annotate(
                text,
                xy=(epochs, end),
                xytext=(14, below),
                textcoords="offset points",
                color=color,
                va="center",
                fontweight="bold" if (text, color) in entries else "normal",
                annotation_clip=False,
            )
