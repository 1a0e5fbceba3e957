"""Detects the launcher of this process, and the size of its job, from the environment variables that launchers set.

Once MPI is initialised, it is authoritative. The variables then only serve to detect a disagreement, such as a launcher
that belongs to another MPI than the library: each process would silently become a world of its own.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lentando.comm.errors import LaunchError

__all__ = ["Claim", "Launch", "advice_on_library", "check_library", "check_world", "detect_launch", "read_claims"]


@dataclass(frozen=True)
class Launch:
    """The job that a launcher promises.

    Attributes:
        launcher: name of the launcher, for messages.
        variable: environment variable from which the launcher was detected.
        size: number of ranks; None if the launcher does not set it.
        mpi: whether the ranks are MPI processes.
        horovod: whether only Horovod connects them.
    """

    launcher: str
    variable: str
    size: int | None
    mpi: bool
    horovod: bool = False


@dataclass(frozen=True)
class _Kind:
    """A kind of launcher.

    Attributes:
        launcher: name of the launcher, for messages.
        rank, size: its environment variables; ``size`` is None if the launcher does not set one.
        mpi: whether the ranks are MPI processes.
        both: whether one variable without the other is a mistake.
        horovod: whether only Horovod connects the ranks.
    """

    launcher: str
    rank: str
    size: str | None
    mpi: bool
    both: bool = False
    horovod: bool = False


_OPEN_MPI = "mpirun (Open MPI)"
_ANOTHER_MPI = (
    "The launcher belongs to another MPI than this library: start with the mpirun that came with it (for pip's MPIs, "
    "the one in the environment's bin/), or install the MPI whose mpirun you use"
)

_CHOOSES_LIBRARY = ("MPI4PY_LIBMPI", "MPI4PY_MPIABI")
"""Variables that determine which MPI library mpi4py loads."""

# The innermost launcher first: a Slurm job often runs mpirun, and so does horovodrun.
_KINDS = (
    _Kind(_OPEN_MPI, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", mpi=True, both=True),
    _Kind("mpiexec (MVAPICH2)", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", mpi=True, both=True),
    _Kind("mpiexec (MPICH, Intel MPI) or srun --mpi=pmi2", "PMI_RANK", "PMI_SIZE", mpi=True, both=True),
    _Kind("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", mpi=False, both=True, horovod=True),
    _Kind("torchrun", "TORCHELASTIC_RUN_ID", "WORLD_SIZE", mpi=False),
    # Only a step of srun has SLURM_STEP_NUM_TASKS: in batch scripts and interactive shells, SLURM_NTASKS is a request.
    _Kind("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", mpi=True),
    _Kind("a PMIx launcher (prun, or srun --mpi=pmix)", "PMIX_RANK", None, mpi=True),
    _Kind("a launcher that sets RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", mpi=False),
)


@dataclass(frozen=True)
class Claim:
    """The values of one launcher's variables, whether or not they are valid.

    Attributes:
        launcher: name of the launcher, for messages.
        variables: the variables for rank and size that are set, with their values.
        rank: rank of this process; None if it is missing or not a number.
        size: number of ranks; None if it is missing, not a number, or not set by this launcher.
        is_complete: whether all variables that this launcher sets are present.
        mpi: whether its ranks are MPI processes.
    """

    launcher: str
    variables: dict[str, str]
    rank: int | None
    size: int | None
    is_complete: bool
    mpi: bool


def read_claims(environment: Mapping[str, str]) -> list[Claim]:
    """The claims of all launchers whose variables are set, with the innermost launcher first."""
    claims: list[Claim] = []
    for kind in _KINDS:
        by_torchrun = kind.rank == "TORCHELASTIC_RUN_ID"  # names the launcher, not the rank
        names = ["RANK" if by_torchrun else kind.rank, *([kind.size] if kind.size else [])]
        variables = {name: environment[name] for name in names if name in environment}
        is_meant = kind.both or len(variables) == len(names)  # others set one of these variables too
        if not variables or not is_meant or (by_torchrun and kind.rank not in environment):
            continue
        if any(variables.items() <= claim.variables.items() for claim in claims):  # torchrun's RANK and WORLD_SIZE
            continue
        rank, size = (_number(variables.get(name)) for name in (names[0], kind.size or ""))
        is_complete = rank is not None and (kind.size is None or bool(size))
        claims.append(Claim(kind.launcher, variables, rank, size, is_complete, kind.mpi))
    return claims


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def detect_launch(environment: Mapping[str, str] | None = None) -> Launch | None:
    """The launcher of this process, or None if it was started alone.

    Raises:
        LaunchError: if a launcher's variables are incomplete or not numbers, or two launchers disagree.
    """
    environment = os.environ if environment is None else environment
    kinds = [kind for kind in _KINDS if _is_complete(kind, environment)]
    claims = [(kind, _launch(kind, environment)) for kind in kinds]
    reliable = [(kind, launch) for kind, launch in claims if kind.both]
    # A process that was started alone may have started others by another launcher.
    of_many = [(kind, launch) for kind, launch in reliable if launch.size != 1]
    places = {(environment[kind.rank], launch.size): (kind, launch) for kind, launch in reversed(of_many)}
    if len(places) > 1:
        statements = " but ".join(
            f"{launch.launcher} says rank {rank} of {size} ({kind.rank}={rank}, {kind.size}={size})"
            for (rank, size), (kind, launch) in reversed(places.items())
        )
        raise LaunchError(
            f"two launchers started this process and disagree: {statements}. Start through one of them only, and unset "
            "the variables of the other if they were inherited from a shell"
        )
    candidates = of_many or reliable or claims
    return candidates[0][1] if candidates else None


def _is_complete(kind: _Kind, environment: Mapping[str, str]) -> bool:
    wanted = [kind.rank] if kind.size is None else [kind.rank, kind.size]
    missing = [variable for variable in wanted if variable not in environment]
    if kind.both and len(missing) == 1:
        (present,) = set(wanted) - set(missing)
        raise LaunchError(
            f"{kind.launcher} set {present}={environment[present]} but not {missing[0]}: a rank needs both to "
            f"know its number. Start through the launcher, or unset {present} to run alone"
        )
    return not missing


def _launch(kind: _Kind, environment: Mapping[str, str]) -> Launch:
    if kind.size is None:
        return Launch(kind.launcher, kind.rank, None, kind.mpi)
    text = environment[kind.size]
    if not text.isdecimal() or int(text) < 1:
        raise LaunchError(f"{kind.launcher} set {kind.size}={text!r}: expected a number of ranks >= 1")
    return Launch(kind.launcher, kind.size, int(text), kind.mpi, kind.horovod)


def check_library(launch: Launch | None, library: str) -> None:
    """Check, before MPI is initialised, that the library supports the launcher: it might end the process otherwise.

    Args:
        launch: result of ``detect_launch``.
        library: result of ``MPI_Get_library_version``.

    Raises:
        LaunchError: if a library of MPICH's family without PMIx was started by Open MPI's mpirun. The reverse case is
            detected by ``check_world``.
    """
    if launch is None or launch.launcher != _OPEN_MPI or "pmix" in library.lower():
        return
    if any(family in library for family in ("MPICH", "MVAPICH", "Intel(R) MPI")):
        name = " ".join(library.split("\n", 1)[0].split())
        remedy = " ".join(filter(None, [advice_on_library(), _ANOTHER_MPI]))
        raise LaunchError(f"{_promise(launch)}, but this process has loaded another MPI ({name}). {remedy}")


def check_world(launch: Launch | None, size: int, library: str, backend: str = "MPI") -> None:
    """Check that the world is the one that the launcher promised.

    Args:
        launch: result of ``detect_launch``.
        size: number of ranks that the backend sees.
        library: name and version of the backend's library.
        backend: name of the backend.

    Raises:
        LaunchError: if the launcher promised another number of ranks.
    """
    if launch is None or launch.size is None or launch.size == size:
        return
    actual = f"{backend} sees {size} ({library})"
    if backend != "MPI":
        remedy = f"Start with horovodrun, or without LENTANDO_TRANSPORT={backend.lower()}"
    elif launch.mpi:
        remedy = " ".join(filter(None, [advice_on_library(), _ANOTHER_MPI]))
        if "srun" in launch.launcher:
            remedy += ". With srun, name its PMI plugin: srun --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH"
    else:
        remedy = (
            "This launcher starts no MPI. Start with mpirun, or with horovodrun --mpi, whose ranks are MPI processes, "
            "or with horovodrun --gloo, where Horovod connects the ranks"
        )
    raise LaunchError(f"{_promise(launch)}, but {actual}: that would train {launch.size} separate models. {remedy}")


def advice_on_library(environment: Mapping[str, str] | None = None) -> str:
    """Advice about variables that determine which MPI library is loaded; empty if none is set."""
    environment = os.environ if environment is None else environment
    values = [f"{name}={environment[name]}" for name in _CHOOSES_LIBRARY if environment.get(name)]
    if not values:
        return ""
    return (
        f"The environment determines which MPI mpi4py loads, by {' and '.join(values)}: unset this, or name the MPI "
        "that your mpirun belongs to."
    )


def _promise(launch: Launch) -> str:
    return f"{launch.launcher} promises {launch.size} ranks ({launch.variable}={launch.size})"
