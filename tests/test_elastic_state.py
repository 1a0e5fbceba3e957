"""Elastic states over real MPI: a rank is killed in an epoch, and the others continue from the last commit."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from case_selection import selected_cases
from elastic_state_torch import COMMIT, MOMENTUM, PERIOD, RATE, SLOW, STEPS, batch
from launching import find_mpirun, launch

from lentando.comm.transport import Array

SUPPORT = Path(__file__).parent / "support"


def survivors(program: str, *arguments: str, size: int = 3) -> list[dict[str, Any]]:
    """What the survivors of an elastic job have printed, by rank."""
    command = [find_mpirun(), "--with-ft", "ulfm", "-np", str(size), sys.executable, str(SUPPORT / program), *arguments]
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    job = launch(command, 120, {"PYTHONPATH": path})
    assert job.status == 0, job.output
    found = [json.loads(line) for line in job.output.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda one: int(one["rank"]))


def gradient(x: Array, w: Array) -> Array:
    """Gradient of the mean square of ``x @ w[:3] + w[3] - x.sum()``."""
    inputs = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    return 2 * inputs.T @ (inputs @ w - x.sum(1)) / len(x)


def trained(method: str, commit: int) -> Array:
    """The weights after training with 3 ranks until a commit, and with 2 ranks from then on."""
    w, v = np.zeros((3, 4)), np.zeros((3, 4))
    anchor, u = np.zeros(4), np.zeros(4)
    for step in range(STEPS):
        if step == commit:
            w, v = np.tile(w[0], (2, 1)), np.tile(v[0], (2, 1))
        gradients = np.array([gradient(batch(step, rank).numpy(), row) for rank, row in enumerate(w)])
        if method == "allreduce":
            gradients[:] = gradients.mean(axis=0)
        v = MOMENTUM * v + gradients
        w = w - RATE * v
        if method == "slowmo" and step % PERIOD == PERIOD - 1:
            u = SLOW * u + (anchor - w.mean(axis=0)) / RATE
            anchor = anchor - RATE * u
            w[:] = anchor
    return w[0]


@pytest.mark.parametrize(
    ("method", "commit"),
    [
        ("allreduce", 10),
        ("slowmo", 15),  # the death is noticed in the outer step after step 16; the commit is in the middle of a round
    ],
)
def test_survivors_continue_from_the_last_commit_as_a_smaller_job_from_that_state(method: str, commit: int) -> None:
    found = survivors("elastic_state_torch.py", method)
    assert [one["number"] for one in found] == [0, 2]
    for rank, one in enumerate(found):
        assert one["resets"] == [[rank, 2]]
        assert one["entered"] == [[0, [], 0], [commit, list(range(commit)), commit]]
        assert one["seen"] == list(range(STEPS))
        assert (one["steps"], one["result"]) == (STEPS, "trained")
        np.testing.assert_allclose(one["weights"], trained(method, commit), rtol=1e-10)


@pytest.mark.parametrize("method", selected_cases(["osgp"], ["sgp", "osgp"]))
def test_gossip_begins_again_from_the_last_commit(method: str) -> None:
    found = survivors("elastic_state_torch.py", method)
    assert [one["number"] for one in found] == [0, 2]
    for one in found:
        (first, second), commit = one["entered"], one["entered"][1][0]
        assert first == [0, [], 0]
        assert commit in (10, 15)  # rank 0's: survivors may be one step apart when they notice the death
        assert commit % COMMIT == 0
        assert second == [commit, list(range(commit)), commit]
        assert (one["seen"], one["steps"]) == (list(range(STEPS)), STEPS)
        np.testing.assert_allclose(one["weights"], [1, 1, 1, 0], atol=0.6)
    assert found[0]["weights"] == found[1]["weights"]
