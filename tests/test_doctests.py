"""The examples in docstrings and in the documentation run, and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "comm": "comm",
    "optimizers": "optimizers",
    "cli": "cli",
    "torch": "frameworks/torch",
    "tensorflow": "frameworks/tensorflow",
}
"""Packages below ``lentando``, and where their files are."""


def name_of(package: str, file: Path) -> str:
    """Name by which a file of a package is imported."""
    parts = file.relative_to(ROOT / FOLDERS[package]).with_suffix("").parts
    return ".".join(("lentando", package, *(part for part in parts if part != "__init__")))


MODULES = sorted(
    name_of(package, file)
    for package, folder in FOLDERS.items()
    for file in (ROOT / folder).rglob("*.py")
    if ">>> " in file.read_text()
)
PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md") if ">>> " in page.read_text())
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples write into a folder of their own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("module", MODULES)
def test_examples_of_a_module_run(module: str) -> None:
    failures = doctest.testmod(importlib.import_module(module), optionflags=OPTIONS)
    assert failures.failed == 0
    assert failures.attempted > 0, "no example was found: is the docstring that of a public object?"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", PAGES)
def test_examples_of_a_page_run(page: str) -> None:
    assert doctest.testfile(str(ROOT / page), module_relative=False, optionflags=OPTIONS).failed == 0
