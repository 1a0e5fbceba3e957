"""Detects the launcher of this process, and the size of its job, from the environment variables that launchers set.

Once MPI is initialised, it is authoritative. The variables then only serve to detect a disagreement, such as a launcher
that belongs to another MPI than the library: each process would silently become a world of its own.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from lentando.comm import launchers
from lentando.comm.errors import LaunchError
from lentando.comm.launchers import Family, Launcher

__all__ = [
    "Claim",
    "Launch",
    "advice_on_library",
    "check_library",
    "check_meeting_point",
    "check_world",
    "detect_launch",
    "read_claims",
]


@dataclass(frozen=True)
class Launch:
    """The job that a launcher promises.

    Attributes:
        launcher: name of the launcher, for messages.
        variable: environment variable from which the launcher was detected.
        size: number of ranks; None if the launcher does not set it.
        mpi: whether the ranks are MPI processes.
        horovod: whether only Horovod connects them.
        torch: whether only torch.distributed connects them.
        family: family of MPI libraries with which they are MPI processes; None if they are not.
        advice: advice for the case that the ranks do not find each other.
    """

    launcher: str
    variable: str
    size: int | None
    mpi: bool
    horovod: bool = False
    torch: bool = False
    family: Family | None = field(default=None, compare=False)
    advice: str = field(default="", compare=False)


_ANOTHER_MPI = (
    "The launcher belongs to another MPI than this library: start with the mpirun that came with it (for pip's MPIs, "
    "the one in the environment's bin/), or install the MPI whose mpirun you use"
)

_CHOOSES_LIBRARY = ("MPI4PY_LIBMPI", "MPI4PY_MPIABI")
"""Variables that determine which MPI library mpi4py loads."""


@dataclass(frozen=True)
class Claim:
    """The values of one launcher's variables, whether or not they are valid.

    Attributes:
        kind: the launcher.
        variables: the variables for rank and size that are set, with their values.
        rank: rank of this process; None if it is missing or not a number.
        size: number of ranks; None if it is missing, not a number, or not set by this launcher.
        is_complete: whether all variables that this launcher sets are present.
    """

    kind: Launcher
    variables: dict[str, str]
    rank: int | None
    size: int | None
    is_complete: bool

    @property
    def launcher(self) -> str:
        """Name of the launcher, for messages."""
        return self.kind.name

    @property
    def mpi(self) -> bool:
        """Whether its ranks are MPI processes."""
        return self.kind.family is not None


def read_claims(environment: Mapping[str, str]) -> list[Claim]:
    """The claims of all launchers whose variables are set and count, with the innermost launcher first."""
    claims: list[Claim] = []
    for kind in launchers.LAUNCHERS:
        names = [kind.rank, *([kind.size] if kind.size else [])]
        variables = {name: environment[name] for name in names if name in environment}
        is_meant = kind.needs_both or len(variables) == len(names)  # others set one of these variables too
        if not variables or not is_meant or (kind.marker is not None and kind.marker not in environment):
            continue
        if any(variables.items() <= claim.variables.items() for claim in claims):  # torchrun's RANK and WORLD_SIZE
            continue
        rank, size = (_number(variables.get(name)) for name in (kind.rank, kind.size or ""))
        is_complete = rank is not None and (kind.size is None or bool(size))
        claims.append(Claim(kind, variables, rank, size, is_complete))
    if any(claim.kind.is_innermost and claim.is_complete for claim in claims):
        return [claim for claim in claims if claim.kind.is_innermost or not claim.is_complete]
    return claims


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def detect_launch(environment: Mapping[str, str] | None = None) -> Launch | None:
    """The launcher of this process, or None if it was started alone.

    Raises:
        LaunchError: if a launcher's variables are incomplete or not numbers, or two launchers disagree.
    """
    environment = os.environ if environment is None else environment
    kinds = [kind for kind in launchers.LAUNCHERS if _is_complete(kind, environment)]
    claims = [(kind, _launch(kind, environment)) for kind in kinds]
    innermost = [launch for kind, launch in claims if kind.is_innermost]
    if innermost:
        return innermost[0]
    reliable = [(kind, launch) for kind, launch in claims if kind.needs_both]
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


def _is_complete(kind: Launcher, environment: Mapping[str, str]) -> bool:
    wanted = [kind.marker or kind.rank, *([kind.size] if kind.size else [])]
    missing = [variable for variable in wanted if variable not in environment]
    if kind.needs_both and len(missing) == 1:
        (present,) = set(wanted) - set(missing)
        raise LaunchError(
            f"{kind.name} set {present}={environment[present]} but not {missing[0]}: a rank needs both to "
            f"know its number. Start through the launcher, or unset {present} to run alone"
        )
    return not missing


def _launch(kind: Launcher, environment: Mapping[str, str]) -> Launch:
    size = None
    if kind.size is not None:
        text = environment[kind.size]
        if not text.isdecimal() or int(text) < 1:
            raise LaunchError(f"{kind.name} set {kind.size}={text!r}: expected a number of ranks >= 1")
        size = int(text)
    is_mpi, variable = kind.family is not None, kind.size or kind.rank
    return Launch(kind.name, variable, size, is_mpi, kind.is_horovod, kind.is_torch, kind.family, kind.advice)


def check_library(launch: Launch | None, library: str) -> None:
    """Check, before MPI is initialised, that the library supports the launcher: it might end the process otherwise.

    Args:
        launch: result of ``detect_launch``.
        library: result of ``MPI_Get_library_version``.

    Raises:
        LaunchError: if a library of MPICH's family without PMIx was started by Open MPI's mpirun. The reverse case is
            detected by ``check_world``.
    """
    if launch is None or launch.family != "Open MPI" or "pmix" in library.lower():
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
    if backend == "torch.distributed":
        remedy = "Let init_process_group connect all ranks, or name those that take part by init(process_group=...)"
    elif backend != "MPI":
        remedy = f"Start with horovodrun, or without LENTANDO_TRANSPORT={backend.lower()}"
    elif launch.mpi:
        remedy = " ".join(filter(None, [advice_on_library(), _ANOTHER_MPI]))
        if launch.advice:
            remedy += f". {launch.advice}"
    else:
        remedy = (
            "This launcher starts no MPI. Start with mpirun, or with horovodrun --mpi, whose ranks are MPI processes; "
            "or without LENTANDO_TRANSPORT=mpi, with torchrun or horovodrun --gloo, which connect the ranks"
        )
    raise LaunchError(f"{_promise(launch)}, but {actual}: that would train {launch.size} separate models. {remedy}")


def check_meeting_point(launch: Launch | None, environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Check that torch.distributed can connect the ranks. Returns the number of this rank, and of all ranks.

    Args:
        launch: result of ``detect_launch``.
        environment: environment variables of this process.

    Raises:
        LaunchError: if a variable is missing by which the ranks find each other.
    """
    environment = os.environ if environment is None else environment
    kind = next(kind for kind in reversed(launchers.LAUNCHERS) if kind.is_torch)
    needed = [kind.rank, kind.size or "", *launchers.MEETING_POINT]
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        reason = f"{launch.launcher} started this process" if launch else "torch.distributed was chosen"
        raise LaunchError(
            f"{reason}, and torch.distributed connects the ranks by {', '.join(needed)}, of which the environment "
            f"lacks {', '.join(missing)}. Start with torchrun, which sets them, or with mpirun, which needs "
            "none; or call torch.distributed.init_process_group before init()"
        )
    return int(environment[needed[0]]), int(environment[needed[1]])


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
