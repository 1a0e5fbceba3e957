"""The variables by which a launcher says to a process that it is a rank: marked as used, and hidden on request.

Programs that a rank starts inherit them. Such a program is not a rank, and MPI's initialisation would wait forever, or
end the job. So a rank leaves a mark in its environment, by which ``init()`` recognises variables that were meant for
another process. A launcher inside the job, with ranks of its own, sets other values.
"""

import hashlib
import json
import multiprocessing
import os
import stat
from collections.abc import Collection, Mapping, MutableMapping

from lentando.comm.errors import LaunchError
from lentando.comm.launch import Launch

__all__ = ["check_is_rank", "hide_variables", "mark_rank", "would_be_misread"]

MARK = "LENTANDO_RANK_PID"
_CONNECTION = "PMI_FD"
"""Descriptor of the socket to the launcher, in MPICH and its like: its number may be the same in two jobs."""
_IDENTITY = (
    "PMIX_NAMESPACE", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "PMI_ID",
    "PMI_JOBID", "PMI_PORT", _CONNECTION, "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "HOROVOD_RANK", "HOROVOD_SIZE",
    "HOROVOD_GLOO_RENDEZVOUS_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "RANK", "WORLD_SIZE",
    "MASTER_PORT", "TORCHELASTIC_RUN_ID",
)  # fmt: skip
"""Variables that together differ from one rank to another, and from one job to another."""
_HIDDEN = (
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    "OMPI_COMM_WORLD_NODE_RANK", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_STEP_NUM_TASKS", "HOROVOD_RANK",
    "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
)  # fmt: skip
"""Variables by which other libraries find out that this process is one of many, and start torch.distributed."""


def mark_rank(environment: MutableMapping[str, str]) -> None:
    """This process is the rank that the launcher's variables speak of: programs that it starts are not."""
    environment[MARK] = f"{os.getpid()} {_fingerprint(environment)} {_socket_of(environment) or 0}"


def check_is_rank(environment: Mapping[str, str], launch: Launch) -> None:
    """Refuse a process that has inherited the variables of a launcher from the rank that started it.

    Args:
        environment: of this process.
        launch: what its variables promise.

    Raises:
        LaunchError: if they were meant for another process.
    """
    process, _, identity = environment.get(MARK, "").partition(" ")
    fingerprint, _, socket = identity.partition(" ")
    if not process or process == str(os.getpid()) or fingerprint != _fingerprint(environment):
        return
    own_socket = _socket_of(environment)
    if own_socket is not None and str(own_socket) != socket:
        return  # a launcher inside the job, with a connection of its own
    advice = ""
    if multiprocessing.parent_process() is not None:
        advice = (
            ". Processes that multiprocessing spawns import the main module again: call init() where that does not "
            'happen, below if __name__ == "__main__":'
        )
    raise LaunchError(
        f"process {os.getpid()} was started by a rank (process {process}), from which it has inherited the variables "
        f"of {launch.launcher} ({launch.variable}), and is not a rank itself: it would wait for the others forever. "
        "Set LENTANDO_TRANSPORT=single in its environment to let it run alone, or start it by a launcher of its own"
        f"{advice}"
    )


def hide_variables(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Take away what other libraries would take for a job of torch.distributed. Returns what was taken away."""
    return {name: environment.pop(name) for name in _HIDDEN if name in environment}


def would_be_misread(environment: Mapping[str, str], modules: Collection[str]) -> bool:
    """Whether a library that is loaded would start torch.distributed because of these variables, and fail.

    Accelerate does, which Hugging Face's Trainer uses, unless the environment also says where ranks meet.

    Args:
        environment: of this process.
        modules: names of the modules that are loaded.
    """
    return "accelerate" in modules and "MASTER_ADDR" not in environment


def _fingerprint(environment: Mapping[str, str]) -> str:
    values = [[name, environment[name]] for name in _IDENTITY if name in environment]
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def _socket_of(environment: Mapping[str, str]) -> int | None:
    """Which socket this process shares with the launcher; None without one."""
    text = environment.get(_CONNECTION, "")
    try:
        found = os.fstat(int(text))
    except (ValueError, OSError):
        return None
    return found.st_ino if stat.S_ISSOCK(found.st_mode) else None
