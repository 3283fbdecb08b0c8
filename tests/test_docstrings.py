"""The examples in docstrings, run as they stand."""

import doctest
import importlib

import pytest

# The functions that most of the code calls; each has an example.
MODULES = {
    "config.load": ["load"],
    "config.overrides": ["applied", "flags"],
    "files": ["atomic_write"],
    "flops": ["flops_per_token"],
    "hardware.chips": ["by_kind"],
    "hardware.slices": ["parse"],
    "matrices": ["named"],
    "optim.schedules": ["schedule"],
    "sharding": ["spec"],
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_right(name):
    module = importlib.import_module(f"scaletrain.{name}")
    examples = {
        test.name.rpartition(".")[2]: test
        for test in doctest.DocTestFinder().find(module, f"scaletrain.{name}")
        if test.examples
    }
    assert set(MODULES[name]) <= examples.keys()
    runner = doctest.DocTestRunner()
    for test in examples.values():
        assert runner.run(test).failed == 0, test.name
