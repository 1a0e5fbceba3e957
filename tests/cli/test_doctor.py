"""``lentando doctor`` in real processes: alone, under launchers that work, and under those that do not."""

import importlib.metadata
import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import WAITING, Job, find_mpirun, launch, mpirun
from ports import free_port

from lentando.cli.app import run
from lentando.cli.doctor.facts import Facts
from lentando.comm.transport_selection import TRANSPORT_NAMES

CHECKOUT = Path(__file__).parents[2]
MPICH = Path(sys.prefix, "mpich/bin")
"""Of an environment with MPICH; this one has Open MPI."""
LAUNCHERS = (
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE", "HOROVOD_RANK", "HOROVOD_SIZE",
    "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID",
)  # fmt: skip
DOCTOR = ("-m", "lentando.cli", "doctor")

needs_mpich = pytest.mark.skipif(not (MPICH / "mpiexec").exists(), reason=f"no {MPICH}/mpiexec")


def alone(*options: str, **environment: str | None) -> Job:
    """Doctor in a process of no launcher, but for the variables that are given."""
    path = os.pathsep.join([str(Path(find_mpirun()).parent), os.environ["PATH"]])
    variables: dict[str, str | None] = {**dict.fromkeys(LAUNCHERS), "PATH": path, **environment}
    return launch([sys.executable, *DOCTOR, *options], 120, variables)


def hide(folder: Path, *modules: str) -> dict[str, str | None]:
    """Variables with which modules are not found: by default PyTorch, TensorFlow and Horovod, which take seconds."""
    hidden = modules or ("torch", "tensorflow", "horovod")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\n")
    return {"PYTHONPATH": str(folder)}


def document(job: Job) -> dict[str, Any]:
    """The one document that ``--json`` prints, whatever launchers say around it."""
    (line,) = [line for line in job.output.splitlines() if line.startswith('{"format"')]
    reported: dict[str, Any] = json.loads(line)
    return reported


def problems(job: Job) -> list[dict[str, Any]]:
    assert "Traceback" not in job.output
    return [finding for finding in document(job)["findings"] if finding["level"] == "problem"]


# Alone.


def test_alone_nothing_is_wrong_and_everything_is_reported() -> None:
    job = alone("--json")
    assert job.status == 0, job.output
    reported = document(job)
    assert reported["format"] == "lentando-doctor-1"
    assert reported["problems"] == 0
    assert reported["notes"] == sum(finding["level"] == "note" for finding in reported["findings"])
    sections = {finding["section"] for finding in reported["findings"]}
    assert sections >= {"versions", "MPI", "launcher", "transports", "GPU", "network", "host"}
    assert set(reported["transports"]) == set(TRANSPORT_NAMES)
    assert reported["transports"]["single"][0]["is_right"] is True
    (facts,) = reported["ranks"].values()
    assert set(facts) == set(Facts.__annotations__)
    assert facts["versions"]["mpi4py"] == importlib.metadata.version("mpi4py")
    assert facts["library"]["vendor"] in ("Open MPI", "MPICH")
    assert Path(facts["library"]["path"]).exists()
    assert any(one["on_path"] and one["vendor"] == facts["library"]["vendor"] for one in facts["programs"])
    assert facts["cores"] == sorted(os.sched_getaffinity(0))
    assert facts["place"] == {"transport": "single", "rank": 0, "size": 1, "local_rank": 0, "local_size": 1}


def test_alone_the_page_is_plain_text(tmp_path: Path) -> None:
    job = alone(**hide(tmp_path))
    assert job.status == 0, job.output
    assert job.output.startswith("lentando doctor: 1 rank on 1 host, started alone\n")
    assert "\x1b" not in job.output
    assert "ok       transport mpi: opens, and its sum is correct; a single rank sends nothing\n" in job.output
    assert "thread level MULTIPLE" in job.output
    assert max(map(len, job.output.splitlines())) <= 120


def test_mpi_that_cannot_be_loaded_is_no_problem_to_a_world_of_one(tmp_path: Path) -> None:
    job = alone("--json", MPI4PY_LIBMPI="/no/such/libmpi.so", **hide(tmp_path))
    assert job.status == 0, job.output
    (found,) = [finding for finding in document(job)["findings"] if "no MPI can be loaded" in finding["text"]]
    assert (found["level"], found["fix"]) == ("note", "unset MPI4PY_LIBMPI")


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--help"]) == 0
    text = capsys.readouterr().out
    assert "mpirun -np 4 lentando doctor" in text
    assert "--json" in text


