"""What the package offers is documented where it stands, with examples, all of which pytest runs."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import paramstate

ERRORS = [name for name in paramstate.__all__ if name.endswith("Error")]
FUNCTIONS = [name for name in paramstate.__all__ if inspect.isfunction(getattr(paramstate, name))]
CLASSES = [getattr(paramstate, name) for name in paramstate.__all__ if inspect.isclass(getattr(paramstate, name))]
SHOWN_AS_A_WHOLE = [paramstate.EditSession]
"""Those whose own example uses every method."""


def own_members(kind: type) -> dict[str, Any]:
    """The public methods and properties of a class that come from this package; a field is no method."""
    found = {}
    for name in dir(kind):
        owner = next(base for base in kind.__mro__ if name in vars(base))
        member = inspect.getattr_static(kind, name)
        member = member.fget if isinstance(member, property) else member
        if name[0] != "_" and owner.__module__.startswith("paramstate.") and callable(member):
            found[name] = member
    return found


def methods() -> dict[str, tuple[str, object]]:
    """The public methods and properties of all public classes, each where it is first said what it does."""
    found: dict[str, tuple[str, object]] = {}
    for kind in CLASSES:
        for name, member in own_members(kind).items():
            said = [vars(base)[name] for base in kind.__mro__ if name in vars(base)]
            said = [getattr(item, "fget", item) for item in said]
            first = next((item for item in said if not (inspect.getdoc(item) or "").startswith("See :")), member)
            if kind not in SHOWN_AS_A_WHOLE:
                found.setdefault(getattr(first, "__qualname__", name), (name, first))
    return found


def examples(item: object) -> str:
    """The lines of code in a docstring."""
    return "\n".join(re.findall(r"^\s*(?:>>>|\.\.\.) .*$", inspect.getdoc(item) or "", re.MULTILINE))


def uses(code: str, name: str) -> bool:
    return re.search(rf"\.{name}\b|\b{name}\(", code) is not None


@pytest.mark.parametrize("name", paramstate.__all__)
def test_a_public_name_is_documented_with_an_example(name: str) -> None:
    code = examples(getattr(paramstate, name))
    assert code
    assert uses(code, name) or name not in FUNCTIONS


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_when_it_is_raised_and_is_also_one_of_pythons(name: str) -> None:
    error = getattr(paramstate, name)
    assert "__doc__" in vars(error)
    assert issubclass(error, paramstate.ParamStateError)
    assert issubclass(error, (LookupError, ValueError, RuntimeError)) or error is paramstate.ParamStateError


@pytest.mark.parametrize(("name", "method"), methods().values(), ids=methods())
def test_a_public_method_is_documented_with_an_example_that_uses_it(name: str, method: object) -> None:
    assert uses(examples(method), name)


def test_the_methods_are_those_of_every_public_class() -> None:
    assert {"Adam.step", "Constraint.project_", "EditRows.keep", "Selection.on", "Store.row_steps"} <= set(methods())
    assert len(methods()) > 80


@pytest.mark.parametrize("kind", SHOWN_AS_A_WHOLE, ids=lambda kind: kind.__name__)
def test_the_example_of_a_class_uses_all_of_its_methods_that_have_none_of_their_own(kind: type) -> None:
    code = examples(kind)
    assert [name for name, item in own_members(kind).items() if not uses(code, name) and not examples(item)] == []


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_public_method_has_a_docstring(kind: type) -> None:
    assert [name for name, item in own_members(kind).items() if not item.__doc__] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_a_function_is_described(name: str) -> None:
    function = getattr(paramstate, name)
    documented = inspect.getdoc(function) or ""
    arguments = inspect.signature(function).parameters
    assert [argument for argument in arguments if f"    {argument}: " not in documented] == []


@pytest.mark.parametrize("kind", [paramstate.Adam, paramstate.AdamW], ids=lambda kind: kind.__name__)
def test_every_argument_of_an_optimizer_is_described(kind: type) -> None:
    _, _, documented = (inspect.getdoc(paramstate.Adam) or "").partition("Args:")
    described = set(re.findall(r"\w+", documented.partition("Raises:")[0]))
    assert set(inspect.signature(kind).parameters) - described == set()
