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
from lentando.comm.launchers import connections, hidden_variables, identity_variables

__all__ = ["check_is_rank", "hide_variables", "mark_rank", "would_be_misread"]

MARK = "LENTANDO_RANK_PID"


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
    return {name: environment.pop(name) for name in hidden_variables() if name in environment}


def would_be_misread(environment: Mapping[str, str], modules: Collection[str]) -> bool:
    """Whether a library that is loaded would start torch.distributed because of these variables, and fail.

    Accelerate, which Hugging Face's Trainer uses, does so unless the environment has an address where ranks meet.

    Args:
        environment: environment variables of this process.
        modules: names of the modules that are loaded.
    """
    return "accelerate" in modules and "MASTER_ADDR" not in environment


def _fingerprint(environment: Mapping[str, str]) -> str:
    values = [[name, environment[name]] for name in identity_variables() if name in environment]
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def _socket_of(environment: Mapping[str, str]) -> int | None:
    """Inode of the socket that connects this process to the launcher; None without one."""
    for name in connections():
        try:
            socket = os.fstat(int(environment.get(name, "")))
        except (ValueError, OSError):
            continue
        if stat.S_ISSOCK(socket.st_mode):
            return socket.st_ino
    return None
