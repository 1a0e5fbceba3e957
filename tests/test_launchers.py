"""One program under every launcher, and the tests that need ranks under those that ``test_ranks.py`` does not start."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from case_selection import selected_cases
from launchers import HOROVOD_GLOO, LAUNCHERS, OPEN_MPI, TORCHRUN, WITH_MPICH, Launcher
from launching import PYTEST, RANKS

PROGRAM = str(Path(__file__).parent / "launchers/same_results.py")
SIZE = 3
OVER_TORCHRUN = " ".join(
    f"torch/test_{name}.py"
    for name in ("gossip", "functions", "async_functions", "more_functions", "gradients_of_functions")
)
"""What runs over PyTorch's own communication: messages between two ranks, and each function of ``lentando.torch``."""


@pytest.fixture(scope="module")
def simulated() -> dict[str, Any]:
    """What the program computes when it is started alone."""
    run = subprocess.run(
        [sys.executable, PROGRAM, "--simulate", str(SIZE)], capture_output=True, text=True, timeout=120, check=True
    )
    return results(run.stdout)


def results(output: str) -> dict[str, Any]:
    """The one line that rank 0 writes; horovodrun puts the rank before it."""
    (line,) = re.findall(r"RESULTS (.*)", output)
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.name)
def test_every_launcher_gives_the_same_results(launcher: Launcher, simulated: dict[str, Any]) -> None:
    """Bit-identically, what our own ring adds; within rounding, what the backend does in an order of its own."""
    job = launcher.run(SIZE, PROGRAM, timeout_seconds=90)
    assert job.status == 0, job.output
    found, expected = results(job.output), dict(simulated)
    assert found.pop("transport") == launcher.transport
    assert expected.pop("transport") == "simulation"
    by_backend, exact = np.array(found.pop("backend")), np.array(expected.pop("backend"))
    assert found == expected
    # The sum of three normal values: each is below 8, and each addition rounds to half a unit in the last place.
    assert (np.abs(by_backend - exact) <= (SIZE - 1) * 16 * np.finfo(np.float64).eps).all()


@pytest.mark.parametrize(
    ("launcher", "size", "paths"),
    [
        (WITH_MPICH, 3, "comm"),
        (HOROVOD_GLOO, 2, "comm"),
        (HOROVOD_GLOO, 2, "torch/test_gossip.py"),
        (TORCHRUN, 2, "comm"),
        pytest.param(TORCHRUN, 3, OVER_TORCHRUN, id="torchrun-3-torch"),
        *selected_cases(
            [],
            [
                (HOROVOD_GLOO, 3, "comm"),
                (TORCHRUN, 3, "comm"),
                (HOROVOD_GLOO, 2, "optimizers"),
                (TORCHRUN, 2, "optimizers"),
                (TORCHRUN, 1, "comm"),
            ],
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_tests_that_need_ranks_pass(launcher: Launcher, size: int, paths: str) -> None:
    files = [str(RANKS / path) for path in paths.split()]
    job = launcher.run(size, *PYTEST, *files, timeout_seconds=480, prepared="lentando.torch")
    assert job.status == 0, job.output
    assert int(re.findall(r"(\d+) passed", job.output)[0]) > 0, job.output


def test_horovods_engine_can_be_forced_under_mpirun() -> None:
    HOROVOD_GLOO.need()
    job = OPEN_MPI.run(SIZE, PROGRAM, environment={"LENTANDO_TRANSPORT": "horovod"})
    assert job.status == 0, job.output
    assert results(job.output)["transport"] == "horovod"
