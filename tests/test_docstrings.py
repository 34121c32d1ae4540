import doctest
import importlib
import pkgutil

import pytest

import hce_jax

MODULES = [hce_jax.__name__, *(module.name for module in pkgutil.walk_packages(hce_jax.__path__, "hce_jax."))]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_give_what_they_say(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples_to_run():
    found = doctest.DocTestFinder().find(importlib.import_module("hce_jax.losses"))
    assert sum(len(each.examples) for each in found) >= 4
