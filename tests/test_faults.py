"""``make faults`` in short: a method of each kind, in PyTorch, with few kills."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from case_selection import selected_cases
from prepared_python import prepared_python

PROGRAM = Path(__file__).parent / "faults"


def faults(*arguments: str, seconds: float = 560) -> "subprocess.CompletedProcess[str]":
    ranks = shlex.join(prepared_python("lentando.torch"))
    command = [sys.executable, str(PROGRAM), "--python", ranks, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


@pytest.mark.long
@pytest.mark.parametrize(
    ("only", "options", "cases"),
    [
        ("torch/slowmo/[!k]", ["--stop-seconds", "3"], 8),
        *selected_cases([], [("torch/osgp/kill", ["--jobs", "1", "--ranks", "4", "--kills", "3"], 4)]),
    ],
)
def test_promises_are_kept(only: str, options: list[str], cases: int) -> None:
    finished = faults("--only", only, *options)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("| yes |") == cases, finished.stdout
    assert f"{cases} cases" in finished.stdout


def test_a_broken_promise_is_reported_with_the_command_that_shows_it_again() -> None:
    """A rank that must not die, since the job is too small to have one: no undisturbed accuracy is that high."""
    finished = faults(
        "--only", "torch/allreduce/kills", "--jobs", "1", "--ranks", "2", "--kills", "1", "--margin", "-2"
    )
    assert finished.returncode == 1
    assert "**broken 1 times**" in finished.stdout
    assert re.search(r"torch/allreduce/kills, seed 1: .*accuracy", finished.stderr)
    assert (
        "again: python tests/faults --only torch/allreduce/kills --seed 1 --jobs 1 --kills 1 --ranks 2"
        in finished.stderr
    )


def test_nothing_tried_is_no_success() -> None:
    finished = faults("--only", "nothing")
    assert finished.returncode == 1
    assert "0 cases" in finished.stdout
