"""Who started this process, and as one of how many: read from the variables that launchers set.

Once MPI is initialised it is the authority. The variables then only serve to notice that the two disagree, as when the
launcher belongs to another MPI than the library: each process would silently become a world of its own.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lentando.comm.errors import LaunchError

__all__ = ["Claim", "Launch", "advice_on_library", "check_library", "check_world", "detect_launch", "read_claims"]


@dataclass(frozen=True)
class Launch:
    """What a launcher promised.

    Attributes:
        launcher: its name, as a user would say it.
        variable: the environment variable that told.
        size: number of ranks promised; None where the launcher does not say.
        mpi: whether the ranks are MPI processes.
        horovod: whether Horovod's engine connects them, and nothing else does.
    """

    launcher: str
    variable: str
    size: int | None
    mpi: bool
    horovod: bool = False


@dataclass(frozen=True)
class _Kind:
    launcher: str
    rank: str
    size: str | None
    mpi: bool
    both: bool = False  # one variable without the other is a mistake
    horovod: bool = False


_OPEN_MPI = "mpirun (Open MPI)"
_ANOTHER_MPI = (
    "The launcher belongs to another MPI than this library: start with the mpirun that came with it (for pip's MPIs, "
    "the one in the environment's bin/), or install the MPI whose mpirun you use"
)

_CHOOSES_LIBRARY = ("MPI4PY_LIBMPI", "MPI4PY_MPIABI")
"""Variables by which mpi4py chooses which MPI it loads."""

# In order of trust: a Slurm job often runs mpirun inside, and horovodrun runs mpirun; the innermost launcher counts.
_KINDS = (
    _Kind(_OPEN_MPI, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", mpi=True, both=True),
    _Kind("mpiexec (MVAPICH2)", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", mpi=True, both=True),
    _Kind("mpiexec (MPICH, Intel MPI) or srun --mpi=pmi2", "PMI_RANK", "PMI_SIZE", mpi=True, both=True),
    _Kind("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", mpi=False, both=True, horovod=True),
    _Kind("torchrun", "TORCHELASTIC_RUN_ID", "WORLD_SIZE", mpi=False),
    # Only a step of srun's has SLURM_STEP_NUM_TASKS: in a batch script or an interactive shell, SLURM_NTASKS is a wish.
    _Kind("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", mpi=True),
    _Kind("a PMIx launcher (prun, or srun --mpi=pmix)", "PMIX_RANK", None, mpi=True),
    _Kind("a launcher that sets RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", mpi=False),
)


@dataclass(frozen=True)
class Claim:
    """What the variables of one launcher say of this process, whether or not they can be true.

    Attributes:
        launcher: its name, as a user would say it.
        variables: those that are set, with their values: the rank's and the size's.
        rank: None where it is missing or no number.
        size: None where it is missing, no number, or not told by this launcher.
        is_complete: whether everything is there that this launcher tells.
        mpi: whether its ranks are MPI processes.
    """

    launcher: str
    variables: dict[str, str]
    rank: int | None
    size: int | None
    is_complete: bool
    mpi: bool


def read_claims(environment: Mapping[str, str]) -> list[Claim]:
    """Of every launcher that has left its variables, the one that is trusted most first."""
    claims: list[Claim] = []
    for kind in _KINDS:
        by_torchrun = kind.rank == "TORCHELASTIC_RUN_ID"  # tells the launcher, not the rank
        names = ["RANK" if by_torchrun else kind.rank, *([kind.size] if kind.size else [])]
        variables = {name: environment[name] for name in names if name in environment}
        is_meant = kind.both or len(variables) == len(names)  # half of what others set too tells nothing
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
    sure = [(kind, launch) for kind, launch in claims if kind.both]
    # A process that was started alone may have started others by another launcher.
    of_many = [(kind, launch) for kind, launch in sure if launch.size != 1]
    places = {(environment[kind.rank], launch.size): (kind, launch) for kind, launch in reversed(of_many)}
    if len(places) > 1:
        words = " but ".join(
            f"{launch.launcher} says rank {rank} of {size} ({kind.rank}={rank}, {kind.size}={size})"
            for (rank, size), (kind, launch) in reversed(places.items())
        )
        raise LaunchError(
            f"two launchers started this process and disagree: {words}. Start through one of them only, and unset the "
            "variables of the other if they were inherited from a shell"
        )
    found = of_many or sure or claims
    return found[0][1] if found else None


def _is_complete(kind: _Kind, environment: Mapping[str, str]) -> bool:
    wanted = [kind.rank] if kind.size is None else [kind.rank, kind.size]
    missing = [variable for variable in wanted if variable not in environment]
    if kind.both and len(missing) == 1:
        (present,) = set(wanted) - set(missing)
        raise LaunchError(
            f"{kind.launcher} set {present}={environment[present]} but not {missing[0]}: a rank needs both to "
            f"know its place. Start through the launcher, or unset {present} to run alone"
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
    """Refuse, before it starts, an MPI that would end a process of another MPI's launcher with words of its own.

    Args:
        launch: what ``detect_launch`` found.
        library: what ``MPI_Get_library_version`` says.

    Raises:
        LaunchError: if a library of MPICH's family was started by Open MPI's mpirun, whose language it was not built to
            speak. The other way around, ``check_world`` finds it.
    """
    if launch is None or launch.launcher != _OPEN_MPI or "pmix" in library.lower():
        return
    if any(family in library for family in ("MPICH", "MVAPICH", "Intel(R) MPI")):
        name = " ".join(library.split("\n", 1)[0].split())
        remedy = " ".join(filter(None, [advice_on_library(), _ANOTHER_MPI]))
        raise LaunchError(f"{_promise(launch)}, but this process has loaded another MPI ({name}). {remedy}")


def check_world(launch: Launch | None, size: int, library: str, backend: str = "MPI") -> None:
    """Refuse a world that is not the one that was promised.

    Args:
        launch: what ``detect_launch`` found.
        size: number of ranks that the backend sees.
        library: name and version of the backend's library.
        backend: name of the backend.

    Raises:
        LaunchError: if the launcher promised another number of ranks.
    """
    if launch is None or launch.size is None or launch.size == size:
        return
    found = f"{backend} sees {size} ({library})"
    if backend != "MPI":
        remedy = f"Start with horovodrun, or without LENTANDO_TRANSPORT={backend.lower()}"
    elif launch.mpi:
        remedy = " ".join(filter(None, [advice_on_library(), _ANOTHER_MPI]))
        if "srun" in launch.launcher:
            remedy += ". With srun, name the plugin that it speaks: srun --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH"
    else:
        remedy = (
            "This launcher starts no MPI. Start with mpirun, or with horovodrun --mpi, whose ranks are MPI processes, "
            "or with horovodrun --gloo and Horovod's own engine"
        )
    raise LaunchError(f"{_promise(launch)}, but {found}: that would train {launch.size} separate models. {remedy}")


def advice_on_library(environment: Mapping[str, str] | None = None) -> str:
    """What to do about variables that choose which MPI is loaded; nothing if none is set."""
    environment = os.environ if environment is None else environment
    found = [f"{name}={environment[name]}" for name in _CHOOSES_LIBRARY if environment.get(name)]
    if not found:
        return ""
    return (
        f"The environment chooses which MPI mpi4py loads, by {' and '.join(found)}: unset this, or name the MPI that "
        "your mpirun belongs to."
    )


def _promise(launch: Launch) -> str:
    return f"{launch.launcher} promises {launch.size} ranks ({launch.variable}={launch.size})"
