"""One rank of a job that times operations of one library. ``benchmarks/run.py`` starts such jobs in turn.

    mpirun -np 4 python benchmarks/peers/operations.py lentando all_reduce:1000000 exchange:25000000 outer_step:25000000

Prints a line of JSON: for each operation and its bytes, the seconds of the slowest rank, median of a few samples.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

SAMPLES = 3
SAMPLE_SECONDS = 0.05
"""What is shorter than this is done several times in a row."""


class Library(Protocol):
    """Who all-reduces; some can do more."""

    rank: int

    def all_reduce(self, elements: int) -> Callable[[], object]:
        """What sums a buffer of so many float32 zeros in place, time and again."""

    def slowest(self, seconds: float) -> float:
        """The longest time of any rank; after a barrier of sorts."""


class MPI:
    """Whichever MPI mpi4py loads."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi, self._comm = MPI, MPI.COMM_WORLD
        self.rank = self._comm.rank

    def all_reduce(self, elements: int) -> Callable[[], object]:
        buffer = np.zeros(elements, np.float32)
        return lambda: self._comm.Allreduce(self._mpi.IN_PLACE, buffer)

    def exchange(self, elements: int) -> Callable[[], object]:
        sent, received = np.zeros(elements, np.float32), np.empty(elements, np.float32)
        to, source = (self.rank + 1) % self._comm.size, (self.rank - 1) % self._comm.size
        return lambda: self._comm.Sendrecv(sent, to, recvbuf=received, source=source)

    def slowest(self, seconds: float) -> float:
        return float(self._comm.allreduce(seconds, self._mpi.MAX))


class Lentando:
    """As a replica does it: the buffer is in shared memory, the algorithm chosen by its size."""

    def __init__(self) -> None:
        from lentando.comm.transports.mpi import MPITransport

        self._transport = MPITransport()
        self.rank = self._transport.rank

    def all_reduce(self, elements: int) -> Callable[[], object]:
        from lentando.comm.collectives import plan_reduction
        from lentando.comm.shared_memory import shared_zeros

        reduction = plan_reduction(self._transport, shared_zeros(elements, np.dtype(np.float32)))
        return lambda: reduction.all_reduce(mean=False)

    def exchange(self, elements: int) -> Callable[[], object]:
        sent, received = np.zeros(elements, np.float32), np.empty(elements, np.float32)
        size = self._transport.size
        sends, receives = [((self.rank + 1) % size, sent)], [((self.rank - 1) % size, received)]
        return lambda: self._transport.exchange(sends, receives, overlap=False).wait()

    def outer_step(self, elements: int) -> Callable[[], object]:
        from lentando.comm.flat import Entry, FlatBuffer, FlatLayout
        from lentando.optimizers.rules.outer_step import OuterStep
        from lentando.optimizers.rules.slow_momentum import SlowMomentum

        model = FlatBuffer(FlatLayout([Entry("weights", (elements,), "float32", 0)]), shared=True)
        outer = OuterStep(self._transport, [model], SlowMomentum(slow_momentum=0.5))
        return lambda: outer.run([0.1])

    def slowest(self, seconds: float) -> float:
        longest = np.array([seconds])
        self._transport.allreduce(longest, "max")
        return float(longest[0])


class TorchDistributed:
    """torch.distributed over one of its backends, which DistributedDataParallel uses."""

    def __init__(self, backend: str) -> None:
        import torch
        import torch.distributed as dist

        if backend == "lentando":
            import lentando.c10d  # noqa: F401 - registers the backend
        self._torch, self._dist = torch, dist
        dist.init_process_group(backend)
        self.rank = dist.get_rank()

    def all_reduce(self, elements: int) -> Callable[[], object]:
        buffer = self._torch.zeros(elements)
        return lambda: self._dist.all_reduce(buffer)

    def slowest(self, seconds: float) -> float:
        longest = self._torch.tensor([seconds], dtype=self._torch.float64)
        self._dist.all_reduce(longest, self._dist.ReduceOp.MAX)
        return float(longest)


class Horovod:
    """Horovod's engine, under whichever controller horovodrun names."""

    def __init__(self) -> None:
        import horovod.torch as hvd
        import torch

        hvd.init()
        self._hvd, self._torch = hvd, torch
        self.rank = hvd.rank()

    def all_reduce(self, elements: int) -> Callable[[], object]:
        buffer = self._torch.zeros(elements)
        return lambda: self._hvd.allreduce_(buffer, op=self._hvd.Sum, name="benchmark")

    def slowest(self, seconds: float) -> float:
        times = self._torch.tensor([seconds], dtype=self._torch.float64)
        return float(self._hvd.allreduce(times, op=self._hvd.Max, name="slowest"))


LIBRARIES: dict[str, Callable[[], Any]] = {
    "lentando": Lentando,
    "mpi": MPI,
    "gloo": lambda: TorchDistributed("gloo"),
    "horovod": Horovod,
}


def seconds_per_call(library: Library, call: Callable[[], object], calls: int) -> float:
    library.slowest(0.0)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return library.slowest((time.perf_counter() - started) / calls)


def median_seconds(library: Library, call: Callable[[], object], sample_seconds: float = SAMPLE_SECONDS) -> float:
    """Of a few samples, each of as many calls as take ``sample_seconds``."""
    seconds_per_call(library, call, 3)  # DDP arranges its buckets after the first iteration
    calls = min(200, max(1, round(sample_seconds / seconds_per_call(library, call, 1))))
    return statistics.median(seconds_per_call(library, call, calls) for _ in range(SAMPLES))


def finish(name: str, library: Library, found: dict[str, float]) -> None:
    """Print what was found, on rank 0, and end together."""
    if library.rank == 0:
        print(json.dumps(found), flush=True)
    library.slowest(0.0)
    if name == "gloo":
        os._exit(0)  # its threads may log errors after their store is closed


def main() -> None:
    name, *wanted = sys.argv[1:]
    library: Library = LIBRARIES[name]()
    found = {}
    for each in wanted:
        operation, _, size = each.partition(":")
        found[each] = median_seconds(library, getattr(library, operation)(int(size) // 4))
    finish(name, library, found)


if __name__ == "__main__":
    main()
