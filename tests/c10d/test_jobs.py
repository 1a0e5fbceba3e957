"""Jobs over backend lentando: how they start, and how they end when a rank fails."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from launchers import TORCHRUN
from launching import Job, mpirun

from lentando.c10d.endings import GRACE_SECONDS
from lentando.c10d.waiting import LOOK_SECONDS

BEGIN = """
import os, sys, time
import torch
from datetime import timedelta
from torch import distributed as dist
import lentando.c10d
"""
INIT = 'dist.init_process_group("lentando")\nrank, size = dist.get_rank(), dist.get_world_size()\n'
ONE_SUM = "tensor = torch.ones(2)\ndist.all_reduce(tensor)\nassert tensor.tolist() == [size, size], tensor\n"


def job(size: int, program: str, environment: dict[str, str | None] | None = None) -> Job:
    unset: dict[str, str | None] = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    return mpirun(
        size, "-c", BEGIN + textwrap.dedent(program), timeout_seconds=100, prepared="lentando.torch",
        environment={**unset, **(environment or {})},
    )  # fmt: skip


def test_no_argument_is_needed_groups_can_be_made_again_and_the_last_need_not_be_destroyed() -> None:
    """Though messages are in flight when the program ends."""
    found = job(
        2,
        INIT + ONE_SUM + "dist.destroy_process_group()\n" + INIT + ONE_SUM + "dist.destroy_process_group()\n"
        "variables = [os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')]\n"
        "print('variables', variables == [str(rank), '2', '2'], flush=True)\n"
        + INIT
        + ONE_SUM
        + "work = dist.irecv(torch.empty(3), 1 - rank)\nprint('end', flush=True)\n",
    )
    assert found.status == 0, found.output
    assert found.output.count("variables True") == 2, found.output
    assert found.seconds < 90


def test_functions_attached_to_futures_end_before_the_program_does() -> None:
    found = job(
        2,
        INIT + "future = dist.all_reduce(torch.ones(2), async_op=True).get_future()\n"
        "future.then(lambda done: (time.sleep(1), print('attached', done.value()[0].tolist(), flush=True)))\n",
    )
    assert found.status == 0, found.output
    assert found.output.count("attached [2.0, 2.0]") == 2, found.output


def test_ranks_that_torch_distributed_numbers_otherwise(tmp_path: Path) -> None:
    """They are mapped to the ranks of MPI."""
    program = """
    mpi_rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rank = size - 1 - mpi_rank
    dist.init_process_group("lentando", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=size)
    tensor = torch.tensor([float(rank)])
    dist.broadcast(tensor, 2)
    assert tensor.item() == 2
    rows = [torch.empty(1) for _ in range(size)]
    dist.all_gather(rows, torch.tensor([float(rank)]))
    assert [row.item() for row in rows] == [0, 1, 2]
    """
    found = job(3, program, {"STORE": str(tmp_path / "store")})
    assert found.status == 0, found.output


STARTS_PROCESSES = """
import subprocess, sys
import torch
import lentando.c10d

class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, number):
        return number**2

if __name__ == "__main__":
    torch.distributed.init_process_group("lentando")
    if torch.distributed.get_rank() == 0:
        for method in ("spawn", "forkserver"):
            loader = torch.utils.data.DataLoader(Squares(), num_workers=1, multiprocessing_context=method)
            assert [number.item() for number in loader] == [0, 1, 4]
        subprocess.run([sys.executable, "-c", "import lentando.c10d"], check=True)
    torch.distributed.barrier()
    print("end", flush=True)
"""


def test_process_that_a_rank_starts_can_import_the_backend(tmp_path: Path) -> None:
    """A loader's worker imports the program again, on one rank only."""
    program = tmp_path / "starts_processes.py"
    program.write_text(STARTS_PROCESSES)
    found = mpirun(2, str(program), timeout_seconds=100)
    assert found.status == 0, found.output
    assert found.output.count("end") == 2, found.output


