"""Who is missing when ranks wait, reported by whole programs under mpirun."""

import re
from pathlib import Path

import pytest
from launching import Job, mpirun

from lentando.comm.errors import ConfigurationError
from lentando.comm.stall import STALLED_STATUS, Thresholds

PROGRAM = """
import os, signal, time
import torch
import lentando.torch as lt

lt.init()
model = torch.nn.Linear(4, 1)
sgd = torch.optim.SGD(model.parameters(), lr=0.1)

def step(optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()

def slow_loader(seconds):
    time.sleep(seconds)
"""


def run(tmp_path: Path, ending: str, size: int = 3, **seconds: float) -> Job:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + ending)
    settings: dict[str, str | None] = {f"LENTANDO_STALL_{name.upper()}": str(value) for name, value in seconds.items()}
    return mpirun(size, str(program), timeout_seconds=120, environment=settings, prepared="lentando.torch")


LATE = """
optimizer = lt.SlowMo(sgd, model=model, period=4)
for number in range(8):
    if number == 6 and lt.rank() == 1:
        slow_loader(4)
    step(optimizer)
print("rank", lt.rank(), "is done")
"""


def test_ranks_that_wait_say_who_is_missing_and_where(tmp_path: Path) -> None:
    job = run(tmp_path, LATE, seconds=1)
    assert job.status == 0, job.output
    assert job.output.count("is done") == 3
    lines = PROGRAM.splitlines()
    stepping, napping = (lines.index(f"    {code}") + 1 for code in ("optimizer.step()", "time.sleep(seconds)"))
    program = re.escape(str(tmp_path / "program.py"))
    assert re.search(
        r"ranks 0 and 2 have waited for [123] s in the outer step after inner step 8 "
        rf"\(at {program}:{stepping} in step\)\. Missing: "
        rf"rank 1 is at {program}:{napping} in slow_loader, after the outer step after inner step 4$",
        job.output,
        re.MULTILINE,
    ), job.output  # on a busy machine, earlier waits may be reported, too


def test_while_no_rank_waits_for_long_nothing_is_reported(tmp_path: Path) -> None:
    job = run(tmp_path, LATE.replace("slow_loader(4)", "slow_loader(1)"), seconds=30)
    assert job.status == 0, job.output
    assert "waited" not in job.output


def test_stopped_rank_ends_the_job_after_the_second_limit(tmp_path: Path) -> None:
    ending = """
optimizer = lt.DistributedOptimizer(sgd, model=model)
for number in range(8):
    if number == 3 and lt.rank() == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    step(optimizer)
"""
    job = run(tmp_path, ending, seconds=1, shutdown_seconds=8)
    assert job.status == STALLED_STATUS, job.output
    assert "in the average of gradients of inner step 4" in job.output
    assert "Missing: rank 2 does not answer: its process is stopped, dead or unreachable" in job.output
    assert (
        f"rank 0 ends the job with status {STALLED_STATUS}: LENTANDO_STALL_SHUTDOWN_SECONDS=8 have passed" in job.output
    )
    assert job.seconds < 100


def test_gossip_whose_neighbor_has_ended_says_so(tmp_path: Path) -> None:
    ending = """
optimizer = lt.DistributedOptimizer(sgd, model=model, base=lt.SGP())
for number in range(5 if lt.rank() == 1 else 20):
    step(optimizer)
"""
    job = run(tmp_path, ending, size=2, seconds=1, shutdown_seconds=40)
    assert job.status == 1, job.output
    waits = r"rank 0: waits in gossip step 6 for a message of rank 1"
    ended = r"rank 1: has ended \(shutdown, or the end of the program\) after 5 gossip steps"
    assert re.search(f"MismatchError: .*{waits}; {ended}", job.output), job.output


@pytest.mark.parametrize("name", ["LENTANDO_STALL_SECONDS", "HOROVOD_STALL_CHECK_TIME_SECONDS"])
def test_limits_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert Thresholds.from_environment() == Thresholds(60.0, 0.0)
    monkeypatch.setenv(name, "7.5")
    assert Thresholds.from_environment().warn_seconds == 7.5
    monkeypatch.setenv(name, "soon")
    with pytest.raises(ConfigurationError, match=f"{name}='soon': expected a number of seconds, 0 for never"):
        Thresholds.from_environment()


def test_horovods_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_STALL_CHECK_DISABLE", "1")
    assert Thresholds.from_environment().warn_seconds == 0
