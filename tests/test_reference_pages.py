"""The reference of the documentation site describes every public name, and the page on migration has code that runs."""

import importlib
import re

import pytest
from pages import ROOT, blocks

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
FOLDERS = {"callbacks", "elastic"}
"""Names of modules, whose own names are listed."""


def described() -> dict[str, list[str]]:
    """Names that the reference pages describe, by the module under which they do."""
    found: dict[str, list[str]] = {}
    for page in (DOCS / "reference").glob("*.md"):
        for block in blocks(page, "{eval-rst}"):
            (module,) = re.findall(r"^\.\. currentmodule:: (\S+)$", block, re.MULTILINE)
            found.setdefault(module, []).extend(re.findall(r"^\.\. auto\w+:: (\S+)$", block, re.MULTILINE))
    return found


@pytest.mark.slow  # loads both frameworks
@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_described_once(module: str) -> None:
    if "torch" in module or "tensorflow" in module:
        pytest.importorskip(module.split(".")[1])
    pages = described()
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
