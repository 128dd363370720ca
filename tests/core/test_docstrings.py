"""The examples in the compiled module's docstrings run."""

from __future__ import annotations

import doctest

import numpy as np

from paramstate import Store, _core


def test_the_examples_of_the_compiled_module_run() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    names = {"np": np, "Store": Store}
    examples = [test for test in finder.find(_core, globs=names) if test.examples]
    assert {test.name.rpartition(".")[2] for test in examples} >= {"Store", "register", "step", "clip"}
    for test in examples:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
