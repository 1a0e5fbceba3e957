"""Jobs that torchrun starts, and process groups of torch.distributed that the program has made itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from case_selection import selected_cases
from launchers import OPEN_MPI, TORCHRUN
from launching import launch
from ports import free_port
from prepared_python import prepared_python

EXAMPLE = str(Path(__file__).parents[1] / "examples/digits_torch.py")
ALGORITHMS = selected_cases(
    ("slowmo", "allreduce", "osgp", "adacomm"),
    ("slowmo", "localsgd", "allreduce", "sgp", "osgp", "dpsgd", "adacomm"),
)
DIFFERENT = selected_cases(3, 5)
"""Models that they train at least, AllReduce left out: on four ranks, two of all algorithms mix in the same way."""

PREPARED = "lentando.torch"
BEGIN = """
import os, signal, sys, time
import numpy as np
import torch
import torch.distributed as dist
import lentando.torch as lt
from lentando.comm import world
"""
SUM = """
total = np.array([float(lt.rank())])
world.transport().allreduce(total)
assert total[0] == sum(range(lt.size())), total
sys.stdout.write(f"done {lt.rank()} of {lt.size()} over {world.transport().name}\\n")
"""


def done(output: str) -> list[str]:
    return sorted(line for line in output.splitlines() if line.startswith("done"))


def by_hand(program: str, size: int, **environment: str) -> list["subprocess.CompletedProcess[str]"]:
    """Ranks that a launcher without an agent has started, which ends none of them."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared = {"WORLD_SIZE": str(size), **place, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*prepared_python(PREPARED), "-c", program],
            env={**os.environ, **shared, "RANK": str(rank), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=90)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [subprocess.CompletedProcess([], p.returncode, out) for p, out in zip(ranks, outputs, strict=True)]


def test_torchrun_that_mpirun_has_started_counts() -> None:
    """The ranks inherit the variables of mpirun, which says that there is one."""
    python = prepared_python(PREPARED)
    torchrun = [*python, *TORCHRUN.command[1:], "2", *TORCHRUN.options, *python]
    job = launch([*OPEN_MPI.command, "1", *torchrun, "-c", BEGIN + "lt.init()" + SUM], 120)
    assert job.status == 0, job.output
    assert done(job.output) == [f"done {rank} of 2 over torch" for rank in range(2)]


@pytest.mark.parametrize("tasks", [1, 2], ids=["a launcher in a shell of srun", "srun numbers the ranks"])
def test_ranks_meet_over_torch_in_a_step_of_srun(tasks: int) -> None:
    """By the variables alone: srun itself is run by ``test_srun.py``, where Slurm is installed."""
    of_srun = "os.environ['SLURM_PROCID'] = os.environ.pop('RANK')\ndel os.environ['WORLD_SIZE']\n" * (tasks - 1)
    ranks = by_hand(
        BEGIN + of_srun + "lt.init()" + SUM, 2, LOCAL_RANK="0", SLURM_PROCID="0", SLURM_STEP_NUM_TASKS=str(tasks)
    )
    assert [done(rank.stdout) for rank in ranks] == [[f"done {rank} of 2 over torch"] for rank in range(2)]


@pytest.mark.long
def test_every_algorithm_trains_the_same_model_as_under_mpirun(tmp_path: Path) -> None:
    """Bit for bit, with and without a default process group of the program, where our ring adds, in one order."""
    options = [
        "--compare", *ALGORITHMS, "--seeds", "1", "--epochs", "1", "--period", "5", "--initial-period", "5",
        "--interval-steps", "10", "--reduction", "ring", "--deterministic", "--no-table", "--report",
    ]  # fmt: skip
    own_group = (
        "import runpy, sys, torch.distributed as dist; dist.init_process_group('gloo'); sys.argv[0] = sys.argv[1]; "
        "del sys.argv[1]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
        "runpy.run_path(sys.argv[0], run_name='__main__'); dist.destroy_process_group()"
    )
    checksums = []
    for launcher, start in ((OPEN_MPI, ()), (TORCHRUN, ()), (TORCHRUN, ("-c", own_group))):
        folder = tmp_path / str(len(checksums))
        job = launcher.run(4, *start, EXAMPLE, *options, str(folder), timeout_seconds=250, prepared=PREPARED)
        assert job.status == 0, job.output
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        checksums.append({line["algorithm"]: line["checksum"] for line in lines if "summary" in line})
    assert checksums[0].keys() == {*ALGORITHMS}
    for found in checksums:
        del found["allreduce"]  # its sums are MPI's and Gloo's own, each in an order of its own
    assert len({*checksums[0].values()}) >= DIFFERENT
    assert checksums[0] == checksums[1] == checksums[2]


def test_a_rank_that_is_killed_ends_the_job() -> None:
    wait = "lt.init()\nif lt.rank() == 1: os.kill(os.getpid(), signal.SIGKILL)\nworld.transport().barrier()"
    job = TORCHRUN.run(3, "-c", BEGIN + wait, timeout_seconds=90)
    assert job.status not in (0, None)
    assert "Signal 9 (SIGKILL)" in job.output