# Under launchers.


def test_two_ranks_that_meet_are_well() -> None:
    job = mpirun(2, *DOCTOR, "--json", timeout_seconds=120)
    assert job.status == 0, job.output
    reported = document(job)
    assert list(reported["ranks"]) == ["0", "1"]
    places = [facts["place"] for facts in reported["ranks"].values()]
    assert [(place["transport"], place["rank"], place["size"]) for place in places] == [("mpi", 0, 2), ("mpi", 1, 2)]
    assert [test["is_right"] for test in reported["transports"]["mpi"]] == [True, True]
    assert all(0 < test["seconds"] < 60 for test in reported["transports"]["mpi"])
    assert reported["probe"]["end"] == "left"
    ranks = [facts["environment"]["OMPI_COMM_WORLD_RANK"] for facts in reported["ranks"].values()]
    assert ranks == ["0", "1"]


def test_worlds_of_one_that_the_user_wanted_are_noted_on_one_page(tmp_path: Path) -> None:
    environment = {**hide(tmp_path), "LENTANDO_TRANSPORT": "single"}
    job = mpirun(2, *DOCTOR, "--json", environment=environment, timeout_seconds=120)
    assert job.status == 0, job.output
    (found,) = [one for one in document(job)["findings"] if one["fix"] == "unset LENTANDO_TRANSPORT"]
    assert found["level"] == "note"
    assert "but transport single sees rank 0 of 1 (LENTANDO_TRANSPORT=single)" in found["text"]


def test_networks_that_this_host_does_not_have_are_problems_on_one_page(tmp_path: Path) -> None:
    """One that all ranks name, and one that differs between ranks and is reported with the rank."""
    program = """
import os, sys
from lentando.cli import main
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    os.environ["FI_TCP_IFACE"] = "nosuch9"
sys.argv = ["lentando", "doctor"]
sys.exit(main())
"""
    environment = {**hide(tmp_path), "OMPI_MCA_btl_tcp_if_include": "lo,nosuch9"}
    job = mpirun(2, "-c", program, environment=environment, timeout_seconds=120)
    assert job.status == 1, job.output
    assert job.output.count("lentando doctor: 2 ranks on 1 host, started by mpirun (Open MPI)") == 1
    assert "ok       rank 0: mpirun (Open MPI) says rank 0 of 2" in job.output
    reported = " ".join(job.output.split())
    missing = "this host has no interface"
    assert f" problem rank 1: FI_TCP_IFACE=nosuch9 (MPICH over libfabric): {missing} nosuch9" in reported
    on_all_ranks = f" problem OMPI_MCA_btl_tcp_if_include=lo,nosuch9 (Open MPI): {missing} or network nosuch9"
    assert on_all_ranks in reported
    fixes = re.findall(r"^ +\$ export OMPI_MCA_btl_tcp_if_include=(\S+)$", job.output, re.MULTILINE)
    assert fixes
    assert set(fixes) <= {name for _, name in socket.if_nameindex()}
    assert "\n2 problems, " in job.output
    assert "Traceback" not in job.output


def test_two_launchers_that_disagree_are_a_problem(tmp_path: Path) -> None:
    environment = {**hide(tmp_path), "HOROVOD_RANK": "1", "HOROVOD_SIZE": "3"}
    job = mpirun(2, *DOCTOR, "--json", environment=environment, timeout_seconds=120)
    assert job.status == 1, job.output
    found = next(one for one in problems(job) if one["section"] == "launcher")
    stated = "mpirun (Open MPI) says rank 0 of 2 (OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE=2), horovodrun says"
    assert f"two launchers disagree about this rank: {stated}" in found["text"]
    assert found["fix"] == "unset HOROVOD_RANK HOROVOD_SIZE"


def test_half_of_a_promise_is_a_problem(tmp_path: Path) -> None:
    job = alone("--json", PMI_RANK="0", **hide(tmp_path))
    assert job.status == 1, job.output
    assert {found["fix"] for found in problems(job)} == {"unset PMI_RANK"}


