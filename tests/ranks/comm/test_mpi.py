"""What is MPI's own: it leaves alone what is the user's, and its errors are ours."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from lentando.comm import world
from lentando.comm.collectives import all_reduce
from lentando.comm.errors import TransportError
from lentando.comm.testing import check_transport
from lentando.comm.testing.transports import TransportSuite
from lentando.comm.transport import Message, Request, Transport
from lentando.comm.transports.mpi import MPITransport
from lentando.comm.transports.mpi.exchange import POLL_SECONDS

if world.transport().name != "mpi":
    pytest.skip("these ranks are not MPI's", allow_module_level=True)


def test_transport_over_some_of_the_ranks_keeps_its_promises(transport: Transport) -> None:
    some: Any = MPI.COMM_WORLD.Split(transport.rank % 2, key=-transport.rank)
    part = MPITransport(some)
    assert (part.rank, part.size) == (some.rank, some.size)
    check_transport(part)
    part.close()
    some.Barrier()  # the user's communicator outlives ours
    some.Free()


class ToOtherNodes(MPITransport):
    """Sends to each rank as if it were on another node."""

    def __init__(self) -> None:
        super().__init__()
        self._piece_bytes = [4_000] * self.size


def test_messages_in_pieces_keep_the_promises_too(transport: Transport) -> None:
    other_nodes = ToOtherNodes()
    check_transport(other_nodes)
    other_nodes.close()


def test_transport_for_a_thread_keeps_the_promises_too(own_transport: MPITransport) -> None:
    other = own_transport.for_thread()
    assert other is not None
    check_transport(other)


def test_pauses_of_a_rank_that_yields_the_processor_grow(
    own_transport: MPITransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A barrier that others enter at once costs little, and a long wait few polls."""
    pauses = list[float]()

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr(own_transport, "_pause", pause)
    own_transport.yields_cpu = True
    if own_transport.rank == own_transport.size - 1:
        time.sleep(0.1)
        own_transport.node_barrier()
    else:
        own_transport.node_barrier()
        assert pauses[0] < 1e-4
        assert pauses == sorted(pauses)
        assert pauses[-1] == POLL_SECONDS
    own_transport.barrier()


def test_a_thread_communicates_while_the_main_thread_does(own_transport: MPITransport) -> None:
    """On half of the ranks the thread begins first, on the others the main thread."""
    other, failures = own_transport.for_thread(), list[BaseException]()
    assert other is not None
    sums = np.ones(50, np.int64)

    def add() -> None:
        try:
            for _ in range(3):
                all_reduce(other, sums)
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    thread = threading.Thread(target=add)
    if own_transport.rank % 2:
        thread.start()
    for _ in range(5):
        assert own_transport.allgather(np.array([own_transport.rank])).size == own_transport.size
    if not own_transport.rank % 2:
        thread.start()
    thread.join()
    assert not failures
    assert (sums == own_transport.size**3).all()


def test_closed_transport_lets_its_thread_go(own_transport: MPITransport) -> None:
    if own_transport.size == 1:
        return
    transport = MPITransport()
    other = transport.for_thread()
    assert other is not None
    peer = (transport.rank + 1) % transport.size
    request = other.exchange([], [(peer, np.empty(1))], 7, overlap=False)
    failures: list[TransportError] = []

    def wait() -> None:
        with pytest.raises(TransportError, match="closed while a thread") as error:
            request.wait()
        failures.append(error.value)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    # Not close(), for MPI would continue to wait for a message that no rank has sent.
    other.closed = True  # type: ignore[attr-defined]
    thread.join(20)
    assert len(failures) == 1
    transport.barrier()  # no rank sends before all have looked
    other.closed = False  # type: ignore[attr-defined]
    other.exchange([((transport.rank - 1) % transport.size, np.zeros(1))], [], 7).wait()
    request.wait()
    transport.close()


class WithoutProgress(MPITransport):
    """What MPI does when no rank is inside a call of its."""

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        self.started = super().exchange(sends, receives, tag, overlap=False)
        return self.started


def test_mpi_alone_makes_no_progress_while_the_caller_computes(transport: Transport) -> None:
    """So the progress thread earns its keep, and the conformance suite notices when it is missing."""
    if transport.size == 1:
        pytest.skip("a message to oneself needs no progress")
    if "Open MPI" not in MPI.Get_library_version():
        pytest.skip("MPICH's shared memory may take the message whole")
    mutant = WithoutProgress()
    check = TransportSuite(mutant, timeout_seconds=0.5)
    try:
        check.progress_while_computing()
        words = ""
    except AssertionError as refusal:
        words = str(refusal)
    refused = transport.allgather(np.array([bool(words)]))
    mutant.started.wait()
    mutant.close()
    assert refused.any()
    assert not words or "made no progress while the caller computed" in words


def test_messages_of_the_users_never_meet_ours(transport: Transport) -> None:
    """Same ranks, same tag, both in flight at once, received in the other order than they were sent."""
    user, size = MPI.COMM_WORLD, transport.size
    to, source = (transport.rank + 1) % size, (transport.rank - 1) % size
    theirs, ours = np.full(4, -1.0), np.full(4, -1.0)
    pending = user.Isend(np.full(4, 100.0 + transport.rank), to, tag=5)
    request = transport.exchange([(to, np.full(4, float(transport.rank)))], [(source, ours)], tag=5)
    request.wait()
    user.Recv(theirs, source, tag=5)
    pending.Wait()
    assert theirs.tolist() == [100.0 + source] * 4
    assert ours.tolist() == [float(source)] * 4


@pytest.mark.parametrize("overlap", [True, False])
def test_message_longer_than_its_receive_is_an_error(own_transport: MPITransport, overlap: bool) -> None:
    """Whichever of the two comes first."""
    rank = own_transport.rank
    sending = own_transport.exchange([(rank, np.zeros(8))], [], overlap=overlap)
    receiving = own_transport.exchange([], [(rank, np.zeros(2))], overlap=overlap)
    with pytest.raises(TransportError, match="truncate"):
        receiving.wait()
    with pytest.raises(TransportError, match="truncate"):
        receiving.test()
    sending.wait()


def test_errors_of_mpi_are_translated(own_transport: MPITransport) -> None:
    with pytest.raises(TransportError, match="MPI failed: .*"):
        own_transport.exchange([(0, np.zeros(1))], [], tag=-5)


def test_no_thread_is_started_before_an_exchange_needs_it(own_transport: MPITransport) -> None:
    own_transport.exchange(
        [(own_transport.rank, np.zeros(1))], [(own_transport.rank, np.zeros(1))], overlap=False
    ).wait()
    assert own_transport._progress is not None
    assert own_transport._progress._thread is None
