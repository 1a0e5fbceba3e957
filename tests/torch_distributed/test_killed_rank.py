"""A rank that is killed, or stands still, while the others are in an operation of backend lentando."""

import pytest
from case_selection import selected_cases
from launching import mpirun

PROGRAM = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
import lentando.c10d

dist.init_process_group("lentando", timeout=timedelta(seconds={timeout}))
pids = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
dist.all_gather(pids, torch.tensor([os.getpid()]))
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
operations = {{
    "all_reduce": lambda: dist.all_reduce(torch.ones(1_000_000)),
    "backward": lambda: model(torch.ones(2, 4)).sum().backward(),
    "barrier": dist.barrier,
}}
operation = operations[sys.argv[1]]
for _ in range(3):  # in the first iterations, DDP changes its buckets
    operation()
if dist.get_rank() == {rank}:
    time.sleep(1)  # the others wait in the operation
    os.kill(os.getpid(), signal.{signal})
started = time.monotonic()
try:
    operation()
except RuntimeError as error:
    print(f"rank {{dist.get_rank()}} caught after {{time.monotonic() - started:.1f}} s: {{error}}", flush=True)
    os.kill(pids[{rank}].item(), signal.SIGKILL)  # mpirun waits long for a process that stands still
    os._exit(1)
"""
OPERATIONS = ("all_reduce", "backward", "barrier")


@pytest.mark.parametrize("operation", selected_cases(["backward"], OPERATIONS))
def test_kill_of_one_rank_ends_the_job_long_before_the_timeout(operation: str) -> None:
    job = mpirun(3, "-c", PROGRAM.format(timeout=1000, signal="SIGKILL", rank=1), operation, timeout_seconds=200)
    assert job.status not in (0, None), job.output
    assert "signal 9" in job.output


@pytest.mark.parametrize(
    ("operation", "rank"),
    selected_cases(
        [("all_reduce", 0), ("backward", 1)],
        [(operation, rank) for operation in OPERATIONS for rank in (0, 1)],
    ),
)
def test_rank_that_stands_still_is_an_error_on_the_others_after_the_timeout(operation: str, rank: int) -> None:
    """Rank 0 holds the store of torch.distributed, which then answers no other rank."""
    program = PROGRAM.format(timeout=5, signal="SIGSTOP", rank=rank)
    job = mpirun(3, "-c", program, operation, timeout_seconds=100, prepared="lentando.torch")
    assert job.status not in (0, None), job.output
    assert "has reached its timeout of 5 s" in job.output
