"""Detects the launcher of this process, and the size of its job, from the environment variables that launchers set.

Once MPI is initialised, it is authoritative. The variables then only serve to detect a disagreement, such as a launcher
that belongs to another MPI than the library: each process would silently become a world of its own.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lentando.comm import launchers
from lentando.comm.claims import Claim, has_meeting_point, is_of_step, read_claims
from lentando.comm.errors import LaunchError
from lentando.comm.launchers import Family

__all__ = [
    "Launch",
    "advice_on_library",
    "advice_without_mpi",
    "check_library",
    "check_meeting_point",
    "check_world",
    "detect_launch",
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
        torch: whether torch.distributed connects them, and MPI only if it has been chosen.
        family: family of MPI libraries with which they are MPI processes; None if they are not.
        advice: advice for the case that the ranks do not find each other.
        rank: number of this process; None if the launcher does not set it.
        has_torch_variables: whether the variables of torch.distributed are set as well, with the same numbers.
        is_single_task: whether this is the one task of a step of srun, which may be a shell.
    """

    launcher: str
    variable: str
    size: int | None
    mpi: bool
    horovod: bool = False
    torch: bool = False
    family: Family | None = field(default=None, compare=False)
    advice: str = field(default="", compare=False)
    rank: int | None = field(default=None, compare=False)
    has_torch_variables: bool = field(default=False, compare=False)
    is_single_task: bool = field(default=False, compare=False)


_ANOTHER_MPI = (
    "The launcher belongs to another MPI than this library: start with the mpirun that came with it (for pip's MPIs, "
    "the one in the environment's bin/), or install the MPI whose mpirun you use"
)

_CHOOSES_LIBRARY = ("MPI4PY_LIBMPI", "MPI4PY_MPIABI")
"""Variables that determine which MPI library mpi4py loads."""


def detect_launch(environment: Mapping[str, str] | None = None) -> Launch | None:
    """The launcher of this process, or None if it was started alone.

    Raises:
        LaunchError: if a launcher's variables are incomplete or not numbers, or two launchers disagree.
    """
    environment = os.environ if environment is None else environment
    claims = read_claims(environment)
    for claim in claims:
        _check_claim(claim)
    reliable = [claim for claim in claims if claim.kind.needs_both]
    # A process that was started alone may have started others by another launcher.
    of_many = [claim for claim in reliable if claim.size != 1]
    _check_agreement(of_many)
    candidates = of_many or reliable or claims
    return _launch(candidates[0], claims, environment) if candidates else None


def _check_claim(claim: Claim) -> None:
    kind = claim.kind
    names = [name for name in (kind.rank, kind.size) if name is not None]
    missing = [name for name in names if name not in claim.variables]
    if missing:
        ((present, value),) = claim.variables.items()
        raise LaunchError(
            f"{kind.name} set {present}={value} but not {missing[0]}: a rank needs both to "
            f"know its number. Start through the launcher, or unset {present} to run alone"
        )
    if kind.size is not None and not claim.size:
        raise LaunchError(
            f"{kind.name} set {kind.size}={claim.variables[kind.size]!r}: expected a number of ranks >= 1"
        )
    if claim.rank is None:
        raise LaunchError(f"{kind.name} set {kind.rank}={claim.variables[kind.rank]!r}: expected the number of a rank")


def _check_agreement(claims: Sequence[Claim]) -> None:
    places = {(claim.rank, claim.size): claim for claim in reversed(claims)}
    if len(places) > 1:
        statements = " but ".join(
            f"{claim.launcher} says rank {rank} of {size} "
            f"({', '.join(f'{name}={value}' for name, value in claim.variables.items())})"
            for (rank, size), claim in reversed(places.items())
        )
        raise LaunchError(
            f"two launchers started this process and disagree: {statements}. Start through one of them only, and unset "
            "the variables of the other if they were inherited from a shell"
        )


def _launch(claim: Claim, claims: Sequence[Claim], environment: Mapping[str, str]) -> Launch:
    kind = claim.kind
    for_torch = [each for each in claims if each.kind.is_torch and has_meeting_point(environment)]
    is_torch = kind.is_torch
    if kind.starts_launchers and claim.size != 1 and has_meeting_point(environment):
        is_torch = not any(environment.get(name) for name in kind.plugins)
        if is_torch:
            _check_agreement([claim, *for_torch])
    return Launch(
        launcher=kind.name,
        variable=kind.size or kind.rank,
        size=claim.size,
        mpi=claim.mpi,
        horovod=kind.is_horovod,
        torch=is_torch,
        family=kind.family,
        advice=kind.advice,
        rank=claim.rank,
        has_torch_variables=any((each.rank, each.size) == (claim.rank, claim.size) for each in for_torch),
        is_single_task=claim.size == 1 and is_of_step(claim, claims),
    )


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
        remedy = ". ".join(filter(None, [remedy, launch.advice, advice_without_mpi()]))
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
    numbers = [kind.rank, kind.size or ""]
    if all(environment.get(name) for name in numbers):
        rank, size = (int(environment[name]) for name in numbers)
    elif launch is not None and launch.rank is not None and launch.size is not None:
        rank, size, numbers = launch.rank, launch.size, []
    missing = [name for name in (*numbers, *launchers.MEETING_POINT) if not environment.get(name)]
    if missing:
        reason = f"{launch.launcher} started this process" if launch else "torch.distributed was chosen"
        raise LaunchError(
            f"{reason}, and torch.distributed connects the ranks by {', '.join([*numbers, *launchers.MEETING_POINT])}, "
            f"of which the environment lacks {', '.join(missing)}. Start with torchrun, which sets them, or with "
            "mpirun, which needs none; or call torch.distributed.init_process_group before init()"
        )
    return rank, size


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


def advice_without_mpi(environment: Mapping[str, str] | None = None) -> str:
    """Advice on how torch.distributed connects ranks that a launcher of MPI has started."""
    environment = os.environ if environment is None else environment
    if has_meeting_point(environment):
        place = " and ".join(f"{name}={environment[name]}" for name in launchers.MEETING_POINT)
        return f"Without MPI: export LENTANDO_TRANSPORT=torch, and torch.distributed connects the ranks at {place}"
    return (
        f"Without MPI: export LENTANDO_TRANSPORT=torch, {launchers.MEETING_POINT[0]} (the host of rank 0) and "
        f"{launchers.MEETING_POINT[1]} (a free port), and torch.distributed connects the ranks"
    )


def _promise(launch: Launch) -> str:
    return f"{launch.launcher} promises {launch.size} ranks ({launch.variable}={launch.size})"
