"""The command line as users see it: in a process of its own where that matters, else called."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import mpirun

import lentando
from lentando.cli.app import run
from lentando.comm.simulation import Compute, Network, simulate
from lentando.comm.topology import OnePeerExponential
from lentando.comm.transport import Transport
from lentando.optimizers.measure import measure_delays
from lentando.optimizers.planning import (
    Measurement,
    Problem,
    all_reduce_seconds,
    append_measurement,
    best_period,
    gossip_rate,
    local_sgd_seconds,
    network_delays,
    read_measurement,
)

CLUSTER = [
    "--parameters",
    "25.6M",
    "--bandwidth",
    "10gbit",
    "--latency",
    "50us",
    "--compute",
    "180ms",
    "--workers",
    "8",
]


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The JSON of ``lentando plan``."""
    assert run(["plan", *map(str, arguments), "--json"]) == 0
    reported: dict[str, Any] = json.loads(capsys.readouterr().out)
    return reported


def seconds(reported: dict[str, Any]) -> dict[tuple[str, int | None], float]:
    return {(row["algorithm"], row["period"]): row["seconds_per_step"] for row in reported["predictions"]}


def test_plan_prints_what_the_delay_model_says(capsys: pytest.CaptureFixture[str]) -> None:
    reported = plan(capsys, *CLUSTER, "--distribution", "exponential", "--straggler", "3:2.0", "--period", "7")
    compute = Compute(0.18, "exponential", stragglers={3: 2.0})
    delays = network_delays(Network(50e-6, 1.25e9), 8, 102_400_000)
    found = seconds(reported)
    assert found["AllReduce", None] == pytest.approx(all_reduce_seconds(compute, 8, delays), rel=1e-12)
    assert found["Local SGD", 7] == found["SlowMo", 7]
    assert found["Local SGD", 7] == pytest.approx(local_sgd_seconds(compute, 8, delays, 7), rel=1e-12)
    sgp = gossip_rate(compute, OnePeerExponential().for_size(8), delays)
    assert found["SGP", None] == pytest.approx(sgp.seconds, rel=1e-12)
    assert found["OSGP, staleness 1", None] < found["SGP", None] < found["AllReduce", None]
    first = reported["predictions"][0]
    assert first["speed_up"] == 1
    assert reported["predictions"][1]["speed_up"] == pytest.approx(found["AllReduce", None] / found["Local SGD", 7])


def test_plan_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *CLUSTER]) == 0
    text = capsys.readouterr().out
    assert "8 workers, model of 102.4 MB; a step computes 180 ms (constant); links of 1.25 GB/s and 50 us" in text
    lines = text.splitlines()
    (row,) = [line.split() for line in lines if line.startswith("AllReduce")]
    assert row == ["AllReduce", "324.2", "ms", "1.00", "44", "%", "exact"]
    assert "\x1b" not in text
    assert "AdaComm: begin with period 9: the smallest period" in text  # 144.4 ms / 8 is 18.05 ms, above 10 % of 180


def test_gossip_in_half_precision_sends_float32(capsys: pytest.CaptureFixture[str]) -> None:
    reported = plan(capsys, *CLUSTER, "--dtype", "bfloat16")
    assert reported["model_bytes"] == 51_200_000
    assert reported["delays"]["exchange_busy"] == pytest.approx((102_400_000 + 16) / 1.25e9)


def test_a_size_will_do_for_a_number_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    by_size = plan(capsys, "--model-size", "102.4MB", *CLUSTER[2:])
    assert by_size["predictions"] == plan(capsys, *CLUSTER)["predictions"]
    assert run(["plan", "--model-size", "1MB", *CLUSTER]) == 2
    assert "--parameters or --model-size, not both" in capsys.readouterr().err


