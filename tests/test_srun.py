"""Jobs that Slurm's srun starts, on a cluster of one node. Skipped, saying so, where there can be none."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import slurm
from launching import Job, find_mpirun
from pages import LAUNCHING, blocks

CHECKOUT = Path(__file__).parents[1]
MPICH = Path(sys.prefix, "mpich/bin/python")
"""Python of an environment with MPICH; this one has Open MPI."""
PROGRAM = """
import sys
import numpy as np
from lentando.comm import world
world.init()
ranks = np.array([world.rank()], np.int64)
world.transport().allreduce(ranks)
sys.stdout.write(f"rank {world.rank()} of {world.size()}: {ranks[0]}\\n")  # in one piece
"""
ALL_FOUR = [f"rank {rank} of 4: 6" for rank in range(4)]

needs_mpich = pytest.mark.skipif(not MPICH.exists(), reason=f"no {MPICH}: an environment with MPICH")


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    reason = slurm.missing()
    if reason is not None:
        pytest.skip(reason)
    with slurm.cluster() as made:
        yield made


def srun(cluster: slurm.Cluster, plugin: str, python: Path = Path(sys.executable)) -> Job:
    """The program on four ranks."""
    command = ("srun", "--ntasks=4", f"--mpi={plugin}", str(python), "-c", PROGRAM)
    return cluster.run(*command, environment={"PYTHONPATH": str(CHECKOUT / "src")})


def ranks_of(job: Job) -> list[str]:
    """What the ranks wrote: srun may say next to it that it waited for the node."""
    return sorted(line for line in job.output.splitlines() if line.startswith("rank"))


def test_open_mpi_meets_through_pmix(cluster: slurm.Cluster) -> None:
    if not cluster.has_plugin("pmix"):
        pytest.skip("srun --mpi=pmix cannot load its library: apt-get install libpmix-dev")
    job = srun(cluster, "pmix")
    assert job.status == 0, job.output
    assert ranks_of(job) == ALL_FOUR


@needs_mpich
def test_mpich_meets_through_pmi2(cluster: slurm.Cluster) -> None:
    job = srun(cluster, "pmi2", MPICH)
    assert job.status == 0, job.output
    assert ranks_of(job) == ALL_FOUR


@pytest.mark.parametrize("plugin", ["pmi2", "none"])
def test_open_mpi_that_srun_leaves_alone_is_an_error_that_names_the_plugin(cluster: slurm.Cluster, plugin: str) -> None:
    refused(srun(cluster, plugin), "Open MPI", "srun --mpi=pmix for Open MPI")


@needs_mpich
def test_mpich_that_srun_leaves_alone_is_an_error_that_names_the_plugin(cluster: slurm.Cluster) -> None:
    refused(srun(cluster, "none", MPICH), "MPICH", "--mpi=pmi2 for MPICH")


def refused(job: Job, library: str, remedy: str) -> None:
    assert job.status not in (0, None), job.output
    assert len(re.findall(rf"LaunchError: .*srun.* promises 4 ranks .*, but MPI sees 1 \({library}", job.output)) == 4
    assert job.output.count("that would train 4 separate models") == 4
    assert remedy in job.output


def test_doctor_names_the_plugin(cluster: slurm.Cluster) -> None:
    command = ("srun", "--ntasks=2", "--mpi=none", sys.executable, "-m", "lentando.cli", "doctor", "--json")
    job = cluster.run(*command)
    assert job.status == 1, job.output
    (line,) = [line for line in job.output.splitlines() if line.startswith('{"format"')]
    (found,) = [finding for finding in json.loads(line)["findings"] if finding["level"] == "problem"]
    assert "srun promises 2 ranks (SLURM_STEP_NUM_TASKS=2), but MPI sees 1" in found["text"]
    assert found["fix"] == "srun --ntasks=2 --mpi=pmix lentando doctor"
    if cluster.has_plugin("pmix"):
        job = cluster.run(*found["fix"].split()[:3], *command[3:])
        assert job.status == 0, job.output


@pytest.mark.parametrize("script", blocks(LAUNCHING, "bash"), ids=["MPI", "torchrun"])
def test_scripts_of_the_documentation_start_the_smallest_example(
    cluster: slurm.Cluster, script: str, tmp_path: Path
) -> None:
    if "--mpi=pmix" in script and not cluster.has_plugin("pmix"):
        pytest.skip("srun --mpi=pmix cannot load its library: apt-get install libpmix-dev")
    (tmp_path / "train.py").symlink_to(CHECKOUT / "examples/minimal_torch.py")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "job.sh").write_text(script)
    tasks = 1 if "torchrun" in script else 4
    smaller = ("--nodes=1", f"--ntasks-per-node={tasks}", "--cpus-per-task=1", f"--chdir={tmp_path}", "--output=log")
    job = cluster.run("sbatch", "--wait", *smaller, str(tmp_path / "job.sh"), timeout_seconds=120)
    assert job.status == 0, job.output + (tmp_path / "log").read_text()
    assert "4 ranks found [1.0, -2.0, 3.0, -4.0]" in (tmp_path / "log").read_text()


def test_mpirun_inside_an_allocation_counts_its_own_ranks(cluster: slurm.Cluster) -> None:
    command = ("salloc", "--quiet", "--ntasks=4", find_mpirun(), "-np", "4", sys.executable, "-c", PROGRAM)
    job = cluster.run(*command)
    assert job.status == 0, job.output
    assert ranks_of(job) == ALL_FOUR


def test_mpirun_inside_a_step_of_one_task_counts_its_own_ranks(cluster: slurm.Cluster) -> None:
    command = ("srun", "--ntasks=1", "--mpi=none", find_mpirun(), "-np", "4", sys.executable, "-c", PROGRAM)
    job = cluster.run(*command)
    assert job.status == 0, job.output
    assert ranks_of(job) == ALL_FOUR


def test_nothing_is_left_of_a_cluster_that_a_test_fails_in() -> None:
    if reason := slurm.missing():
        pytest.skip(reason)
    with suppress(ZeroDivisionError), slurm.cluster() as made:
        assert len(slurm.processes(made)) >= 3
        raise ZeroDivisionError
    assert slurm.processes(made) == []
    assert not made.folder.exists()
