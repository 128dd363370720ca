"""The picture of the Gaussian fits: the photograph, what each fit made of it, and how they went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: no screen is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from gaussians import psnr
from row_movement import Movement

COLORS = ("#d62728", "#08519c")
ERROR_SHOWN = 0.15  # an absolute error that is drawn white


class Drawable(Protocol):
    """What is drawn of a fit."""

    losses: list[float]
    counts: list[int]
    movement: Movement
    image: Tensor


def draw_fits(
    photograph: Tensor, fits: Mapping[str, Drawable], constant: Mapping[str, Sequence[float]], every: int, path: Path
) -> None:
    """Draw everything and write the picture."""
    figure = plt.figure(figsize=(15, 11), layout="constrained")
    figure.suptitle(
        "2-D Gaussians fitted to a photograph, densified and pruned on the way: surgery by hand, and by edit_rows",
        fontsize=14,
        fontweight="bold",
    )
    places = figure.subplot_mosaic(
        [["original", "fit 0", "fit 1"], ["counts", "error 0", "error 1"], ["curves", "curves", "movement"]],
        height_ratios=(1, 1, 1.35),
    )
    _show(places["original"], photograph, f"original, {photograph.shape[2]} x {photograph.shape[1]} pixels")
    for index, (name, fit) in enumerate(fits.items()):
        _show(places[f"fit {index}"], fit.image, f"{name}: {psnr(fit.losses[-1]):.2f} dB", COLORS[index])
        error = (fit.image - photograph).abs().mean(dim=0)
        title = f"absolute error, black 0 to white {ERROR_SHOWN:g}; mean {error.mean():.4f}"
        _show(places[f"error {index}"], error / ERROR_SHOWN, title)
    _draw_counts(places["counts"], fits)
    _draw_curves(places["curves"], fits, every)
    _draw_movement(places["movement"], fits, constant)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _show(axes: Axes, image: Tensor, title: str, color: str = "black") -> None:
    shown = image.clamp(0.0, 1.0)
    axes.imshow(shown.permute(1, 2, 0).numpy() if shown.dim() == 3 else shown.numpy(), cmap="gray", vmin=0.0, vmax=1.0)
    axes.set_title(title, fontsize=11, color=color)
    axes.set_axis_off()


def _draw_counts(axes: Axes, fits: Mapping[str, Drawable]) -> None:
    first = next(iter(fits.values()))
    axes.plot(first.counts, color="#333333", linewidth=2.0)
    axes.set_title("number of Gaussians, the same in both", fontsize=11)
    _plain(axes, "step")


def _draw_curves(axes: Axes, fits: Mapping[str, Drawable], every: int) -> None:
    for (name, fit), color in zip(fits.items(), COLORS, strict=True):
        axes.plot([psnr(loss) for loss in fit.losses], color=color, linewidth=1.6, label=name)
    first = next(iter(fits.values()))
    for step in range(every, len(first.counts), every):
        if first.counts[step] != first.counts[step - 1]:
            axes.axvline(step, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set_ylim(bottom=psnr(first.losses[every]) - 0.5)  # until then both are the same
    axes.set_title("PSNR (dB, higher is better); a grey line is where rows went and came", fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    _plain(axes, "step")


def _draw_movement(axes: Axes, fits: Mapping[str, Drawable], constant: Mapping[str, Sequence[float]]) -> None:
    axes.axhline(1.0, color="#bbbbbb", linewidth=0.8, zorder=0)
    for (name, fit), color in zip(fits.items(), COLORS, strict=True):
        owner = name.split(",")[0]
        ages = range(1, len(constant[name]) + 1)
        axes.plot(ages, constant[name], color=color, linestyle=(0, (4, 3)), label=f"{owner}, constant gradient")
        seen = fit.movement.by_age
        axes.plot(ages[: len(seen)], seen, color=color, linewidth=2.2, marker="o", label=f"{owner}, in this fit")
    axes.set_ylim(0.0, 7.0)  # room for the legend
    axes.set_title("how far a new row moves (lr a step)", fontsize=11)
    axes.legend(frameon=False, loc="upper left", fontsize=8.5)
    _plain(axes, "steps since the row came")


def _plain(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
