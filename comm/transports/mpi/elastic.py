"""MPI whose ranks may die: User-Level Failure Mitigation (ULFM), which Open MPI 5 has under ``mpirun --with-ft ulfm``.

Each communicator has one sequence of agreements, which all living ranks take part in. As long as they agree that all is
well, work goes on. The first one that says no is followed, on every rank, by a new communicator without the dead:
whoever finds a rank dead, wherever it is, revokes the communicator, which ends the waits of the others, and says no at
its next agreement: that of a vote, or of the repair itself. So a rank that votes meets one that repairs.
"""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from mpi4py import MPI

from lentando.comm.elastic import HOW_TO_START
from lentando.comm.errors import ConfigurationError, RankLostError, TransportError
from lentando.comm.transports.mpi.exchange import POLL_SECONDS, MPIExchange
from lentando.comm.transports.mpi.transport import MPITransport

__all__ = ["ElasticMPITransport"]

FAULT_TOLERANT = "OMPI_MCA_mpi_ft_enable"
"""What mpirun --with-ft ulfm sets."""
NOTICE_SECONDS = 1.0
"""A collective may fail with some other error before this rank has been told of the death that is its cause."""
SETTLE_SECONDS = 5.0
"""How long MPI may take to let go of messages of before a repair. It does at once, but for one that is half received
from a rank that lives."""
BARRIER_TAG = 32_767
"""Keeps the barrier's messages apart from all others."""
EXCHANGES_REMEMBERED = 64
"""So many are begun before those that are over are forgotten."""


class ElasticMPITransport(MPITransport):
    """Ranks of an MPI communicator that go on when some of them die. Implements ``lentando.comm.capabilities.Elastic``.

    Args:
        comm: the ranks that take part; all of ``MPI.COMM_WORLD`` by default.

    Raises:
        ConfigurationError: if this MPI, or the way it was started, does not let ranks outlive each other.
    """

    def __init__(self, comm: MPI.Intracomm | None = None) -> None:
        _check_that_ranks_may_die()
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
        before.Revoke()  # or what a living rank will never send would be waited for
        self._settle()
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
        self._sit_down(comm, [survivors.index(rank) for rank in self.same_node if rank in survivors])
        with self._channel_lock:
            self._whispered = []
            _free(self._side_channel)
            self._side_channel = channel
        self._notices = []
        _free(before)
        self._is_broken = False
        return survivors

    def node_barrier(self) -> None:
        # By messages, which end with an error when the transport is revoked. In round k, each rank tells the one 2^k
        # places further (Hensgen, Finkel and Manber, IJPP 1988).
        ranks, own, count = self.same_node, self.local_rank, self.local_size
        word = np.zeros(1, np.uint8)
        for k in range((count - 1).bit_length()):
            to, source = ranks[(own + 2**k) % count], ranks[(own - 2**k) % count]
            self.exchange([(to, word)], [(source, np.empty_like(word))], BARRIER_TAG, overlap=False).wait()

    def open_side_channel(self) -> bool:
        return self._side_channel is not None

    def for_thread(self) -> None:
        return None  # it would have to be repaired too, in the middle of what its thread does

    def send_nowait(self, peer: int, content: bytes) -> None:
        with self._channel_lock, suppress(TransportError):  # to the dead, or to a rank that there is no more
            super().send_nowait(peer, content)

    def receive_nowait(self) -> tuple[int, bytes] | None:
        with self._channel_lock:
            try:
                return super().receive_nowait()
            except RankLostError:
                if self._side_channel is not None:
                    self._side_channel.Ack_failed()  # and the living are heard again, also before the repair
        return None

    def close(self) -> None:
        with suppress(MPI.Exception):
            self._comm.Revoke()  # all ranks have come here: what is still under way, nobody waits for
        self._settle()
        with suppress(MPI.Exception):
            super().close()

    def _begins(self, request: MPIExchange) -> None:
        if len(self._exchanges) >= EXCHANGES_REMEMBERED:
            self._exchanges = [exchange for exchange in self._exchanges if exchange.is_under_way]
        self._exchanges.append(request)

    def _settle(self) -> None:
        """Let MPI finish with the arrays of all exchanges, which nobody waits for any more.

        What it has not finished with then is kept: memory that it might write to must not be used for something else.
        """
        until = time.monotonic() + SETTLE_SECONDS
        self._exchanges = [exchange for exchange in self._exchanges if not exchange.settle()]
        while self._exchanges and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            self._exchanges = [exchange for exchange in self._exchanges if not exchange.settle()]

    def _as_ours(self, error: MPI.Exception, statuses: Sequence[MPI.Status] = ()) -> TransportError:
        ours = super()._as_ours(error, statuses)
        classes = {error.Get_error_class(), *(MPI.Get_error_class(status.Get_error()) for status in statuses)}
        if _tells_of_a_death(classes) or (classes & {MPI.ERR_OTHER, MPI.ERR_INTERN} and self._is_somebody_dead()):
            return RankLostError(f"rank {self.rank} of {self.size} has found a rank dead, or been told so. {ours}")
        return ours

    def _is_somebody_dead(self) -> bool:
        until = time.monotonic() + NOTICE_SECONDS
        while time.monotonic() < until:
            dead = self._comm.Get_failed()
            count = dead.Get_size()
            dead.Free()
            if count or self._comm.Is_revoked():
                return True
            time.sleep(POLL_SECONDS)
        return False


def _check_that_ranks_may_die() -> None:
    library = MPI.Get_library_version().strip("\0 \n").splitlines()[0].split(", package")[0]
    if "Open MPI" not in library or not hasattr(MPI, "ERR_REVOKED"):
        raise ConfigurationError(
            f"elastic=True needs an MPI that lets ranks outlive each other (ULFM), got {library}. {HOW_TO_START}"
        )
    if os.environ.get(FAULT_TOLERANT, "").lower() not in ("1", "true", "yes", "on"):
        raise ConfigurationError(
            "elastic=True needs a launcher that lets ranks outlive each other, but this job was started without "
            f"({FAULT_TOLERANT} is not set): it would end with its first rank. {HOW_TO_START}"
        )


def _tells_of_a_death(classes: set[int]) -> bool:
    return bool(classes & {MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED})


def _agree(comm: MPI.Comm, yes: bool) -> bool:
    """Whether all say yes and live: the same answer on every rank."""
    try:
        return bool(comm.Agree(int(yes)))
    except MPI.Exception as error:
        if _tells_of_a_death({error.Get_error_class()}):
            return False
        raise TransportError(f"MPI failed in an agreement: {error.Get_error_string()}") from error


def _shrunk(comm: MPI.Intracomm) -> MPI.Intracomm:
    """A communicator without the dead."""
    try:
        smaller = MPI.Intracomm(comm.Shrink())
    except MPI.Exception as error:
        if _tells_of_a_death({error.Get_error_class()}):
            return _shrunk(comm)
        raise TransportError(f"MPI failed in leaving out the dead: {error.Get_error_string()}") from error
    smaller.Set_errhandler(MPI.ERRORS_RETURN)
    return smaller


def _ranks_in(before: MPI.Intracomm, after: MPI.Intracomm) -> list[int]:
    """What numbers the ranks of one communicator have in another."""
    own, others = after.Get_group(), before.Get_group()
    numbers = list(own.Translate_ranks(list(range(own.Get_size())), others))
    own.Free()
    others.Free()
    return numbers


def _free(comm: MPI.Intracomm | None) -> None:
    """Let go of a communicator, whoever in it has died."""
    if comm is not None:
        with suppress(MPI.Exception):
            comm.Free()
