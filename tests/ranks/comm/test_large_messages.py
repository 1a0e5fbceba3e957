"""Whatever is larger than one call of MPI may move goes in pieces: here the limit is low, so that everything is large.

``tests/support/large_messages.py`` does the same by hand with gigabytes.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lentando.comm import pieces, world
from lentando.comm.collectives import plan_reduction
from lentando.comm.objects import allgather_object, broadcast_object
from lentando.comm.testing import check_transport
from lentando.comm.transport import Array, Transport

if world.transport().name != "mpi":
    pytest.skip("these ranks are not MPI's", allow_module_level=True)

from lentando.comm.transports.mpi import MPITransport

LIMIT = 10_000


class Watched:
    """A communicator whose calls must keep the limit. ``exceeded`` is what did not."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.exceeded: list[str] = []
        self.calls: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._comm, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            for argument in arguments:
                buffer = argument[0] if isinstance(argument, tuple) else argument
                if isinstance(buffer, np.ndarray):
                    self.calls.add(name)
                    if buffer.nbytes > LIMIT:
                        self.exceeded.append(f"{name} of {buffer.nbytes} bytes")
            return found(*arguments, **options)

        return call


class WatchedTransport(MPITransport):
    def __init__(self) -> None:
        super().__init__()
        self.watched = Watched(self._comm)
        self._comm: Any = self.watched


@pytest.fixture
def watched_transport(monkeypatch: pytest.MonkeyPatch, transport: Transport) -> Iterator[WatchedTransport]:
    found = WatchedTransport()
    monkeypatch.setattr(pieces, "LONGEST_BYTES", LIMIT)
    yield found
    assert not found.watched.exceeded
    found.close()


@pytest.mark.parametrize("yields_cpu", [False, True])
def test_every_operation_keeps_the_promises_in_pieces(watched_transport: WatchedTransport, yields_cpu: bool) -> None:
    watched_transport.yields_cpu = yields_cpu
    check_transport(watched_transport)
    collectives = {"Iallreduce", "Iallgather", "Ibcast"} if yields_cpu else {"Allreduce", "Allgather", "Bcast"}
    assert {"Isend", "Irecv", *collectives} <= watched_transport.watched.calls


def test_extremes_and_sums_of_any_length_are_right_in_pieces(watched_transport: WatchedTransport) -> None:
    size = watched_transport.size
    for elements in (LIMIT // 8, LIMIT // 8 + 1, 2 * LIMIT + 1):
        own = np.arange(elements, dtype=np.float64) + watched_transport.rank
        total, largest = own.copy(), own.copy()
        watched_transport.allreduce(total)
        watched_transport.allreduce(largest, "max")
        first = np.arange(elements, dtype=np.float64)
        assert np.array_equal(total, size * first + size * (size - 1) / 2)
        assert np.array_equal(largest, first + size - 1)


def test_objects_and_reductions_travel_in_pieces(watched_transport: WatchedTransport) -> None:
    rank, size = watched_transport.rank, watched_transport.size
    value = {"weights": np.arange(3 * LIMIT, dtype=np.float32), "text": "x" * LIMIT}
    found = broadcast_object(watched_transport, value if rank == size - 1 else None, size - 1)
    assert np.array_equal(found["weights"], value["weights"])
    assert [len(text) for text in allgather_object(watched_transport, "y" * (LIMIT + rank))] == [
        LIMIT + other for other in range(size)
    ]
    for algorithm in ("ring", "backend", "auto"):
        buffer: Array = np.full(5 * LIMIT + 3, rank + 1, np.float32)
        reduction = plan_reduction(watched_transport, buffer, algorithm, scatter_gather=True)
        part = reduction.reduce_scatter()
        buffer[reduction.shard] = part
        reduction.all_gather()
        assert (buffer == size * (size + 1) / 2).all()
