"""Configuration of Sphinx, which builds the documentation site: ``make docs``.

The source folder is the root of the repository, so that links between pages, results and programs are the same on the
site and in the repository.
"""

import sys
from itertools import cycle
from pathlib import Path

from sphinx.application import Sphinx

import lentando

sys.path.insert(0, str(Path(__file__).parent))

project = "Lentando"
author = "The Lentando authors"
copyright = "2026, the Lentando authors"  # noqa: A001 - Sphinx's name
release = version = lentando.__version__

root_doc = "docs/index"
include_patterns = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**",
    "benchmarks/results/*.md",
    "examples/**/*.md",
    "findings/*.md",
]
exclude_patterns = [".*", "build", "dist", "runs", "src", "tests", "comm", "optimizers", "frameworks", "cli"]
html_extra_path = ["site_root"]  # index.html, which leads to root_doc

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"Lentando {release}"

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a property may be described in the docstring of its class as well


def escape_bars(app: Sphinx, what: str, name: str, documented: object, options: object, lines: list[str]) -> None:
    """Let |x| in a docstring be a norm, which Sphinx would take for the name of a substitution."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = line.split("``")
            lines[number] = "``".join(
                part if literal else part.replace("|", "\\|") for part, literal in zip(parts, cycle([False, True]))
            )


def setup(app: Sphinx) -> None:
    """Connect the hooks; Sphinx calls this."""
    app.connect("autodoc-process-docstring", escape_bars)
