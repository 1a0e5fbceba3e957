"""The table of launchers is complete, and the only place that knows their variables."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from lentando.cli.doctor.facts import environment
from lentando.cli.doctor.job import launcher_mismatch
from lentando.comm import launchers
from lentando.comm.claims import read_claims
from lentando.comm.errors import LaunchError
from lentando.comm.inherited_variables import MARK, check_is_rank, hide_variables, mark_rank
from lentando.comm.launch import check_world, detect_launch
from lentando.comm.launchers import LAUNCHERS, Launcher

ROOT = Path(__file__).parents[2]
HIDDEN = (
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    "OMPI_COMM_WORLD_NODE_RANK", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_STEP_NUM_TASKS", "HOROVOD_RANK",
    "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
    "ALPS_APP_PE",
)  # fmt: skip
IDENTITY = {
    "PMIX_NAMESPACE", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "PMI_ID",
    "PMI_JOBID", "PMI_PORT", "PMI_FD", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "HOROVOD_RANK", "HOROVOD_SIZE",
    "HOROVOD_GLOO_RENDEZVOUS_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "RANK",
    "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ALPS_APP_PE",
}  # fmt: skip
FLUX = Launcher(
    name="flux run",
    rank="FLUX_TASK_RANK",
    size="FLUX_JOB_SIZE",
    local_rank="FLUX_TASK_LOCAL_ID",
    family="any",
    needs_both=True,
    identity=("FLUX_JOB_ID",),
    hidden=("FLUX_JOB_NNODES",),
    advice="With flux run, name its PMI plugin",
)
"""A launcher that the table does not have, with the variables that its manual lists."""
RANK = {
    "FLUX_TASK_RANK": "1",
    "FLUX_JOB_SIZE": "2",
    "FLUX_TASK_LOCAL_ID": "1",
    "FLUX_JOB_ID": "f1",
    "FLUX_JOB_NNODES": "1",
}


@pytest.fixture
def flux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "LAUNCHERS", (FLUX, *LAUNCHERS))


def test_every_variable_that_other_libraries_read_is_hidden() -> None:
    assert sorted(launchers.hidden_variables()) == sorted(HIDDEN)


def test_every_variable_that_distinguishes_ranks_and_jobs_is_part_of_the_identity() -> None:
    assert set(launchers.identity_variables()) == IDENTITY


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.name)
def test_an_entry_is_complete_and_differs_from_all_others(launcher: Launcher) -> None:
    assert launcher.size is not None or not launcher.needs_both
    assert launcher.local_rank is not None or launcher.size is None
    assert not (launcher.is_horovod and launcher.family)
    assert len(launcher.variables) == len(set(launcher.variables))
    others = [other for other in LAUNCHERS if other is not launcher]
    assert launcher.name not in [other.name for other in others]
    marked = [other for other in others if other.rank == launcher.rank]
    assert all({launcher.marker, other.marker} != {None} for other in marked)


def test_a_new_launcher_is_one_entry(flux: None) -> None:
    launch = detect_launch(RANK)
    assert launch is not None
    assert (launch.launcher, launch.size, launch.mpi) == ("flux run", 2, True)
    (claim,) = read_claims(RANK)
    assert (claim.rank, claim.size, claim.is_complete) == (1, 2, True)
    with pytest.raises(
        LaunchError, match=r"flux run promises 2 ranks \(FLUX_JOB_SIZE=2\).*With flux run, name its PMI"
    ):
        check_world(launch, 1, "Open MPI v5.0.11")
    with pytest.raises(LaunchError, match="flux run set FLUX_TASK_RANK=1 but not FLUX_JOB_SIZE"):
        detect_launch({"FLUX_TASK_RANK": "1"})


def test_variables_of_a_new_launcher_are_hidden_marked_and_reported(flux: None) -> None:
    shown = dict(RANK)
    assert hide_variables(shown) == {name: value for name, value in RANK.items() if name != "FLUX_JOB_ID"}
    child = dict(RANK)
    mark_rank(child)
    child[MARK] = "1 " + child[MARK].partition(" ")[2]
    launch = detect_launch(child)
    assert launch is not None
    with pytest.raises(LaunchError, match="is not a rank itself"):
        check_is_rank(child, launch)
    check_is_rank({**child, "FLUX_JOB_ID": "f2"}, launch)
    assert environment({**RANK, "HOME": "/home/me"}) == dict(sorted(RANK.items()))


def test_doctor_compares_the_family_of_a_new_launcher_with_the_library(
    flux: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = {"vendor": "Open MPI", "version": "5.0", "path": None, "error": None}
    facts = {"environment": RANK, "library": library}
    assert launcher_mismatch(facts) is None  # type: ignore[arg-type]
    monkeypatch.setattr(launchers, "LAUNCHERS", (Launcher(name="other", rank="A", size="B", family="MPICH"),))
    facts["environment"] = {"A": "0", "B": "2"}
    assert "other says rank 0 of 2 (A=0, B=2), but the library here is Open MPI" in str(launcher_mismatch(facts))  # type: ignore[arg-type]


def constants(path: Path) -> Iterator[str]:
    return (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))


def test_no_other_module_of_comm_and_cli_names_a_variable_of_the_table() -> None:
    names = launchers.reported_variables()
    found = {
        path.name: names.intersection(constants(path))
        for folder in ("comm", "cli")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "launchers.py"
    }
    assert {name: variables for name, variables in found.items() if variables} == {}
