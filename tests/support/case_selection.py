"""Products of settings of which `make test` tries a part, and `make test-all` everything: see CONTRIBUTING.md."""

import os
from typing import TypeVar

_T = TypeVar("_T")


def selected_cases(part: _T, whole: _T) -> _T:
    """``part``, if it runs all the code that ``whole`` does."""
    return whole if os.environ.get("LENTANDO_TESTS") == "all" else part
