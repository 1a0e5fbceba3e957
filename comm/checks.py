"""Settings that users give, checked when they are given: each check says what was expected and what was found."""

from collections.abc import Sequence
from math import isfinite
from numbers import Integral, Real
from typing import Any

import numpy as np

from lentando.comm.errors import ConfigurationError

__all__ = ["check_choice", "check_flag", "check_has", "check_integer", "is_number"]


def check_choice(name: str, value: Any, legal: Sequence[str]) -> None:
    """A setting that must be one of some names.

    Raises:
        ConfigurationError: if it is anything else.
    """
    if value not in legal:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, legal))}, got {value!r}")


def check_integer(name: str, value: Any, least: int, what: str) -> None:
    """A setting that must be an integer. True and False are none.

    Args:
        name: of the setting.
        value: that was given.
        least: that it can be.
        what: it counts, in words.

    Raises:
        ConfigurationError: if it is anything else.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{name} must be an integer >= {least} ({what}), got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """A setting that must be True or False.

    Raises:
        ConfigurationError: if it is anything else: the string "no" would count as True.
    """
    if not isinstance(value, bool | np.bool_):
        raise ConfigurationError(f"{name} must be True or False, got {value!r}")


def check_has(name: str, value: Any, needed: tuple[str, ...], examples: str) -> None:
    """A setting that must be an object with certain attributes, and not the class of such objects.

    Args:
        name: of the setting.
        value: that was given.
        needed: names of the attributes.
        examples: what users write, in words.

    Raises:
        ConfigurationError: if it is a class, or lacks an attribute.
    """
    if isinstance(value, type):
        raise ConfigurationError(f"{name} must be an object such as {examples}, got the class {value.__name__} itself")
    missing = [attribute for attribute in needed if not hasattr(value, attribute)]
    if missing:
        raise ConfigurationError(f"{name} must be {examples} or the like, got {value!r}")


def is_number(value: object) -> bool:
    """Whether a setting is a finite real number. True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
