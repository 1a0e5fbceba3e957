"""Settings in words: by these ranks see whether they have the same, and checkpoints whether they may be continued."""

from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

__all__ = ["UNSAID", "in_words"]

UNSAID = MappingProxyType({"unsaid": True})
"""Metadata of a choice whose default goes without saying: checkpoints of before it existed have the same words."""


def in_words(value: Any, with_unsaid: bool = True) -> str:
    """``repr``, without the address in memory that Python's default puts there for a user's own classes.

    Args:
        value: settings, or one of them.
        with_unsaid: False leaves out defaults that go without saying.
    """
    name = type(value).__name__
    if is_dataclass(value):
        said = [f for f in fields(value) if with_unsaid or f.metadata != UNSAID or getattr(value, f.name) != f.default]
        inside = [f"{f.name}={in_words(getattr(value, f.name), with_unsaid)}" for f in said]
        return f"{name}({', '.join(inside)})"
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return name if hex(id(value)) in text else text