@pytest.mark.parametrize(
    ("variables", "promise"),
    [
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, "promises 4 ranks (PMI_SIZE=4), but MPI sees 1"),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "7"},
            "the environment lacks MASTER_ADDR, MASTER_PORT",
        ),
    ],
)
def test_ranks_that_never_meet_are_reported_by_rank_0(variables: dict[str, str], promise: str, tmp_path: Path) -> None:
    hidden = hide(tmp_path)
    job = alone("--json", **variables, **hidden)
    assert job.status == 1, job.output
    (found,) = [one for one in problems(job) if one["section"] == "job"]
    assert promise in found["text"]
    assert found["fix"] == "mpirun -np 4 lentando doctor"
    others = {name: "2" if name.endswith("RANK") else value for name, value in variables.items()}
    assert alone(**others, **hidden).output == ""


@needs_mpich
def test_launcher_of_mpich_next_to_open_mpi_is_reported_on_one_page(tmp_path: Path) -> None:
    job = under(MPICH / "mpiexec", Path(sys.executable), **hide(tmp_path))
    assert job.status == 1, job.output
    assert job.output.count("lentando doctor: one process") == 1
    assert job.output.count("promises 2 ranks (PMI_SIZE=2), but MPI") == 1
    assert "Traceback" not in job.output


@needs_mpich
def test_mpich_under_the_launcher_of_open_mpi_is_reported_on_one_page() -> None:
    """MPICH ends a process that this launcher started, from within MPI_Init."""
    job = under(Path(find_mpirun()), MPICH / "python")
    assert job.status == 1, job.output
    assert job.output.count("lentando doctor: one process") == 1
    reported = " ".join(job.output.split())
    assert re.search(r"problem mpirun \(Open MPI\) .*, but .*MPICH (Version: )?\d", reported)
    assert f"$ {MPICH}/mpirun -np 2 lentando doctor" in reported
    assert "Traceback" not in job.output


@needs_mpich
def test_mpich_under_its_own_launcher_is_well() -> None:
    job = under(MPICH / "mpiexec", MPICH / "python")
    assert job.status == 0, job.output
    assert "lentando doctor: 2 ranks on 1 host" in job.output
    assert "library MPICH" in job.output


def under(launcher: Path, python: Path, **environment: str | None) -> Job:
    command = [str(launcher), "-n", "2", str(python), *DOCTOR]
    return launch(command, 120, {"PYTHONPATH": str(CHECKOUT / "src"), **environment})


# What hangs and what dies.


@pytest.mark.parametrize(
    ("comes", "expected"),
    [("", "while joining the job"), ("open_transport()", "during the first messages of transport mpi")],
)
def test_rank_that_never_answers_is_reported_in_time(comes: str, expected: str, tmp_path: Path) -> None:
    program = f"""
import os, sys, time
from lentando.cli import main
from lentando.comm.transport_selection import open_transport
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    {comes}
    time.sleep(100)
sys.argv = ["lentando", "doctor", "--timeout", "8"]
sys.exit(main())
"""
    job = mpirun(2, "-c", program, environment=hide(tmp_path), timeout_seconds=90)
    assert job.status == 1, job.output
    assert f"problem  no answer {expected} within 8 s" in job.output
    assert "$ export OMPI_MCA_btl_tcp_if_include=" in job.output
    assert job.seconds < 80


def test_rank_of_torchrun_that_never_comes_is_reported_in_time(tmp_path: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables = {"RANK": "0", "WORLD_SIZE": "2", **place, **hide(tmp_path, "horovod")}
    job = alone("--json", "--timeout", "10", **variables)
    assert job.status == 1, job.output
    (found,) = problems(job)
    assert "no answer while joining the job within 10 s" in found["text"]
    assert found["fix"].startswith("export GLOO_SOCKET_IFNAME=")


def test_mpi_that_ends_the_process_is_reported_with_its_last_output(tmp_path: Path) -> None:
    environment = {**hide(tmp_path), **dict.fromkeys(WAITING), "OMPI_MCA_pml": "nosuch"}
    for _ in range(10):  # mpirun kills rank 0, too: on a busy machine sometimes before it has reported
        job = mpirun(2, *DOCTOR, "--json", environment=environment, timeout_seconds=60)
        assert job.status == 1, job.output
        if '{"format"' in job.output:
            break
    (found,) = problems(job)
    assert "while joining the job. Its last output: " in found["text"]
    assert "MPI_Init" in found["text"]
    assert found["fix"] == "unset OMPI_MCA_pml"
