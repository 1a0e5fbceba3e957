"""Settings as plain data: ranks compare it before they train, and checkpoints before they are continued.

An object becomes a dict of its fields, with the name of its class under ``"class"``. The data contain no address in
memory and no name of a module, so that equal settings give equal data on every rank and in every run.
"""

import json
import sys
from collections import deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, Field, fields
from enum import Enum
from functools import partial
from inspect import isfunction, ismethod, isroutine
from math import isfinite
from numbers import Integral, Real
from types import CellType
from typing import Any
from zlib import crc32

import numpy as np

__all__ = ["CLASS", "UNKNOWN", "as_text", "describe", "differences", "with_defaults"]

CLASS = "class"
"""Key of the class's name."""

UNKNOWN = "unknown"
"""Key that stands for the attributes of an object of which an earlier version has recorded only the class."""

MOST_ELEMENTS = 64
"""Elements of the largest array that is described by its values, and not by a checksum."""

MOST_LEVELS = 4
"""Levels of objects within objects whose attributes are described; of deeper ones, only the class is."""

EXACT_INTEGERS = 2.0**53
"""Below this, every integer is a float64."""


def describe(value: Any) -> Any:
    """A setting as data that JSON can hold.

    - Numbers are equal whatever their type: 1, 1.0 and ``np.float32(1)``. Arrays are nested lists; large ones, their
      shape, dtype and checksum.
    - An object with a method ``describe()`` is what that returns, which is described in turn; a dict gets the name of
      the class. Such a method makes two spellings of one setting equal, or leaves out attributes that decide nothing.
    - A dataclass is its fields, without those that ``__init__`` does not take or that are not compared.
    - Any other object is its attributes, private ones included, without leading underscores.
    - A function is its name, its defaults and the variables that it has captured. What it computes is not compared.
    - Objects of the standard library are their ``repr``, unless that is of the form ``<...>``.

    Args:
        value: a setting, or the settings within it.
    """
    return _described(value, (), 0)


def _described(value: Any, inside: tuple[int, ...], levels: int) -> Any:
    """As ``describe``, for a value within objects and containers with these ids."""
    simple, data = _simple(value)
    if simple:
        return data
    name = type(value).__name__
    if id(value) in inside:
        return {CLASS: name}

    def within(item: Any, deeper: int = 0) -> Any:
        return _described(item, (*inside, id(value)), levels + deeper)

    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else as_text(within(key)): within(item) for key, item in value.items()}
    if isinstance(value, list | tuple | deque):
        return [within(item) for item in value]
    if isinstance(value, Set):
        return sorted(map(within, value), key=_canonical)
    if isinstance(value, type):
        return {CLASS: "type", "name": value.__name__}
    if callable(getattr(value, "describe", None)):
        data = within(value.describe())
        return {CLASS: name, **data} if isinstance(data, dict) else data
    own = _fields(value)
    if own is not None:
        return {CLASS: name, **{field.name: within(getattr(value, field.name)) for field in own}}
    if isinstance(value, partial):
        parts = {"function": value.func, "args": value.args, "keywords": value.keywords}
        return {CLASS: name, **{key: within(part) for key, part in parts.items()}}
    if isroutine(value):
        parameters = {key: within(item, 1) for key, item in _parameters(value).items() if item}
        return {CLASS: "function", "name": value.__name__, **parameters}
    if type(value).__module__.partition(".")[0] in sys.stdlib_module_names:
        text = repr(value)
        return {CLASS: name} if text.startswith("<") or " at 0x" in text else {CLASS: name, "value": text}
    if levels == MOST_LEVELS:
        return {CLASS: name}
    return {CLASS: name, **{key: within(item, 1) for key, item in sorted(_attributes(value).items())}}


def _simple(value: Any) -> tuple[bool, Any]:
    """Whether a value holds no others, and its data if so."""
    if isinstance(value, Enum):
        return True, {CLASS: type(value).__name__, "name": value.name}
    if value is None or isinstance(value, bool):
        return True, value
    if isinstance(value, str):
        return True, str(value)
    if isinstance(value, np.bool_):
        return True, bool(value)
    if isinstance(value, Integral):
        return True, int(value)
    if isinstance(value, Real):
        return True, _number(float(value))
    if isinstance(value, complex | np.complexfloating):
        return True, {CLASS: "complex", "value": str(complex(value))}
    if isinstance(value, np.ndarray):
        return True, _array(value)
    return False, None


