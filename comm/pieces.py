"""Large buffers in pieces: engines count bytes or elements in 32 bits, some without saying so.

Open MPI 5 has no large counts, and fails from 2 GiB on in broadcasts, all-gathers and messages; Horovod counts in 32
bits, too. Whatever goes to such an engine is cut here, at a limit that a test sets low to see that every operation
keeps it.
"""

from collections.abc import Iterator

from lentando.comm.transport import Array

__all__ = ["LONGEST_BYTES", "longest_elements", "pieces"]

LONGEST_BYTES = 2**30
"""Of what one call of an engine moves. Equal on all ranks, or their pieces would not match."""


def longest_elements(itemsize: int, ranks: int = 1) -> int:
    """How many elements of so many bytes one call moves, if each of ``ranks`` contributes as many."""
    return max(1, LONGEST_BYTES // (itemsize * ranks))


def pieces(array: Array, longest: int | None = None) -> Iterator[Array]:
    """The consecutive parts of a one-dimensional array; an array without elements is one part.

    Args:
        array: any.
        longest: most elements of a part; by default, as many as one call may move.
    """
    if longest is None:
        longest = longest_elements(array.itemsize)
    if array.size <= longest:
        yield array
        return
    for start in range(0, array.size, longest):
        yield array[start : start + longest]
