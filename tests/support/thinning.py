"""Products of settings of which `make test` runs a part, and `LENTANDO_TESTS=all make test` everything."""

import os
from typing import TypeVar

_T = TypeVar("_T")

ALL = os.environ.get("LENTANDO_TESTS") == "all"


def thinned(part: _T, whole: _T) -> _T:
    """``part``, if it is enough to meet every setting of ``whole`` once; what is left out repeats their code."""
    return whole if ALL else part
