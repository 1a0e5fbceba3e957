"""Whole programs under mpirun that train in two process sets of two ranks: checkpoints, stalls, signals."""

import re
from pathlib import Path

from launching import mpirun

PROGRAM = """
import os, signal, sys, time
import torch
import lentando.torch as lt

lt.init(process_sets=[lt.ProcessSet([0, 2]), lt.ProcessSet([1, 3])])
mine = lt.ProcessSet([0, 2] if lt.rank() % 2 == 0 else [1, 3])
parity, folder = lt.rank() % 2, os.path.join(sys.argv[1], f"set {lt.rank() % 2}")

def made():
    torch.manual_seed(parity)
    model = torch.nn.Linear(4, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, lt.SlowMo(sgd, model=model, period=2, process_set=mine)

def train(model, optimizer, first, last):
    for step in range(first, last):
        torch.manual_seed(100 * step + lt.rank())
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
"""

RESUMED = """
model, optimizer = made()
train(model, optimizer, 0, 3)
lt.save(folder, optimizer, extra={"step": 3})
train(model, optimizer, 3, 8)
resumed_model, resumed = made()
extra = lt.load(folder, resumed)
if lt.rank() == 3:
    time.sleep(3.5)
train(resumed_model, resumed, extra["step"], 8)
assert torch.equal(model.weight, resumed_model.weight)
weights = lt.allgather(model.weight.detach())
assert torch.equal(weights[0], weights[2]) and torch.equal(weights[1], weights[3])
assert not torch.equal(weights[0], weights[1])
print("rank", lt.rank(), "has resumed")
"""


def test_sets_save_and_resume_apart_and_a_stall_in_one_names_the_ranks_of_the_job(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + RESUMED)
    job = mpirun(4, str(program), str(tmp_path), environment={"LENTANDO_STALL_SECONDS": "1"}, prepared="lentando.torch")
    assert job.status == 0, job.output
    assert job.output.count("has resumed") == 4
    line = PROGRAM.splitlines().index("        optimizer.step()") + 1
    assert re.search(
        r"rank 1 has waited for [123] s in .* of process set \[1, 3\] "
        rf"\(at .*program.py:{line} in train\)\. Missing: rank 3 is at ",
        job.output,
    ), job.output


SIGNALLED = """
model, optimizer = made()
lt.save_on_signal(folder, optimizer)
train(model, optimizer, 0, 3)
if lt.rank() == 3:
    os.kill(os.getpid(), signal.SIGTERM)
train(model, optimizer, 3, 8)
assert parity == 0
print("rank", lt.rank(), "has trained to the end")
"""


def test_the_members_of_a_set_save_and_leave_when_one_receives_a_signal(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + SIGNALLED)
    job = mpirun(4, str(program), str(tmp_path), prepared="lentando.torch")
    assert job.status == 85, job.output
    assert job.output.count("has trained to the end") == 2
    assert "rank 3 of 2 received" not in job.output
    assert "rank 3 of process set [1, 3] received a signal to stop: saved to" in job.output, job.output
    assert (tmp_path / "set 1" / "checkpoint.json").exists()
    assert not (tmp_path / "set 0").exists()
