"""DiLoCo's outer rule between a replica on each rank and the reference, and what it is equal to in special cases."""

from math import cos, pi
from typing import Any

import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from numpy_model import Worker

from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Transport
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.outer_sgd import OuterSGD
from lentando.optimizers.rules.slow_momentum import SlowMomentum

DIMENSION = 13  # no number of ranks divides it
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def cosine(step: int) -> float:
    return 0.05 * (1 + cos(pi * step / 24))


def worker(transport: Transport, outer: Any, rates: Any, **settings: Any) -> Worker:
    return Worker(transport, QUADRATIC, START, rates, base=LocalSGD(), outer=outer, period=4, **settings)


@pytest.mark.parametrize("algorithm", ["ring", "backend"])
@pytest.mark.parametrize(("lr", "momentum", "nesterov"), [(0.7, 0.9, True), (0.7, 0.5, False), (0.4, 0.0, False)])
def test_outer_sgd_equals_the_reference_under_a_schedule(
    transport: Transport, algorithm: str, lr: float, momentum: float, nesterov: bool
) -> None:
    found = worker(transport, OuterSGD(lr, momentum, nesterov), cosine, algorithm=algorithm).run(24)
    expected = reference.diloco(transport.size, 24, START, QUADRATIC, 4, cosine, lr, momentum, nesterov)
    assert_allclose(found, expected, **EXACT)


def test_each_parameter_group_may_have_a_rate_of_its_own(transport: Transport) -> None:
    def rates(step: int) -> list[float]:
        return [cosine(step), 0.0]  # with slow momentum, a rate of 0 would adopt the average

    def per_element(step: int) -> Any:
        return np.repeat(rates(step), [DIMENSION // 2, DIMENSION - DIMENSION // 2])

    found = worker(transport, OuterSGD(), rates).run(20)
    expected = reference.diloco(transport.size, 20, START, QUADRATIC, 4, per_element, 0.7, 0.9)
    assert_allclose(found, expected, **EXACT)


def test_at_a_constant_rate_it_is_slow_momentum_and_under_a_schedule_it_is_not(transport: Transport) -> None:
    for rates, are_equal in ((lambda step: 0.1, True), (cosine, False)):
        diloco = worker(transport, OuterSGD(0.7, 0.9, nesterov=True), rates).run(24)
        slowmo = worker(transport, SlowMomentum(0.7, 0.9, nesterov=True), rates).run(24)
        assert np.allclose(diloco, slowmo, rtol=1e-10, atol=1e-10) == are_equal


def test_learning_rate_1_without_momentum_adopts_the_average_itself(transport: Transport) -> None:
    found = worker(transport, OuterSGD(1, 0, nesterov=False), cosine).run(15)
    assert_array_equal(found, worker(transport, None, cosine).run(15))


def test_float32_keeps_momentum_and_anchor_in_float32(transport: Transport) -> None:
    model = Worker(transport, QUADRATIC, START.astype(np.float32), cosine, base=LocalSGD(), outer=OuterSGD(), period=4)
    expected = reference.diloco(transport.size, 24, START, QUADRATIC, 4, cosine, 0.7, 0.9)
    assert_allclose(model.run(24), expected, rtol=1e-4, atol=1e-5)
    assert model.slow_buffer().dtype == np.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "the outer learning rate must be a number > 0, got 0"),
        ({"lr": "0.7"}, "the outer learning rate must be a number > 0, got '0.7'"),
        ({"momentum": 1.0}, "the outer momentum must be a number >= 0 and < 1, got 1.0"),
        ({"momentum": 0.0}, "nesterov=True needs an outer momentum > 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        OuterSGD(**settings)
