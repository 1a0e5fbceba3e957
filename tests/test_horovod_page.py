"""docs/horovod.md says of every public name of Horovod what became of it, and the table is what the packages export."""

import importlib
import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/horovod.md"
NAMES = ROOT / "tests/support/horovod_names.txt"
COLUMNS = {
    "horovod.torch": 1,
    "horovod.tensorflow": 2,
    "horovod.tensorflow.keras": 3,
    "horovod.keras": 3,
}
"""Modules of Horovod, and their column. Names of their submodules are written with the submodule: `elastic.run`."""
STATES = ("same", "differs", "refused")
PARAMETER = re.compile(r"(\*{0,2}\w+)(?:=(.*))?")
CONSTANTS: dict[str, Any] = {"None": None, "True": True, "False": False}


@dataclass(frozen=True)
class Name:
    """A public name of Horovod.

    Attributes:
        module: such as ``horovod.torch``.
        name: with the submodule, if it is of one.
        parameters: names and defaults, in order; None if it cannot be called.
    """

    module: str
    name: str
    parameters: tuple[tuple[str, str | None], ...] | None

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def split_parameters(text: str) -> tuple[tuple[str, str | None], ...]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    found = [PARAMETER.fullmatch(part.strip()) for part in parts if part.strip()]
    return tuple((match[1], match[2]) for match in found if match)


@cache
def horovods_names() -> list[Name]:
    found = []
    for line in NAMES.read_text().splitlines():
        if line.startswith("#"):
            continue
        path, bracket, parameters = line.partition("(")
        module = max((module for module in COLUMNS if path.startswith(f"{module}.")), key=len)
        name = path.removeprefix(f"{module}.")
        found.append(Name(module, name, split_parameters(parameters[:-1]) if bracket else None))
    return found


@cache
def table() -> dict[str, list[str]]:
    """The rows of the page's table: by name, the cells."""
    section = PAGE.read_text().partition("## Names")[2].partition("\n## ")[0]
    rows: dict[str, list[str]] = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
            for name in re.findall(r"`([^`]+)`", cells[0]):
                assert name not in rows, f"{name} is in two rows"
                rows[name] = cells
    return rows


def ours(name: Name) -> Any:
    """What Lentando has under this name, or None."""
    found: Any = importlib.import_module(name.module.replace("horovod", "lentando", 1))
    for part in name.name.split("."):
        exported = part in getattr(found, "__all__", [part])
        found = getattr(found, part, None) if exported else None
    return found


def of_framework(module: str) -> list[Name]:
    pytest.importorskip("torch" if module == "horovod.torch" else "tensorflow")
    return [name for name in horovods_names() if name.module == module]


def test_the_list_of_names_is_complete() -> None:
    names = {str(name) for name in horovods_names()}
    assert {"horovod.torch.allreduce", "horovod.tensorflow.DistributedGradientTape"} < names
    assert {"horovod.keras.callbacks.MetricAverageCallback", "horovod.torch.elastic.TorchState"} < names
    assert len(names) > 240


def test_every_row_is_of_a_name_of_horovod_and_has_a_state() -> None:
    names = {name.name for name in horovods_names()}
    assert set(table()) <= names
    for name, cells in table().items():
        assert len(cells) == 5, f"{name}: {cells}"
        for column in {COLUMNS[each.module] for each in horovods_names() if each.name == name}:
            assert cells[column] in STATES, f"{name}, column {column}: {cells[column]!r}"
        if {"differs", "refused"} & set(cells[1:4]):
            assert cells[4], f"{name}: in which way, or why"


@pytest.mark.parametrize("module", COLUMNS)
def test_what_the_page_says_is_what_is_exported(module: str) -> None:
    wrong = []
    for name in of_framework(module):
        state, found = table()[name.name][COLUMNS[module]] if name.name in table() else "in no row", ours(name)
        if state not in STATES or (found is None or refuses(found)) != (state == "refused"):
            wrong.append(f"{name}: the page says {state}, found {found!r}")
    assert wrong == []


def refuses(found: Any) -> bool:
    """Whether each call is an error that says what to do instead."""
    return bool(getattr(found, "__refused__", False))


