"""Runs what the documents show: every Python example, in order, with its output. Checks what they repeat."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

import paramstate
from frameworks import stay_offline

stay_offline()

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benches/README.md")] + sorted(
    (ROOT / "docs").glob("**/*.md")
)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, and the line on which the text begins."""

    language: str
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    content = document.read_text(encoding="utf-8")
    return [Block(found[1], found[2], content.count("\n", 0, found.start(2)) + 1) for found in FENCE.finditer(content)]


def shown_output(following: Block | None) -> str | None:
    """The text block that comes next is what a Python block prints."""
    return following.text if following is not None and following.language == "text" else None


def optional_packages() -> set[str]:
    """What a document may show and an environment may lack: the packages of the groups `test` and `clients`."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    groups = (
        re.search(rf"^{group} = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL) for group in ("test", "clients")
    )
    lines = "".join(found[1] for found in groups if found is not None)
    return {name.replace("-", "_") for name in re.findall(r'^    "([\w-]+)', lines, re.MULTILINE)}


def lacking(block: Block) -> list[str]:
    """The optional packages that a block imports and that are not installed here."""
    nodes = list(ast.walk(ast.parse(block.text)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in imported} & optional_packages()
    return sorted(name for name in packages if importlib.util.find_spec(name) is None)


def as_named(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def test_a_block_that_prints_something_else_is_found(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text("# Title\n\n```python\nprint(1)\n```\n\n```text\n2\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"document\.md:4"):
        run(document)


def test_a_document_is_run_up_to_the_first_block_that_needs_a_package_that_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "document.md"
    needing = "```python\nimport jax\n```\n\n```python\nprint(1)\n```\n\n```text\n2\n```\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    document.write_text(needing, encoding="utf-8")
    with pytest.raises(pytest.skip.Exception, match=r"document\.md:2 needs jax"):
        run(document)
    document.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n\n" + needing, encoding="utf-8")
    with pytest.raises(AssertionError, match=r"document\.md:2 prints"):
        run(document)
    document.write_text("```python\nimport nowhere\n```\n", encoding="utf-8")
    with pytest.raises(ModuleNotFoundError):
        run(document)


THEIR_WARNINGS = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::paramstate")]
"""For pages that run other packages: as in tests/systems."""


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, marks=THEIR_WARNINGS if path.parent.name == "systems" else []) for path in DOCUMENTS],
    ids=as_named,
)
def test_the_examples_of_a_document_print_what_it_shows(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run(document)


def run(document: Path) -> None:
    """Run the Python blocks of a document one after another in one namespace.

    From the first block on that imports an optional package which is not installed, a document is not run.
    """
    found = blocks(document)
    namespace: dict[str, object] = {"__name__": "__document__"}
    for block, following in zip_longest(found, found[1:]):
        if block.language != "python":
            continue
        place = f"{document.name}:{block.line}"
        if lacking(block):
            pytest.skip(f"{place} needs {', '.join(lacking(block))}; the blocks above it ran")
        # Empty lines before it, so that a traceback shows the document's own line numbers.
        code = compile("\n" * (block.line - 1) + block.text, str(document), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        expected = shown_output(following)
        if expected is not None:
            assert printed.getvalue().splitlines() == expected.splitlines(), f"{place} prints something else"


@pytest.mark.parametrize("document", DOCUMENTS, ids=as_named)
def test_the_links_of_a_document_lead_somewhere(document: Path) -> None:
    missing = [
        target
        for target in LINK.findall(document.read_text(encoding="utf-8"))
        if not (document.parent / target).exists()
    ]
    assert missing == []


def test_the_readme_leads_to_every_page() -> None:
    """A page about a system from the README itself; every other one from a page that the README leads to."""
    readme = ROOT / "README.md"
    reached, waiting = {readme}, [readme]
    while waiting:
        document = waiting.pop()
        targets = {
            (document.parent / target).resolve() for target in LINK.findall(document.read_text(encoding="utf-8"))
        }
        new = {target for target in targets - reached if target.suffix == ".md" and target.is_file()}
        reached |= new
        waiting.extend(new)
    assert {*(ROOT / "docs").glob("**/*.md")} <= reached
    direct = {(ROOT / target).resolve() for target in LINK.findall(readme.read_text(encoding="utf-8"))}
    assert {*(ROOT / "docs" / "systems").glob("*.md")} <= direct


def test_the_rust_example_is_the_one_that_cargo_test_runs() -> None:
    (example,) = (block.text for block in blocks(ROOT / "README.md") if block.language == "rust")
    source = (ROOT / "rust/core/src/lib.rs").read_text(encoding="utf-8")
    documented = "\n".join(line.removeprefix("//!").removeprefix(" ") for line in source.splitlines())
    assert example in documented


def test_the_version_is_the_same_everywhere() -> None:
    cargo = re.search(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text(encoding="utf-8"), re.MULTILINE)
    changes = re.search(r"^## \[(\d.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert cargo is not None
    assert changes is not None
    assert paramstate.__version__ == cargo[1] == changes[1]


def test_the_readme_names_the_oldest_rust_that_cargo_accepts() -> None:
    oldest = re.search(r'^rust-version = "(.+)"$', (ROOT / "Cargo.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert oldest is not None
    assert f"Rust {oldest[1]} or later" in (ROOT / "README.md").read_text(encoding="utf-8")
