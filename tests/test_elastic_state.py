"""Elastic states over real MPI: a rank is killed in an epoch, and the others continue from the last commit."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from case_selection import selected_cases
from elastic_state_data import (
    BATCHES,
    COMMIT,
    EPOCHS,
    LOOP_COMMIT,
    LOOP_STEPS,
    MOMENTUM,
    PERIOD,
    RATE,
    SLOW,
    STEPS,
    batch,
)
from launching import find_mpirun, launch
from prepared_python import prepared_python

from lentando.comm.transport import Array

SUPPORT = Path(__file__).parent / "support"


def survivors(framework: str, *arguments: str, size: int = 3) -> list[dict[str, Any]]:
    """What the survivors of an elastic job have printed, by rank."""
    python = prepared_python({"torch": "lentando.torch", "keras": "lentando.tensorflow"}[framework])
    program = str(SUPPORT / f"elastic_state_{framework}.py")
    command = [find_mpirun(), "--with-ft", "ulfm", "-np", str(size), *python, program, *arguments]
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    job = launch(command, 120, {"PYTHONPATH": path})
    assert job.status == 0, job.output
    found = [json.loads(line) for line in job.output.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda one: int(one["rank"]))


def gradient(x: Array, w: Array) -> Array:
    """Gradient of the mean square of ``x @ w[:3] + w[3] - x.sum()``."""
    inputs = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    return 2 * inputs.T @ (inputs @ w - x.sum(1)) / len(x)


def trained(steps: int, ranks: dict[int, list[int]], momentum: float, slow: float | None) -> list[float]:
    """The weights after training.

    Args:
        steps: number of steps.
        ranks: by step, where ranks have died: the number of ranks from then on, and the rank whose state they continue
            from, before the step.
        momentum: of SGD.
        slow: momentum of SlowMo; None for averages of gradients.
    """
    w, v = np.zeros((ranks[0][0], 4)), np.zeros((ranks[0][0], 4))
    anchor, u = np.zeros(4), np.zeros(4)
    for step in range(steps):
        number, source = ranks.get(step, [len(w), -1])
        if source >= 0:
            w, v = np.tile(w[source], (number, 1)), np.tile(v[source], (number, 1))
        gradients = np.array([gradient(batch(step, rank), row) for rank, row in enumerate(w)])
        if slow is None:
            gradients[:] = gradients.mean(axis=0)
        v = momentum * v + gradients
        w = w - RATE * v
        if slow is not None and step % PERIOD == PERIOD - 1:
            u = slow * u + (anchor - w.mean(axis=0)) / RATE
            anchor = anchor - RATE * u
            w[:] = anchor
    return list(w[0])


@pytest.mark.parametrize(
    ("method", "commit", "slow"),
    [
        ("allreduce", 10, None),
        (
            "slowmo",
            15,
            SLOW,
        ),  # the death is noticed in the outer step after step 16; the commit is in the middle of a round
    ],
)
def test_survivors_continue_from_the_last_commit_as_a_smaller_job_from_that_state(
    method: str, commit: int, slow: float | None
) -> None:
    found = survivors("torch", method)
    weights = trained(STEPS, {0: [3, 0], commit: [2, 0]}, MOMENTUM, slow)
    assert [one["number"] for one in found] == [0, 2]
    for rank, one in enumerate(found):
        assert one["resets"] == [[rank, 2]]
        assert one["entered"] == [[0, [], 0], [commit, list(range(commit)), commit]]
        assert one["seen"] == list(range(STEPS))
        assert (one["steps"], one["result"]) == (STEPS, "trained")
        np.testing.assert_allclose(one["weights"], weights, rtol=1e-10)


@pytest.mark.parametrize("method", selected_cases(["osgp"], ["sgp", "osgp"]))
def test_gossip_begins_again_from_the_last_commit(method: str) -> None:
    found = survivors("torch", method)
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


def test_fit_and_graphs_continue_from_the_last_commit() -> None:
    """In one job: rank 1 dies in ``fit``, and rank 0 of the other two in a loop that calls a ``tf.function``."""
    (found,) = survivors("keras")
    assert (found["number"], found["rank"], found["size"]) == (2, 0, 1)
    assert found["resets"] == [[1, 2]]
    assert found["entered"] == [[0, 0, 0], [1, 0, BATCHES], [0, 2], [LOOP_COMMIT, 1]]
    assert (found["steps"], found["state"]) == (EPOCHS * BATCHES, [EPOCHS, 0])
    assert found["rounds"] == LOOP_STEPS // PERIOD
    fitted = trained(EPOCHS * BATCHES, {0: [3, 0], BATCHES: [2, 0]}, MOMENTUM, None)
    np.testing.assert_allclose(found["fitted"], fitted, rtol=1e-5)  # fit passes the data on in float32
    looped = trained(LOOP_STEPS, {0: [2, 0], LOOP_COMMIT: [1, 1]}, 0.0, SLOW)
    np.testing.assert_allclose(found["looped"], looped, rtol=1e-10)
