"""What is trained: a small GPT on Python's own manual, and a network on scikit-learn's digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

from digits import Digits, load

CONTEXT, WIDTH, HEADS, LAYERS, BYTES = 64, 64, 4, 2, 256
TEXTS, IMAGES = 8, 64  # of a batch
HELD_OUT_TEXTS = 64

Batch = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Causal self-attention, in plain operations: torch's fused one is slow in bfloat16 on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        """Mix each place with those before it."""
        texts, places, _ = hidden.shape
        split = self.queries_keys_values(hidden).view(texts, places, 3, HEADS, WIDTH // HEADS)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        scores = queries @ keys.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)
        later = torch.ones(places, places, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ values
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(texts, places, WIDTH))
        return out


class Block(nn.Module):
    """Attention and a network of one hidden layer, each after a norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(WIDTH), Attention())
        self.network = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Add what both say."""
        hidden = hidden + self.attention(hidden)
        out: Tensor = hidden + self.network(hidden)
        return out


class GPT(nn.Module):
    """A decoder over bytes whose embedding is also its output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.apply(_begin)

    def forward(self, texts: Tensor) -> Tensor:
        """Logits of the next byte at each place, classes before places as `cross_entropy` wants them."""
        hidden = self.norm(self.blocks(self.bytes(texts) + self.places.weight))
        logits: Tensor = hidden @ self.bytes.weight.T
        return logits.transpose(1, 2)


def _begin(module: nn.Module) -> None:
    """Begin with small normal weights, as GPT-2 does."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def classifier() -> nn.Module:
    """A network of two hidden layers."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


@cache
def manual() -> tuple[Tensor, Tensor]:
    """The bytes of the pages that `help()` shows, in the order of their names; the last tenth is held out."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    border = len(codes) * 9 // 10
    return codes[:border], codes[border:]


def _windows(codes: Tensor, starts: Tensor) -> Batch:
    windows = codes[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def batch_of_texts(draw: torch.Generator) -> Batch:
    """Pieces of the manual from places drawn at random."""
    codes, _ = manual()
    return _windows(codes, torch.randint(len(codes) - CONTEXT, (TEXTS,), generator=draw))


def held_out_texts() -> Batch:
    """Pieces of what is held out, evenly spaced, the same for all."""
    _, codes = manual()
    return _windows(codes, torch.linspace(0, len(codes) - CONTEXT - 1, HELD_OUT_TEXTS).long())


@cache
def _digits() -> Digits:
    return load()


def batch_of_digits(draw: torch.Generator) -> Batch:
    """Images drawn at random."""
    digits = _digits()
    chosen = torch.randint(len(digits.train_labels), (IMAGES,), generator=draw)
    return digits.train_images[chosen], digits.train_labels[chosen]


def held_out_digits() -> Batch:
    """All images that are held out."""
    digits = _digits()
    return digits.test_images, digits.test_labels


@dataclass(frozen=True)
class Task:
    """A model, its data and the settings of its training, fixed before any result was seen."""

    name: str
    title: str
    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    held_out: Callable[[], Batch]
    steps: int
    warm_up: int
    lr: float
    betas: tuple[float, float]
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def rate(self, step: int) -> float:
        """Rise in a line, then fall along a cosine to a tenth."""
        if step < self.warm_up:
            return self.lr * (step + 1) / self.warm_up
        done = (step - self.warm_up) / (self.steps - self.warm_up)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def _gpt(name: str, beta2: float) -> Task:
    title = f"GPT on Python's manual, betas (0.9, {beta2:g})"
    return Task(name, title, GPT, batch_of_texts, held_out_texts, steps=300, warm_up=30, lr=3e-3, betas=(0.9, beta2))


GPT_TASK = _gpt("gpt", 0.95)
LONG_GPT_TASK = _gpt("gpt-0.999", 0.999)
DIGITS_TASK = Task(
    "digits",
    "Classifier of digits, betas (0.9, 0.999)",
    classifier,
    batch_of_digits,
    held_out_digits,
    steps=600,
    warm_up=60,
    lr=1e-3,
    betas=(0.9, 0.999),
)