def test_the_best_period_is_reported_where_its_constants_are(capsys: pytest.CaptureFixture[str]) -> None:
    constants = ["--loss-gap", 2, "--lipschitz", 3, "--variance", 0.5, "--learning-rate", 0.05, "--time", "10min"]
    reported = plan(capsys, *CLUSTER, *constants)
    problem = Problem(2.0, 3.0, 0.5, 0.05, 600.0)
    assert reported["recommended"]["period"] == best_period(problem, reported["delays"]["outer_step"])
    assert reported["recommended"]["rule"] == "tau*"
    assert "Theorem 2" in reported["recommended"]["reason"]
    reported = plan(capsys, *CLUSTER, *constants[:-4], "--learning-rate", 0.5, "--time", "10min")
    assert "proved only where" in reported["recommended"]["reason"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["plan"],
            "missing --parameters (or --model-size), --workers, --compute, --bandwidth, --latency: give them",
        ),
        (["plan", *CLUSTER[:-2]], "missing --workers"),
        (
            ["plan", "--parameters", "many"],
            "'--parameters': expected a number such as 1000, 64k, 25.6M or 7B, got 'many'",
        ),
        (["plan", "--latency", "50"], "expected a time with its unit, such as 50us"),
        (["plan", "--bandwidth", "10gb"], "there is no unit 'gb'"),
        (["plan", *CLUSTER, "--straggler", "9:1"], "expected RANK:FACTOR such as 3:2.5, with a rank from 0 to 7"),
        (["plan", *CLUSTER, "--lipschitz", "3"], "tau* needs all five"),
        (["plan", *CLUSTER, "--period", "0"], "--period"),
        (["plan", *CLUSTER, "--distribution", "uniform"], "constant"),
        (["plan", *CLUSTER, "--plot", "/no/such/folder/x.png"], "cannot write the picture"),
        (["plan", "--from", "/no/such/file"], "cannot read /no/such/file"),
        (["measure"], "--parameters"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["plan", "--frobnicate"], "--frobnicate"),
    ],
)
def test_nonsense_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert run(arguments) == 2
    reported = capsys.readouterr().err
    assert reported.startswith("lentando: ")
    assert reported.count("\n") == 1
    assert expected in reported


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["measure", "-h"]])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(arguments) == 0
    text = capsys.readouterr().out
    assert "Usage: lentando" in text
    assert len(arguments) == 1 or "lentando measure --parameters 25.6M" in text


