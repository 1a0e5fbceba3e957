"""Adasum: the combination of gradients by Maleki et al., 2020 (arXiv:2006.02924).

Two gradients a and b are combined as (1 - a.b / (2 a.a)) a + (1 - a.b / (2 b.b)) b: orthogonal ones are added, parallel
ones averaged. More than two are combined in a binary tree: neighbours in pairs, then neighbouring pairs, and so on.
Each tensor (each layer) is combined separately, with its own dot products.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from lentando.comm.operations.slices import exchange_slices, share_slices, slice_bounds
from lentando.comm.transport import Array, Transport

__all__ = ["adasum"]


def adasum(transport: Transport, array: Array, lengths: Sequence[int]) -> None:
    """Combine the tensors of all ranks by Adasum, in place. Collective. The result is bit-identical on every rank.

    Each rank combines its slice of all vectors, after one exchange of slices; another one distributes the results. In
    between, each level of the tree needs the dot products of whole tensors, which are summed over the slices in a small
    message. Vectors, dot products and intermediate results are float64; the result is rounded once.

    Any number of ranks can take part. With a number that is not a power of two, the last vector of a level with an odd
    number of vectors passes to the next level unchanged. Horovod requires a power of two, and rounds after each level.

    Args:
        transport: transport of the participating ranks.
        array: one-dimensional contiguous array of floating point, in which the tensors follow each other.
        lengths: numbers of elements of the tensors.

    Example:
        >>> from lentando.comm.testing import run_ranks
        >>> def worker(transport):
        ...     array = np.array([1.0, 0.0, 2.0]) if transport.rank == 0 else np.array([0.0, 1.0, 4.0])
        ...     adasum(transport, array, [2, 1])  # orthogonal in the first tensor, parallel in the second
        ...     return array.tolist()
        >>> run_ranks(2, worker)[0]
        [1.0, 1.0, 3.0]
    """
    bounds = slice_bounds(array.size, transport.size)
    mine = slice(bounds[transport.rank], bounds[transport.rank + 1])
    slices = exchange_slices(transport, [array[start:end] for start, end in pairwise(bounds)])
    vectors = [received.astype(np.float64) for received in slices]
    tensors = _parts(lengths, mine)
    while len(vectors) > 1:
        pairs = list(zip(vectors[::2], vectors[1::2], strict=False))
        products = np.array([[_products(a[part], b[part]) for part in tensors] for a, b in pairs])
        totals = transport.allgather(products).sum(axis=0)  # summed in the same order on all ranks
        for (a, b), of_pair in zip(pairs, totals, strict=True):
            for part, (dot, square_a, square_b) in zip(tensors, of_pair, strict=True):
                a[part] = _share(dot, square_a) * a[part] + _share(dot, square_b) * b[part]
        vectors = vectors[::2]
    np.copyto(array[mine], vectors[0], casting="same_kind")
    share_slices(transport, array, bounds)


def _parts(lengths: Sequence[int], mine: slice) -> list[slice]:
    """The part of each tensor that lies in this rank's slice, counted from the start of the slice; may be empty."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    clipped = [np.clip(positions, mine.start, mine.stop) - mine.start for positions in (starts, ends)]
    return [slice(int(start), int(end)) for start, end in zip(*clipped, strict=True)]


def _products(a: Array, b: Array) -> tuple[float, float, float]:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(a @ b), float(a @ a), float(b @ b)


def _share(dot: float, square: float) -> float:
    """The factor of a vector; 1 for a vector of zeros, of which any multiple is zero."""
    return 1.0 if square == 0 else float(1 - dot / (2 * square))
