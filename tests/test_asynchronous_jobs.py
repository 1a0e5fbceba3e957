"""Whole programs whose asynchronous operations cannot complete: each ends soon, with the reason, on every rank."""

import json
import sys
from pathlib import Path

from launching import Job, find_mpirun, launch, mpirun

START = """
import os, signal, sys, time
import numpy as np
from lentando.comm import operations, world
from lentando.comm.errors import LentandoError

world.init(elastic="elastic" in sys.argv)
rank = world.rank()

def submit(name):
    return operations.allreduce_call(np.ones(1), operations.Sum, name=name).start()

def wait(handle):
    try:
        handle.wait()
    except LentandoError as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
"""


def run(program: str, size: int = 2, **environment: str) -> Job:
    job = mpirun(size, "-c", START + program, timeout_seconds=60, environment={**environment})
    assert job.status is not None, job.output
    assert job.seconds < 50, job.output
    return job


def test_a_rank_that_waits_in_a_blocking_call_is_found() -> None:
    job = run("""
if rank == 0:
    operations.barrier()
else:
    wait(submit("x"))
    operations.barrier()
wait(submit("y"))
""")
    assert job.status == 0, job.output
    expected = "rank 1: MismatchError: all ranks wait, and none can continue. rank 0: waits in a collective operation; "
    assert expected + "rank 1: waits for 'allreduce.x' (not submitted by rank 0)" in job.output
    assert job.output.count("Error") == 1, job.output


def test_a_rank_that_ends_while_another_waits_is_found() -> None:
    job = run("""
if rank == 1:
    wait(submit("x"))
""")
    assert job.status == 0, job.output
    waits = "rank 0: waits in shutdown(), or the end of the program; rank 1: waits for 'allreduce.x' (not submitted by"
    assert waits in job.output


def test_the_error_of_a_handle_ends_the_job() -> None:
    job = run("""
if rank == 1:
    submit("x").wait()
""")
    assert job.status not in (0, None), job.output
    assert "MismatchError: all ranks wait, and none can continue" in job.output
    assert "rank 1 failed (MismatchError) and ends the job" in job.output


def test_a_rank_that_is_killed_ends_the_job() -> None:
    job = run("""
handle = submit("x") if rank == 0 else None
if rank == 1:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
handle.wait()
print("the handle is complete")
""")
    assert job.status not in (0, None), job.output
    assert "the handle is complete" not in job.output


def test_a_stall_report_names_what_is_missing_where() -> None:
    job = run(
        """
handles = [submit(f"gradient {number}") for number in range(3) if rank or number != 1]
if rank == 0:
    time.sleep(3)
    handles.append(submit("gradient 1"))
for handle in handles:
    wait(handle)
""",
        LENTANDO_STALL_SECONDS="1",
        size=3,
    )
    assert job.status == 0, job.output
    assert "in an asynchronous operation" in job.output
    assert (
        "Asynchronous operations: 'allreduce.gradient 1' was submitted by ranks 1 and 2, not by rank 0. Missing: rank 0"
    ) in job.output


def test_handles_that_no_rank_waits_for_do_not_keep_a_program_from_ending() -> None:
    job = run('submit("x")\nif rank == 0:\n    submit("y")\n')
    assert job.status == 0, job.output
    assert "operation 'allreduce.y' of rank 0 was not executed: the job has ended" in job.output


def test_an_elastic_job_refuses_asynchronous_operations() -> None:
    program = (
        START
        + """
for function in (lambda: submit("x"), operations.join):
    try:
        function()
    except ValueError as error:
        print(f"rank {rank}: {error}", flush=True)
"""
    )
    command = [find_mpirun(), "--with-ft", "ulfm", "-np", "2", sys.executable, "-c", program, "elastic"]
    job = launch(command, 120)
    assert job.status == 0, job.output
    assert job.output.count("an elastic job has no asynchronous operations") == 2, job.output
    assert job.output.count("join() is not possible in an elastic job") == 2, job.output


def test_without_threads_in_mpi_waiting_ranks_execute() -> None:
    program = (
        'import mpi4py\nmpi4py.rc.thread_level = "serialized"\n'
        + START
        + """
arrays = {name: np.ones(1) for name in "abc"}
handles = [operations.allreduce_call(arrays[name], operations.Sum, name=name).start() for name in ("abc", "cab")[rank]]
for handle in handles:
    handle.wait()
wait(submit(f"only rank {rank}"))
print([array.tolist() for array in arrays.values()])
"""
    )
    job = mpirun(2, "-c", program, timeout_seconds=60)
    assert job.status == 0, job.output
    assert job.output.count("[[2.0], [2.0], [2.0]]") == 2, job.output
    assert job.output.count("MismatchError: all ranks wait, and none can continue") == 2, job.output


def test_the_timeline_of_a_job_that_is_killed_is_valid(tmp_path: Path) -> None:
    job = run(
        """
for _ in range(20):
    submit("x").wait()
own = os.path.join(os.environ["LENTANDO_TIMELINE"], f"timeline.rank{rank}.json" if rank else "timeline.json")
while open(own).read().count('"ALLREDUCE"') < 20:
    time.sleep(0.01)
operations.barrier()
os.kill(os.getpid(), signal.SIGKILL)
""",
        LENTANDO_TIMELINE=str(tmp_path / "runs"),
    )
    assert job.status not in (0, None), job.output
    for name in ("timeline.json", "timeline.rank1.json"):
        found = json.loads((tmp_path / "runs" / name).read_text())
        assert sum(event["name"] == "ALLREDUCE" for event in found) == 20
