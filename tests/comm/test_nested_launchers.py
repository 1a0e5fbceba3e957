"""Several launchers' variables at once: that of the launcher which started this process counts.

The environments are those of real clusters, reduced to the variables that launchers set.
"""

import sys

import pytest

from lentando.comm.claims import read_claims
from lentando.comm.errors import ConfigurationError, LaunchError
from lentando.comm.launch import advice_without_mpi, check_meeting_point, check_world, detect_launch
from lentando.comm.launchers import LAUNCHERS
from lentando.comm.transport_selection import open_transport

PMI = "mpiexec (MPICH, Intel MPI) or srun --mpi=pmi2"
TORCH = "a launcher that sets RANK and WORLD_SIZE"
MEETING_POINT = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def step(rank: int, size: int, plugin: str = "none") -> dict[str, str]:
    """Variables of a task that srun has started."""
    by_plugin = {
        "none": {},
        "pmi2": {"PMI_RANK": str(rank), "PMI_SIZE": str(size), "PMI_JOBID": "17.0", "PMI_FD": "11"},
        "pmix": {"PMIX_RANK": str(rank), "PMIX_NAMESPACE": "slurm.pmix.17.0", "SLURM_MPI_TYPE": "pmix"},
        "cray_shasta": {"PALS_RANKID": str(rank), "PMI_RANK": str(rank), "PMI_SIZE": str(size), "PMI_LOCAL_RANK": "0"},
    }[plugin]
    task = {"SLURM_JOB_ID": "17", "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    return {**task, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(size), **by_plugin}


def open_mpi(rank: int, size: int) -> dict[str, str]:
    return {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(size), "PMIX_RANK": str(rank)}


def torch(rank: int, size: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", **MEETING_POINT}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process's environment, without the variables of any launcher."""
    for name in {name for launcher in LAUNCHERS for name in launcher.variables}:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def hide_mpi4py(environment: pytest.MonkeyPatch) -> None:
    """Let its import fail, and let it look as if no other test of this process had used MPI."""
    environment.setitem(sys.modules, "mpi4py", None)
    environment.delitem(sys.modules, "mpi4py.MPI", raising=False)


@pytest.mark.parametrize(
    ("variables", "launcher", "rank", "size"),
    [
        ({**step(1, 3, "pmi2"), **open_mpi(5, 8)}, "mpirun (Open MPI)", 5, 8),
        ({**step(0, 2, "cray_shasta"), **open_mpi(1, 4)}, "mpirun (Open MPI)", 1, 4),
        ({**step(1, 2), "PMI_RANK": "5", "PMI_SIZE": "8"}, PMI, 5, 8),
        ({**step(0, 1, "pmi2"), **open_mpi(3, 4)}, "mpirun (Open MPI)", 3, 4),
        ({**step(1, 2, "pmi2"), **torch(5, 8)}, TORCH, 5, 8),
        ({**step(1, 2, "pmix"), **torch(5, 8)}, TORCH, 5, 8),
        ({**step(0, 1, "pmix"), **torch(3, 4)}, TORCH, 3, 4),
        ({**open_mpi(0, 1), **torch(3, 4)}, TORCH, 3, 4),
        ({**open_mpi(1, 2), **torch(5, 8)}, TORCH, 5, 8),
        ({**step(1, 2, "pmi2"), **torch(5, 8), "TORCHELASTIC_RUN_ID": "17"}, "torchrun", 5, 8),
        ({**step(5, 8, "pmi2"), **torch(5, 8)}, PMI, 5, 8),
        ({**step(5, 8, "pmix"), **torch(5, 8)}, "srun", 5, 8),
        ({**step(5, 8, "pmix"), **torch(0, 8)}, "srun", 5, 8),
        ({**step(5, 8, "pmix"), "RANK": "0", "WORLD_SIZE": "16"}, "srun", 5, 8),
        ({**open_mpi(1, 2), "RANK": "0", "WORLD_SIZE": "4", **MEETING_POINT}, "mpirun (Open MPI)", 1, 2),
        ({"ALPS_APP_PE": "3"}, "aprun (Cray)", 3, None),
        ({**step(3, 8), "ALPS_APP_PE": "3", **MEETING_POINT}, "srun", 3, 8),
    ],
    ids=[
        "mpirun whose daemons srun started by pmi2", "the same on a Cray", "Hydra whose daemons srun started",
        "mpirun in a shell of srun", "DeepSpeed's launcher on each node, pmi2", "the same, pmix",
        "DeepSpeed's launcher in a shell of srun", "in a world of one", "on each node, started by mpirun", "torchrun",
        "srun with pmi2 whose wrapper sets RANK", "the same, pmix", "RANK of the batch script", "stale variables",
        "mpirun in a pod that has RANK", "aprun", "srun of a Cray XC",
    ],
)  # fmt: skip
def test_launcher_that_started_the_process_counts(
    variables: dict[str, str], launcher: str, rank: int, size: int | None
) -> None:
    found = detect_launch(variables)
    assert found is not None
    assert (found.launcher, found.rank, found.size, found.is_single_task) == (launcher, rank, size, False)
    assert found.torch is (launcher in (TORCH, "torchrun"))
    assert found.mpi is not found.torch
    first = read_claims(variables)[0]
    assert (first.launcher, first.rank, first.size) == (launcher, rank, size)


@pytest.mark.parametrize("more", [{}, torch(5, 8)], ids=["MASTER_ADDR and MASTER_PORT", "RANK and WORLD_SIZE too"])
def test_srun_without_a_plugin_and_with_a_meeting_point_is_for_torch(more: dict[str, str]) -> None:
    variables = {**step(5, 8), **MEETING_POINT, **more}
    found = detect_launch(variables)
    assert found is not None
    assert (found.launcher, found.torch, found.mpi) == ("srun", True, True)
    assert check_meeting_point(found, variables) == (5, 8)


@pytest.mark.parametrize("variables", [step(5, 8), {**step(5, 8), "MASTER_ADDR": "node1"}])
def test_srun_without_a_meeting_point_is_for_mpi(variables: dict[str, str]) -> None:
    found = detect_launch(variables)
    assert found is not None
    assert (found.torch, found.mpi) == (False, True)


def test_rank_of_the_batch_script_is_an_error_where_ranks_would_meet_by_it() -> None:
    """``export RANK=$SLURM_PROCID`` outside of srun is 0 on all ranks."""
    with pytest.raises(LaunchError, match=r"srun says rank 5 of 8 .* but a launcher that sets RANK .* says rank 0 of"):
        detect_launch({**step(5, 8), **torch(0, 8)})


@pytest.mark.parametrize("plugin", ["none", "pmi2", "pmix", "cray_shasta"])
def test_program_in_a_shell_of_srun_is_alone_and_loads_no_mpi(environment: pytest.MonkeyPatch, plugin: str) -> None:
    """``srun --pty bash``, and salloc where it opens its shell on the node."""
    for name, value in step(0, 1, plugin).items():
        environment.setenv(name, value)
    hide_mpi4py(environment)
    assert open_transport().name == "single"
    with pytest.raises(LaunchError, match=r"started this process, but (mpi4py is not installed|MPI cannot be loaded)"):
        open_transport(prefer_mpi=True)


def test_ranks_of_mpirun_may_meet_over_torch() -> None:
    found = detect_launch(open_mpi(1, 4))
    assert check_meeting_point(found, MEETING_POINT) == (1, 4)
    with pytest.raises(LaunchError, match=r"connects the ranks by MASTER_ADDR, MASTER_PORT, .* lacks MASTER_PORT\."):
        check_meeting_point(found, {"MASTER_ADDR": "node1"})


def test_error_of_mpi_says_how_to_do_without_it() -> None:
    with pytest.raises(
        LaunchError, match=r"srun --mpi=pmix for Open MPI.*Without MPI: export LENTANDO_TRANSPORT=torch"
    ):
        check_world(detect_launch(step(5, 8)), 1, "Open MPI v5.0.11")
    assert "MASTER_ADDR (the host of rank 0) and MASTER_PORT (a free port)" in advice_without_mpi({})
    assert "at MASTER_ADDR=node1 and MASTER_PORT=29500" in advice_without_mpi(MEETING_POINT)


@pytest.mark.parametrize("variables", [step(5, 8, "cray_shasta"), step(5, 8, "pmix"), open_mpi(5, 8)])
def test_ranks_with_all_variables_of_torch_do_without_mpi_where_there_is_no_mpi4py(
    environment: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """``srun bash -c 'export RANK=$SLURM_PROCID ...; python train.py'``."""
    for name, value in {**variables, **torch(5, 8)}.items():
        environment.setenv(name, value)
    hide_mpi4py(environment)
    with pytest.raises(ConfigurationError, match=r"elastic=True is not possible over torch\.distributed"):
        open_transport(elastic=True)
    environment.setenv("RANK", "4")
    with pytest.raises(LaunchError, match=r"(mpi4py is not installed|MPI cannot be loaded)"):
        open_transport()
