"""MPI whose ranks may die: User-Level Failure Mitigation (ULFM), which Open MPI 5 has under ``mpirun --with-ft ulfm``.

Each communicator has one sequence of agreements, in which all living ranks take part. Work continues as long as all
agree. After the first agreement that fails, every rank makes a new communicator without the dead: a rank that finds
another dead revokes the communicator, which ends the waits of the others, and says no at its next agreement, be it that
of a vote or of the repair itself. So a vote on one rank and a repair on another take part in the same agreement.
"""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import numpy as np
from mpi4py import MPI

from lentando.comm.elastic import HOW_TO_START
from lentando.comm.errors import ConfigurationError, RankLostError, TransportError
from lentando.comm.transports.mpi.exchange import POLL_SECONDS, MPIExchange
from lentando.comm.transports.mpi.transport import MPITransport

__all__ = ["ElasticMPITransport"]

FAULT_TOLERANT = "OMPI_MCA_mpi_ft_enable"
"""Environment variable that ``mpirun --with-ft ulfm`` sets."""
NOTICE_SECONDS = 5.0
"""How long a rank waits for the report of a death after another error, because the error may arrive first: by a second
or more where mpirun shares its core with many ranks."""
SETTLE_SECONDS = 5.0
"""Time limit for MPI to release messages from before a repair. All are released at once, except for one that is half
received from a living rank."""
BARRIER_TAG = 32_767
"""Tag of the messages of ``node_barrier``."""
EXCHANGES_REMEMBERED = 64
"""Number of recorded exchanges from which those that are complete are discarded."""


class ElasticMPITransport(MPITransport):
    """Ranks of an MPI communicator that continue when some of them die. Implements ``Elastic``.

    Args:
        comm: communicator of the participating ranks; by default ``MPI.COMM_WORLD``.

    Raises:
        ConfigurationError: if this MPI library, or its launcher, ends the job when a rank dies.
    """

    def __init__(self, comm: MPI.Intracomm | None = None) -> None:
        _check_fault_tolerance()
        self._exchanges: list[MPIExchange] = []
        self._is_broken = False
        self._channel_lock = threading.Lock()
        super().__init__(comm)
        self._node.Free()
        super().open_side_channel()

    def vote(self, yes: bool) -> bool:
        if not yes:
            self._comm.Revoke()
        self._is_broken = not _agree(self._comm, yes)
        return not self._is_broken

    def repair(self) -> list[int]:
        if not self._is_broken:
            self.vote(yes=False)
        before = comm = self._comm
        before.Revoke()  # ends waits for messages that living ranks will never send
        self._release_arrays()
        while True:
            smaller = _shrunk(comm)
            _free(comm if comm is not before else None)
            comm, is_ready = smaller, True
            channel: MPI.Intracomm | None = None
            try:
                if self._side_channel is not None:
                    channel = comm.Dup()
                    channel.Set_errhandler(MPI.ERRORS_RETURN)
            except MPI.Exception:
                is_ready = False
                comm.Revoke()
            if _agree(comm, is_ready):
                break
            _free(channel)
        survivors = _ranks_in(before, comm)
        self._set_communicator(comm, [survivors.index(rank) for rank in self.same_node if rank in survivors])
        with self._channel_lock:
            self._side_sends = []
            _free(self._side_channel)
            self._side_channel = channel
        self._notices = []
        _free(before)
        self._is_broken = False
        return survivors

    def node_barrier(self) -> None:
        # By messages, which end with an error when the communicator is revoked. In round k, each rank notifies the one
        # 2^k further (Hensgen, Finkel and Manber, IJPP 1988).
        ranks, index, count = self.same_node, self.local_rank, self.local_size
        word = np.zeros(1, np.uint8)
        for k in range((count - 1).bit_length()):
            destination, source = ranks[(index + 2**k) % count], ranks[(index - 2**k) % count]
            self.exchange([(destination, word)], [(source, np.empty_like(word))], BARRIER_TAG, overlap=False).wait()

    def open_side_channel(self) -> bool:
        return self._side_channel is not None

    def for_thread(self) -> None:
        return None  # it would need a repair, too, while its thread communicates

    def for_ranks(self, ranks: Sequence[int]) -> NoReturn:
        raise ConfigurationError("an elastic job has no subsets of its ranks, because they would not survive a death")

    def send_nowait(self, peer: int, content: bytes) -> None:
        with self._channel_lock, suppress(TransportError):  # the receiver may be dead, or no longer numbered
            super().send_nowait(peer, content)

    def receive_nowait(self) -> tuple[int, bytes] | None:
        with self._channel_lock:
            try:
                return super().receive_nowait()
            except RankLostError:
                if self._side_channel is not None:
                    self._side_channel.Ack_failed()  # to receive messages of living ranks, also before the repair
        return None

    def close(self) -> None:
        with suppress(MPI.Exception):
            self._comm.Revoke()  # all ranks are closing: no rank waits for messages that are in flight
        self._release_arrays()
        with suppress(MPI.Exception):
            super().close()

    def _on_exchange(self, request: MPIExchange) -> None:
        if len(self._exchanges) >= EXCHANGES_REMEMBERED:
            self._exchanges = [exchange for exchange in self._exchanges if exchange.is_in_flight]
        self._exchanges.append(request)

    def _release_arrays(self) -> None:
        """Let MPI finish with the arrays of all exchanges, which are not waited for any more.

        Arrays with which it has not finished in time are kept: memory that MPI may write to must not be reused.
        """
        until = time.monotonic() + SETTLE_SECONDS
        self._exchanges = [exchange for exchange in self._exchanges if not exchange.settle()]
        while self._exchanges and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            self._exchanges = [exchange for exchange in self._exchanges if not exchange.settle()]

    def _translate(self, error: MPI.Exception, statuses: Sequence[MPI.Status] = ()) -> TransportError:
        translated = super()._translate(error, statuses)
        classes = {error.Get_error_class(), *(MPI.Get_error_class(status.Get_error()) for status in statuses)}
        if _report_a_death(classes) or (classes & {MPI.ERR_OTHER, MPI.ERR_INTERN} and self._has_dead_ranks()):
            return RankLostError(f"rank {self.rank} of {self.size} has found another rank dead. {translated}")
        return translated

    def _has_dead_ranks(self) -> bool:
        until = time.monotonic() + NOTICE_SECONDS
        while time.monotonic() < until:
            dead = self._comm.Get_failed()
            count = dead.Get_size()
            dead.Free()
            if count or self._comm.Is_revoked():
                return True
            time.sleep(POLL_SECONDS)
        return False


