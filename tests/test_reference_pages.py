"""The reference of the documentation site describes every public name, with an example; code of the pages runs."""

import doctest
import importlib
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from pages import ROOT, blocks

from lentando.comm import world

DOCS = ROOT / "docs"
MODULES = [
    "lentando.optimizers",
    "lentando.torch",
    "lentando.tensorflow",
    "lentando.tensorflow.keras",
    "lentando.tensorflow.keras.callbacks",
    "lentando.torch.elastic",
    "lentando.tensorflow.elastic",
    "lentando.comm.simulation",
    "lentando.comm.cluster",
    "lentando.comm.testing",
    "lentando.optimizers.planning",
    "lentando.optimizers.testing",
]
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
FOLDERS = {"callbacks", "elastic"}
"""Names of modules, whose own names are listed."""


def described(pages: Iterable[Path]) -> dict[str, list[str]]:
    """Names that reference pages describe, by the module under which they do."""
    found: dict[str, list[str]] = {}
    for page in pages:
        for block in blocks(page, "{eval-rst}"):
            (module,) = re.findall(r"^\.\. currentmodule:: (\S+)$", block, re.MULTILINE)
            found.setdefault(module, []).extend(re.findall(r"^\.\. auto\w+:: (\S+)$", block, re.MULTILINE))
    return found


@pytest.mark.slow  # loads both frameworks
@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_described_once(module: str) -> None:
    if "torch" in module or "tensorflow" in module:
        pytest.importorskip(module.split(".")[1])
    pages = described(REFERENCE)
    public = importlib.import_module(module)
    names = pages.get(module, [])
    assert len(names) == len(set(names))
    elsewhere = {
        name
        for other in pages
        if other != module
        for name in pages[other]
        if getattr(public, name, None) is getattr(importlib.import_module(other), name, object())
    }
    assert set(names) | (elsewhere & set(public.__all__)) == set(public.__all__) - FOLDERS


def examples(page: Path) -> list[str]:
    """The examples of a reference page, which show what several entries have in common."""
    return [block for block in blocks(page, "python") if block.startswith(">>>")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of NumPy to Keras
@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_examples_of_a_reference_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LENTANDO_TRANSPORT", "single")
    for number, block in enumerate(examples(page)):
        for framework in ("torch", "tensorflow"):
            if framework in block:
                pytest.importorskip(framework)
        report: list[str] = []
        test = doctest.DocTestParser().get_doctest(block, {}, f"{page.name}, example {number}", str(page), 0)
        try:
            results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
        finally:
            world.shutdown()
        assert results.failed == 0, "".join(report)


@pytest.mark.slow  # loads both frameworks
def test_every_public_name_has_an_example() -> None:
    """In its own docstring, or on the page that describes it."""
    pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    without = []
    for page in REFERENCE:
        shown = "".join(examples(page))
        for module, names in described([page]).items():
            for name in names:
                text = getattr(importlib.import_module(module), name).__doc__ or ""
                if ">>>" not in text and not re.search(rf"\b{name}\b", shown):
                    without.append(f"{module}.{name}")
    assert without == []


def test_code_after_a_migration_runs() -> None:
    pytest.importorskip("torch")
    import torch

    import lentando.torch as lt

    page = DOCS / "migrating.md"
    after = [block for block in blocks(page, "python") if block.startswith("# after\n")]
    assert len(after) == page.read_text().count("\n## ")
    try:
        for block in after:
            model = torch.nn.Linear(3, 1)
            names = {"torch": torch, "lt": lt, "model": model, "dataset": [torch.ones(3)]}
            lt.init()
            exec(block, names)
            model(torch.ones(2, 3)).sum().backward()
            names["optimizer"].step()
    finally:
        lt.shutdown()
