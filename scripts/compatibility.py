"""Write the tables of docs/compatibility.md from the tests that prove them: `compatibility.py [--check]`.

Each file of `tests/contract` and `tests/clients` is a section: its docstring's first line is the heading, and each
test's docstring is the statement that the test proves. Needs nothing but Python's standard library.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "compatibility.md"
TABLE = re.compile(r"(<!-- tests/(contract|clients) -->\n).*?(?=<!-- end -->)", re.DOTALL)


class MissingStatementError(Exception):
    """A test that does not say what it proves."""


def statement(node: ast.Module | ast.FunctionDef, called: str) -> str:
    """The first paragraph of a docstring, on one line."""
    docstring = ast.get_docstring(node)
    if not docstring:
        msg = f"{called} has no docstring: its first line is what docs/compatibility.md says of it"
        raise MissingStatementError(msg)
    return " ".join(docstring.split("\n\n")[0].split())


def tests(module: ast.Module) -> Iterator[ast.FunctionDef]:
    """The test functions of a file, those in classes too, in order."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from (m for m in node.body if isinstance(m, ast.FunctionDef) and m.name.startswith("test_"))


def section(path: Path) -> str:
    """One file's heading and table."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    rows = [
        f"| {statement(test, f'{path.name}::{test.name}').replace('|', '&#124;')} | `{test.name}` |"
        for test in tests(module)
    ]
    place = path.relative_to(ROOT).as_posix()
    heading = statement(module, path.name).rstrip(".")
    head = [f"### {heading}", "", f"[{place}](../{place})", "", "| what holds | test |", "| --- | --- |"]
    return "\n".join([*head, *rows])


def written(document: str) -> str:
    """The document with its tables made anew."""

    def table(found: re.Match[str]) -> str:
        files = sorted((ROOT / "tests" / found[2]).glob("test_*.py"))
        return f"{found[1]}\n" + "\n\n".join(section(path) for path in files) + "\n\n"

    return TABLE.sub(table, document)


def main() -> None:
    """Write the document, or only say whether it is up to date."""
    before = DOCUMENT.read_text(encoding="utf-8")
    after = written(before)
    if sys.argv[1:] == ["--check"]:
        raise SystemExit(0 if after == before else "docs/compatibility.md is stale: run scripts/compatibility.py")
    DOCUMENT.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
