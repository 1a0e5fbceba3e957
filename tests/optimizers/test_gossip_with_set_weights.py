"""Gossip continues to mix after the program has set weights between two steps, once and again."""

from typing import Any

import numpy as np
import pytest
from numpy_model import Worker

from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP


@pytest.mark.parametrize("period", [None, 40])
@pytest.mark.parametrize("base", [SGP(), OSGP(), OSGP(staleness=3), DPSGD()], ids=repr)
def test_replicas_come_together_after_each_time(base: Any, period: int | None) -> None:
    apart: list[list[float]] = [[], []]

    def work(transport: ThreadTransport) -> None:
        worker = Worker(
            transport, lambda rank, step, x: np.zeros_like(x), np.ones(4), lambda step: 0.1, base=base, period=period
        )
        worker.run(2)
        for round_number in range(2):
            worker.model.x[:] = 100.0 * transport.rank
            worker.run(24)
            distance = worker.replica.consensus_distance()
            if transport.rank == 0:
                apart[round_number].append(distance)

    run_ranks(4, work)
    assert apart[0][0] < 5
    assert apart[1][0] < 5
