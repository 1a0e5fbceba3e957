"""The error-runtime experiment, started as a user starts it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import on_ranks, started

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "error_runtime.py")
METHODS = ["synchronous SGD", "period 4", "period 16", "period 64", "AdaComm", "AdaComm, slow momentum"]


def methods(result: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = result["methods"]
    assert list(found) == METHODS
    return found


def test_quick_simulation_shows_adacomm_ahead_and_writes_one_page(tmp_path: Path) -> None:
    run = started(EXAMPLE, "--quick", "--report", str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "4 workers, D/Y = 4, constant compute" in run.stdout
    assert "1/1" in run.stderr  # the progress bar
    numbers = json.loads((tmp_path / "error_runtime.json").read_text())
    found = methods(numbers["results"][0])
    # The delay model of constant Y and D is exact here: Y + D / period.
    for method, period in (("synchronous SGD", 1), ("period 4", 4), ("period 16", 16), ("period 64", 64)):
        assert found[method]["seconds_per_step"][0] == pytest.approx(1 + 4 / period, rel=0.03)
    assert found["AdaComm"]["speedup_to_1.01"][0] > 1.3
    assert found["AdaComm"]["final_loss"][0] < found["synchronous SGD"]["final_loss"][0]
    (periods,) = found["AdaComm"]["periods"]
    assert periods[0] == 64
    assert periods == sorted(periods, reverse=True)
    assert periods[-1] <= 4
    picture = (tmp_path / "error_runtime.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    page = (tmp_path / "error_runtime.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)  # loads nothing
    assert all(f"<td>{method}</td>" in page for method in METHODS)


def test_real_ranks_measure_train_and_are_compared_with_their_simulation(tmp_path: Path) -> None:
    flags = ["--real", "--steps", "60", "--step-seconds", "0.002", "--interval", "10", "--initial-period", "16"]
    job = on_ranks(2, EXAMPLE, *flags, "--report", str(tmp_path))
    assert job.status == 0, job.output
    assert "measured and simulated" in job.output
    measured, simulated = json.loads((tmp_path / "error_runtime.json").read_text())["results"]
    assert measured["step_seconds"] == simulated["step_seconds"] >= 0.002
    assert measured["average_seconds"] == simulated["average_seconds"] > 0
    for result in (measured, simulated):
        found = methods(result)
        assert found["synchronous SGD"]["seconds_per_step"][0] > 0.002
        assert found["AdaComm"]["periods"][0][0] == 16
