"""An image as a sum of 2-D Gaussians, differentiable: GaussianImage (Zhang et al. 2024, arXiv:2403.08551).

Pixel x has the colour sum over n of o_n c_n exp(-d' S_n^-1 d / 2), with d = x - m_n and S_n = R_n diag(s_n^2) R_n'.
The sum needs no order, so there is no depth and no sorting. Each Gaussian is evaluated on a square window around
the pixel next to its mean, and the windows are added into the image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

RADIUS = 7  # of a window, in pixels
LOG_SCALES = (math.log(0.35), math.log(RADIUS / 2.5))  # smaller ones fall between pixels, larger ones out of the window


def initial_gaussians(count: int, image: Tensor, generator: torch.Generator) -> nn.ParameterDict:
    """Gaussians at random places, round, half opaque, with half the colour that the image has there."""
    _, height, width = image.shape
    means = torch.rand(count, 2, generator=generator) * torch.tensor([width - 1.0, height - 1.0])
    column, row = means.round().long().unbind(1)
    size = math.log(0.5 * math.sqrt(height * width / count))
    return nn.ParameterDict(
        {
            "means": means,
            "log_scales": torch.full((count, 2), size).clamp(*LOG_SCALES),
            "rotations": torch.rand(count, generator=generator) * math.pi,
            "colours": 0.5 * image[:, row, column].T,
            "opacities": torch.full((count,), 0.5),
        }
    )


def render(gaussians: nn.ParameterDict, height: int, width: int) -> Tensor:
    """The image, of shape (3, height, width)."""
    means = gaussians["means"]
    limits = torch.tensor([width - 1, height - 1])
    corner = means.detach().round().long().clamp(torch.zeros_like(limits), limits)  # of a window, on a padded image
    window = torch.arange(-RADIUS, RADIUS + 1)
    dx, dy = ((corner + window[:, None, None]) - means).unbind(2)  # (window, n) each
    columns, rows = (corner + RADIUS + window[:, None, None]).unbind(2)
    power = _exponents(gaussians["log_scales"], gaussians["rotations"], dx, dy)
    weights = gaussians["opacities"] * power.exp()  # (window, window, n)
    padded_width = width + 2 * RADIUS
    pixels = (rows[:, None] * padded_width + columns[None]).flatten()
    coloured = (gaussians["colours"].T[:, None, None] * weights).flatten(1)
    padded: Tensor = means.new_zeros(3, (height + 2 * RADIUS) * padded_width).index_add(1, pixels, coloured)
    return padded.view(3, -1, padded_width)[:, RADIUS:-RADIUS, RADIUS:-RADIUS]


def _exponents(log_scales: Tensor, rotations: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """-d' S^-1 d / 2 over the windows, of shape (window, window, n)."""
    cosine, sine = rotations.cos(), rotations.sin()
    along, across = (-0.5 * torch.exp(-2.0 * log_scales)).unbind(1)
    xx = along * cosine**2 + across * sine**2
    yy = along * sine**2 + across * cosine**2
    xy = 2.0 * (along - across) * cosine * sine
    return (xx * dx**2)[None] + (yy * dy**2)[:, None] + (xy * dx)[None] * dy[:, None]


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of values in 0 to 1."""
    return -10.0 * math.log10(mean_squared_error)
