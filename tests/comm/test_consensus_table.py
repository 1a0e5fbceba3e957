"""The command that prints measured consensus errors next to theory: the two must be equal, not only printed."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "consensus.py"


@pytest.mark.parametrize("size", [2, 3, 8, 9, 12])
def test_measured_errors_are_those_of_theory(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    rows = list(runpy.run_path(str(SCRIPT))["measure"](size))
    assert {row.topology for row in rows} >= {"ring", "one-peer exponential", "complete"}
    assert ("hypercube" in {row.topology for row in rows}) == (size in (2, 8))
    for row in rows:
        for measured, theory in zip(row.measured, row.theory, strict=True):
            if theory is not None:
                assert measured == pytest.approx(theory, rel=1e-9, abs=1e-14), row


def test_prints_writes_and_draws(tmp_path: Path) -> None:
    table, picture = tmp_path / "consensus.md", tmp_path / "consensus.svg"
    command = [sys.executable, str(SCRIPT), "--sizes", "4", "5", "--markdown", str(table), "--plot", str(picture)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    lines = table.read_text().splitlines()
    assert sum(line.startswith("| 4 ") for line in lines) == 9
    assert sum(line.startswith("| 5 ") for line in lines) == 7
    assert sum(line.startswith(("4 ", "5 ")) for line in printed.splitlines()) == 16
    assert "<svg" in picture.read_text()


def test_refuses_a_world_of_one() -> None:
    found = subprocess.run(
        [sys.executable, str(SCRIPT), "--sizes", "1"], capture_output=True, text=True, check=False, timeout=120
    )
    assert found.returncode == 2
    assert "at least 2 ranks" in found.stderr
