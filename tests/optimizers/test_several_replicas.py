"""Several optimizers of one job whose models have the same layout: each is averaged with its own kind alone."""

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy_model import Worker

from lentando.comm.errors import MismatchError
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import SGP
from lentando.optimizers.rules.local_sgd import LocalSGD

METHODS: dict[str, dict[str, Any]] = {
    "allreduce": {"base": AllReduce()},
    "local sgd": {"base": LocalSGD(), "period": 1},
    "gossip and outer steps": {"base": SGP(), "period": 1},
}


def two_workers(transport: ThreadTransport, **settings: Any) -> list[Worker]:
    return [
        Worker(transport, lambda rank, step, x: x - rank, np.full(4, start), lambda step: 0.1, **settings)
        for start in (1.0, 100.0)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_steps_in_another_order_are_an_error_on_every_rank(method: str) -> None:
    def work(transport: ThreadTransport) -> None:
        workers = two_workers(transport, **METHODS[method])
        for worker in workers:
            worker.run(2)
        before = [worker.model.x.copy() for worker in workers]
        order = workers if transport.rank == 0 else workers[::-1]
        with pytest.raises(MismatchError, match=r"\(optimizer \d of this job\)"):
            order[0].run(1)
        if method == "allreduce":  # which steps after the message
            for worker, x in zip(workers, before, strict=True):
                assert_array_equal(worker.model.x, x)

    run_ranks(2, work)


@pytest.mark.parametrize("method", METHODS)
def test_each_model_is_averaged_with_its_own_kind(method: str) -> None:
    def work(transport: ThreadTransport) -> None:
        first, second = two_workers(transport, **METHODS[method])
        for _ in range(3):
            second.run(1)
            first.run(1)
        assert abs(first.model.x).max() < 2
        assert second.model.x.min() > 50

    run_ranks(3, work)
