"""The smallest example, started unchanged by every launcher and alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import LAUNCHERS, Launcher, has_torch

MINIMAL = Path(__file__).parents[2] / "examples/minimal_torch.py"
FOUND = "ranks found [1.0, -2.0, 3.0, -4.0]"


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.name)
def test_every_launcher_starts_it(launcher: Launcher) -> None:
    launcher.need()
    if not has_torch(launcher):
        pytest.skip(f"no PyTorch for {launcher.python}")
    job = launcher.run(2, str(MINIMAL))
    assert job.status == 0, job.output
    assert re.findall(r"\d+ ranks found .*", job.output) == [f"2 {FOUND}"], job.output


def test_it_runs_alone() -> None:
    finished = subprocess.run([sys.executable, MINIMAL], capture_output=True, text=True, timeout=60, check=True)
    assert finished.stdout == f"1 {FOUND}\n"


def test_it_is_small() -> None:
    assert len(MINIMAL.read_text().splitlines()) <= 30
