"""Helpers of the conformance suites of transports: what ranks send, and how a broken promise is reported."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import TransportError
from lentando.comm.transport import Array, Request, Transport

__all__ = ["DTYPES", "LARGEST_TAG", "LARGE_ELEMENTS", "LATE_SECONDS", "TransportChecks"]

DTYPES: tuple[DTypeLike, ...] = (
    np.float32, np.float64, np.float16, bfloat16, np.int64, np.int32, np.uint8, np.bool_,
)  # fmt: skip
LARGE_ELEMENTS = 1024 * 1024
"""More elements than any backend buffers for a receiver that has not called yet."""
LARGEST_TAG = 32767
LATE_SECONDS = 0.02


class TransportChecks:
    """Checks of a transport, one per method. The subclasses hold the checks.

    Args:
        transport: transport to check.
        timeout_seconds: limit for an exchange that should take milliseconds.
    """

    def __init__(self, transport: Transport, timeout_seconds: float) -> None:
        self.transport = transport
        self.timeout_seconds = timeout_seconds

    @property
    def next(self) -> int:
        """The rank after this one, on a ring."""
        return (self.transport.rank + 1) % self.transport.size

    @property
    def previous(self) -> int:
        """The rank before this one, on a ring."""
        return (self.transport.rank - 1) % self.transport.size

    def run_check(self, check: Callable[[], None]) -> None:
        """Run a check in which the transport must not raise an error."""
        try:
            check()
        except TransportError as error:
            name = check.__name__.replace("_", " ")
            raise AssertionError(f"{self.label()}: {name}: {error}") from error

    def require_complete(self, request: Request, description: str) -> None:
        """Call ``test()`` until it returns True, for ``timeout_seconds`` at most."""
        deadline = time.perf_counter() + self.timeout_seconds
        while not request.test():
            self.require(
                time.perf_counter() < deadline, f"{description} was not complete after {self.timeout_seconds} s"
            )
            time.sleep(0)

    def require_equal(self, array: Array, expected: Array, description: str) -> None:
        """Raise an ``AssertionError`` unless shape, dtype and all elements are equal."""
        is_equal = array.shape == expected.shape and array.dtype == expected.dtype and np.array_equal(array, expected)
        self.require(is_equal, f"{description}: expected {_shown(expected)}, got {_shown(array)}")

    def require(self, condition: bool, failure: str) -> None:
        """Raise an ``AssertionError`` with the message ``failure`` unless the condition is true."""
        if not condition:
            raise AssertionError(f"{self.label()}: {failure}")

    def label(self) -> str:
        """Return the transport's name and rank, which begin every message."""
        return f"transport {getattr(self.transport, 'name', '?')!r} on rank {getattr(self.transport, 'rank', '?')}"

    def numbers(self, rank: int, number: int = 0, elements: int = 33, dtype: DTypeLike = np.float32) -> Array:
        """Return message ``number`` of ``rank``: integers that the dtype represents exactly, as it does their sum."""
        small = (np.arange(elements) + 5 * rank + 3 * number) % 11
        beyond_other_dtypes = {"int64": 2**54, "float64": 2**40}
        return (small + beyond_other_dtypes.get(np.dtype(dtype).name, 0)).astype(dtype)

    def put(self, array: Array) -> Array:
        """Return the array in the memory that is checked: here, host memory."""
        return array

    def empty(self, elements: int = 33) -> Array:
        """Return an array in host memory for a message to fill."""
        return np.full(elements, -1, np.float32)


def _shown(array: Array) -> str:
    first: Iterable[Any] = array.reshape(-1)[:6].tolist()
    return f"{array.dtype} {array.shape} {', '.join(map(str, first))}{', ...' if array.size > 6 else ''}"
