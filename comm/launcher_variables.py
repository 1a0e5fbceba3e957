"""Environment variables by which a launcher identifies a process as a rank: marked as used, and hidden on request.

Programs that a rank starts inherit them. Such a program is not a rank, and MPI's initialisation would wait forever, or
end the job. Each rank therefore adds a mark to its environment, by which ``init()`` recognises variables that were
meant for another process. A launcher inside the job, with ranks of its own, sets other values.
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
"""Descriptor of the socket to the launcher, in MPICH and its derivatives. Its number may be the same in two jobs."""
_IDENTITY = (
    "PMIX_NAMESPACE", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "PMI_ID",
    "PMI_JOBID", "PMI_PORT", _CONNECTION, "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "HOROVOD_RANK", "HOROVOD_SIZE",
    "HOROVOD_GLOO_RENDEZVOUS_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "RANK", "WORLD_SIZE",
    "MASTER_PORT", "TORCHELASTIC_RUN_ID",
)  # fmt: skip
"""Variables whose values, taken together, are unique to each rank of each job."""
_HIDDEN = (
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    "OMPI_COMM_WORLD_NODE_RANK", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_STEP_NUM_TASKS", "HOROVOD_RANK",
    "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
)  # fmt: skip
"""Variables because of which other libraries start torch.distributed."""


def mark_rank(environment: MutableMapping[str, str]) -> None:
    """Record that this process is the rank that the launcher's variables describe, unlike programs that it starts."""
    environment[MARK] = f"{os.getpid()} {_fingerprint(environment)} {_socket_of(environment) or 0}"


def check_is_rank(environment: Mapping[str, str], launch: Launch) -> None:
    """Check that this process has not inherited the launcher's variables from the rank that started it.

    Args:
        environment: environment variables of this process.
        launch: the job that they promise.

    Raises:
        LaunchError: if they were meant for another process.
    """
    process, _, identity = environment.get(MARK, "").partition(" ")
    fingerprint, _, socket = identity.partition(" ")
    if not process or process == str(os.getpid()) or fingerprint != _fingerprint(environment):
        return
    socket_here = _socket_of(environment)
    if socket_here is not None and str(socket_here) != socket:
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
    """Remove the variables because of which other libraries start torch.distributed. Returns those removed."""
    return {name: environment.pop(name) for name in _HIDDEN if name in environment}


def would_be_misread(environment: Mapping[str, str], modules: Collection[str]) -> bool:
    """Whether a library that is loaded would start torch.distributed because of these variables, and fail.

    Accelerate, which Hugging Face's Trainer uses, does so unless the environment has an address where ranks meet.

    Args:
        environment: environment variables of this process.
        modules: names of the modules that are loaded.
    """
    return "accelerate" in modules and "MASTER_ADDR" not in environment


def _fingerprint(environment: Mapping[str, str]) -> str:
    values = [[name, environment[name]] for name in _IDENTITY if name in environment]
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def _socket_of(environment: Mapping[str, str]) -> int | None:
    """Inode of the socket that connects this process to the launcher; None without one."""
    text = environment.get(_CONNECTION, "")
    try:
        socket = os.fstat(int(text))
    except (ValueError, OSError):
        return None
    return socket.st_ino if stat.S_ISSOCK(socket.st_mode) else None
