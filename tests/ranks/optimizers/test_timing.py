"""What replicas on real ranks find out about their speed."""

import time

import numpy as np
import pytest
from numpy_model import Worker

from lentando.comm.transport import Transport
from lentando.optimizers.report import report_of
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm
from lentando.optimizers.rules.local_sgd import LocalSGD

STEP_SECONDS = 0.002
SLOW_SECONDS = 0.06
"""So much longer that a busy machine makes no other rank as slow."""
STEPS = 17


@pytest.mark.parametrize(("base", "period"), [(LocalSGD(), 4), (AllReduce(), None)], ids=["local", "synchronous"])
def test_a_rank_that_sleeps_is_named_on_every_rank(
    transport: Transport, base: BaseAlgorithm, period: int | None
) -> None:
    slow = transport.size - 1

    def gradient(rank: int, step: int, x: np.ndarray) -> np.ndarray:
        time.sleep(SLOW_SECONDS if rank == slow else STEP_SECONDS)
        return 0.0 * x

    worker = Worker(transport, gradient, np.zeros(1000), lambda step: 0.1, base=base, period=period)
    worker.run(STEPS)
    report = report_of(worker.replica)
    by_rank = report["compute_seconds_by_rank"]
    assert len(by_rank) == transport.size
    assert by_rank[slow] > SLOW_SECONDS
    assert report["size"] == transport.size
    assert report["delay_seconds"] > 0
    assert report["seconds_per_step"] > SLOW_SECONDS
    reported = transport.allgather(np.array(by_rank))
    assert (reported == reported[0]).all()
    waited = transport.allgather(np.array([report["waiting_seconds"]]))[:, 0] / (STEPS - 1)
    if transport.size == 1:
        assert report["stragglers"] == []
        assert waited[0] == 0
        return
    assert report["stragglers"] == [slow]
    assert report["predicted_seconds_per_step"] > SLOW_SECONDS
    # The others wait for the slow rank in every round, and it for no rank.
    assert waited.argmin() == slow
    assert np.delete(waited, slow).min() > 0.4 * (SLOW_SECONDS - STEP_SECONDS)
