"""Markers and scheduling of the suite.

Tests that run on several ranks are below ``tests/ranks``. ``test_ranks.py`` starts them under mpirun; by hand:

mpirun -np 3 python -m pytest tests/ranks/comm

``make check`` runs the tests that have neither of the markers ``ranks`` and ``slow``. The marker ``ranks`` is set below
on every test whose code or fixtures start a launcher, and ``slow`` on every test that starts any process, because it
takes Python that long to import this package. Other slow tests are marked by hand. ``make test`` runs all tests, four
at a time, in any order, except that the tests of a file that share a fixture stay together. Those that are marked
``long`` begin first, so that no worker waits at the end for one that has begun late.
"""

import importlib
import inspect
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import hypothesis
import launching
import pytest
from case_selection import selected_cases

from lentando.comm.launch import detect_launch

# PyTorch brings triton, except in its build for CPUs, and triton must come before TensorFlow: docs/troubleshooting.md.
if find_spec("triton"):
    importlib.import_module("triton")
os.environ.pop("COLUMNS", None)  # xdist gives its workers a width, to which programs that tests start would wrap pages
# print() with several arguments would write each of them alone, and the lines of two ranks would run together.
os.environ.pop("PYTHONUNBUFFERED", None)
# No example has a time limit, for the machine may be busy. `make test` tries the same ones each time.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=selected_cases(True, False),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")
collect_ignore = [] if detect_launch() else ["ranks"]

TESTS = f"{Path(__file__).parent}{os.sep}"
LAUNCHING = (launching.launch, launching.find_mpirun)
PROCESSES = (subprocess.run, subprocess.Popen, subprocess.check_output)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start ranks or other processes, and begin with those that take long."""
    for item in items:
        used = set(entry_points(item)) if isinstance(item, pytest.Function) else set()
        if item.path.is_relative_to(launching.RANKS) or any(reaches(function, LAUNCHING) for function in used):
            item.add_marker(pytest.mark.ranks)
        if any(reaches(function, PROCESSES) for function in used):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def entry_points(item: pytest.Function) -> Iterator[FunctionType]:
    """The functions that pytest calls for a test, and the methods of its parameters."""
    fixtures = [definition.func for name in item._fixtureinfo.name2fixturedefs.values() for definition in name]
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    for value in (item.function, *fixtures, *parameters):
        yield from functions_of(value)


def functions_of(value: Any) -> list[FunctionType]:
    """A function itself, or the methods of a class or of an instance's class."""
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, FunctionType):
        return [value]
    members = vars(value if isinstance(value, type) else type(value)).values()
    return [member for member in members if isinstance(member, FunctionType)]


@cache
def reaches(function: FunctionType, targets: tuple[Any, ...]) -> bool:
    """Whether a function refers to one of the targets, directly or through other functions of the test suite."""
    seen, waiting = set(), [function]
    while waiting:
        current = waiting.pop()
        if current in seen or not current.__code__.co_filename.startswith(TESTS):
            continue
        seen.add(current)
        for value in referred(current):
            if any(value is target for target in targets):
                return True
            waiting += functions_of(value)
    return False


def referred(function: FunctionType) -> Iterator[Any]:
    """Global objects, and attributes of global modules, whose names a function uses."""
    names = {name for code in nested(function.__code__) for name in code.co_names}
    for value in [function.__globals__[name] for name in names & function.__globals__.keys()]:
        if isinstance(value, ModuleType):
            yield from [getattr(value, name) for name in names & vars(value).keys()]
        else:
            yield value


def nested(code: CodeType) -> Iterator[CodeType]:
    """Code of a function and of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each free worker the next test, or the next whole file if it has a module fixture, so that jobs run once."""
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def shares_a_fixture(file: str) -> bool:
        return 'scope="module"' in (config.rootpath / file).read_text()

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if shares_a_fixture(file) else nodeid

    return Scheduling(config, log)
