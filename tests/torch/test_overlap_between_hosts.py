"""Gradients overlap by default between hosts: a job on two of them, continued on one machine."""

import subprocess
import sys
from pathlib import Path

import pytest
from prepared_python import prepared_python
from two_hosts import TWO_HOSTS, need_hosts

pytestmark = pytest.mark.alone

PROGRAM = """
import sys
import torch
from torch import nn
import lentando.torch as lt

folder, first, last, expected = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4] == "True"
lt.init()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2))
optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
assert optimizer.report()["is_overlapped"] is expected, optimizer.report()["is_overlapped"]

def backward(step):
    optimizer.zero_grad()
    torch.manual_seed(100 * step + lt.rank())
    model(torch.randn(8, 30)).square().mean().backward()

def train(start, stop):
    for step in range(start, stop):
        backward(step)
        optimizer.step()

if first:
    lt.load(folder, optimizer)
train(first, 3)
if not first:
    lt.save(folder, optimizer)
train(max(first, 3), last)
if lt.rank() == 0:
    print("sum", *(value.hex() for p in model.parameters() for value in p.detach().double().flatten().tolist()[:9]))
    backward(last)  # which no step follows
"""


@pytest.fixture(autouse=True)
def _allowed() -> None:
    need_hosts()


def result_of(prefix: list[str], python: list[str], *arguments: object) -> str:
    command = [*prefix, "mpirun", "-np", "2", *python, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("sum")]
    return line


def test_overlap_is_the_default_between_hosts_and_its_checkpoint_continues_on_one(tmp_path: Path) -> None:
    on_hosts = result_of(TWO_HOSTS, [sys.executable], tmp_path / "checkpoint", 0, 6, True)
    assert result_of([], prepared_python("lentando.torch"), tmp_path / "checkpoint", 3, 6, False) == on_hosts
