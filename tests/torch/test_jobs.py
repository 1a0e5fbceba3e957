"""Whole programs under mpirun: what happens to a job when something goes wrong on one rank."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from case_selection import selected_cases
from launching import mpirun
from prepared_python import prepared_python

PROGRAM = """
import sys, time
import torch
import lentando.torch as lt

lt.init()

def make(method):
    model = torch.nn.Linear(4, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    if method == "allreduce":
        return model, lt.DistributedOptimizer(sgd, model=model)
    return model, lt.SlowMo(sgd, model=model, period=4)

model, optimizer = make(sys.argv[1])

def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()

def fail():
    print(f"fails at {time.time()} s", flush=True)
    raise RuntimeError("disk is on fire")

"""
METHODS = ["slowmo", "allreduce"]
WHERE_BOTH_FAIL_ALIKE = selected_cases(["slowmo"], METHODS)


def run(tmp_path: Path, ending: str, method: str, size: int = 3, prepared: str | None = "lentando.torch") -> Any:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + ending)
    return mpirun(size, str(program), method, timeout_seconds=120, prepared=prepared)


def check_that_the_failure_has_ended(job: Any) -> None:
    """Check what a job has written, and that it has ended soon after ``fail``, however long its start has taken."""
    ended = time.time()
    assert job.status not in (0, None)
    assert "RuntimeError: disk is on fire" in job.output
    assert "rank 2 failed (RuntimeError) and ends the job" in job.output
    (failed,) = re.findall(r"fails at ([0-9.]+) s", job.output)
    assert ended - float(failed) < 20


@pytest.mark.parametrize("method", METHODS)
def test_rank_with_fewer_batches_is_named_on_every_rank(tmp_path: Path, method: str) -> None:
    job = run(tmp_path, "train(10 if lt.rank() == 1 else 16)", method)
    assert job.status not in (0, None)
    assert job.output.count("MismatchError: the ranks are not about to do the same thing") == 3
    assert ("after 12 steps and 2 rounds" if method == "slowmo" else "after 10 steps") in job.output
    assert "rank 1: has ended (shutdown, or the end of the program)" in job.output
    assert job.seconds < 100  # most of it to start, on a machine that is busy


@pytest.mark.parametrize("method", WHERE_BOTH_FAIL_ALIKE)
def test_rank_that_raises_takes_the_job_down(tmp_path: Path, method: str) -> None:
    ending = "train(5)\nif lt.rank() == 2: fail()\ntrain(1000000)"
    check_that_the_failure_has_ended(run(tmp_path, ending, method, prepared=None))


def test_inside_join_a_rank_may_have_fewer_batches_and_equal_steps_end_well(tmp_path: Path) -> None:
    ending = """
for method in ("slowmo", "allreduce"):
    model, optimizer = make(method)
    with lt.join(optimizer):
        train(10 if lt.rank() == 1 else 16)
    print("joined", method, model.weight.data.tolist())
model, optimizer = make("slowmo")
train(10)
print("done", optimizer.report()["rounds"])
"""
    job = run(tmp_path, ending, "slowmo")
    assert job.status == 0, job.output
    for method in METHODS:
        joined = [line for line in job.output.splitlines() if line.startswith(f"joined {method}")]
        assert len(joined) == 3
        assert len(set(joined)) == 1
    assert job.output.count("done 2") == 3


def test_traceback_is_shown_where_torch_distributed_collects_what_hooks_write(tmp_path: Path) -> None:
    """init_process_group wraps the hook that ends the job, and would write its output only when it returns."""
    ending = f"""
store = torch.distributed.FileStore({str(tmp_path / "store")!r}, lt.size())
torch.distributed.init_process_group("gloo", store=store, rank=lt.rank(), world_size=lt.size())
if lt.rank() == 1: raise RuntimeError('disk is on fire')
train(1000000)
"""
    job = run(tmp_path, ending, "slowmo", size=2)
    assert job.status not in (0, None)
    assert "RuntimeError: disk is on fire" in job.output
    assert "rank 1 failed (RuntimeError) and ends the job" in job.output


@pytest.mark.parametrize("method", WHERE_BOTH_FAIL_ALIKE)
def test_rank_that_raises_inside_join_takes_the_job_down(tmp_path: Path, method: str) -> None:
    ending = """
with lt.join(optimizer):
    if lt.rank() == 2: train(5); fail()
    train(1000000 if lt.rank() == 1 else 3)
"""
    check_that_the_failure_has_ended(run(tmp_path, ending, method))


def run_alone(python: list[str], program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*python, "-c", program], capture_output=True, text=True, timeout=120, check=False)


def test_use_before_init_is_refused() -> None:
    program = """
import torch, lentando.torch as lt
weight = torch.nn.Parameter(torch.zeros(2))
sgd = torch.optim.SGD([weight], lr=0.1)
wraps, reduces, sends = lambda: lt.SlowMo(sgd), lambda: lt.allreduce(weight), lambda: lt.broadcast_object(1)
uses = [lt.rank, lt.size, lt.barrier, wraps, reduces, sends]
for use in uses:
    try:
        use()
    except lt.NotInitializedError as error:
        print(error)
"""
    finished = run_alone(prepared_python("lentando.torch"), program)
    assert finished.stdout.count("call init() first") == 6, finished.stderr


def test_torch_package_loads_no_tensorflow_and_no_mpi() -> None:
    program = (
        "import sys, lentando.torch\nprint([m for m in ('tensorflow', 'keras', 'mpi4py.MPI') if m in sys.modules])"
    )
    assert run_alone([sys.executable], program).stdout.strip() == "[]"


def test_rank_that_forgets_the_loss_takes_the_job_down_with_the_reason(tmp_path: Path) -> None:
    ending = """
optimizer = lt.AdaComm(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
for step in range(100000):
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    optimizer.step(loss=loss if lt.rank() != 1 else None)
"""
    job = run(tmp_path, ending, "slowmo")
    assert job.status not in (0, None)
    assert "ConfigurationError: inner step 1 on rank 1 came without its training loss" in job.output
    assert "rank 1 failed (ConfigurationError) and ends the job" in job.output
    assert job.seconds < 100  # most of it to start, on a machine that is busy