@pytest.mark.parametrize(
    ("wait", "named"),
    [
        ("world.transport().exchange([], [(1, np.empty(1))]).wait()", "rank 1"),
        ("world.transport().allreduce(np.ones(4))", "a rank"),
        ("lt.synchronize(lt.allreduce_async(torch.ones(3), name='x'))", "rank 1"),
        ("world.transport()._opened_short_messages().close()", "rank 1"),
        *selected_cases(
            [],
            [
                ("world.transport().take_notice(1)", "rank 1"),
                ("while world.transport().read_notice(1) is None: time.sleep(0.01)", "rank 1"),
            ],
        ),
    ],
    ids=["exchange", "allreduce", "asynchronous", "last message", *selected_cases([], ["notice", "polled notice"])],
)
def test_ranks_that_wait_for_one_that_was_killed_say_so(wait: str, named: str) -> None:
    """Without an agent that ends them first."""
    kill = "lt.init()\nif lt.rank() == 1: time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)\n"
    for rank, found in enumerate(by_hand(BEGIN + kill + wait, 3)):
        assert found.returncode == (-9 if rank == 1 else 1), found.stdout
        if rank != 1:
            assert f"torch.distributed failed: {named} has died, or has left the job without" in found.stdout


def test_an_exception_ends_the_job_with_its_reason() -> None:
    job = TORCHRUN.run(
        3, "-c", BEGIN + "lt.init()\nif lt.rank() == 1: raise ValueError('boom')\n" + SUM, prepared=PREPARED
    )
    assert job.status not in (0, None)
    assert "ValueError: boom" in job.output
    assert "Lentando: rank 1 failed (ValueError) and ends the job" in job.output


def test_groups_of_the_program_are_used_and_left_alone() -> None:
    """Its default group, parts of it at the same time, of any backend, and again after shutdown()."""
    program = """
from torch.testing._internal.distributed import fake_pg  # registers a backend that sends nothing
dist.init_process_group("gloo")
rank = dist.get_rank()
pending = dist.all_reduce(torch.ones(1), async_op=True)
for members, backend in (([0, 1], "gloo"), ([2, 3], "fake")):
    group = dist.new_group(members, backend=backend)
    if rank in members:
        lt.init(process_group=group)
        assert (lt.rank(), lt.size()) == (members.index(rank), 2)
        lt.barrier()
        lt.shutdown()
lt.init()
pending.wait()
everyone = torch.ones(1)
dist.all_reduce(everyone)
assert everyone.item() == lt.size() == 4
dist.destroy_process_group()
"""
    job = TORCHRUN.run(4, "-c", BEGIN + program + SUM, prepared=PREPARED)
    assert job.status == 0, job.output
    assert done(job.output) == [f"done {rank} of 4 over torch" for rank in range(4)]


def test_init_makes_groups_that_shutdown_destroys_though_no_rank_receives_a_message() -> None:
    program = """
for _ in range(2):
    lt.init()
    assert dist.is_initialized()
    lt.barrier()
    lt.shutdown()
    assert not dist.is_initialized()
lt.init()
transport = world.transport()
other = 1 - lt.rank()
if lt.rank() == 0:
    transport.exchange([(1, np.ones(100_000))], [])
    assert not transport.exchange([], [(1, np.empty(10))], 3).test()
lt.shutdown()
sys.stdout.write("done\\n")
"""
    job = TORCHRUN.run(2, "-c", BEGIN + program, prepared=PREPARED)
    assert job.status == 0, job.output
    assert done(job.output) == ["done", "done"]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("lt.init(elastic=True)", "ConfigurationError: elastic=True is not possible over torch.distributed"),
        (
            "dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())\nlt.init()",
            "promises 2 ranks (WORLD_SIZE=2), but torch.distributed sees 1",
        ),
        ("if os.environ['RANK'] == '0': lt.init()\nelse: time.sleep(20)", "for the other ranks to join"),
        (
            "dist.init_process_group('gloo')\ngroup = dist.new_group([0])\nlt.init(process_group=group)",
            "expected a process group of torch.distributed that this process is a member of",
        ),
    ],
    ids=["elastic", "another size", "one rank alone", "not a member"],
)
def test_a_mistake_is_an_error_that_names_it(program: str, expected: str) -> None:
    job = TORCHRUN.run(2, "-c", BEGIN + program, environment={"LENTANDO_JOIN_SECONDS": "3"}, prepared=PREPARED)
    assert job.status not in (0, None)
    assert expected in job.output, job.output


def test_a_world_of_one_needs_no_process_group() -> None:
    job = TORCHRUN.run(1, "-c", BEGIN + "lt.init()\nassert not dist.is_initialized()\n" + SUM, prepared=PREPARED)
    assert job.status == 0, job.output
    assert done(job.output) == ["done 0 of 1 over single"]


def test_torch_can_be_chosen_and_names_what_is_missing() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import lentando.torch as lt; lt.init()"],
        env={**os.environ, "LENTANDO_TRANSPORT": "torch"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1
    assert "lacks RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Start with torchrun" in run.stderr
