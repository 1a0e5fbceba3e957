"""A rank that is killed, or stands still, while the others are in an operation of backend lentando."""

import pytest
from launching import mpirun

PROGRAM = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
import lentando.c10d

dist.init_process_group("lentando", timeout=timedelta(seconds={timeout}))
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
operations = {{
    "all_reduce": lambda: dist.all_reduce(torch.ones(1_000_000)),
    "backward": lambda: model(torch.ones(2, 4)).sum().backward(),
    "barrier": dist.barrier,
}}
operation = operations[sys.argv[1]]
for _ in range(3):  # in the first iterations, DDP changes its buckets
    operation()
if dist.get_rank() == 1:
    time.sleep(1)  # the others wait in the operation
    os.kill(os.getpid(), signal.{signal})
started = time.monotonic()
try:
    operation()
except RuntimeError as error:
    print(f"rank {{dist.get_rank()}} caught after {{time.monotonic() - started:.1f}} s: {{error}}", flush=True)
    os._exit(1)
"""
OPERATIONS = ("all_reduce", "backward", "barrier")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kill_of_one_rank_ends_the_job_long_before_the_timeout(operation: str) -> None:
    job = mpirun(3, "-c", PROGRAM.format(timeout=1000, signal="SIGKILL"), operation, timeout_seconds=200)
    assert job.status not in (0, None), job.output
    assert "signal 9" in job.output


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rank_that_stands_still_is_an_error_on_the_others_after_the_timeout(operation: str) -> None:
    job = mpirun(3, "-c", PROGRAM.format(timeout=5, signal="SIGSTOP"), operation, timeout_seconds=200)
    assert job.status not in (0, None), job.output
    assert "has reached its timeout of 5 s" in job.output
