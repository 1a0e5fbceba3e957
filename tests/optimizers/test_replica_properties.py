"""Any setting, any number of replicas: the replica equals the reference."""

from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from numpy_model import Worker

from lentando.comm.transport import Transport
from lentando.comm.transports.threads import run_ranks
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.slow_momentum import SlowMomentum


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 6),
    dimension=st.integers(2, 20),
    period=st.integers(1, 5),
    steps=st.integers(0, 14),
    alpha=st.floats(0.1, 2.0),
    beta=st.floats(0.05, 0.95),
    nesterov=st.booleans(),
    momentum=st.sampled_from([0.0, 0.9]),
    buffers=st.sampled_from(["reset", "maintain", "average"]),
    rates=st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.3]), min_size=14, max_size=14),
    algorithm=st.sampled_from(["ring", "backend"]),
    exact_average=st.booleans(),
)
def test_replicas_equal_algorithm_1(
    size: int,
    dimension: int,
    period: int,
    steps: int,
    alpha: float,
    beta: float,
    nesterov: bool,
    momentum: float,
    buffers: Any,
    rates: list[float],
    algorithm: Any,
    exact_average: bool,
) -> None:
    gradient, start = reference.quadratic(dimension), np.linspace(-1, 1, dimension)

    def train(transport: Transport) -> Any:
        worker = Worker(
            transport,
            gradient,
            start,
            lambda step: rates[step],
            momentum,
            base=LocalSGD(),
            outer=SlowMomentum(alpha, beta, nesterov),
            period=period,
            base_buffers=buffers if exact_average else "maintain",
            algorithm=algorithm,
            exact_average=exact_average,
        )
        return worker.run(steps)

    expected = reference.slowmo(
        size, steps, start, gradient, period, lambda step: rates[step], alpha, beta, momentum,
        buffers if exact_average else "maintain", nesterov, exact_average,
    )  # fmt: skip
    assert_allclose(np.array(run_ranks(size, train)), expected.x, rtol=1e-9, atol=1e-9)
