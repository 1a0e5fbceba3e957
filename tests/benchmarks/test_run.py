"""The benchmark next to the peers: its jobs start and end, and its table says what they reported."""

import importlib
import json
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from case_selection import selected_cases
from launchers import OPEN_MPI, TORCHRUN
from launching import mpirun
from prepared_python import prepared_python

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


def test_jobs_of_peers_end_in_a_table_and_pictures(tmp_path: Path) -> None:
    results = tmp_path / "of" / "today"  # made if it is not there
    done = run(
        "node", "--sizes", "64KB,1MB", "--repeats", "1", "--libraries", "Open MPI,Gloo", "--results", str(results)
    )
    assert done.returncode == 0, done.stderr
    title, table = (results / "node.md").read_text().split("\n", 1)
    assert title == "# Measurements: node"
    assert table.strip() in done.stdout
    for line in ("| float32 buffer | ", "| 64 KB ", "| 1 MB ", "2 ranks on one node. ", "4 ranks on one node. "):
        assert line in table
    assert sorted(path.name for path in results.glob("*.png")) == [
        "node_2_ranks.png",
        "node_4_ranks.png",
    ]


def test_run_py_finds_what_it_takes_from_the_programs_of_peers() -> None:
    text = (ROOT / "benchmarks/run.py").read_text()
    imports = re.findall(r"^ +(from peers\.\w+ import .*)$", text, re.MULTILINE)
    assert len(imports) >= 4
    found = [sys.executable, "-c", "\n".join(imports)]
    subprocess.run(found, cwd=ROOT / "benchmarks", check=True, timeout=100)


TAKES_ITS_TURN = """
import json, sys
from pathlib import Path
library, log = sys.argv[1], Path(sys.argv[2])
seen = log.read_text().split()
log.write_text(" ".join([*seen, library]))
print(json.dumps({"turn": len(seen)}))
"""


def test_peers_take_turns_forwards_and_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    jobs = importlib.import_module("jobs")
    log, program = tmp_path / "log", tmp_path / "program.py"
    log.touch()
    program.write_text(TAKES_ITS_TURN)
    names = [jobs.OURS, "Open MPI"]
    found = jobs.alternate(jobs.HostGroup(0, 1), names, str(program), {name: [str(log)] for name in names}, 3)
    assert log.read_text().split() == ["mpi", "lentando", "lentando", "mpi", "mpi", "lentando"]
    assert {name: sample["turn"].seconds for name, sample in found.items()} == {
        names[0]: (1, 2, 5),
        names[1]: (0, 3, 4),
    }


def test_peer_that_is_not_here_is_an_error_that_says_who_is() -> None:
    done = run("node", "--libraries", "Open MPI,BlueConnect")
    assert done.returncode == 2
    assert "not here: BlueConnect; here are Lentando, Open MPI" in done.stderr


