"""Ranks that train on the same batches, as control messages show it: one warning, and none where the data differ."""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy_model import Worker

from lentando.comm.agreement import Event
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.transports.single import SingleTransport
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.rank_comparison import RankComparison, weighted_rate
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import SGP
from lentando.optimizers.rules.local_sgd import LocalSGD

METHODS: dict[str, dict[str, Any]] = {
    "allreduce": {"base": AllReduce()},
    "local sgd": {"base": LocalSGD(), "period": 2},
    "one long round": {"base": LocalSGD(), "period": 4},
    "gossip and outer steps": {"base": SGP(), "period": 2},
}
STEPS = 8


def gradient(rank: int, step: int, x: Any) -> Any:
    return x - step


def warned(
    log: pytest.LogCaptureFixture, loss: Callable[[Worker], float] | None, size: int = 3, **settings: Any
) -> list[str]:
    """What is reported of losses when ranks have these."""

    def work(transport: ThreadTransport) -> None:
        worker = Worker(transport, gradient, np.ones(4), lambda step: 0.1, loss=loss, averages_loss=True, **settings)
        worker.run(STEPS)

    log.clear()
    with log.at_level(logging.WARNING, "lentando"):
        run_ranks(size, work)
    return [record.getMessage() for record in log.records if "same losses" in record.getMessage()]


@pytest.mark.parametrize("method", METHODS)
def test_equal_losses_on_all_ranks_are_reported_once(method: str, caplog: pytest.LogCaptureFixture) -> None:
    (stated,) = warned(caplog, lambda worker: 1 / (1 + worker.replica.inner_steps), **METHODS[method])
    assert "all 3 ranks have had exactly the same losses" in stated
    assert "by lt.rank() and lt.size()" in stated


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "loss",
    [
        lambda worker: 1 / (1 + worker.replica.inner_steps) + 1e-12 * worker.rank,  # other data
        lambda worker: math.log(10),  # a last layer of zeros, and a learning rate of zero: nothing is known
        lambda worker: math.log(10) if worker.replica.inner_steps < 2 else 1.0 + worker.rank,
        lambda worker: 0.0,
        None,
    ],
)
def test_other_losses_are_not(loss: Any, method: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not warned(caplog, loss, **METHODS[method])


def test_losses_that_are_equal_later_are_not(caplog: pytest.LogCaptureFixture) -> None:
    """As when a model has learned all, and every loss is rounded to the same few numbers."""

    def loss(worker: Worker) -> float:
        step = worker.replica.inner_steps
        return 1.0 + worker.rank if step == 0 else 2.0**-step

    assert not warned(caplog, loss, base=AllReduce())


def test_one_rank_alone_has_no_other_data(caplog: pytest.LogCaptureFixture) -> None:
    assert not warned(caplog, lambda worker: 1 / (1 + worker.replica.inner_steps), size=1, base=AllReduce())


def test_weighted_rate_distinguishes_groups_and_is_the_rate_of_one() -> None:
    assert weighted_rate([0.1]) == 0.1
    assert weighted_rate([0.1, 0.3]) != weighted_rate([0.3, 0.1])
    assert weighted_rate([0.5, 0.5, 0.5]) == 0.5
    assert math.isnan(weighted_rate([0.1, math.nan]))


@pytest.mark.parametrize(("before", "after", "warnings"), [(1, 0, 2), (0, 1, 0)])
def test_the_rank_that_is_0_when_ranks_differ_warns(
    before: int, after: int, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In an elastic job a rank that was not 0 when the optimizer was wrapped may be the only one left to warn."""
    transport = SingleTransport()
    transport.rank, transport.size = before, 2  # as after the deaths of other ranks, below
    comparison = RankComparison(transport, rates_may_differ=False, progress=Progress(lambda: 0.0))
    transport.rank = after
    same, different = np.ones(2), np.array([0.1, 0.2])
    with caplog.at_level(logging.WARNING, "lentando"):
        for loss in (1.0, 2.0, 3.0):
            numbers = {"weighted_rate": different, "learning_rate": different, "loss": loss * same}
            comparison.receive(Event.GRADIENTS, numbers)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == warnings
    assert sum("learning rates differ between ranks" in text for text in texts) == warnings // 2
    assert sum("exactly the same losses" in text for text in texts) == warnings // 2
