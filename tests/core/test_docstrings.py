"""Every method of the compiled `Store` shows its use, and the examples in the compiled module's docstrings run."""

from __future__ import annotations

import doctest
import re

import numpy as np
import pytest

from paramstate import Store, _core

METHODS = [name for name in vars(Store) if not name.startswith("_")]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_the_store_has_an_example_that_uses_it(name: str) -> None:
    examples = doctest.DocTestParser().get_examples(getattr(Store, name).__doc__)
    assert any(re.search(rf"\.{name}\(", example.source) for example in examples)


def test_the_examples_of_the_compiled_module_run() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    names = {"np": np, "Store": Store}
    examples = [test for test in finder.find(_core, globs=names) if test.examples]
    assert {test.name.rpartition(".")[2] for test in examples} >= {"Store", *METHODS}
    for test in examples:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
