"""Run the examples in the docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import llmkit

ROOMS = [info.name for info in pkgutil.walk_packages(llmkit.__path__, "llmkit.") if info.name != "llmkit.configs"]


@pytest.mark.parametrize("name", ROOMS)
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(name))
    assert not found.failed


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    assert sum(bool(one.examples) for name in ROOMS for one in finder.find(importlib.import_module(name))) > 20