def _number(value: float) -> Any:
    if not isfinite(value):
        return str(value)  # JSON has no NaN and no infinity
    return int(value) if value.is_integer() and abs(value) < EXACT_INTEGERS else value


def _array(array: Any) -> Any:
    if array.size <= MOST_ELEMENTS:
        return describe(array.tolist())
    checksum = crc32(np.ascontiguousarray(array).view(np.uint8).data)
    return {CLASS: "ndarray", "shape": list(array.shape), "dtype": array.dtype.name, "checksum": f"{checksum:08x}"}


def _fields(value: Any) -> list[Field[Any]] | None:
    """The fields that identify an object, None if its class is no dataclass. Those of a base class alone do not."""
    if "__dataclass_fields__" not in vars(type(value)):
        return None
    return [field for field in fields(value) if field.init and field.compare]


def _parameters(function: Any) -> dict[str, Any]:
    """What a function computes with, in addition to its arguments: defaults, captured variables, a method's object."""
    if ismethod(function):
        return {"self": function.__self__, **_parameters(function.__func__)}
    if not isfunction(function):
        return {}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {
        "defaults": function.__defaults__,
        "keyword_defaults": function.__kwdefaults__,
        "captured": {name: cell.cell_contents for name, cell in cells if cell != CellType()},
    }


def _attributes(value: Any) -> dict[str, Any]:
    """An object's attributes by name, without the underscores that mark private ones."""
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for group in slots for name in ([group] if isinstance(group, str) else group)]
    found = {name: getattr(value, name) for name in names if not name.startswith("__") and hasattr(value, name)}
    found |= getattr(value, "__dict__", {})
    public = {name: name.lstrip("_") for name in found}
    return {name if public[name] in ("", *found) else public[name]: item for name, item in found.items()}


def with_defaults(saved: Any, value: Any) -> Any:
    """Earlier data of a setting, with the defaults of dataclass fields that did not exist when it was written.

    A field that is added later must have the default that changes nothing.

    Args:
        saved: what ``describe`` returned, in this or an earlier version.
        value: the setting here, which may be another one.
    """
    if not isinstance(saved, dict) or saved.get(CLASS, type(value).__name__) != type(value).__name__:
        return saved
    if UNKNOWN in saved:
        return describe(value)
    own = _fields(value)
    if own is None:
        return saved
    filled = dict(saved)
    for field in own:
        if field.name in saved:
            filled[field.name] = with_defaults(saved[field.name], getattr(value, field.name))
        elif field.default is not MISSING:
            filled[field.name] = describe(field.default)
        elif field.default_factory is not MISSING:
            filled[field.name] = describe(field.default_factory())
    return filled


_ABSENT = object()


def differences(described: Sequence[Any], key: str = "") -> list[tuple[str, list[str]]]:
    """Where data differ: the path of each key, such as ``"outer.slow_momentum"``, and the values as text.

    Args:
        described: two or more results of ``describe``.
        key: path of the data within the settings.
    """
    if len(set(map(_canonical, described))) == 1:
        return []
    if all(isinstance(data, dict) for data in described) and len({data.get(CLASS) for data in described}) == 1:
        keys = dict.fromkeys(name for data in described for name in data)
        return [
            difference
            for name in keys
            for difference in differences(
                [data.get(name, _ABSENT) for data in described], f"{key}.{name}" if key else name
            )
        ]
    return [(key, ["absent" if data is _ABSENT else as_text(data) for data in described])]


def as_text(data: Any) -> str:
    """Data that ``describe`` returned, for messages: ``SGP(topology=Ring(), wire_dtype=None)``."""
    if isinstance(data, list):
        return f"[{', '.join(map(as_text, data))}]"
    if not isinstance(data, dict):
        return repr(data)
    if CLASS in data:
        return f"{data[CLASS]}({', '.join(f'{key}={as_text(item)}' for key, item in data.items() if key != CLASS)})"
    return f"{{{', '.join(f'{key!r}: {as_text(item)}' for key, item in data.items())}}}"


def _canonical(data: Any) -> str:
    """Text that is equal for equal data only: to Python, 1 and True are equal."""
    return "absent" if data is _ABSENT else json.dumps(data, sort_keys=True)
