"""Checks of the collectives of a transport with arrays in host memory."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lentando.comm.array_module import to_host
from lentando.comm.capabilities import SharedNode
from lentando.comm.testing.checks import DTYPES, LARGE_ELEMENTS, LATE_SECONDS, TransportChecks
from lentando.comm.transport import ReduceOp

__all__ = ["CollectiveChecks"]


class CollectiveChecks(TransportChecks):
    """Checks of collective operations."""

    def broadcast_from_every_root(self) -> None:
        """Every rank receives the array of the root, for every root, dtype and shape."""
        for root in range(self.transport.size):
            for dtype in DTYPES:
                array = self.numbers(self.transport.rank, root, 6, dtype).reshape(2, 3)
                self.transport.broadcast(array, root)
                expected = self.numbers(root, root, 6, dtype).reshape(2, 3)
                self.require_equal(array, expected, f"a broadcast of {np.dtype(dtype)} from rank {root}")
        for shape in ((), (0,), (LARGE_ELEMENTS,)):
            array = np.full(shape, self.transport.rank + 1, np.float32)
            self.transport.broadcast(array)
            self.require_equal(array, np.ones(shape, np.float32), f"a broadcast of shape {shape}")

    def allgather(self) -> None:
        """Every rank receives the arrays of all ranks in order, in memory of its own."""
        for dtype in DTYPES:
            for shape in ((5,), (2, 3), (), (0,)):
                elements = int(np.prod(shape))
                array = self.numbers(self.transport.rank, 0, elements, dtype).reshape(shape)
                gathered = self.transport.allgather(array)
                expected = [
                    self.numbers(rank, 0, elements, dtype).reshape(shape) for rank in range(self.transport.size)
                ]
                self.require_equal(gathered, np.stack(expected), f"an allgather of {np.dtype(dtype)}, shape {shape}")
                gathered[...] = 0
                self.require_equal(array, expected[self.transport.rank], "the array given to allgather")

    def allreduce(self) -> None:
        """Sums, minima and maxima are those of NumPy, for every dtype and shape."""
        functions: dict[ReduceOp, Any] = {"sum": np.add, "min": np.minimum, "max": np.maximum}
        size = self.transport.size
        for op, function in functions.items():
            for dtype in (np.float32, np.float64, np.int64, np.int32):
                for shape in ((7,), (2, 3), (0,)):
                    elements = int(np.prod(shape))
                    array = self.numbers(self.transport.rank, 0, elements, dtype).reshape(shape)
                    self.transport.allreduce(array, op)
                    by_rank = [self.numbers(rank, 0, elements, dtype) for rank in range(self.transport.size)]
                    expected = function.reduce(by_rank).astype(dtype).reshape(shape)
                    self.require_equal(array, expected, f"an allreduce ({op}) of {np.dtype(dtype)}, shape {shape}")
        for op in ("min", "max"):
            self.extremes(op)
        for integers in (np.dtype(np.uint8), np.dtype(np.int16), np.dtype(np.int32)):
            largest = np.full((size, 100), np.iinfo(integers).max, integers)
            array = self.put(largest[0].copy())
            self.transport.allreduce(array)
            expected = largest.sum(axis=0, dtype=integers)
            self.require_equal(to_host(array), expected, f"an allreduce (sum) of {integers} beyond its largest number")
        total = self.numbers(self.transport.rank)
        self.transport.allreduce(total)
        expected = np.sum([self.numbers(rank) for rank in range(self.transport.size)], axis=0, dtype=np.float32)
        self.require_equal(total, expected, "an allreduce without an op, which is a sum")

    def extremes(self, op: ReduceOp) -> None:
        """A NaN of any rank is the result on all ranks, infinities and signed zeros are ordered, and all bits agree."""
        rank, size = self.transport.rank, self.transport.size
        for dtype in (np.float32, np.float64):
            for with_nan in range(size):
                values = np.array([rank, -rank, np.nan if rank == with_nan else rank, -0.0 if rank % 2 else 0.0], dtype)
                if rank == with_nan:
                    values = np.append(values, [-np.nan, np.inf, -np.inf]).astype(dtype)
                else:
                    values = np.append(values, np.full(3, rank)).astype(dtype)
                array = self.put(values)
                self.transport.allreduce(array, op)
                reduced = to_host(array)
                description = f"an allreduce ({op}) of {np.dtype(dtype)} with NaN on rank {with_nan}"
                self.require(
                    bool(np.isnan(reduced[[2, 4]]).all()),
                    f"{description}: expected NaN, got {reduced[[2, 4]].tolist()}",
                )
                largest = float(size - 1)
                expected = [largest, 0.0] if op == "max" else [0.0, -largest]
                self.require(
                    reduced[:2].tolist() == expected, f"{description}: expected {expected}, got {reduced[:2].tolist()}"
                )
                is_negative = size > 1 and op == "min"
                self.require(bool(np.signbit(reduced[3])) == is_negative, f"{description}: a zero has the wrong sign")
                by_rank = self.transport.allgather(reduced.view(np.uint8))
                self.require(bool((by_rank == by_rank[0]).all()), f"{description}: the ranks ended with different bits")

    def barrier(self) -> None:
        """No rank returns from the barrier before all ranks have called it."""
        self.require_no_early_return("barrier", self.transport.barrier, range(self.transport.size))

    def node_barrier(self) -> None:
        """No rank of a node returns before all ranks of the node have called it."""
        if isinstance(self.transport, SharedNode):
            self.require_no_early_return("node_barrier", self.transport.node_barrier, self.transport.same_node)

    def require_no_early_return(self, name: str, wait: Callable[[], None], ranks: Sequence[int]) -> None:
        """Let each rank in turn call ``wait`` late, and measure that the others wait for it."""
        rank = self.transport.rank
        token = np.zeros(1, np.uint8)
        for late in ranks:
            others = [other for other in ranks if other != late]
            if rank == late:
                self.transport.exchange([], [(other, np.zeros(1, np.uint8)) for other in others]).wait()
                time.sleep(LATE_SECONDS)  # starts after every other rank has read its clock
                wait()
            else:
                started = time.perf_counter()
                self.transport.exchange([(late, token)], []).wait()
                wait()
                waited = time.perf_counter() - started
                self.require(waited >= LATE_SECONDS, f"{name} returned before rank {late} had called it")
