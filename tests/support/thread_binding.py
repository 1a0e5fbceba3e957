"""Horovod's way to work among threads: an operation begins when all ranks have asked for it by its name."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lentando.comm.errors import TransportError
from lentando.comm.transport import Array, ReduceOp
from lentando.comm.transports.horovod.binding import REDUCED_HERE


@dataclass
class Pending:
    """One operation: what the ranks that have asked for it brought."""

    size: int
    brought: dict[int, Any] = field(default_factory=dict)
    results: list[Array] | None = None
    error: str | None = None


class Coordinator:
    """What Horovod's rank 0 is. Operations run one after the other, in the thread of the last caller."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lock = threading.Lock()
        self.pending: dict[str, Pending] = {}
        self.failure: str | None = None
        self.performed: list[str] = []

    def ask(
        self, rank: int, name: str, what: Any, brought: Any, perform: Callable[[list[Any]], list[Array]]
    ) -> Pending:
        with self.lock:
            if self.failure is not None:
                raise TransportError(self.failure)
            operation = self.pending.setdefault(name, Pending(self.size))
            if rank in operation.brought:
                raise TransportError(f"rank {rank} asked for {name} again before it was done")
            operation.brought[rank] = (what, brought)
            if len(operation.brought) == self.size:
                del self.pending[name]
                by_rank = [operation.brought[rank] for rank in range(self.size)]
                if any(what != by_rank[0][0] for what, _ in by_rank):
                    operation.error = f"the ranks ask {name} for {sorted({str(what) for what, _ in by_rank})}"
                else:
                    self.performed.append(name)
                    operation.results = perform([brought for _, brought in by_rank])
            return operation


class Asked:
    """What an engine gives back."""

    def __init__(self, coordinator: Coordinator, operation: Pending, rank: int, into: Array | None = None) -> None:
        self.coordinator, self.operation, self.rank, self.into = coordinator, operation, rank, into

    def done(self) -> bool:
        return self.operation.results is not None or bool(self.operation.error or self.coordinator.failure)

    def result(self) -> Array:
        if self.operation.results is None:
            raise TransportError(self.operation.error or self.coordinator.failure)
        found = self.operation.results[self.rank]
        if self.into is None:
            return found
        self.into[...] = found
        return self.into


class ThreadBinding:
    """One rank's view of it."""

    module = "threads"

    def __init__(self, coordinator: Coordinator, rank: int) -> None:
        self.coordinator = coordinator
        self._rank = rank

    def size(self) -> int:
        return self.coordinator.size

    def rank(self) -> int:
        return self._rank

    def local_size(self) -> int:
        return self.coordinator.size

    def local_rank(self) -> int:
        return self._rank

    def allreduce(self, name: str, array: Array, op: ReduceOp) -> Asked:
        assert array.dtype.name in REDUCED_HERE
        function = {"sum": np.add, "min": np.minimum, "max": np.maximum}[op]

        def perform(by_rank: list[Array]) -> list[Array]:
            with np.errstate(over="ignore", invalid="ignore"):
                return [function.reduce(by_rank)] * len(by_rank)

        return self._ask(name, ("allreduce", array.dtype.name, array.shape, op), array.copy(), perform, array)

    def broadcast(self, name: str, memory: Array, root: int) -> Asked:
        assert memory.dtype == np.uint8

        def perform(by_rank: list[Array]) -> list[Array]:
            return [by_rank[root]] * len(by_rank)

        return self._ask(name, ("broadcast", memory.shape, root), memory.copy(), perform, memory)

    def allgather(self, name: str, memory: Array) -> Asked:
        assert memory.dtype == np.uint8

        def perform(by_rank: list[Array]) -> list[Array]:
            return [np.concatenate(by_rank)] * len(by_rank)

        return self._ask(name, "allgather", memory.copy(), perform, None)

    def alltoall(self, name: str, words: Array, splits: Sequence[int]) -> Asked:
        parts = np.split(words.copy(), np.cumsum(splits)[:-1])

        def perform(by_rank: list[list[Array]]) -> list[Array]:
            return [np.concatenate([parts[rank] for parts in by_rank]) for rank in range(len(by_rank))]

        return self._ask(name, "alltoall", parts, perform, None)

    def _ask(
        self, name: str, what: Any, brought: Any, perform: Callable[[list[Any]], list[Array]], into: Array | None
    ) -> Asked:
        operation = self.coordinator.ask(self._rank, name, what, brought, perform)
        return Asked(self.coordinator, operation, self._rank, into)
