"""Arrays by name: made, copied out of flat buffers, and compared, with errors that show where they differ."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from lentando.comm.dtypes import numpy_dtype
from lentando.comm.flat import Entry
from lentando.comm.transport import Array
from lentando.optimizers.framework import Framework

__all__ = [
    "Values",
    "buffer_values",
    "copied_values",
    "entries_of",
    "expect",
    "expect_same",
    "extreme_values",
    "fill_buffers",
    "incremented",
    "random_values",
    "shown",
    "trained_entries",
]

Values: TypeAlias = dict[str, Array]
"""An array for each of several entries of the flat buffers, by the entry's name."""

SMALL_EXPONENT, LARGE_EXPONENT = 12, 96
"""Powers of two of large numbers in float16, and in dtypes with the exponents of float32 or more."""

SHOWN_ELEMENTS = 4
"""Elements of an array that a message contains."""


def entries_of(framework: Framework) -> list[Entry]:
    """All entries of the flat buffers: parameters and statistics."""
    return [entry for buffer in framework.buffers for entry in buffer.layout.entries]


def trained_entries(framework: Framework) -> list[Entry]:
    """The entries that are parameters, which the base optimizer steps."""
    return [entry for entry in entries_of(framework) if entry.group is not None]


def buffer_values(framework: Framework) -> Values:
    """Copies of all entries of the flat buffers."""
    return {
        entry.name: np.array(view)
        for buffer in framework.buffers
        for entry, view in zip(buffer.layout.entries, buffer.views, strict=True)
    }


def fill_buffers(framework: Framework, values: Mapping[str, Array]) -> None:
    """Write values into the flat buffers."""
    for buffer in framework.buffers:
        for entry, view in zip(buffer.layout.entries, buffer.views, strict=True):
            view[...] = values[entry.name]


def copied_values(values: Mapping[str, Array]) -> Values:
    """Copies of arrays by name."""
    return {name: np.array(array) for name, array in values.items()}


def incremented(values: Mapping[str, Array]) -> Values:
    """Arrays by name with 1 added to each number."""
    return {
        name: np.array(array) if array.dtype == bool else np.array(array + array.dtype.type(1), array.dtype)
        for name, array in values.items()
    }


def random_values(entries: Sequence[Entry], *seed: int, scale: float = 1.0) -> Values:
    """Positive and negative numbers for entries, different in each element."""
    values: Values = {}
    for number, entry in enumerate(entries):
        generator = np.random.default_rng([*seed, number])
        drawn = generator.uniform(0.25, 1.0, entry.shape) * generator.choice((-1.0, 1.0), entry.shape)
        values[entry.name] = (scale * drawn).astype(_dtype(entry))
    return values


def extreme_values(entries: Sequence[Entry], *seed: int) -> Values:
    """Very large and very small normal numbers for entries, and a negative zero in each."""
    values = random_values(entries, *seed)
    for entry in entries:
        flat = values[entry.name].reshape(-1)
        exponent = SMALL_EXPONENT if entry.dtype == "float16" else LARGE_EXPONENT
        flat[1::3] *= _dtype(entry).type(2.0**exponent)
        flat[2::3] *= _dtype(entry).type(2.0**-exponent)
        flat[:1] = -0.0
    return values


def expect(condition: bool, framework: Framework, message: str) -> None:
    """Raise an error that names the adapter unless a promise is kept."""
    if not condition:
        raise AssertionError(f"{getattr(framework, 'name', type(framework).__name__)!s} adapter: {message}")


def expect_same(
    framework: Framework,
    found: Mapping[str, Array],
    expected: Mapping[str, Array],
    description: str,
    tolerance: float | None = None,
) -> None:
    """Compare arrays by name, bit by bit, or up to rounding errors.

    Args:
        framework: the adapter, which the error names.
        found: arrays by name.
        expected: the arrays that they should equal.
        description: noun phrase for the arrays and the moment, such as "the model after store()".
        tolerance: roundings, in units of the dtype's resolution at the largest element, that are allowed; None for
            bit-identical values.

    Raises:
        AssertionError: with the first array that differs.
    """
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    expect(not missing and not surplus, framework, f"{description} lacks {missing} and has unexpected {surplus}")
    for name, wanted in expected.items():
        array = np.asarray(found[name])
        expect(
            array.shape == wanted.shape and array.dtype == wanted.dtype,
            framework,
            f"{description}: expected {name!r} with shape {wanted.shape} and dtype {wanted.dtype}, found shape "
            f"{array.shape} and dtype {array.dtype}",
        )
        expect(
            _equal(array, wanted, tolerance),
            framework,
            f"{description}: expected {name!r} to be {shown(wanted)}, found {shown(array)}",
        )


def shown(array: Any) -> str:
    """The first elements of an array, for a message."""
    flat = np.asarray(array).reshape(-1)
    numbers = ", ".join(f"{float(value):.6g}" for value in flat[:SHOWN_ELEMENTS])
    return f"[{numbers}{', ...' if flat.size > SHOWN_ELEMENTS else ''}]"


def _equal(found: Array, expected: Array, tolerance: float | None) -> bool:
    if tolerance is None:
        return found.tobytes() == expected.tobytes()
    wide = expected.astype(np.float64)
    limit = tolerance * _resolution(expected) * max(1.0, float(np.abs(wide).max(initial=0.0)))
    return bool((np.abs(found.astype(np.float64) - wide) <= limit).all())


def _resolution(array: Array) -> float:
    """The distance between 1 and the next number of the array's dtype."""
    step, one = 1.0, array.dtype.type(1)
    while array.dtype.type(1 + step / 2) != one:
        step /= 2
    return step


def _dtype(entry: Entry) -> np.dtype[Any]:
    return numpy_dtype(entry.dtype)
