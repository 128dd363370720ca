"""A table for people: by rich where it is installed and asks, as plain text everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def plain(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as text, its columns aligned.

    >>> print(plain(("name", "kind"), [("weight", "equal"), ("bias", "changed")]))
    name    kind
    ------  -------
    weight  equal
    bias    changed
    """
    widths = [max(len(line[place]) for line in (columns, *rows)) for place in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Any:
    """The table for rich, which calls this only when it prints: it is installed then."""
    from rich.table import Table
    from rich.text import Text

    # Text, for "[tensor]" in a sentence would be taken for markup.
    table = Table(title=title, caption=Text(caption), caption_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
