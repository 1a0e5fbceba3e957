"""What ranks do with their launcher's variables: programs that they start are distinguished, other libraries misled."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from launchers import OPEN_MPI, WITH_MPICH, Launcher

from lentando.comm.errors import LaunchError
from lentando.comm.inherited_variables import MARK, check_is_rank, hide_variables, mark_rank, would_be_misread
from lentando.comm.launch import detect_launch

OPEN_MPI_RANK = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_NAMESPACE": "prterun-host-7@1", "PMIX_RANK": "1",
}  # fmt: skip
HOROVOD_RANK = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_GLOO_RENDEZVOUS_PORT": "4711"}


def started_by(environment: dict[str, str], **changed: str) -> dict[str, str]:
    """The environment of a process that a rank with this one has started."""
    mark_rank(environment)
    inherited = {**environment, **changed}
    inherited[MARK] = "1 " + inherited[MARK].partition(" ")[2]
    return inherited


def check(environment: dict[str, str]) -> None:
    launch = detect_launch(environment)
    assert launch is not None
    check_is_rank(environment, launch)


@pytest.fixture
def connection() -> Iterator[str]:
    """Number of a descriptor that could be the connection to MPICH's launcher."""
    with socket.socket() as opened:
        yield str(opened.fileno())


def test_rank_itself_may_join_again() -> None:
    environment = dict(OPEN_MPI_RANK)
    check(environment)
    mark_rank(environment)
    check(environment)


@pytest.mark.parametrize("variables", [OPEN_MPI_RANK, HOROVOD_RANK])
def test_program_that_a_rank_starts_is_refused(variables: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"was started by a rank \(process 1\).*is not a rank itself"):
        check(started_by(dict(variables), SOMETHING_ELSE="1"))


@pytest.mark.parametrize(
    ("variables", "changed"),
    [
        (OPEN_MPI_RANK, {"PMIX_NAMESPACE": "prterun-host-8@1"}),
        (OPEN_MPI_RANK, {"OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}),
        (HOROVOD_RANK, {"HOROVOD_GLOO_RENDEZVOUS_PORT": "4712"}),
    ],
)
def test_rank_of_a_launcher_inside_the_job_is_a_rank(variables: dict[str, str], changed: dict[str, str]) -> None:
    check(started_by(dict(variables), **changed))


def test_connections_to_the_launcher_are_distinguished_where_their_numbers_are_the_same(connection: str) -> None:
    inherited = started_by({"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_FD": connection})
    with pytest.raises(LaunchError, match="is not a rank itself"):
        check(inherited)
    kept = os.dup(int(connection))
    with socket.socket() as another:
        os.dup2(another.fileno(), int(connection))
        check(inherited)
    os.dup2(kept, int(connection))
    os.close(kept)


def test_closed_connection_to_the_launcher_is_no_connection(connection: str) -> None:
    inherited = started_by({"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_FD": connection})
    os.close(int(connection))
    with pytest.raises(LaunchError, match="is not a rank itself"):
        check(inherited)
    os.dup2(0, int(connection))  # for the fixture to close


def test_hidden_variables_are_those_of_every_launcher() -> None:
    environment = {**OPEN_MPI_RANK, **HOROVOD_RANK, "PMI_RANK": "0", "PMI_SIZE": "2", "RANK": "0", "PATH": "/bin"}
    hidden = hide_variables(environment)
    assert detect_launch(environment) is None
    assert environment["PATH"] == "/bin"
    assert {**environment, **hidden} == {
        **OPEN_MPI_RANK, **HOROVOD_RANK, "PMI_RANK": "0", "PMI_SIZE": "2", "RANK": "0", "PATH": "/bin",
    }  # fmt: skip


def test_accelerate_would_misread_the_variables_unless_it_knows_where_ranks_meet() -> None:
    assert would_be_misread(OPEN_MPI_RANK, {"accelerate", "torch"})
    assert not would_be_misread(OPEN_MPI_RANK, {"torch"})
    assert not would_be_misread({**OPEN_MPI_RANK, "MASTER_ADDR": "node1"}, {"accelerate", "torch"})


@pytest.mark.parametrize(
    ("loaded", "argument", "hides"), [(True, "None", True), (False, "None", False), (True, "False", False)]
)
def test_variables_are_hidden_where_accelerate_is_loaded(loaded: bool, argument: str, hides: bool) -> None:
    """An empty module stands in for Accelerate, which the development environment does without."""
    program = (
        "import os, sys, types\nfrom lentando.comm import world\n"
        f"if {loaded}: sys.modules['accelerate'] = types.ModuleType('accelerate')\n"
        f"world.init(hide_launcher={argument})\n"
        f"assert ('OMPI_COMM_WORLD_SIZE' not in os.environ) == {hides}\nassert world.size() == 2\n"
    )
    job = OPEN_MPI.run(2, "-c", program, environment={"MASTER_ADDR": None})
    assert job.status == 0, job.output


PROGRAM = """
import multiprocessing, os, subprocess, sys
from lentando.comm import world

if sys.argv[1:] == ["child"]:
    world.init()
    print("ALONE", world.size(), flush=True)
    sys.exit()

def joins() -> None:
    world.init()

if __name__ == "__main__":
    before = dict(os.environ)
    world.init(hide_launcher=True)
    looked_at = [  # by accelerate.utils.environment
        f"{prefix}{what}" for prefix in ("", "PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
        for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    ]
    looked_at += ["WORLD_SIZE", "LOCAL_WORLD_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
    assert not [name for name in looked_at if name in os.environ]
    assert world.transport().allgather(__import__("numpy").zeros(1)).shape == (2, 1)
    world.shutdown()
    added = os.environ.keys() - before.keys()
    assert added == {"LENTANDO_RANK_PID"}, added
    assert all(os.environ[name] == value for name, value in before.items())
    world.init()
    statuses = []
    for environment in ({}, {"LENTANDO_TRANSPORT": "single"}):
        started = subprocess.run([sys.executable, __file__, "child"], env={**os.environ, **environment})
        statuses.append(started.returncode)
    spawned = multiprocessing.get_context("spawn").Process(target=joins)
    spawned.start()
    spawned.join()
    print("STATUSES", [*statuses, spawned.exitcode], flush=True)
"""


@pytest.mark.parametrize("launcher", [OPEN_MPI, WITH_MPICH], ids=lambda launcher: launcher.name)
def test_programs_that_ranks_start_do_not_wait_for_a_job_that_is_not_theirs(tmp_path: Path, launcher: Launcher) -> None:
    launcher.need()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    job = launcher.run(2, str(program), timeout_seconds=100, environment={MARK: None})
    assert job.status == 0, job.output
    assert job.output.count("STATUSES [1, 0, 1]") == 2, job.output
    assert job.output.count("ALONE 1") == 2, job.output
    assert job.output.count("and is not a rank itself: it would wait for the others forever") == 4, job.output
    assert job.output.count("Processes that multiprocessing spawns import the main module again") == 2, job.output
