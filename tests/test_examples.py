"""The examples in docstrings run, and public functions of selection, dynamics and ensembles have one."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

import almlip_jax

SHOWN = ("selection", "dynamics", "ensembles")
SLOW = ("know", "relax", "label")
"""Their examples evaluate a potential in compiled loops, or start workers."""
PLUG_INS = ("openmmml",)
"""Programs for which some module is a plug-in, which they import and nobody else."""


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(almlip_jax.__path__, "almlip_jax."):
        if found.name.endswith("__main__"):
            continue
        try:
            yield import_module(found.name)
        except ModuleNotFoundError as missing:
            if (missing.name or "").partition(".")[0] not in PLUG_INS:
                raise


def examples() -> list[Any]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = {test.name: test for module in modules() for test in finder.find(module) if test.examples}
    slow = {name for name in tests if name.rpartition(".")[2] in SLOW}
    return [
        pytest.param(test, id=name, marks=[pytest.mark.slow] if name in slow else []) for name, test in tests.items()
    ]


@pytest.mark.parametrize("example", examples())
def test_examples_run(example):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    told: list[str] = []
    assert runner.run(example, out=told.append).failed == 0, "".join(told)


def packages(room: str) -> list[str]:
    """The package and those below it."""
    whole = import_module(f"almlip_jax.{room}")
    below = pkgutil.walk_packages(whole.__path__, f"{whole.__name__}.")
    return [whole.__name__, *(one.name for one in below if one.ispkg)]


@pytest.mark.parametrize("name", [name for room in SHOWN for name in packages(room)])
def test_public_functions_have_an_example(name):
    package = import_module(name)
    offered = {name: getattr(package, name) for name in package.__all__}
    functions = {name: inspect.unwrap(one) for name, one in offered.items() if hasattr(one, "__wrapped__")}
    functions |= {name: one for name, one in offered.items() if inspect.isfunction(one)}
    assert [name for name, one in functions.items() if ">>>" not in (one.__doc__ or "")] == []
