"""The examples in the docstrings of the public names run, and print what they show."""

import doctest

import pytest
import torch

import cat_plugin


@pytest.mark.parametrize("name", cat_plugin.__all__)
def test_example_of_the_public_name(name):
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    (example,) = finder.find(getattr(cat_plugin, name), name, globs={})
    assert example.examples, f"the docstring of {name} has no example"
    report: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        failed = runner.run(example, out=report.append).failed
    assert not failed, "".join(report)
