"""Processes that ranks make by fork: they end as other processes do, signals end them, and they do not communicate."""

from pathlib import Path

import pytest
from launchers import OPEN_MPI, WITH_MPICH, Launcher, has_torch

PROGRAM = """
import multiprocessing, os, signal, sys, time
import torch
import lentando.torch as lt

lt.init()
model = torch.nn.Linear(3, 3)
optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), 0.1), model=model, period=2, slow_momentum=0.5)
before = signal.getsignal(signal.SIGTERM)
lt.save_on_signal("nowhere", optimizer)

def status_of(work):
    process = os.fork()
    if process == 0:
        work()
        sys.exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def know_the_rank():
    assert (lt.size(), lt.rank()) == (size, rank) and signal.getsignal(signal.SIGTERM) == before
    lt.shutdown()
    assert not lt.is_initialized()

def fail():
    raise ValueError("in a child")

size, rank = lt.size(), lt.rank()
statuses = [status_of(work) for work in (know_the_rank, fail, lt.barrier, optimizer.averaged().__enter__)]
context = multiprocessing.get_context("fork")
endless = [context.Process(target=time.sleep, args=(1000,), daemon=index > 3) for index in range(8)]
for process in endless:
    process.start()
    if not process.daemon:
        process.terminate()  # right after the fork: nothing of the signal may be lost
for process in endless[:4]:
    process.join()
    statuses.append(process.exitcode)

class Ranks(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor(lt.rank())

seen = {int(item) for item in torch.utils.data.DataLoader(Ranks(), batch_size=None, num_workers=2)}
assert seen == {rank}, seen
assert lt.allgather_object(statuses) == [statuses] * size
for _ in range(4):
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
print("STATUSES", statuses, flush=True)
"""


@pytest.mark.parametrize("launcher", [OPEN_MPI, WITH_MPICH], ids=lambda launcher: launcher.name)
def test_children_of_ranks_are_no_ranks(tmp_path: Path, launcher: Launcher) -> None:
    launcher.need()
    if launcher is WITH_MPICH and not has_torch(launcher):
        pytest.skip("the environment of MPICH has no PyTorch")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    job = launcher.run(2, str(program), timeout_seconds=150)
    assert job.status == 0, job.output
    # Status 3 is that of sys.exit, 1 that of an exception, -15 that of SIGTERM.
    assert job.output.count("STATUSES [3, 1, 1, 1, -15, -15, -15, -15]") == 2, job.output
    refused = "was made by fork (multiprocessing, os.fork) from rank {}, and only the rank itself can communicate"
    assert all(job.output.count(refused.format(rank)) == 2 for rank in range(2)), job.output
    assert "has received SIGTERM" not in job.output
    assert "ends the job" not in job.output