def test_torchrun_without_mpi_is_refused_with_what_to_use() -> None:
    program = BEGIN + 'dist.init_process_group("lentando")'
    job = TORCHRUN.run(2, "-c", program, timeout_seconds=100, prepared="lentando.torch")
    assert job.status not in (0, None), job.output
    assert "torchrun has started this one. Start with mpirun or srun" in job.output
    assert 'use init_process_group("gloo")' in job.output


def test_group_of_one_process_needs_no_mpi() -> None:
    program = BEGIN + INIT + ONE_SUM + "assert 'mpi4py.MPI' not in sys.modules\n"
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@pytest.mark.alone
def test_exception_in_a_group_of_one_process_is_the_only_thing_that_it_reports() -> None:
    program = BEGIN + INIT + "print('raised', time.time(), flush=True)\nraise ValueError('broken')\n"
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.count("Traceback") == 1, run.stderr
    assert run.stderr.endswith("ValueError: broken\n")
    assert time.time() - float(run.stdout.split()[1]) < GRACE_SECONDS + LOOK_SECONDS


def test_groups_of_other_ranks_after_another_initialisation() -> None:
    """Rank 2 creates one of them only, of the same name."""
    program = """
    for members in ([0, 1], [1, 2]):
        dist.init_process_group("lentando", timeout=timedelta(seconds=10))
        group = dist.new_group(members)
        if dist.get_rank() in members:
            tensor = torch.ones(2)
            dist.all_reduce(tensor, group=group)
            assert tensor.tolist() == [2, 2], tensor
        dist.destroy_process_group()
    """
    found = job(3, program)
    assert found.status == 0, found.output


FAILURES = {
    "exception": ("raise ValueError('this rank breaks')", "rank 1 has failed (ValueError: this rank breaks)"),
    "exit": ("sys.exit(0)", "rank 1 has ended its program"),
    "destroyed": ("dist.destroy_process_group(); time.sleep(20)", "rank 1 has destroyed the group"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_rank_that_leaves_is_an_error_on_the_others_long_before_the_timeout(failure: str) -> None:
    what, message = FAILURES[failure]
    program = f"""
    if rank == 1:
        {what}
    else:
        started = time.monotonic()
        try:
            dist.all_reduce(torch.ones(3))
        except dist.DistBackendError as error:
            print("caught", rank, round(time.monotonic() - started), error, flush=True)
            raise
    """
    found = job(3, INIT + ONE_SUM + textwrap.dedent(program))
    assert found.status not in (0, None), found.output
    assert found.seconds < 90
    assert found.output.count("caught") == 2, found.output
    assert message in found.output


def test_rank_that_never_creates_the_group_is_named(tmp_path: Path) -> None:
    program = """
    if os.environ["RANK"] == "1":
        time.sleep(10)
    else:
        os.environ["TORCH_DIST_INIT_BARRIER"] = "0"
        store = dist.FileStore(os.environ["STORE"], 2)
        try:
            dist.init_process_group("lentando", store=store, rank=0, world_size=2, timeout=timedelta(seconds=2))
        except dist.DistBackendError as error:
            print("caught", error, flush=True)
    """
    found = job(2, program, {"STORE": str(tmp_path / "store")})
    assert "rank 0 of 2 has waited 2 s for rank 1 of group" in found.output, found.output


def test_error_reaches_backward_of_a_distributed_model() -> None:
    """Through PyTorch's C++ code, which waits for futures."""
    program = """
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    for _ in range(3):  # in the first ones, DDP changes its buckets
        model(torch.ones(2, 4)).sum().backward()
    if rank == 1:
        time.sleep(40)
        os._exit(0)
    loss = model(torch.ones(2, 4)).sum()
    try:
        loss.backward()
    except RuntimeError as error:
        print("caught", error, flush=True)
    os._exit(3)
    """
    init = INIT.replace('"lentando")', '"lentando", timeout=timedelta(seconds=10))')
    found = job(2, init + textwrap.dedent(program))
    assert "caught" in found.output, found.output
    assert "has reached its timeout of 10 s" in found.output, found.output
