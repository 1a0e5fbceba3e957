"""Cuts large buffers into pieces, because backends count bytes or elements in 32 bits, some of them undocumented.

Open MPI 5 has no large counts, and fails from 2 GiB on in broadcasts, all-gathers and messages; Horovod counts in 32
bits too. All buffers for such a backend are cut here. Tests set the limit low to check that every operation observes
it.
"""

from collections.abc import Iterator

from lentando.comm.transport import Array

__all__ = ["LONGEST_BYTES", "longest_elements", "pieces"]

LONGEST_BYTES = 2**30
"""Limit of the bytes that one call of a backend moves. Equal on all ranks: their pieces have to match."""


def longest_elements(itemsize: int, ranks: int = 1) -> int:
    """Number of elements of ``itemsize`` bytes that one call may move if each of ``ranks`` contributes as many."""
    return max(1, LONGEST_BYTES // (itemsize * ranks))


def pieces(array: Array, longest: int | None = None) -> Iterator[Array]:
    """Cut a one-dimensional array into consecutive parts. An array without elements is one part.

    Args:
        array: one-dimensional array of any dtype.
        longest: limit of the elements of a part; by default, the number that one call may move.
    """
    if longest is None:
        longest = longest_elements(array.itemsize)
    if array.size <= longest:
        yield array
        return
    for start in range(0, array.size, longest):
        yield array[start : start + longest]
