"""Whole jobs whose ranks gossip for unequally many steps: an error on every rank, within seconds, never a wait."""

from pathlib import Path

import pytest
from case_selection import thoroughly
from launchers import OPEN_MPI, WITH_MPICH, Launcher, has_torch

TORCH = """
import sys, torch
import lentando.torch as lt

size, ending = int(sys.argv[1]), sys.argv[2]
lt.init()
model = torch.nn.Linear(size, size)
sgd = torch.optim.SGD(model.parameters(), lr=0.1 / size)
base, period = {"exit": (lt.SGP(), None), "evaluate": (lt.OSGP(), 4), "": (lt.DPSGD(), 4)}[ending]
optimizer = lt.DistributedOptimizer(sgd, model=model, base=base, period=period)
for _ in range(6 if lt.rank() == 1 else 9):
    optimizer.zero_grad()
    model(torch.ones(1, size)).mean().backward()
    optimizer.step()
if lt.rank() == 1 and ending == "exit":
    sys.exit(5)
if ending == "evaluate":
    with optimizer.averaged():
        pass
"""
KERAS = """
import keras, numpy as np
import lentando.tensorflow as lt

lt.init()
model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
optimizer = lt.DistributedOptimizer(keras.optimizers.SGD(0.1), model=model, base=lt.SGP())
model.compile(optimizer=optimizer, loss="mse")
count = 6 if lt.rank() == 1 else 9
model.fit(np.ones((count, 3)), np.ones((count, 2)), batch_size=1, verbose=0)
"""
LARGE = "1200"
"""Layers whose messages an engine does not copy aside: their sender waits for the receiver."""


def check(launcher: Launcher, prepared: str, ranks: int, program: Path, *arguments: str) -> None:
    job = launcher.run(ranks, str(program), *arguments, timeout_seconds=120, prepared=prepared)
    assert job.status not in (0, None), job.output
    assert job.output.count("MismatchError: the ranks are not about to do the same thing") >= ranks, job.output
    ended = "evaluates the average" if "evaluate" in arguments else "has ended (shutdown, or the end of the program)"
    assert f"rank 1: {ended}" in job.output, job.output


@pytest.mark.parametrize("launcher", [OPEN_MPI, WITH_MPICH], ids=lambda launcher: launcher.name)
@pytest.mark.parametrize(("ranks", "size", "ending"), [(2, "3", "exit"), (3, LARGE, "evaluate"), (3, LARGE, "")])
def test_torch(tmp_path: Path, launcher: Launcher, ranks: int, size: str, ending: str) -> None:
    launcher.need()
    if launcher is WITH_MPICH and not has_torch(launcher):
        pytest.skip("the environment of MPICH has no PyTorch")
    program = tmp_path / "program.py"
    program.write_text(TORCH)
    check(launcher, "lentando.torch", ranks, program, size, ending)


@thoroughly
def test_keras(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(KERAS)
    check(OPEN_MPI, "lentando.tensorflow", 2, program)
