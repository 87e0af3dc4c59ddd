"""The examples in the docstrings of the public names run, and give what they say."""

import doctest

import pytest
import torch

import baselines


@pytest.mark.parametrize("name", ["quantize", "summarize", "QuantSpec"])
def test_examples_run(name):
    (test,) = [test for test in doctest.DocTestFinder(recurse=False).find(getattr(baselines, name), name)]
    assert test.examples
    test.globs = {}
    with torch.random.fork_rng():
        assert doctest.DocTestRunner().run(test).failed == 0
