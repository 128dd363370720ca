"""Shapes of the parameters that the rows use."""

from __future__ import annotations

from scale import SMALLER

Shape = tuple[int, ...]

VOCABULARY = 50_257 // SMALLER
POSITIONS = 1_024
WIDTH = 768 // SMALLER
LAYERS = 12


def linear(inputs: int, outputs: int) -> list[Shape]:
    """Weight, inputs first as GPT-2's own layers have it, and bias."""
    return [(inputs, outputs), (outputs,)]


def layer_norm() -> list[Shape]:
    """Gain and bias."""
    return [(WIDTH,), (WIDTH,)]


def block() -> list[Shape]:
    """One transformer block: attention, then the perceptron, each behind a layer norm."""
    attention = linear(WIDTH, 3 * WIDTH) + linear(WIDTH, WIDTH)
    perceptron = linear(WIDTH, 4 * WIDTH) + linear(4 * WIDTH, WIDTH)
    return layer_norm() + attention + layer_norm() + perceptron


def gpt2() -> list[Shape]:
    """GPT-2 small: 148 parameters, 124,439,808 elements; the output head is the token embedding, so it adds none."""
    embeddings: list[Shape] = [(VOCABULARY, WIDTH), (POSITIONS, WIDTH)]
    return embeddings + [shape for _ in range(LAYERS) for shape in block()] + layer_norm()


def rows_of(row: int) -> Shape:
    """One parameter of about 33.6 million elements, in rows of so many."""
    elements = 33_554_432 // SMALLER**2
    return (elements,) if row == 1 else (elements // row, row)


def square_matrices() -> list[Shape]:
    """Eight matrices of one shape, 33,554,432 elements: some of the others compile their step anew for each shape."""
    side = 2_048 // min(SMALLER, 8)  # some keep moments of less than 4,096 elements in 32 bits
    return [(side, side)] * 8


def vectors(count: int, length: int) -> list[Shape]:
    """Many small parameters of one length."""
    return [(length,)] * count