@pytest.mark.parametrize("module", COLUMNS)
def test_help_shows_the_arguments_of_every_function(module: str) -> None:
    """Functions may be wrapped, such as those that AutoGraph does not convert."""
    wrong = []
    for name in of_framework(module):
        found = ours(name)
        if inspect.isfunction(found) and not refuses(found):
            kinds = [each.kind.name for each in inspect.signature(found).parameters.values()]
            defined_here = vars(importlib.import_module(found.__module__)).get(found.__name__) is found
            if kinds == ["VAR_POSITIONAL", "VAR_KEYWORD"] or not defined_here:
                wrong.append(f"{name}: {found.__module__}.{found.__qualname__}{inspect.signature(found)}")
    assert wrong == []


@pytest.mark.parametrize("module", COLUMNS)
def test_a_name_that_is_the_same_takes_horovods_arguments(module: str) -> None:
    """In Horovod's order, with its defaults; more may follow."""
    wrong = {}
    for name in of_framework(module):
        if name.parameters is not None and table()[name.name][COLUMNS[module]] == "same":
            found = ours(name)
            problem = difference(name, inspect.signature(found)) if callable(found) else "cannot be called"
            if problem:
                wrong[str(name)] = problem
    assert wrong == {}


def difference(name: Name, signature: inspect.Signature) -> str:
    """What a call that is written for Horovod would run into; empty if nothing."""
    assert name.parameters is not None
    taken = [each for each in signature.parameters.values() if each.kind is not each.KEYWORD_ONLY]
    for position, (parameter, default) in enumerate(name.parameters):
        if parameter.startswith("*"):
            return ""
        if position >= len(taken) or taken[position].name != parameter:
            return f"{parameter} is not argument {position}"
        if default is not None and not same_default(taken[position].default, default, name):
            return f"{parameter} has the default {taken[position].default}, not {default}"
    more = taken[len(name.parameters) :]
    needed = [each.name for each in more if each.default is each.empty and "VAR" not in each.kind.name]
    return f"needs {needed}, too" if needed else ""


def same_default(value: Any, default: str, name: Name) -> bool:
    """Whether a default is the one that Horovod's source text has."""
    if value is inspect.Parameter.empty:
        return False
    if default in CONSTANTS:
        return value is CONSTANTS[default]
    if re.fullmatch(r"-?[\d.e-]+", default):
        return bool(value == float(default))
    if default.startswith("'"):
        return bool(value == default.strip("'"))
    package: ModuleType = importlib.import_module(name.module.replace("horovod", "lentando", 1))
    expected: Any = package
    for part in default.split("."):
        expected = getattr(expected, part, None)
    return expected is not None and value is expected


def test_every_variable_of_horovod_that_is_read_is_on_the_page() -> None:
    sources = [path for layer in ("comm", "optimizers", "frameworks") for path in (ROOT / layer).rglob("*.py")]
    read = {name for path in sources for name in re.findall(r'"(HOROVOD_\w+)"', path.read_text())}
    assert {"HOROVOD_RANK", "HOROVOD_TIMELINE_MARK_CYCLES", "HOROVOD_STALL_CHECK_DISABLE"} < read
    section = PAGE.read_text().partition("## Environment variables")[2].partition("\n## ")[0]
    assert read - set(re.findall(r"`(HOROVOD_\w+)`", section)) == set()


def test_the_page_counts_the_tests_of_horovods_that_it_lists() -> None:
    """Each file's tests that do not pass are as many as the first table says."""
    results = PAGE.read_text().partition("<!-- results: begin -->")[2]
    counts = re.findall(r"^\| `(test_\w+\.py)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", results, re.MULTILINE)
    assert len(counts) == 4
    for file, *numbers in counts:
        total, passed, skipped, failed = map(int, numbers)
        rows = re.findall(rf"^\| `{file}` \| ((?:`\w+`(?:, )?)+) \|", results, re.MULTILINE)
        listed = [test for row in rows for test in re.findall(r"`(\w+)`", row)]
        assert len(listed) == len(set(listed)) == skipped + failed, file
        assert passed == total - skipped - failed, file


def test_every_program_and_its_changed_line_are_on_the_page() -> None:
    folder = ROOT / "examples/migrating_from_horovod"
    diff = PAGE.read_text().partition("```diff\n")[2].partition("```")[0]
    shown = re.findall(r"^(\w+\.py)\n-(.*)\n\+(.*)$", diff, re.MULTILINE)
    programs = {path.name for path in folder.glob("*.py") if "import horovod." in path.read_text()}
    assert {program for program, _, _ in shown} == {
        program for program in programs if not program.startswith("horovod_")
    }
    for program, before, after in shown:
        lines = folder.joinpath(program).read_text().splitlines()
        assert [line for line in lines if "import horovod" in line] == [before]
        assert after == before.replace("horovod", "lentando")
