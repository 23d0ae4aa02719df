"""The examples in the docstrings of the pure functions."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

from customized_grpo import ops

FUNCTIONS = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples(name: str) -> None:
    names = {**vars(ops), "torch": torch}
    parser, doc = doctest.DocTestParser(), inspect.getdoc(getattr(ops, name)) or ""
    test = parser.get_doctest(doc, names, name, None, None)
    assert test.examples, "a function that others import shows how it is used"
    outcome = doctest.DocTestRunner().run(test)
    assert outcome.failed == 0
