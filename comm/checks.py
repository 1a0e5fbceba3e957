"""Checks of settings that users pass. Each error says what was expected and what was found."""

from collections.abc import Sequence
from math import isfinite
from numbers import Integral, Real
from typing import Any

import numpy as np

from lentando.comm.errors import ConfigurationError

__all__ = ["check_choice", "check_flag", "check_has", "check_integer", "is_integer", "is_number"]


def check_choice(name: str, value: Any, legal: Sequence[str]) -> None:
    """Check that a setting is one of several names.

    Args:
        name: name of the setting.
        value: value that the user has passed.
        legal: legal values.

    Raises:
        ConfigurationError: if it is anything else.
    """
    if value not in legal:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, legal))}, got {value!r}")


def check_integer(name: str, value: Any, least: int, quantity: str) -> None:
    """Check that a setting is an integer. True and False do not count as integers.

    Args:
        name: name of the setting.
        value: value that the user has passed.
        least: smallest legal value.
        quantity: description of the setting, for the error message.

    Raises:
        ConfigurationError: if it is anything else.
    """
    if not is_integer(value) or value < least:
        raise ConfigurationError(f"{name} must be an integer >= {least} ({quantity}), got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Check that a setting is True or False.

    Args:
        name: name of the setting.
        value: value that the user has passed.

    Raises:
        ConfigurationError: if it is anything else: the string "no" would count as True.
    """
    if not isinstance(value, bool | np.bool_):
        raise ConfigurationError(f"{name} must be True or False, got {value!r}")


def check_has(name: str, value: Any, needed: tuple[str, ...], examples: str) -> None:
    """Check that a setting is an object with certain attributes, and not the class of such objects.

    Args:
        name: name of the setting.
        value: value that the user has passed.
        needed: names of the attributes.
        examples: examples of legal values, for the error message.

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


def is_integer(value: object) -> bool:
    """Whether a setting is an integer. True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
