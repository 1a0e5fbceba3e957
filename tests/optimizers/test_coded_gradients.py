"""Averages of gradients in few bits, with error feedback in both directions."""

from typing import Any

import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from numpy_model import Worker
from quantized_reference import LEVELS, quantized, shards

from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.operations import Average, Sum
from lentando.comm.simulation import simulate
from lentando.comm.testing import run_ranks
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gradient_layout import gradient_layouts
from lentando.optimizers.rules.partial_average import PartialAverage
from lentando.optimizers.rules.wire import WireDtype

SIZES = (300, 5, 700)
SIZE = sum(SIZES)


def buffers(dtype: str = "float64") -> tuple[FlatBuffer, FlatBuffer]:
    layouts = build_layouts([Entry(f"w{n}", (size,), dtype, 0) for n, size in enumerate(SIZES)])
    return FlatBuffer(layouts[0]), FlatBuffer(gradient_layouts(layouts)[0])


def gradient(rank: int, step: int) -> Array:
    return np.random.default_rng([rank, step]).normal(size=SIZE) * np.geomspace(1e-3, 10, SIZE)


def averaged(transport: Transport, steps: int, **settings: Any) -> list[Array]:
    parameters, gradients = buffers()
    bound = AllReduce(**settings).bind(transport, [parameters], [gradients])
    found = []
    for step in range(steps):
        gradients.array[:SIZE] = gradient(transport.rank, step)
        gradients.array[SIZE:] = 1, 0, transport.rank % 2
        bound.average_gradients()
        found.append(gradients.array.copy())
    return found


def expected(ranks: int, steps: int, levels: int, divisor: int) -> list[Array]:
    parts = shards(SIZE + len(SIZES), ranks)
    parts = [slice(part.start, min(part.stop, SIZE)) for part in parts]

    def code(v: Array) -> Array:
        return np.concatenate([quantized(v[part], levels) for part in parts if part.start < part.stop])

    errors, mean_error, found = np.zeros((ranks, SIZE)), np.zeros(SIZE), []
    for step in range(steps):
        total = np.zeros(SIZE)
        for rank in range(ranks):
            wanted = gradient(rank, step) + errors[rank]
            sent = code(wanted) if ranks > 1 else wanted
            errors[rank] = wanted - sent
            total += sent
        wanted = total / divisor + mean_error
        sent = code(wanted) if ranks > 1 else wanted
        mean_error = wanted - sent
        found.append(sent)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("op", [Average, Sum])
def test_gradients_equal_an_independent_reference(ranks: int, name: WireDtype, op: Any) -> None:
    outcome = run_ranks(ranks, lambda transport: averaged(transport, 4, wire_dtype=name, op=op))
    divisor = ranks if op is Average else 1
    for found in outcome:
        assert_array_equal(found, outcome[0])
        assert_allclose([one[:SIZE] for one in found], expected(ranks, 4, LEVELS[name], divisor), rtol=0, atol=1e-12)
        presence = np.array([ranks, 0, ranks // 2]) / divisor
        assert_allclose([one[SIZE:] for one in found], [presence] * 4, rtol=1e-15)


def test_a_simulation_equals_threads_bit_by_bit() -> None:
    def job(transport: Transport) -> list[Array]:
        return averaged(transport, 3, wire_dtype="int4")

    assert_array_equal(simulate(job, 5), run_ranks(5, job))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_of_all_dtypes(dtype: str) -> None:
    def job(transport: Transport) -> Array:
        parameters, gradients = buffers(dtype)
        bound = AllReduce(wire_dtype="int8").bind(transport, [parameters], [gradients])
        gradients.array[:SIZE] = gradient(transport.rank, 0)
        bound.average_gradients()
        return gradients.array.astype(np.float64)

    outcome = run_ranks(3, job)
    exact = np.mean([gradient(rank, 0) for rank in range(3)], axis=0)
    for found in outcome:
        assert_array_equal(found, outcome[0])
        assert_allclose(found[:SIZE], exact, rtol=2e-2, atol=0.25)


@pytest.mark.parametrize("name", LEVELS)
def test_the_sum_of_all_steps_is_that_of_full_precision(name: WireDtype) -> None:
    steps = 50
    found = run_ranks(3, lambda transport: averaged(transport, steps, wire_dtype=name))[0]
    total = sum(one[:SIZE] for one in found)
    exact = sum(gradient(rank, step) for rank in range(3) for step in range(steps)) / 3
    assert abs(total - exact).max() < 2 * 40 / LEVELS[name]  # a rounding error of either half, not of 50 steps


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_reach_all_ranks_and_are_not_kept(bad: float) -> None:
    """A GradScaler expects them: it does not take the step, and the next averages are finite."""

    def job(transport: Transport) -> tuple[Array, Array]:
        parameters, gradients = buffers()
        bound = AllReduce(wire_dtype="int8").bind(transport, [parameters], [gradients])
        gradients.array[:SIZE] = gradient(transport.rank, 0)
        gradients.array[400] = bad if transport.rank == 1 else 1
        bound.average_gradients()
        first = gradients.array.copy()
        gradients.array[:SIZE] = gradient(transport.rank, 1)
        bound.average_gradients()
        return first, gradients.array.copy()

    for first, second in run_ranks(3, job):
        assert np.isnan(first[400])
        assert np.isfinite(first[:256]).all()
        assert np.isfinite(second).all()


def test_a_rank_without_a_batch_keeps_its_error() -> None:
    def job(transport: Transport) -> tuple[Array, Array]:
        parameters, gradients = buffers()
        bound = AllReduce(wire_dtype="int8").bind(transport, [parameters], [gradients])
        gradients.array[:SIZE] = gradient(transport.rank, 0)
        bound.average_gradients()
        before = bound.state_dict()["errors"]["flat"][0].copy()  # type: ignore[attr-defined]
        gradients.array[:SIZE] = gradient(transport.rank, 1)
        bound.average_gradients(PartialAverage(transport.rank != 1, 2, 3))
        after = bound.state_dict()["errors"]["flat"][0]  # type: ignore[attr-defined]
        return gradients.array[:SIZE].copy(), after - before

    exact = (gradient(0, 1) + gradient(2, 1)) / 2
    for rank, (found, change) in enumerate(run_ranks(3, job)):
        assert_allclose(found, exact, rtol=0, atol=40 / 127)
        assert change.any() == (rank != 1)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_resumed_run_is_bit_identical(steps: int) -> None:
    start, gradients = np.linspace(-1, 1, 600), reference.quadratic(600)

    def job(transport: Transport) -> None:
        def worker() -> Worker:
            return Worker(transport, gradients, start, lambda _: 0.1, base=AllReduce(wire_dtype="int4"))

        first = worker()
        first.run(steps)
        saved, x = first.replica.state_dict(), first.model.x.copy()
        second = worker()
        second.model.x[:] = x
        second.replica.load_state_dict(saved)
        assert_array_equal(second.run(5), first.run(5))

    run_ranks(3, job)


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings, text in (
        ({"wire_dtype": "int3"}, "wire_dtype must be 'bfloat16', 'float16', 'int8', 'int4' or None"),
        ({"wire_dtype": "int8", "overlap": True}, "overlap=True averages gradients as they are"),
        ({"wire_dtype": "int8", "predivide_factor": 2.0}, "predivide_factor has no use with wire_dtype='int8'"),
    ):
        with pytest.raises(ConfigurationError, match=text):
            AllReduce(**settings)  # type: ignore[arg-type]
