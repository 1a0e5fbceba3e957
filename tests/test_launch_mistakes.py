"""Jobs that are started wrongly: each ends at once, with a sentence that says what to do, and never trains N models."""

import os
import re
import subprocess
import sys

import pytest
from launchers import HOROVOD_GLOO, OPEN_MPI, WITH_MPICH, Launcher
from launching import Job, launch, mpirun
from two_hosts import TWO_HOSTS, need_hosts

JOIN = "from lentando.comm import world; world.init(); print('IS IN', world.rank(), world.size())"
SECONDS = 90.0
"""In which a job that cannot work must have ended."""


def mistake(launcher: Launcher, python: str, **environment: str) -> Job:
    """Start two ranks with the Python of another launcher's environment."""
    launcher.need()
    job = launch([*launcher.command, "2", *launcher.options, python, "-c", JOIN], 120, environment)
    assert job.status not in (0, None), job.output
    assert "IS IN" not in job.output
    assert job.seconds < SECONDS
    return job


def test_library_of_mpich_under_mpirun_of_open_mpi() -> None:
    """MPICH ends such a process with words of its own when it starts, so the error comes before."""
    WITH_MPICH.need()
    job = mistake(OPEN_MPI, WITH_MPICH.python)
    assert "LaunchError: mpirun (Open MPI) promises 2 ranks (OMPI_COMM_WORLD_SIZE=2), but this process has loaded" in (
        job.output
    )
    assert "another MPI (MPICH Version: " in job.output
    assert "start with the mpirun that came with it" in job.output


def test_library_of_open_mpi_under_mpiexec_of_mpich() -> None:
    job = mistake(WITH_MPICH, sys.executable)
    assert "LaunchError: mpiexec (MPICH, Intel MPI) or srun --mpi=pmi2 promises 2 ranks (PMI_SIZE=2)" in job.output
    assert "but MPI sees 1 (Open MPI" in job.output
    assert "start with the mpirun that came with it" in job.output


def test_variables_of_another_launcher_that_a_shell_has_kept() -> None:
    job = mistake(OPEN_MPI, sys.executable, HOROVOD_RANK="0", HOROVOD_SIZE="3")
    assert "LaunchError: two launchers started this process and disagree" in job.output
    assert re.search(r"mpirun \(Open MPI\) says rank [01] of 2 .* but horovodrun says rank 0 of 3", job.output)


def test_launcher_inside_another_launcher() -> None:
    """Each of mpirun's ranks starts a job of MPICH's: two jobs of three, not one of six."""
    WITH_MPICH.need()
    inner = [*WITH_MPICH.command, "3", WITH_MPICH.python, "-c", JOIN]
    job = launch([*OPEN_MPI.command, "2", *inner], 120)
    assert job.status not in (0, None), job.output
    assert "IS IN" not in job.output
    assert "two launchers started this process and disagree" in job.output
    assert job.seconds < SECONDS


def test_horovodrun_without_mpi_and_without_horovods_binding() -> None:
    """The Python of the MPICH environment has neither Horovod nor a framework."""
    WITH_MPICH.need()
    job = mistake(HOROVOD_GLOO, WITH_MPICH.python)
    assert (
        "LaunchError: Horovod's Python binding cannot be loaded (torch is not installed; tensorflow is not installed)"
    ) in job.output
    assert "or start with mpirun or horovodrun --mpi" in job.output


def test_horovods_variables_without_horovodrun() -> None:
    """Left over in a shell: no rendezvous, no second rank."""
    HOROVOD_GLOO.need()
    run = subprocess.run(
        [sys.executable, "-c", JOIN],
        env={**os.environ, "HOROVOD_RANK": "0", "HOROVOD_SIZE": "4",
             "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert "LaunchError: horovodrun promises 4 ranks (HOROVOD_SIZE=4), but Horovod sees 1" in run.stderr


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan"])
def test_wait_that_is_none_is_refused(seconds: str) -> None:
    job = mistake(OPEN_MPI, sys.executable, LENTANDO_JOIN_SECONDS=seconds)
    assert f"LENTANDO_JOIN_SECONDS='{seconds}': expected seconds > 0, or inf" in job.output


def test_wait_may_have_no_end() -> None:
    job = OPEN_MPI.run(2, "-c", JOIN, environment={"LENTANDO_JOIN_SECONDS": "inf"})
    assert job.status == 0, job.output


def test_rank_that_never_comes_to_init_ends_the_job() -> None:
    late = f"import time; from mpi4py import MPI\nif MPI.COMM_WORLD.rank: time.sleep(110)\n{JOIN}"
    job = OPEN_MPI.run(2, "-c", late, environment={"LENTANDO_JOIN_SECONDS": "2"})
    assert job.status not in (0, None), job.output
    assert "Lentando: rank 0 on " in job.output
    assert "has waited 2 s for the other ranks to join (2 in all) and ends the job" in job.output
    assert job.seconds < SECONDS


def test_interface_that_does_not_route_ends_the_job() -> None:
    """Each host has a loopback interface of its own, which leads to no other host."""
    need_hosts()
    command = [*OPEN_MPI.command, "2", "--mca", "btl_tcp_if_include", "lo", sys.executable, "-c", JOIN]
    job = launch([*TWO_HOSTS, *command], 120, {"LENTANDO_JOIN_SECONDS": "5"})
    assert job.status not in (0, None), job.output
    assert "IS IN" not in job.output
    assert re.search(r"Lentando: rank [01] on h[01] has waited 5 s for the other ranks to join", job.output)
    assert "name the network interface that connects the hosts" in job.output
    assert "OMPI_MCA_btl_tcp_if_include=lo" in job.output
    assert job.seconds < SECONDS


@pytest.mark.parametrize("variable", ["MPI4PY_LIBMPI=/no/such/libmpi.so", "MPI4PY_MPIABI=no_such_abi"])
def test_variable_that_chooses_an_mpi_that_is_not_there_is_named(variable: str) -> None:
    name, _, value = variable.partition("=")
    job = mpirun(1, "-c", "from lentando.comm import world; world.init()", environment={name: value})
    assert job.status not in (0, None)
    assert f"The environment determines which MPI mpi4py loads, by {variable}: unset this" in job.output
    assert "pip install lentando" not in job.output
