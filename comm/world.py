"""The job that this process belongs to, joined by ``init()`` and left by ``shutdown()``. There is one per process."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lentando.comm import timeline
from lentando.comm.asynchronous import close_operations, open_operations
from lentando.comm.closed import is_closed
from lentando.comm.elastic import HOW_TO_START, exchange_hosts, is_elastic, transaction
from lentando.comm.errors import ConfigurationError, NotInitializedError
from lentando.comm.final_checks import take_problems
from lentando.comm.forked import is_forked
from lentando.comm.inherited_variables import hide_variables, mark_rank, would_be_misread
from lentando.comm.launch import detect_launch
from lentando.comm.leaving import agree_to_leave
from lentando.comm.nodes import nodes_of, note_nodes
from lentando.comm.process_end import process_end
from lentando.comm.stall import begin_inspection, end_inspection
from lentando.comm.subsets import close_subsets, leave_subsets, open_subset
from lentando.comm.transport import Transport
from lentando.comm.transport_selection import open_transport
from lentando.comm.transports.single import SingleTransport

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch.distributed import ProcessGroup

    from lentando.comm.process_sets import ProcessSet

__all__ = [
    "cross_rank",
    "cross_size",
    "init",
    "is_homogeneous",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "shutdown",
    "simulated_rank",
    "size",
    "transport",
]

_log = logging.getLogger("lentando")


@dataclass
class _Program:
    """A program that can join a job: that of this process, or of a simulated rank.

    Attributes:
        offered: transport that ``init()`` joins; None where ``init()`` opens one.
        joined: transport of the job, between ``init()`` and ``shutdown()``.
        hidden_variables: variables that ``init()`` has removed from the environment.
        has_called_init: whether the end of the simulated rank is the end of a program, which leaves the job.
    """

    offered: Transport | None = None
    joined: Transport | None = None
    hidden_variables: dict[str, str] = field(default_factory=dict)
    has_called_init: bool = False


_process = _Program()
_simulated: ContextVar[_Program | None] = ContextVar("lentando_simulated_program", default=None)


def _program() -> _Program:
    return _simulated.get() or _process


def init(
    comm: "MPI.Intracomm | Transport | None" = None,
    process_sets: "Sequence[ProcessSet] | Literal['dynamic'] | None" = None,
    *,
    process_group: "ProcessGroup | None" = None,
    elastic: bool = False,
    hide_launcher: bool | None = None,
) -> None:
    """Join the job that mpirun, torchrun, horovodrun or srun started. A program started alone becomes a world of 1.

    From then on, an exception that ends this rank ends the whole job with a non-zero status, and the normal end of the
    program waits until all ranks have reached it. A second call has no effect.

    Args:
        comm: the participating ranks: an mpi4py communicator, such as a part of ``MPI.COMM_WORLD`` (``Split``), each
            of whose ranks calls ``init``; or any ``Transport``. All ranks of the job by default.
        process_sets: process sets to add to the job at once, the same on all ranks. ``"dynamic"``, which Horovod needs
            for ``add_process_set``, has no effect.
        process_group: a process group of torch.distributed that contains the participating ranks, each of whose ranks
            calls ``init``. Under torchrun, and in a program that has initialised torch.distributed itself, all ranks
            by default. Lentando sends its messages over groups of its own.
        elastic: whether the other ranks continue when the process of a rank dies (is killed, runs out of memory);
            ``rank()`` and ``size()`` are then those among the survivors. Needs Open MPI 5 under
            ``mpirun --with-ft ulfm``.
        hide_launcher: whether to remove the variables by which a launcher numbers its ranks (``OMPI_COMM_WORLD_SIZE``,
            ``RANK`` and others) from the environment until ``shutdown()``. Libraries that would start torch.distributed
            because of them, such as Accelerate, then train this rank's model as if it were alone, and Lentando averages
            it. torch.distributed gets no default group then, by which Transformers would see the other ranks. By
            default this is done if Accelerate has been imported already, and ``MASTER_ADDR`` is not set.

    Raises:
        LaunchError: if the launcher promised a world that the transport does not see, or if this process is not a rank
            but was started by one, whose launcher variables it has inherited.
        ConfigurationError: if ``LENTANDO_TRANSPORT``, ``LENTANDO_LOG_LEVEL`` or ``LENTANDO_STALL_SECONDS`` has an
            illegal value, or if this job cannot be elastic, or cannot have one of the process sets; this process does
            not belong to a job then.

    Example:
        >>> init()  # without a launcher: a world of 1
        >>> rank(), size(), local_rank()
        (0, 1, 0)
        >>> shutdown()
    """
    program = _program()
    if program.offered is not None:
        if elastic:
            _check_elastic(program.offered)
        program.joined, program.has_called_init = program.offered, True
        _add(program.offered, process_sets)
        return
    if program.joined is not None:
        return
    level = _log_level()
    if hide_launcher is None:
        hide_launcher = would_be_misread(os.environ, sys.modules)
    is_given = isinstance(comm, Transport)
    joined = (
        comm
        if isinstance(comm, Transport)
        else open_transport(comm, process_group=process_group, elastic=elastic, default_group=not hide_launcher)
    )
    if elastic:
        _check_elastic(joined)
    program.joined = joined
    if not is_given and not isinstance(joined, SingleTransport) and detect_launch() is not None:
        mark_rank(os.environ)
    if hide_launcher:
        program.hidden_variables.update(hide_variables(os.environ))
    if level is not None:
        _log_to_stderr(level, joined.rank)
    _log.info("rank %d of %d over %s", joined.rank, joined.size, joined.name)
    begin_inspection(joined)
    exchange_hosts(joined)
    open_operations(joined)
    timeline.start_from_environment(joined)
    note_nodes(joined)
    process_end.install(lambda: _process.joined, shutdown)
    try:
        _add(joined, process_sets)
    except ConfigurationError:  # on every rank
        shutdown()
        raise


def _add(job: Transport, process_sets: "Sequence[ProcessSet] | Literal['dynamic'] | None") -> None:
    if process_sets is None or process_sets == "dynamic":
        return
    for added in process_sets:
        open_subset(job, added.ranks)


def _check_elastic(transport: Transport) -> None:
    if transport.size > 1 and not is_elastic(transport):
        raise ConfigurationError(
            f"elastic=True is not possible over transport {transport.name!r}, which ends when a rank dies. "
            f"{HOW_TO_START}"
        )


def shutdown() -> None:
    """Leave the job. All ranks do so together; the normal end of the program calls it too.

    In a process that a rank has forked, and after the program has finalised MPI itself, no other rank is waited for.

    Raises:
        MismatchError: on every rank, if one of them is about to do something else, such as another training step.
        NonFiniteError: on every rank, if training has ended with parameters that are not finite, and this has not been
            reported yet. The rank has not left the job then: the next call leaves it.
    """
    program = _program()
    leaving = program.joined
    if leaving is None:
        return
    if is_forked(leaving):
        program.joined = None
        return
    if not is_closed(leaving):  # the program may have finalised MPI
        problems = take_problems(leaving)
        problems += leave_subsets(leaving)
        transaction(leaving, lambda: agree_to_leave(leaving, problems))
        close_operations(leaving)
    if program is _process:
        end_inspection(leaving)
        os.environ.update(program.hidden_variables)
        program.hidden_variables.clear()
        timeline.stop()
    program.joined = None
    close_subsets(leaving)
    leaving.close()


def is_initialized() -> bool:
    """Whether this process belongs to a job: True between ``init()`` and ``shutdown()``."""
    return _program().joined is not None


def transport() -> Transport:
    """The transport of the job.

    Raises:
        NotInitializedError: before ``init()`` or after ``shutdown()``.
    """
    joined = _program().joined
    if joined is None:
        raise NotInitializedError("Lentando has not been initialised: call init() first, once, on every rank")
    return joined


@contextmanager
def simulated_rank(offered: Transport) -> Iterator[None]:
    """Within this context, the functions of this module refer to a simulated rank instead of this process.

    Each greenlet and each thread has its own view. The rank has been initialised already. If ``init()`` is called
    inside, the end of the context is the end of a program, and calls ``shutdown()``.

    Args:
        offered: transport of the simulated rank.
    """
    program = _Program(offered, offered)
    token = _simulated.set(program)
    try:
        yield
        if program.has_called_init:
            shutdown()
    finally:
        _simulated.reset(token)


def rank() -> int:
    """Number of this process among all of the job, ``0 <= rank() < size()``."""
    return transport().rank


def size() -> int:
    """Number of processes of the job."""
    return transport().size


def local_rank() -> int:
    """Number of this process among those on the same node, which is usually the index of its GPU."""
    return transport().local_rank


def local_size() -> int:
    """Number of processes on this node."""
    return transport().local_size


def cross_rank() -> int:
    """Number of this process among those with the same local rank: the number of its node, in most jobs."""
    return nodes_of(transport()).cross_rank


def cross_size() -> int:
    """Number of processes with this local rank: the number of nodes, in most jobs."""
    return nodes_of(transport()).cross_size


def is_homogeneous() -> bool:
    """Whether every node has the same number of processes."""
    return nodes_of(transport()).is_homogeneous


def _log_level() -> str | None:
    level = os.environ.get("LENTANDO_LOG_LEVEL")
    if level is not None and level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigurationError(f"LENTANDO_LOG_LEVEL={level!r}: expected debug, info, warning or error")
    return level and level.upper()


def _log_to_stderr(level: str, rank: int) -> None:
    _log.setLevel(level)
    if not _log.handlers:  # the user's own, or ours of an earlier init
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"[lentando rank {rank}] %(levelname)s %(message)s"))
        _log.addHandler(handler)
