"""NumPy arrays in memory that belongs to another library."""

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np

from lentando.comm.transport import Array

__all__ = ["array_at"]


def array_at(address: int, nbytes: int, dtype: np.dtype[Any], owner: object) -> Array:
    """A one-dimensional array in memory that an object owns, which may be written to.

    Args:
        address: where the memory begins; not 0.
        nbytes: its length, more than 0: a multiple of the size of an element.
        dtype: dtype of the elements, also one of ml_dtypes.
        owner: what the array keeps alive.
    """
    memory: Any = _memory_type(nbytes).from_address(address)
    memory.owner = owner
    return np.frombuffer(memory, dtype)


@lru_cache(maxsize=4096)
def _memory_type(nbytes: int) -> "type[ctypes.Array[ctypes.c_char]]":
    """A type of so many bytes. ctypes makes one for each length, which is kept here."""
    return ctypes.c_char * nbytes
