"""The launchers that are known, each with everything that other modules need to know about it: one entry of a table.

The detection of the launcher (``launch``), the variables that are marked or hidden (``inherited_variables``) and
``lentando doctor`` derive from this table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = [
    "LAUNCHERS",
    "MEETING_POINT",
    "Family",
    "Launcher",
    "connections",
    "hidden_variables",
    "identity_variables",
    "local_rank_variables",
    "reported_variables",
]

Family: TypeAlias = Literal["Open MPI", "MPICH", "any"]
"""Family of MPI libraries that a launcher's ranks can load; MPICH's includes Intel MPI, MVAPICH and Cray MPICH."""


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """A launcher, by the environment variables that it sets for each rank.

    Attributes:
        name: name for messages.
        rank: variable that contains the number of the rank.
        size: variable that contains the number of ranks; None if the launcher sets none.
        local_rank: variable that contains the number of the rank on its node; None if the launcher sets none.
        marker: variable that only this launcher sets, needed if other launchers set the same ``rank`` and ``size``.
        family: family of MPI libraries with which its ranks are MPI processes; None if they are not.
        is_horovod: whether only Horovod connects the ranks.
        is_torch: whether only torch.distributed connects the ranks.
        needs_both: whether ``rank`` without ``size``, or the reverse, is a mistake.
        is_innermost: whether other launchers start it, one on each node: its ranks inherit the variables of those,
            which then do not count.
        starts_launchers: whether it often starts other launchers, whose variables are then the ones that count.
        plugins: variables of which it sets one where it has prepared its ranks for MPI. Without any, MPI may still
            connect them (by PMI-1, which needs none), or nothing may.
        is_plugin: whether such a plugin sets the variables of this entry, with the numbers of that launcher.
        identity: further variables whose values, together with those above, are unique to each rank of each job.
        connection: variable that contains the descriptor of the rank's socket to the launcher. The number of the
            descriptor may be the same in two jobs, the socket is not.
        hidden: further variables because of which other libraries start torch.distributed.
        command: command that starts a program on ``{size}`` ranks with this launcher and the PMI ``{plugin}``, for a
            launcher that is used in place of mpirun where it exists.
        advice: advice for a launcher whose ranks do not find each other.
    """

    name: str
    rank: str
    size: str | None = None
    local_rank: str | None = None
    marker: str | None = None
    family: Family | None = None
    is_horovod: bool = False
    is_torch: bool = False
    needs_both: bool = False
    is_innermost: bool = False
    starts_launchers: bool = False
    plugins: tuple[str, ...] = ()
    is_plugin: bool = False
    identity: tuple[str, ...] = ()
    connection: str | None = None
    hidden: tuple[str, ...] = ()
    command: str = ""
    advice: str = ""

    @property
    def numbering(self) -> list[str]:
        """The variables that number the rank and count the ranks, which other libraries read as well."""
        return [name for name in (self.rank, self.size, self.local_rank) if name is not None]

    @property
    def variables(self) -> list[str]:
        """All variables of this entry."""
        others = [name for name in (self.marker, self.connection) if name is not None]
        return list(dict.fromkeys([*self.numbering, *others, *self.identity, *self.hidden, *self.plugins]))


_NAME_PLUGIN = "With srun, name its PMI plugin: srun --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH"

LAUNCHERS = (
    Launcher(
        name="torchrun",
        rank="RANK",
        size="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        marker="TORCHELASTIC_RUN_ID",
        is_torch=True,
        is_innermost=True,
        identity=("MASTER_PORT",),
        hidden=("LOCAL_WORLD_SIZE",),
    ),
    Launcher(
        name="mpirun (Open MPI)",
        rank="OMPI_COMM_WORLD_RANK",
        size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        family="Open MPI",
        needs_both=True,
        hidden=("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_NODE_RANK"),
    ),
    Launcher(
        name="mpiexec (MVAPICH2)",
        rank="MV2_COMM_WORLD_RANK",
        size="MV2_COMM_WORLD_SIZE",
        local_rank="MV2_COMM_WORLD_LOCAL_RANK",
        family="MPICH",
        needs_both=True,
        hidden=("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        name="mpiexec (MPICH, Intel MPI) or srun --mpi=pmi2",
        rank="PMI_RANK",
        size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        family="MPICH",
        needs_both=True,
        is_plugin=True,
        identity=("PMI_ID", "PMI_JOBID", "PMI_PORT"),
        connection="PMI_FD",
        hidden=("MPI_LOCALNRANKS",),
        advice=_NAME_PLUGIN,
    ),
    Launcher(
        name="horovodrun",
        rank="HOROVOD_RANK",
        size="HOROVOD_SIZE",
        local_rank="HOROVOD_LOCAL_RANK",
        is_horovod=True,
        needs_both=True,
        identity=("HOROVOD_GLOO_RENDEZVOUS_PORT",),
        hidden=("HOROVOD_LOCAL_SIZE",),
    ),
    Launcher(
        name="srun",
        rank="SLURM_PROCID",
        size="SLURM_STEP_NUM_TASKS",  # only in a step of srun: in batch scripts and shells, SLURM_NTASKS is a request
        local_rank="SLURM_LOCALID",
        family="any",
        starts_launchers=True,
        plugins=("PMI_RANK", "PMIX_RANK", "PALS_RANKID", "ALPS_APP_PE"),
        identity=("SLURM_JOB_ID", "SLURM_STEP_ID"),
        hidden=("SLURM_NTASKS", "SLURM_NPROCS"),
        command="srun --ntasks={size} --mpi={plugin}",
        advice=_NAME_PLUGIN,
    ),
    Launcher(
        name="a PMIx launcher (prun, or srun --mpi=pmix)",
        rank="PMIX_RANK",
        family="any",
        identity=("PMIX_NAMESPACE",),
    ),
    Launcher(
        name="aprun (Cray)",
        rank="ALPS_APP_PE",
        family="MPICH",
    ),
    Launcher(
        name="a launcher that sets RANK and WORLD_SIZE",
        rank="RANK",
        size="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        is_torch=True,
    ),
)
"""The innermost launcher first: a Slurm job often runs mpirun, as horovodrun does; any may start torchrun per node."""

MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
"""Variables with the host and the port at which the ranks of torch.distributed meet."""


def identity_variables() -> list[str]:
    """Variables whose values, taken together, are unique to each rank of each job."""
    markers = [launcher.marker for launcher in LAUNCHERS if launcher.marker is not None]
    names = [name for each in LAUNCHERS for name in (each.rank, each.size, *each.identity) if name is not None]
    return list(dict.fromkeys([*names, *connections(), *markers]))


def connections() -> list[str]:
    """Variables that contain the descriptor of a rank's socket to its launcher."""
    return [launcher.connection for launcher in LAUNCHERS if launcher.connection is not None]


def hidden_variables() -> list[str]:
    """Variables because of which other libraries start torch.distributed."""
    return list(dict.fromkeys(name for each in LAUNCHERS for name in (*each.numbering, *each.hidden)))


def local_rank_variables() -> Iterator[str]:
    """Variables in which launchers pass a rank its number on its node."""
    return (launcher.local_rank for launcher in LAUNCHERS if launcher.local_rank is not None)


def reported_variables() -> set[str]:
    """All variables of all launchers, for reports."""
    return {name for launcher in LAUNCHERS for name in launcher.variables}