def test_results_that_cannot_be_written_are_an_error_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("of a caller's\n")
    done = run("step", "--results", str(tmp_path / "notes"))
    assert done.returncode == 2
    assert "cannot be made: File exists" in done.stderr
    command = [sys.executable, str(ROOT / "benchmarks/consensus.py"), "--plot", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "is not a file that can be written" in done.stderr


def test_a_single_measurement_is_reported_without_a_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    sample = importlib.import_module("measuring").Sample
    assert str(sample((0.25,))) == "250 ms"
    assert str(sample((1.0, 2.0, 3.0))) == "2 (1 to 3) s"


LAUNCHERS = {"lentando": OPEN_MPI, "gloo": TORCHRUN}


def peer(program: str, library: str, *arguments: str) -> dict[str, Any]:
    """What a job of two ranks says."""
    file = str(ROOT / "benchmarks/peers" / program)
    done = LAUNCHERS[library].run(2, file, library, *arguments, timeout_seconds=200, prepared="lentando.torch")
    assert done.status == 0, done.output
    (report,) = re.findall(r"^\{.*\}$", done.output, re.MULTILINE)
    found: dict[str, Any] = json.loads(report)
    return found


OURS = ("SlowMo", "SlowMo(delay=5)", "SlowMo(int8)", "SlowMo(int8, delay=2)", "AdaComm")


@pytest.mark.parametrize(("library", "methods"), [("lentando", OURS), *selected_cases([], [("gloo", ("DDP",))])])
def test_training_until_a_loss_reports_when_it_was_where(library: str, methods: tuple[str, ...]) -> None:
    curves = peer("loss.py", library, "--compute-seconds", "0.002", "--width", "16", "--steps", "64")
    assert tuple(curves) == methods
    for curve in curves.values():
        assert all(earlier < later for (earlier, _), (later, _) in pairwise(curve))
        assert curve[0][0] > 0.002
        assert curve[-1][1] < 0.9 * math.log(10)  # which is the loss of who knows nothing


def test_iteration_takes_no_less_than_it_computes() -> None:
    found = peer("iterations.py", "lentando", "--compute-seconds", "0.01", "--gossip-seconds", "0.005", "--layers", "2")
    assert {"AllReduce", "AllReduce(overlap=False)", "SlowMo", "SGP", "OSGP"} < set(found)
    for name, seconds in found.items():
        assert seconds > (0.01 if "AllReduce" in name or name in ("SlowMo", "compute alone") else 0.005)


def test_iterations_of_a_chosen_method_are_timed_with_computing_alone() -> None:
    chosen = ["--methods", "SlowMo(delay=12)", "--compute-seconds", "0.005", "--layers", "2"]
    found = peer("iterations.py", "lentando", *chosen)
    assert list(found) == ["compute alone", "SlowMo(delay=12)"]


SMALL = ["--width", "16", "--layers", "1", "--batch-size", "2", "--period", "4", "--steps", "12"]


def test_a_language_model_is_trained_by_each_library_alike() -> None:
    by_ddp = peer("language.py", "gloo", *SMALL)
    by_steps = peer("language.py", "lentando", *SMALL, "--every-step")
    by_rounds = peer("language.py", "lentando", *SMALL, "--delay", "1")
    assert by_steps["loss"] == pytest.approx(by_ddp["loss"], rel=1e-3)  # the same weights, batches and average
    assert by_rounds["loss"] < by_rounds["points"][0][3]  # it has learned since the first round
    parameters = by_ddp["parameters"]
    for found, averages in ((by_ddp, 12), (by_steps, 12), (by_rounds, 3)):
        assert found["bytes_sent"] == pytest.approx(averages * 4 * parameters, rel=0.02)  # of 2 ranks
        assert [steps for steps, *_ in found["points"]] == [4, 8, 12]


def test_runs_that_are_kept_are_not_repeated_and_end_in_a_table_and_a_picture(tmp_path: Path) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    command = [sys.executable, str(ROOT / "benchmarks/quantized.py"), "--seeds", "0", "1", "--runs", str(runs)]
    command += ["--methods", "DDP", "SlowMo", "--workers", "2", "--results", str(results)]
    runs.mkdir()
    for method, loss, sent in (("every-step", 2.0, 64_000_000), ("", 2.2, 4_000_000)):
        for seed in (0, 1):
            name = "_".join(filter(None, ["simulated_workers_2_seed", str(seed), "steps_144", method]))
            points = [[16, 1.0, sent // 2, loss + 1], [32, 2.0, sent, loss]]
            found = {"loss": loss + 0.01 * seed, "bytes_sent": sent, "parameters": 1, "points": points}
            (runs / f"{name}.json").write_text(json.dumps(found))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    table = " ".join((results / "quantized.md").read_text().split())
    assert "| SlowMo | 2.2050 | 0.0071 | +0.00 % | 4.00 | 16.0 |" in table
    assert (results / "quantized.png").exists()
    assert len(list(runs.iterdir())) == 4


def test_what_step_adds_goes_into_a_table(tmp_path: Path) -> None:
    file = tmp_path / "step.md"
    command = [*prepared_python("lentando.torch"), str(ROOT / "benchmarks/step_overhead.py")]
    done = subprocess.run(
        [*command, "--steps", "50", "--markdown", str(file)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "| 100        | " in file.read_text()
    title, table = file.read_text().split("\n", 1)
    assert title == "# Measurements: step"
    assert table.strip() in done.stdout


def test_what_gossip_adds_goes_into_a_table(tmp_path: Path) -> None:
    file = tmp_path / "gossip.md"
    command = [str(ROOT / "benchmarks/gossip_on_node.py"), "--size", "4MB", "--batch", "2", "--repeats", "1"]
    done = mpirun(2, *command, "--markdown", str(file), prepared="lentando.torch")
    assert done.status == 0, done.output
    rows = [line.split("|")[1].strip() for line in file.read_text().splitlines() if line.startswith("|")]
    assert [row for row in rows if not row.startswith("-")] == ["method", "SGD alone", "SGP", "OSGP", "D-PSGD"]


def test_what_fit_takes_besides_goes_into_a_table(tmp_path: Path) -> None:
    file = tmp_path / "fit.md"
    program = str(ROOT / "benchmarks/fit_overhead.py")
    command = [*prepared_python("lentando.tensorflow"), program, "--repeats", "1", "--epochs", "1"]
    done = subprocess.run(
        [*command, "--batches", "3", "--markdown", str(file)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "| synchronous SGD             |" in file.read_text()


def test_loops_of_horovods_users_run_with_lentando(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    found = peer("horovod_loops.py", "lentando", "--iterations", "2")
    assert len(found) == 6
    assert all(seconds > 0 for seconds in found.values())
    loops = importlib.import_module("peers.horovod_loops")
    shapes = list(loops.resnet50_shapes(1))
    assert (len(shapes), sum(map(math.prod, shapes))) == (161, 25_557_032)  # as torchvision's has


def test_loops_of_synchronous_sgd_run_with_lentando() -> None:
    found = peer("synchronous.py", "lentando", "--iterations", "1", "--models", "5,000 parameters")
    methods = ["compute alone", "compute alone and a barrier", "synchronous SGD", "SlowMo", "SGP", "overlap=True"]
    assert list(found) == [f"5,000 parameters, {method}" for method in methods]
    assert all(seconds > 0 for seconds in found.values())


@pytest.mark.parametrize("backend", selected_cases(["lentando"], ["lentando", "gloo"]))
def test_backends_of_torch_distributed_report_the_same_figures(backend: str) -> None:
    found = peer("c10d.py", backend, "--sizes", "64000", "--layers", "2")
    loops = ["layers", "160 tensors"]
    assert list(found) == [
        "all_reduce:64000",
        *(figure for loop in loops for figure in (f"{loop}, compute alone", loop)),
    ]
    assert all(seconds > 0 for seconds in found.values())
