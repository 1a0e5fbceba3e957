"""Whole jobs of several ranks, from their start to their end, good or bad."""

import os
import re
import subprocess
import sys

from launching import Job, mpirun

SECONDS = 50.0
"""In which a job must have ended when one of its ranks cannot continue."""

BEGIN = """
import sys
import numpy as np
from lentando.comm import world
from lentando.comm.agreement import Event, Intent, agree
world.init()
rank = world.rank()
"""
ROUND = "agree(world.transport(), Intent(Event.ROUND, round=3), lambda: 'begins round 3')\n"


def written(pattern: str, job: Job) -> list[str]:
    """The lines of the ranks, sorted: MPI may write lines of its own."""
    return sorted(re.findall(rf"^{pattern}$", job.output, re.MULTILINE))


def test_rank_that_raises_ends_the_job_with_its_reason() -> None:
    job = mpirun(3, "-c", BEGIN + "if rank == 1: raise ValueError('boom')\n" + ROUND, timeout_seconds=60)
    assert job.status not in (0, None)
    assert "ValueError: boom" in job.output
    assert "Lentando: rank 1 failed (ValueError) and ends the job" in job.output
    assert job.seconds < SECONDS


def test_nccl_that_one_rank_cannot_use_is_refused_on_every_rank() -> None:
    program = """
import os, sys
from lentando.comm import world
from lentando.comm.transports import nccl_binding
sys.modules["cupy"] = None
nccl_binding.find_spec = lambda name: object()
if os.environ["OMPI_COMM_WORLD_RANK"] != "1":
    nccl_binding.NCCLBinding.problem = lambda self: None
world.init()
"""
    job = mpirun(3, "-c", program, timeout_seconds=60, environment={"LENTANDO_TRANSPORT": "nccl"})
    assert job.status not in (0, None)
    found = "ranks 0 and 2: nothing is missing; rank 1: CuPy or nccl4py cannot be loaded"
    assert job.output.count(f"LaunchError: NCCL cannot be used: {found}") == 3, job.output
    assert job.seconds < SECONDS


def test_rank_that_raises_while_others_wait_for_its_message_ends_the_job() -> None:
    wait = "world.transport().exchange([], [(1, np.empty(1))]).wait()\n"
    job = mpirun(3, "-c", BEGIN + "if rank == 1: raise ValueError('boom')\n" + wait, timeout_seconds=60)
    assert job.status not in (0, None)
    assert "ValueError: boom" in job.output
    assert job.seconds < SECONDS


def test_rank_that_ends_before_a_round_is_named_on_every_rank() -> None:
    job = mpirun(3, "-c", BEGIN + "if rank == 2: sys.exit()\n" + ROUND, timeout_seconds=60)
    assert job.status not in (0, None)
    found = "ranks 0 and 1: begins round 3; rank 2: has ended (shutdown, or the end of the program)"
    assert job.output.count(f"MismatchError: the ranks are not about to do the same thing. {found}.") == 3
    assert job.seconds < SECONDS


def test_job_whose_ranks_end_together_succeeds() -> None:
    job = mpirun(3, "-c", BEGIN + ROUND + r"sys.stdout.write(f'done {rank}\n')")
    assert job.status == 0, job.output
    assert written(r"done \d", job) == ["done 0", "done 1", "done 2"]


def test_status_of_one_rank_is_that_of_the_job() -> None:
    job = mpirun(3, "-c", BEGIN + ROUND + "sys.exit(3 if rank == 1 else 0)")
    assert job.status == 3, job.output


def test_rank_that_exits_with_a_status_before_a_round_ends_the_job() -> None:
    job = mpirun(3, "-c", BEGIN + "if rank == 1: sys.exit(3)\n" + ROUND, timeout_seconds=60)
    assert job.status not in (0, None)
    assert "rank 1: has ended" in job.output
    assert job.seconds < SECONDS


def test_rank_that_disappears_ends_the_job() -> None:
    job = mpirun(3, "-c", BEGIN + "import os\nif rank == 1: os._exit(9)\n" + ROUND, timeout_seconds=60)
    assert job.status not in (0, None)
    assert job.seconds < SECONDS


def test_exception_after_shutdown_is_the_users_alone() -> None:
    job = mpirun(2, "-c", BEGIN + "world.shutdown()\nif rank == 1: raise ValueError('afterwards')")
    assert "ValueError: afterwards" in job.output
    assert "Lentando:" not in job.output


def test_part_of_the_ranks_can_be_a_job_of_their_own() -> None:
    program = """
import sys
from mpi4py import MPI
from lentando.comm import world
from lentando.comm.objects import allgather_object
part = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2)
world.init(part)
sys.stdout.write(f"{allgather_object(world.transport(), MPI.COMM_WORLD.rank)}\\n")  # in one piece
world.shutdown()
part.Barrier()  # the user's communicator is still the user's
"""
    job = mpirun(5, "-c", program)
    assert job.status == 0, job.output
    assert written(r"\[[\d, ]+\]", job) == ["[0, 2, 4]"] * 3 + ["[1, 3]"] * 2


def test_single_can_be_forced_under_mpirun() -> None:
    program = BEGIN + "print(world.rank(), world.size())"
    job = mpirun(2, "-c", program, environment={"LENTANDO_TRANSPORT": "single"})
    assert written(r"\d \d", job) == ["0 1", "0 1"]


def test_mpi_that_the_user_has_started_is_used_without_a_launcher() -> None:
    """A singleton of MPI's own: the library is trusted once it runs."""
    found = run_alone("from mpi4py import MPI\n" + BEGIN + "print(world.transport().name, world.size())")
    assert found.stdout.split() == ["mpi", "1"], found.stderr


def test_mpi_can_be_forced_in_a_program_that_was_started_alone() -> None:
    found = run_alone(BEGIN + "print(world.transport().name, world.size())", LENTANDO_TRANSPORT="mpi")
    assert found.stdout.split() == ["mpi", "1"], found.stderr


def test_promise_of_many_ranks_next_to_an_mpi_that_sees_one_is_an_error() -> None:
    for variables, promise in (
        (
            {"PMI_RANK": "0", "PMI_SIZE": "4"},
            "mpiexec (MPICH, Intel MPI) or srun --mpi=pmi2 promises 4 ranks (PMI_SIZE=4)",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "LENTANDO_TRANSPORT": "mpi"},
            "a launcher that sets RANK and WORLD_SIZE promises 4 ranks (WORLD_SIZE=4)",
        ),
    ):
        found = run_alone(BEGIN, **variables)
        assert found.returncode == 1
        assert f"LaunchError: {promise}, but MPI sees 1 (" in found.stderr
        assert "that would train 4 separate models" in found.stderr


def run_alone(program: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **root, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
