"""The digits example, started as a user starts it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from case_selection import thoroughly
from recipe_runs import alone, on_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = str(EXAMPLES / "digits_torch.py")
TENSORFLOW = str(EXAMPLES / "digits_tensorflow.py")


@pytest.mark.long
def test_four_ranks_learn_and_report(tmp_path: Path) -> None:
    job = on_ranks(4, EXAMPLE, "--compare", "--seeds", "1", "--epochs", "6", "--report", str(tmp_path))
    assert job.status == 0, job.output
    assert job.output.count("0/6 [00:00<?, ?epoch/s]") == 3  # the start of one progress bar per training: rank 0's
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = summaries(tmp_path)
    assert found.keys() == {"slowmo", "localsgd", "allreduce"}
    for algorithm, summary in found.items():
        assert summary["accuracy"] >= 0.95
        assert f"{summary['accuracy']:.4f}" in job.output
        losses = [line["loss"] for line in lines if line["algorithm"] == algorithm and "epoch" in line]
        assert len(losses) == 6
        assert losses[-1] < losses[0] / 4
    assert found["slowmo"]["rounds"] == found["localsgd"]["rounds"] == 6 * 22 // 12
    assert found["slowmo"]["megabytes"] < found["allreduce"]["megabytes"] / 6


def summary(folder: Path) -> dict[str, Any]:
    (found,) = summaries(folder).values()
    return found


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["algorithm"]: line for line in lines if "summary" in line}


@pytest.mark.long
def test_real_and_simulated_ranks_train_the_same_models(tmp_path: Path) -> None:
    """The same training function, unchanged: bit-identical. The ring adds in one order everywhere."""
    algorithms = ["sgp", "dpsgd", "osgp", "slowmo", "adacomm"]
    common = [
        EXAMPLE,
        "--compare",
        *algorithms,
        "--seeds",
        "1",
        "--epochs",
        "6",
        "--reduction",
        "ring",
        "--base",
        "osgp",
    ]
    common += ["--staleness", "2", "--deterministic", "--slow-momentum", "0.3", "--report"]
    job = on_ranks(4, *common, str(tmp_path / "real"))
    assert job.status == 0, job.output
    alone(*common, str(tmp_path / "simulated"), "--simulate", "4")
    real, virtual = summaries(tmp_path / "real"), summaries(tmp_path / "simulated")
    assert list(real) == list(virtual) == algorithms
    for algorithm in algorithms:
        assert real[algorithm]["accuracy"] >= 0.95
        for what in ("checksum", "consensus_distance", "periods"):
            assert virtual[algorithm][what] == real[algorithm][what], (algorithm, what)
    periods = virtual["adacomm"]["periods"]
    assert periods[0] == 22
    assert periods[-1] <= 4
    assert f"seed 0: {', '.join(map(str, periods))}" in job.output


@thoroughly
@pytest.mark.long
def test_keras_ranks_learn_and_share_a_table_with_torch(tmp_path: Path) -> None:
    flags = ["--compare", "--seeds", "1", "--epochs", "6", "--no-table", "--report", str(tmp_path)]
    job = on_ranks(4, TENSORFLOW, *flags)
    assert job.status == 0, job.output
    assert "test accuracy" not in job.output
    found = summaries(tmp_path)
    assert found.keys() == {"slowmo", "localsgd", "allreduce"}
    assert min(summary["accuracy"] for summary in found.values()) >= 0.95
    assert found["slowmo"]["rounds"] == 6 * 22 // 12
    table = [sys.executable, str(EXAMPLES / "digits_table.py"), str(tmp_path), str(tmp_path)]
    printed = subprocess.run(table, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "4 ranks, 1 seed" in printed
    assert f"{found['slowmo']['accuracy']:.4f}" in printed


@pytest.mark.long
def test_real_and_simulated_keras_ranks_train_alike(tmp_path: Path) -> None:
    """Graphs on real ranks, eager steps in the simulation: equal up to the order of additions inside TensorFlow."""
    common = [TENSORFLOW, "--algorithm", "osgp", "--deterministic", "--epochs", "4", "--reduction", "ring", "--report"]
    job = on_ranks(2, *common, str(tmp_path / "real"))
    assert job.status == 0, job.output
    alone(*common, str(tmp_path / "simulated"), "--simulate", "2")
    real, virtual = summary(tmp_path / "real"), summary(tmp_path / "simulated")
    assert real["accuracy"] >= 0.95
    assert abs(virtual["accuracy"] - real["accuracy"]) < 0.02
    assert virtual["megabytes"] == real["megabytes"]


def test_alone_it_runs_without_a_launcher(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, EXAMPLE, "--epochs", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "1 rank, 1 seed" in run.stdout


def test_bad_flag_ends_every_rank_with_a_reason() -> None:
    job = on_ranks(3, EXAMPLE, "--period", "0")
    assert job.status not in (0, None)
    assert job.output.count("ConfigurationError: period must be an integer >= 1") == 3
    assert job.seconds < 100
