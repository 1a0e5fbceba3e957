"""Products of settings of which `make test` tries a part, and `make test-all` everything: see CONTRIBUTING.md."""

import os
from typing import TypeVar

import pytest

_T = TypeVar("_T")
_ALL = os.environ.get("LENTANDO_TESTS") == "all"

thoroughly = pytest.mark.skipif(not _ALL, reason="only in make test-all: see CONTRIBUTING.md")
"""Marks a test all of whose code other tests run."""


def selected_cases(part: _T, whole: _T) -> _T:
    """``part``, if it runs all the code that ``whole`` does."""
    return whole if _ALL else part
