"""Patterns over dotted names, and the names that come nearest to one that matches nothing.

A pattern is matched component by component, and what it names includes everything below: ``hyper_net`` stands for
``hyper_net.0.weight`` and never for ``hyper_net_ema.0.weight``. ``*`` stands for one component or for a part of one,
``**`` for any number of them, ``?`` for one character and ``[...]`` for one of several.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from paramstate.errors import listed


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that ``pattern`` stands for, in their order.

    A name that begins with the very text of the pattern is preferred, so characters that have a meaning in patterns
    may occur in names.

    >>> names = ["hyper_net.0.weight", "hyper_net.0.bias", "hyper_net_ema.0.weight"]
    >>> matching("hyper_net", names)
    ['hyper_net.0.weight', 'hyper_net.0.bias']
    >>> matching("*.0.weight", names)
    ['hyper_net.0.weight', 'hyper_net_ema.0.weight']
    >>> matching("**.bias", names)
    ['hyper_net.0.bias']
    """
    names = list(names)
    literal = [name for name in names if name == pattern or name.startswith(f"{pattern}.")]
    components = pattern.split(".")
    return literal or [name for name in names if _leads(components, name.split("."))]


def _leads(pattern: Sequence[str], name: Sequence[str]) -> bool:
    """Whether ``pattern`` matches a leading part of ``name``."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return _leads(pattern[1:], name) or (bool(name) and _leads(pattern, name[1:]))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _leads(pattern[1:], name[1:])


def nearest(text: str, names: Iterable[str]) -> str:
    """What to say after "nothing is called so": the names of parameters and of what holds them that look most alike.

    >>> nearest("hypernet", ["hyper_net.0.weight", "target_net.0.weight"])
    "the nearest names are 'hyper_net'"
    >>> nearest("weight", [])
    'there are no names'
    """
    known = list(dict.fromkeys(part for name in names for part in _with_parents(name)))
    alike = [name for name in known if name.count(".") == text.count(".")]
    near = _close(text, alike) or _close(text, known) or known[:3]
    return f"the nearest names are {listed(near)}" if near else "there are no names"


def _close(text: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(text, names, n=3, cutoff=0.5)


def _with_parents(name: str) -> list[str]:
    components = name.split(".")
    return [".".join(components[:depth]) for depth in range(1, len(components) + 1)]
