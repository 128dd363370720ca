"""A photograph that scikit-learn carries, made small."""

from __future__ import annotations

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional


def load_photograph(height: int, width: int) -> Tensor:
    """Load the temple of the two sample images as values in 0 to 1, of shape (3, height, width).

    Each pixel is the mean of those that it covers, so no detail is sharper than the pixels are.
    """
    full = torch.as_tensor(load_sample_image("china.jpg").copy(), dtype=torch.float32).permute(2, 0, 1) / 255.0
    return functional.interpolate(full[None], size=(height, width), mode="area")[0]
