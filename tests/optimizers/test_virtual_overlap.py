"""Outer steps with a delay in virtual time: the schedule that one computes by hand."""

import numpy as np
import pytest
import reference
from numpy_model import Worker

from lentando.comm.simulation import Compute, Network, SimulatedTransport, simulate
from lentando.optimizers.report import report_of
from lentando.optimizers.rules.fragments import Delay
from lentando.optimizers.rules.local_sgd import LocalSGD

DIMENSION, PERIOD, ROUNDS = 100_000, 4, 6
STEP = 1.0
"""Seconds of an inner step."""
CONTROL = 2e-3
"""Bound of the seconds of a control message, of some 200 bytes, where an average takes seconds."""


def times(average_seconds: float, delay: Delay, fragments: int = 1) -> tuple[list[float], list[float]]:
    """Seconds of each inner step after the first round, and of its end, on a rank of two.

    The all-reduce of all parameters takes ``average_seconds``, by the simulator's formula without latency.
    """
    network = Network(0.0, 8 * DIMENSION / average_seconds)

    def train(transport: SimulatedTransport) -> list[float]:
        gradient, start = reference.constant(DIMENSION), np.zeros(DIMENSION)
        settings = {"base": LocalSGD(), "period": PERIOD, "algorithm": "backend", "delay": delay}
        worker = Worker(transport, gradient, start, lambda step: 0.5, **settings, fragments=fragments)
        found = []
        for _ in range(ROUNDS * PERIOD + 1):
            worker.run(1)
            found.append(transport.clock())
        if delay == "auto":
            found.append(report_of(worker.replica)["delay"])
        return found

    (found, _) = simulate(train, 2, network=network, compute=Compute(STEP))
    ends = found[PERIOD - 1 :]  # from the first contribution on
    return list(np.diff(ends[: (ROUNDS - 1) * PERIOD + 1])), found


@pytest.mark.parametrize(
    ("average_seconds", "delay", "expected"),
    [
        (1.5, 2, [1, 1, 1, 1]),  # it hides
        (3.5, 2, [1, 2.5, 1, 1]),  # the second step waits for what is left
        (3.5, PERIOD, [1, 1, 1, 1]),
        (6.0, PERIOD, [1, 1, 1, 3]),  # the link is always busy: a round takes as long as an average
        (6.0, 1, [6, 1, 1, 1]),
    ],
)
def test_only_what_does_not_hide_takes_time(average_seconds: float, delay: int, expected: list[float]) -> None:
    """The k-th inner step after each contribution, control messages aside."""
    found, _ = times(average_seconds, delay)
    rounds = np.array(found).reshape(-1, PERIOD)
    assert np.abs(rounds - expected).max() < CONTROL * (1 + average_seconds)


def test_fragments_use_the_link_one_after_the_other() -> None:
    """Two halves that take 3 s each: contributed in the middle and at the end of a round, adopted 2 steps later."""
    found, _ = times(6.0, 2, fragments=2)
    rounds = np.array(found).reshape(-1, PERIOD)[1:]
    assert np.abs(rounds - [1, 2, 1, 2]).max() < CONTROL * 7


@pytest.mark.parametrize(("average_seconds", "chosen"), [(0.5, 1), (2.5, 3), (9.0, PERIOD)])
def test_the_delay_that_is_chosen_is_the_quotient(average_seconds: float, chosen: int) -> None:
    assert times(average_seconds, "auto")[1][-1] == chosen
