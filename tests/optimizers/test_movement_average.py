"""Outer steps that average movements: in few bits, with weights, and with a penalty for long ones."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from numpy_model import Worker
from quantized_reference import LEVELS, QuantizedRounds, quantized, shards

from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import ConfigurationError, NonFiniteError
from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.simulation import simulate
from lentando.comm.testing import run_ranks
from lentando.comm.transport import Array, Transport
from lentando.comm.transports.single import SingleTransport
from lentando.optimizers.rules.gossip import SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.movement_penalty import MovementPenalty, rank_factors
from lentando.optimizers.rules.outer_sgd import OuterSGD
from lentando.optimizers.rules.outer_step import OuterStep
from lentando.optimizers.rules.partial_average import PartialAverage
from lentando.optimizers.rules.settings import Settings
from lentando.optimizers.rules.slow_momentum import SlowMomentum
from lentando.optimizers.rules.wire import WireDtype

DIMENSION, RATE, PERIOD = 700, 0.125, 3
START = np.linspace(-1, 1, DIMENSION)
GRADIENT = reference.quadratic(DIMENSION)
CODES: dict[WireDtype, Callable[[Any], Any]] = {
    "int8": lambda v: quantized(v, LEVELS["int8"]),
    "int4": lambda v: quantized(v, LEVELS["int4"]),
    "bfloat16": lambda v: v.astype(bfloat16).astype(v.dtype),
    "float16": lambda v: v.astype(np.float16).astype(v.dtype),
}
SETTINGS: dict[str, Any] = {"base": LocalSGD(), "period": PERIOD}


def slow_momentum(rounds: QuantizedRounds, mean: Any) -> Any:
    rounds.u = 0.5 * rounds.u + (rounds.anchor - mean) / RATE
    return rounds.anchor - RATE * rounds.u


def nesterov(rounds: QuantizedRounds, mean: Any) -> Any:
    moved = rounds.anchor - mean
    rounds.u = 0.9 * rounds.u + moved
    return rounds.anchor - 0.7 * (moved + 0.9 * rounds.u)


RULES: list[tuple[Any, Any]] = [
    (None, lambda _, mean: mean),
    (SlowMomentum(1.0, 0.5), slow_momentum),
    (OuterSGD(0.7, 0.9, nesterov=True), nesterov),
]


def expected(ranks: int, steps: int, code: Any, rule: Any, factors: Any = None, gradient: Any = GRADIENT) -> list[Any]:
    rounds = QuantizedRounds(START, ranks, code)
    x = [START] * ranks
    for step in range(steps):
        x = [own - RATE * gradient(rank, step, own) for rank, own in enumerate(x)]
        if (step + 1) % PERIOD == 0:
            norms = [float(np.linalg.norm(own - rounds.anchor)) for own in x]
            x = [rounds.end(x, None if factors is None else factors(norms), rule)] * ranks
    return x


def train(transport: Transport, steps: int, gradient: Any = GRADIENT, **settings: Any) -> Array:
    worker = Worker(transport, gradient, START, lambda _: RATE, **{**SETTINGS, **settings})
    return worker.run(steps).copy()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize(("outer", "rule"), RULES)
def test_outer_steps_equal_an_independent_reference(ranks: int, name: WireDtype, outer: Any, rule: Any) -> None:
    steps = 4 * PERIOD + 1
    outcome = run_ranks(ranks, lambda transport: train(transport, steps, outer=outer, wire_dtype=name))
    tie = 1e-3 if name == "float16" else 1e-12  # the last bit of a mean decides it: movements have few bits there
    assert_allclose(outcome, expected(ranks, steps, CODES[name], rule), rtol=0, atol=tie)


def delayed(ranks: int, steps: int, delay: int, code: Any) -> list[Any]:
    """Averages that are adopted some steps after they were formed; each half of an average is coded."""
    parts = shards(DIMENSION, ranks)
    anchor, u, x, contributed = START, np.zeros(DIMENSION), [START] * ranks, [START] * ranks
    errors, mean_error = [np.zeros(DIMENSION)] * ranks, np.zeros(DIMENSION)
    for step in range(1, steps + 1):
        x = [own - RATE * GRADIENT(rank, step - 1, own) for rank, own in enumerate(x)]
        if step > delay + 1 and (step - delay) % PERIOD == 0:
            x = [own - then + anchor for own, then in zip(x, contributed, strict=True)]
        if step % PERIOD == 0:
            contributed, wanted = x, [own - anchor + error for own, error in zip(x, errors, strict=True)]
            sent = [np.concatenate([code(one[part]) for part in parts]) for one in wanted]
            errors = [one - read for one, read in zip(wanted, sent, strict=True)]
            mean = sum(sent) / ranks + mean_error
            read = np.concatenate([code(mean[part]) for part in parts])
            mean_error = mean - read
            u = 0.5 * u + (anchor - (anchor + read)) / RATE
            anchor = anchor - RATE * u
    return x


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("delay", [1, PERIOD - 1])
def test_delayed_outer_steps_equal_an_independent_reference(ranks: int, name: WireDtype, delay: int) -> None:
    steps = 4 * PERIOD + 1
    settings = {"outer": SlowMomentum(1.0, 0.5), "delay": delay, "wire_dtype": name}
    outcome = run_ranks(ranks, lambda transport: train(transport, steps, **settings))
    code = CODES[name] if ranks > 1 else np.copy
    assert_allclose(outcome, delayed(ranks, steps, delay, code), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_fragments_are_close_to_full_precision_and_leave_ranks_equal(name: WireDtype) -> None:
    def job(transport: Transport, name: WireDtype | None) -> Array:
        return train(transport, 8 * PERIOD, outer=SlowMomentum(1.0, 0.5), fragments=2, wire_dtype=name)

    outcome = run_ranks(3, lambda transport: job(transport, name))
    assert_array_equal(outcome, simulate(lambda transport: job(transport, name), 3))
    last = slice(DIMENSION // 2, None)  # the fragment that is averaged at the end of a round
    assert_array_equal(outcome[1][last], outcome[0][last])
    assert_allclose(outcome, run_ranks(3, lambda transport: job(transport, None)), rtol=0, atol=2 / LEVELS[name])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_simulation_equals_threads_bit_by_bit(name: WireDtype) -> None:
    def job(transport: Transport) -> Array:
        return train(transport, 2 * PERIOD, outer=SlowMomentum(1.0, 0.5), wire_dtype=name)

    assert_array_equal(simulate(job, 5), run_ranks(5, job))


def averaged(
    transport: Transport, dtype: str, sizes: Sequence[int], moves: Callable[[int, int], Any], rounds: int, name: Any
) -> Array:
    """Rounds of movements without a rule, of a buffer with parameters and a statistic."""
    entries = [Entry(f"w{n}", (size,), dtype, n) for n, size in enumerate(sizes[:-1])]
    (layout,) = build_layouts([*entries, Entry("statistic", (sizes[-1],), dtype, None)])
    buffer = FlatBuffer(layout)
    buffer.array[...] = 1
    outer = OuterStep(transport, [buffer], None, wire_dtype=name)
    for number in range(rounds):
        buffer.array[...] = buffer.array.astype(np.float64) + moves(transport.rank, number)
        outer.run([0.1] * len(entries))
    return buffer.array.astype(np.float64)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("sizes", [(1, 1), (3, 250, 9), (256, 256, 300), (70000, 1, 5)])
def test_all_ranks_are_bit_identical_and_statistics_are_exact(ranks: int, dtype: str, sizes: Sequence[int]) -> None:
    size = sum(sizes)

    def moves(rank: int, number: int) -> Any:
        random = np.random.default_rng([rank, number])
        parameters = random.normal(size=size - sizes[-1]) / 16
        return np.concatenate([parameters, random.integers(-4, 5, sizes[-1]) * 840.0 / ranks])

    outcome = run_ranks(ranks, lambda transport: averaged(transport, dtype, sizes, moves, 2, "int4"))
    for other in outcome[1:]:
        assert_array_equal(other, outcome[0])
    exact = run_ranks(ranks, lambda transport: averaged(transport, dtype, sizes, moves, 2, None))
    assert_array_equal(outcome[0][size - sizes[-1] :], exact[0][size - sizes[-1] :])
    assert_allclose(outcome[0], exact[0], rtol=0.01, atol=0.06)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_errors_do_not_add_up(name: WireDtype) -> None:
    """Equal movements in each round: without error feedback, small elements would never move."""

    def moves(rank: int, number: int) -> Any:
        return np.linspace(0, 1, 256)[:, None].repeat(2, 1).T.ravel() ** 8 * (1 + rank) / 64

    outcome = run_ranks(3, lambda transport: averaged(transport, "float32", (500, 12), moves, 60, name))
    exact = 1 + 60 * sum(moves(rank, 0) for rank in range(3)) / 3
    steps_of_rounding = 2 * 3 / 64 / LEVELS[name]
    assert abs(outcome[0] - exact)[:500].max() <= steps_of_rounding


def test_bytes_are_those_of_the_coding() -> None:
    def bytes_sent(transport: Transport, name: WireDtype | None) -> int:
        (layout,) = build_layouts([Entry("w", (4 * 2560,), "float32", 0)])
        outer = OuterStep(transport, [FlatBuffer(layout)], None, algorithm="ring", wire_dtype=name)
        before = transport.traffic.copy()
        outer.run([0.1])
        return transport.traffic.bytes_sent - before.bytes_sent

    agreement = 3  # whether the average is finite, one byte to each other rank
    for name, bits in ((None, 32), ("int8", 8.125), ("int4", 4.125)):
        found = run_ranks(4, lambda transport, name=name: bytes_sent(transport, name))
        assert set(found) == {agreement + 2 * 3 * 2560 * bits / 8}


@pytest.mark.parametrize("name", ["int8", None])
def test_values_that_are_not_finite_are_found_and_change_nothing(name: WireDtype | None) -> None:
    def job(transport: Transport) -> tuple[str, bool]:
        weighting = "equal" if name else "steps"
        worker = Worker(transport, GRADIENT, START, lambda _: RATE, **SETTINGS, wire_dtype=name, weighting=weighting)
        worker.run(2 * PERIOD - 1)
        worker.gradient = lambda *_: np.where(np.arange(DIMENSION) == 400, np.nan if transport.rank == 1 else 0, 0)
        with pytest.raises(NonFiniteError) as error:
            worker.run(1)
        outer = worker.replica.state_dict()["outer"]
        return str(error.value), all(np.isfinite(a).all() for v in outer.values() for a in v["flat"] if a is not None)

    for text, is_state_finite in run_ranks(3, job):
        assert "1: 'part1' is not finite" in text
        assert is_state_finite


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_rank_that_is_not_finite_is_left_out_and_continues_from_the_average(name: WireDtype) -> None:
    def gradient(rank: int, step: int, x: Array) -> Array:
        return GRADIENT(rank, step, x) * (np.nan if (rank, step) == (1, 4) else 1)

    outcome = run_ranks(3, lambda t: train(t, 3 * PERIOD, gradient, wire_dtype=name, on_nonfinite="skip"))
    rounds = QuantizedRounds(START, 3, CODES[name])
    x = [START] * 3
    for step in range(3 * PERIOD):
        x = [own - RATE * GRADIENT(rank, step, own) for rank, own in enumerate(x)]
        if (step + 1) % PERIOD == 0:
            x = [rounds.end(x, [1.0, float(step != 5), 1.0])] * 3
    assert_allclose(outcome, x, rtol=0, atol=1e-6)


def test_uneven_data() -> None:
    """In the second round rank 2 has no batch left: it keeps its error, and adopts the average of the others."""

    def job(transport: Transport) -> Array:
        worker = Worker(transport, GRADIENT, START, lambda _: RATE, **SETTINGS, wire_dtype="int8")
        return worker.run_joined((2 if transport.rank < 2 else 1) * PERIOD).copy()

    rounds = QuantizedRounds(START, 3, CODES["int8"])
    x = [START] * 3
    for first, factors in ((0, [1.0, 1.0, 1.0]), (PERIOD, [1.0, 1.0, 0.0])):
        for step in range(first, first + PERIOD):
            x = [own - RATE * factors[rank] * GRADIENT(rank, step, own) for rank, own in enumerate(x)]
        x = [rounds.end(x, factors)] * 3
    assert_allclose(run_ranks(3, job), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["int4", None])
def test_steps_weight_the_ranks_on_uneven_data(name: WireDtype | None) -> None:
    counts = [3, 1, 2]

    def job(transport: Transport) -> Array:
        worker = Worker(transport, GRADIENT, START, lambda _: RATE, **SETTINGS, wire_dtype=name, weighting="steps")
        return worker.run_joined(counts[transport.rank]).copy()

    x = [START] * 3
    for step in range(PERIOD):
        x = [own - RATE * (step < counts[r]) * GRADIENT(r, step, own) for r, own in enumerate(x)]
    rounds = QuantizedRounds(START, 3, CODES[name] if name else np.copy)
    assert_allclose(run_ranks(3, job), [rounds.end(x, [1.5, 0.5, 1.0])] * 3, rtol=0, atol=1e-6)


def sampled(transport: Transport, samples: Sequence[float | None], **settings: Any) -> Array:
    worker = Worker(transport, GRADIENT, START, lambda _: RATE, **SETTINGS, weighting="samples", **settings)
    for step in range(2 * PERIOD):
        own = samples[transport.rank]
        if own is not None:
            worker.replica.rank_weights.record_samples(own + step % 2)
        worker.run(1)
    return worker.model.x.copy()


def test_samples_weight_the_ranks() -> None:
    rounds = QuantizedRounds(START, 3, CODES["int8"])
    x, samples = [START] * 3, np.array([10.0, 2.0, 5.0])
    for first in (0, PERIOD):
        for step in range(first, first + PERIOD):
            x = [own - RATE * GRADIENT(rank, step, own) for rank, own in enumerate(x)]
        total = 3 * samples + (1 if first == 0 else 2)
        x = [rounds.end(x, 3 * total / total.sum())] * 3
    assert_allclose(run_ranks(3, lambda t: sampled(t, [10, 2, 5], wire_dtype="int8")), x, rtol=0, atol=1e-6)


def test_samples_that_are_missing_or_zero_are_errors_on_every_rank() -> None:
    def job(transport: Transport, samples: Sequence[float | None]) -> str:
        with pytest.raises(ConfigurationError) as error:
            sampled(transport, samples)
        return str(error.value)

    for text in run_ranks(3, lambda transport: job(transport, [1, None, None])):
        assert "needs the number of samples of every step, and ranks 1 and 2 took steps without it" in text
    worker = Worker(SingleTransport(), GRADIENT, START, lambda _: RATE, **SETTINGS, weighting="samples")
    for bad in (-1, float("nan"), "many", None):
        with pytest.raises(ConfigurationError, match="samples must be a number >= 0"):
            worker.replica.rank_weights.record_samples(bad)  # type: ignore[arg-type]
    worker.replica.rank_weights.record_samples(0, 3)
    with pytest.raises(ConfigurationError, match="no rank has done anything in this round"):
        worker.run(PERIOD)


def fast_on_rank_1(rank: int, step: int, x: Any) -> Any:
    return (100 if rank == 1 else 1) * GRADIENT(rank, step, x)


def clipped(norms: Sequence[float]) -> list[float]:
    return [min(1.0, 0.5 / norm) for norm in norms]


def inverse(norms: Sequence[float]) -> list[float]:
    weights = [1 / norm for norm in norms]
    return [len(norms) * weight / sum(weights) for weight in weights]


def softmax(norms: Sequence[float]) -> list[float]:
    weights = [float(np.exp(-norm)) for norm in norms]
    return [len(norms) * weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["int8", None])
@pytest.mark.parametrize(
    ("penalty", "factors"),
    [
        (MovementPenalty(clip_norm=0.5), clipped),
        (MovementPenalty(norm_weights="inverse"), inverse),
        (MovementPenalty(norm_weights="softmax"), softmax),
    ],
)
def test_penalties_equal_an_independent_reference(ranks: int, name: Any, penalty: Any, factors: Any) -> None:
    steps = 3 * PERIOD
    settings = {"wire_dtype": name, "movement_penalty": penalty}
    outcome = run_ranks(ranks, lambda transport: train(transport, steps, fast_on_rank_1, **settings))
    code = CODES[name] if name else np.copy
    assert_allclose(outcome, expected(ranks, steps, code, RULES[0][1], factors, fast_on_rank_1), rtol=0, atol=1e-6)


PENALTIES = [
    MovementPenalty(clip_norm=1.5),
    MovementPenalty(norm_weights="inverse"),
    MovementPenalty(norm_weights="softmax"),
    MovementPenalty(norm_weights="inverse", clip_norm=1.5),
    MovementPenalty(norm_weights="softmax", clip_norm=1.5),
    MovementPenalty(outlier_threshold=3.0),
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@pytest.mark.parametrize("norm", [np.nan, np.inf, 0.0, 1e9])
def test_the_norm_of_a_rank_that_is_left_out_decides_nothing(penalty: MovementPenalty, norm: float) -> None:
    found = rank_factors(np.array([1.0, 2.0, 0.0]), np.array([1.0, 2.0, norm]), penalty)
    others = rank_factors(np.array([1.0, 2.0]), np.array([1.0, 2.0]), penalty)
    assert_array_equal(found, [*others, 0.0])
    assert (others > 0).all()


def test_an_outlier_is_left_out_until_it_moves_as_before() -> None:
    """Rank 1 takes 100 times too long steps in the 6th and 7th round."""

    def gradient(rank: int, step: int, x: Any) -> Any:
        return (100 if rank == 1 and step // PERIOD in (5, 6) else 1) * GRADIENT(rank, step, x)

    def job(transport: Transport) -> tuple[Array, int]:
        penalty = MovementPenalty(outlier_threshold=5, warmup_rounds=3, smoothing=0.1)
        worker = Worker(transport, gradient, START, lambda _: RATE, **SETTINGS, movement_penalty=penalty)
        return worker.run(9 * PERIOD).copy(), worker.replica.rank_weights.left_out

    x, anchor = [START] * 4, START
    for step in range(9 * PERIOD):
        x = [own - RATE * gradient(rank, step, own) for rank, own in enumerate(x)]
        if (step + 1) % PERIOD == 0:
            counting = [rank for rank in range(4) if rank != 1 or step // PERIOD not in (5, 6)]
            anchor = np.mean([x[rank] for rank in counting], axis=0)
            x = [anchor] * 4
    for rank, (found, left_out) in enumerate(run_ranks(4, job)):
        assert_allclose(found, anchor, rtol=0, atol=1e-12)
        assert left_out == (2 if rank == 1 else 0)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("delay", [0, 1])
def test_weights_that_the_program_sets_are_adopted_exactly(name: WireDtype, delay: int) -> None:
    new = np.random.default_rng(0).normal(size=DIMENSION) * 1e4

    def job(transport: Transport) -> Array:
        worker = Worker(transport, GRADIENT, START, lambda _: RATE, **SETTINGS, wire_dtype=name, delay=delay)
        worker.run(PERIOD + 1)
        worker.model.x[:] = new
        worker.gradient = lambda *_: np.zeros(DIMENSION)
        worker.run(PERIOD - 1 + delay)
        return worker.model.x.copy()

    assert_array_equal(run_ranks(4, job), [new] * 4)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_an_average_in_full_precision_has_statistics_too(name: WireDtype) -> None:
    def job(transport: Transport) -> Array:
        entries = [Entry("w", (250,), "float32", 0), Entry("statistic", (50,), "float32", None)]
        buffer = FlatBuffer(build_layouts(entries)[0])
        outer = OuterStep(transport, [buffer], None, wire_dtype=name)
        buffer.array[...] = np.linspace(-1, 1, 300) * 2**transport.rank
        outer.average(PartialAverage(True, transport.size, transport.size, in_full=True))
        outer.adopt()
        return buffer.array.copy()

    whole = np.linspace(-1, 1, 300).astype(np.float32)
    assert_array_equal(run_ranks(2, job), [(whole + 2 * whole) / 2] * 2)


@pytest.mark.parametrize("name", ["int8", "int4", None])
@pytest.mark.parametrize("steps", [1, PERIOD, 2 * PERIOD + 1])
@pytest.mark.parametrize(
    "more",
    [
        {"weighting": "samples", "movement_penalty": MovementPenalty(outlier_threshold=3, warmup_rounds=2)},
        {"delay": 2},
        {"delay": 1, "fragments": 2, "blend": 0.5},
    ],
    ids=["weights", "delay", "fragments"],
)
def test_a_resumed_run_is_bit_identical(name: WireDtype | None, steps: int, more: dict[str, Any]) -> None:
    settings = {**SETTINGS, "outer": SlowMomentum(1.0, 0.5), "wire_dtype": name, **more}

    def job(transport: Transport) -> None:
        def worker() -> Worker:
            return Worker(transport, GRADIENT, START, lambda _: RATE, **settings)

        def run(worker: Worker, count: int) -> Array:
            for _ in range(count):
                worker.replica.rank_weights.record_samples(1 + transport.rank)
                worker.run(1)
            return worker.model.x.copy()

        first = worker()
        run(first, steps)
        saved, x = first.replica.state_dict(), first.model.x.copy()
        second = worker()
        second.model.x[:] = x
        second.replica.load_state_dict(saved)
        assert_array_equal(run(second, 3 * PERIOD), run(first, 3 * PERIOD))

    run_ranks(3, job)


def test_over_gossip_the_mean_is_that_of_all_ranks() -> None:
    """Gossip mixes, and the exact average that follows is coded: the mean over ranks is kept but for rounding."""

    def job(transport: Transport) -> Array:
        gradient: Any = lambda rank, *_: np.full(DIMENSION, float(rank))  # noqa: E731
        return train(transport, PERIOD, gradient, base=SGP(), wire_dtype="int8")

    assert_allclose(run_ranks(4, job), [START - 3 * RATE * 1.5] * 4, rtol=0, atol=2e-2 * 3 * RATE * 1.5)


PENALTY = MovementPenalty(clip_norm=1.0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"wire_dtype": "int3"}, "wire_dtype must be 'bfloat16', 'float16', 'int8', 'int4' or None"),
        ({"weighting": "time"}, "weighting must be one of 'equal', 'steps', 'samples', 'normalized', got 'time'"),
        ({"movement_penalty": 3.0}, r"movement_penalty must be MovementPenalty\(...\) or None, got 3.0"),
        (
            {"wire_dtype": "int8", "period": None, "base": SGP()},
            "wire_dtype='int8' is about the average of outer",
        ),
        ({"weighting": "steps", "exact_average": False, "outer": SlowMomentum()}, "about the exact average"),
        ({"weighting": "steps", "base": SGP()}, "weighting='steps' is not possible with SGP.*gossip has mixed"),
        (
            {"movement_penalty": PENALTY, "wire_dtype": "int8", "base": SGP()},
            "movement_penalty=.* is not possible",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        Settings(**{**SETTINGS, **settings})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "MovementPenalty needs clip_norm, norm_weights or outlier_threshold"),
        ({"clip_norm": 0}, "clip_norm must be a number > 0, got 0"),
        ({"clip_norm": float("nan")}, "clip_norm must be a number > 0"),
        ({"outlier_threshold": -1.0}, "outlier_threshold must be a number > 0"),
        ({"norm_weights": "norm"}, "norm_weights must be one of 'inverse', 'softmax'"),
        ({"clip_norm": 1, "smoothing": 2}, "smoothing must be a number > 0 and <= 1"),
        ({"clip_norm": 1, "smoothing": None}, "smoothing must be a number > 0 and <= 1, got None"),
        ({"clip_norm": 1, "warmup_rounds": 1}, "warmup_rounds must be an integer >= 2"),
    ],
)
def test_penalties_that_make_no_sense_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        MovementPenalty(**arguments)
