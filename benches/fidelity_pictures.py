"""The pictures of fidelity: the course of the held-out loss, and where every seed ended."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: no screen is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from fidelity_tasks import Task
from fidelity_training import BASELINE, Run, Setting
from fidelity_verdict import ALLOWED

GREY = "#9a9a9a"
COLOURS = {"torch": "#111111", "bfloat16": "#d95f02", "float32": "#1b6ca8", "8bit": "#2a9d5c"}
MARKS = {"torch": "x", "bfloat16": "o", "float32": "s", "8bit": "^"}


def draw(task: Task, rows: dict[Setting, list[Run]], path: Path) -> None:
    """Draw one task: a panel of curves for each way of keeping values, and one panel of ends."""
    panels = list(dict.fromkeys(_panel(setting) for setting in rows))
    figure = plt.figure(figsize=(11.5, 3.4 + 0.34 * len(rows)), layout="constrained")
    figure.suptitle(task.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(3.0, 0.6 + 0.34 * len(rows)))[:, 0]
    axes = above.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, ax in zip(panels, axes, strict=True):
        chosen = {setting: runs for setting, runs in rows.items() if _panel(setting) == panel}
        _draw_curves(ax, panel, {BASELINE: rows[BASELINE], **chosen})
    axes[0].set_ylabel("held-out loss (log scale)")
    _draw_ends(below.subplots(), rows)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _panel(setting: Setting) -> str:
    if setting.values == "float32":
        return "values float32"
    return f"values bfloat16, {setting.rounding or 'nearest'}"


def _style(setting: Setting) -> str:
    return "torch" if setting.rounding is None else setting.state


def _draw_curves(ax: Axes, title: str, rows: dict[Setting, list[Run]]) -> None:
    """Mean over seeds as a line, least to greatest as a band; the baseline's in grey behind all."""
    for setting, runs in rows.items():
        steps = runs[0].steps
        at_each_step = list(zip(*(run.losses for run in runs), strict=True))
        means = [statistics.fmean(losses) for losses in at_each_step]
        if setting == BASELINE:
            ax.plot(steps, means, color=GREY, linewidth=6.0, alpha=0.5, label="all float32", solid_capstyle="butt")
        else:
            name = _style(setting)
            called = "torch.optim.AdamW" if name == "torch" else f"state {name}"
            ax.plot(steps, means, color=COLOURS[name], linewidth=1.3, label=called)
        colour = GREY if setting == BASELINE else COLOURS[_style(setting)]
        lows, highs = [min(losses) for losses in at_each_step], [max(losses) for losses in at_each_step]
        ax.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel("step")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.tick_params(axis="y", which="both", labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False, loc="upper right")


def _draw_ends(ax: Axes, rows: dict[Setting, list[Run]]) -> None:
    """Every seed's last loss as a dot, the mean as a bar; the band is what the rule allows the mean."""
    base = [run.final for run in rows[BASELINE]]
    centre, reach = statistics.fmean(base), ALLOWED * statistics.stdev(base)
    ax.axvspan(centre - reach, centre + reach, color=GREY, alpha=0.2, linewidth=0)
    for height, (setting, runs) in enumerate(rows.items()):
        finals = [run.final for run in runs]
        name = _style(setting)
        ax.scatter(finals, [height] * len(finals), color=COLOURS[name], marker=MARKS[name], s=18, alpha=0.7)
        ax.plot([statistics.fmean(finals)] * 2, [height - 0.35, height + 0.35], color=COLOURS[name], linewidth=2)
    ax.set_yticks(range(len(rows)), [setting.name for setting in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel(f"last held-out loss of each seed; bar: mean; grey: float32's mean ± {ALLOWED:g} standard deviations")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", alpha=0.25)