def _check_fault_tolerance() -> None:
    library = MPI.Get_library_version().strip("\0 \n").splitlines()[0].split(", package")[0]
    if "Open MPI" not in library or not hasattr(MPI, "ERR_REVOKED"):
        raise ConfigurationError(
            f"elastic=True needs an MPI whose ranks survive the death of others (ULFM), got {library}. {HOW_TO_START}"
        )
    if os.environ.get(FAULT_TOLERANT, "").lower() not in ("1", "true", "yes", "on"):
        raise ConfigurationError(
            f"elastic=True needs a launcher that enables fault tolerance, but {FAULT_TOLERANT} is not set: this job "
            f"would end with the first rank that dies. {HOW_TO_START}"
        )


def _report_a_death(classes: set[int]) -> bool:
    return bool(classes & {MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED})


def _agree(comm: MPI.Comm, yes: bool) -> bool:
    """Return whether all ranks live and say yes: the same answer on all of them."""
    try:
        return bool(comm.Agree(int(yes)))
    except MPI.Exception as error:
        if _report_a_death({error.Get_error_class()}):
            return False
        raise TransportError(f"MPI failed in an agreement: {error.Get_error_string()}") from error


def _shrunk(comm: MPI.Intracomm) -> MPI.Intracomm:
    """Return a communicator of the living ranks of ``comm``."""
    try:
        smaller = MPI.Intracomm(comm.Shrink())
    except MPI.Exception as error:
        if _report_a_death({error.Get_error_class()}):
            return _shrunk(comm)
        raise TransportError(
            f"MPI failed in making a communicator without the dead: {error.Get_error_string()}"
        ) from error
    smaller.Set_errhandler(MPI.ERRORS_RETURN)
    return smaller


def _ranks_in(before: MPI.Intracomm, after: MPI.Intracomm) -> list[int]:
    """Return the ranks in ``before`` of the processes of ``after``, by their rank in ``after``."""
    group_after, group_before = after.Get_group(), before.Get_group()
    ranks = list(group_after.Translate_ranks(list(range(group_after.Get_size())), group_before))
    group_after.Free()
    group_before.Free()
    return ranks


def _free(comm: MPI.Intracomm | None) -> None:
    """Free a communicator, some of whose ranks may have died."""
    if comm is not None:
        with suppress(MPI.Exception):
            comm.Free()