def test_a_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    assert run(["plan", *CLUSTER, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"picture written to {path}" in capsys.readouterr().err


def test_a_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["plan", *CLUSTER, "--plot", "plan.png"]) == 2
    assert capsys.readouterr().err == "lentando: --plot needs matplotlib: pip install matplotlib\n"


def test_plan_loads_no_framework_no_mpi_and_no_simulator() -> None:
    program = f"""
import sys
from lentando.cli.app import run
assert run({["plan", *CLUSTER]!r}) == 0
print(sorted({{"torch", "tensorflow", "keras", "mpi4py.MPI", "greenlet", "matplotlib"}} & set(sys.modules)))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "[]"


def test_the_package_runs_as_a_module() -> None:
    def reported(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "lentando.cli", *arguments]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        return finished.returncode, finished.stdout + finished.stderr

    assert reported("--version") == (0, f"lentando {lentando.__version__}\n")
    status, text = reported("plan", "--workers", "none")
    assert status == 2
    assert "Traceback" not in text


# Measured values.

NETWORK = Network(latency_seconds=1e-3, bandwidth_bytes_per_second=1e8)


def measured(size: int, elements: int) -> Measurement:
    def measure(transport: Transport) -> Measurement:
        return measure_delays(transport, elements, repeats=2)

    found = simulate(measure, size, network=NETWORK)
    assert all(other == found[0] for other in found)
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 5])
def test_delays_measured_in_the_simulator_are_those_of_its_network(size: int) -> None:
    elements = 64 * 5 * 40
    found = measured(size, elements).delays_at(4 * elements)
    expected = network_delays(NETWORK, size, 4 * elements)
    assert found is not None
    assert found.gradient_average == pytest.approx(expected.gradient_average, rel=1e-9)
    assert found.outer_step == pytest.approx(expected.outer_step, rel=1e-9)
    assert found.exchange == pytest.approx(expected.exchange, rel=1e-9)
    assert found.exchange_busy == pytest.approx(expected.exchange_busy, rel=1e-2)
    assert found.slow_momentum == found.exchange_local == 0


@pytest.mark.slow
def test_plan_from_measured_values_equals_plan_from_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.jsonl"
    append_measurement(path, measured(4, 12_800))
    path.write_text('{"epoch": 1, "loss": 2.3}\n\n' + path.read_text())  # other lines are left alone
    common = ["--parameters", "12800", "--compute", "20ms"]
    network = ["--latency", "1ms", "--bandwidth", "100MB/s", "--workers", 4]
    from_file = seconds(plan(capsys, "--from", path, *common))
    assert from_file == pytest.approx(seconds(plan(capsys, *common, *network)), rel=1e-3)
    # Between the sizes that were measured, too.
    common[1] = "5000"
    from_file = seconds(plan(capsys, "--from", path, *common))
    assert from_file == pytest.approx(seconds(plan(capsys, *common, *network)), rel=1e-2)


@pytest.mark.slow
def test_a_report_is_a_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    report = {
        "period": 12, "rounds": 3, "size": 2, "model_bytes": 4000, "delay_seconds": 0.012, "compute_seconds": 0.1,
        "compute_seconds_by_rank": [0.1, 0.15], "compute_deviation_seconds_by_rank": [0.0, None],
    }  # fmt: skip
    append_measurement(path, report)
    reported = plan(capsys, "--from", path)
    assert reported["compute"]["mean_seconds_by_rank"] == pytest.approx([0.1, 0.15])
    assert seconds(reported)["Local SGD", 12] == pytest.approx(0.151)
    assert seconds(reported)["SGP", None] is None  # a report of this run knows no delay of gossip
    path.write_text(json.dumps({"summary": True, "report": json.loads(path.read_text())}) + "\n")
    assert plan(capsys, "--from", path)["compute"] == reported["compute"]
    append_measurement(path, measured(2, 1000))  # later lines add
    assert seconds(plan(capsys, "--from", path))["SGP", None] == pytest.approx(0.15, rel=0.02)
    slower = plan(capsys, "--from", path, "--compute", "1s", "--distribution", "exponential")
    assert slower["compute"] == {"mean_seconds_by_rank": [1.0, 1.0], "distribution": "exponential"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss 2.3", "line 1: expected JSON Lines, got 'loss 2.3'"),
        ('{"loss": 2.3}', "has no measured values"),
        ('{"format": "lentando-measurement-1"}', "line 1: not in the format lentando-measurement-1: 'size'"),
        ('{"format": "lentando-measurement-1", "size": 2, "compute_seconds_by_rank": [1]}', "of 2 ranks, got 1"),
        (
            '{"format": "lentando-measurement-1", "size": 1, "delays": {"outer_step": [[4, -1]]}}',
            "a time in seconds >= 0",
        ),
        (2 * '{"format": "lentando-measurement-1", "size": %d}\n' % (1, 2), "size is 2 after 1"),
    ],
)
def test_a_file_that_contains_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    assert run(["plan", "--from", str(path)]) == 2
    assert expected in capsys.readouterr().err


def test_delays_on_other_numbers_of_ranks_are_not_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.jsonl"
    append_measurement(path, measured(2, 1000))
    assert run(["plan", "--from", str(path), "--compute", "1s", "--workers", "8"]) == 2
    assert "was measured on 2 ranks: it does not determine the delays on 8" in capsys.readouterr().err
    assert run(["plan", "--from", str(path), "--workers", "8", *CLUSTER[2:8]]) == 0


@pytest.mark.slow
def test_measurements_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.jsonl"
    found = measured(3, 1000)
    append_measurement(path, found)
    again = read_measurement(path)
    assert again.delays == {name: [tuple(point) for point in points] for name, points in found.delays.items()}
    assert (again.size, again.model_bytes) == (3, 4000)


def test_measure_under_mpirun_feeds_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = mpirun(2, "-m", "lentando.cli", "measure", "--parameters", "10k", "--repeats", "2", "--json")
    assert job.status == 0, job.output
    (line,) = [line for line in job.output.splitlines() if line.startswith("{")]
    path = tmp_path / "cluster.jsonl"
    path.write_text(line)
    reported = plan(capsys, "--from", path, "--compute", "20ms")
    assert reported["size"] == 2
    assert reported["model_bytes"] == 40_000
    assert all(seconds > 0.02 for seconds in seconds(reported).values())
    job = mpirun(3, "-m", "lentando.cli", "measure", "--parameters", "1k", "--repeats", "1")
    assert job.status == 0, job.output
    assert "3 ranks, model of 4 kB" in job.output
    assert "gossip with one peer" in job.output
    assert "\x1b" not in job.output
