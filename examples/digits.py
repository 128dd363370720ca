"""scikit-learn's handwritten digits, split once into a part to train on and a part to test on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """Images as rows of 64 pixels in 0 to 1, labels 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Digits:
    """Load and split; the split is the same every time and has every digit in both parts in equal shares."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=0.25, random_state=0, stratify=labels)
    train_images, test_images = (torch.as_tensor(part, dtype=torch.float32) for part in split[:2])
    train_labels, test_labels = (torch.as_tensor(part, dtype=torch.int64) for part in split[2:])
    return Digits(train_images, train_labels, test_images, test_labels)
