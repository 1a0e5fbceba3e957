"""A framework adapter driven by ``Replica`` on ranks that are threads, compared with a few lines of NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lentando.comm.errors import LentandoError
from lentando.comm.flat import Entry
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.transport import Array
from lentando.optimizers.framework import Framework
from lentando.optimizers.replica import Replica
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.settings import BaseBuffers, Settings
from lentando.optimizers.rules.slow_momentum import SlowMomentum
from lentando.optimizers.testing.subject import MakeSubject
from lentando.optimizers.testing.values import (
    Values,
    copied_values,
    entries_of,
    expect_same,
    random_values,
    trained_entries,
)

__all__ = ["check_training_on_ranks"]

PERIOD, ROUNDS = 2, 3
SLOW_LR, SLOW_MOMENTUM = 0.75, 0.5
ROUNDINGS = 16.0
"""Rounding errors, in units of the dtype's resolution, by which the library may differ from these lines."""

Wide: TypeAlias = dict[str, Any]
"""Arrays in float64, by name."""


def check_training_on_ranks(make: MakeSubject, sizes: Sequence[int]) -> None:
    """Check the start of training, SlowMo's outer step and the average of gradients, in worlds of these sizes."""
    size = 0
    try:
        for size in sizes:
            _check_start(make, size)
            _check_slow_momentum(make, size, "maintain")
            _check_slow_momentum(make, size, "average")
            _check_gradient_average(make, size)
    except LentandoError as error:
        name = make().framework.name
        raise AssertionError(f"{name} adapter: training on {size} ranks failed: {error}") from error


@dataclass
class _Round:
    """A round of one rank: the model and the optimizer's buffers around the outer step, and its learning rates."""

    rates: Sequence[float]
    before: Values
    after: Values
    buffers_before: Values
    buffers_after: Values


def _check_start(make: MakeSubject, size: int) -> None:
    """All ranks begin with the weights of rank 0, and with its tensors that are not averaged."""
    subjects = [make() for _ in range(size)]

    def run(transport: ThreadTransport) -> tuple[Values, Values, Values, Values]:
        subject = subjects[transport.rank]
        framework = subject.framework
        subject.assign(random_values(entries_of(framework), 20, transport.rank))
        rest = copied_values(framework.not_averaged())
        if transport.rank:
            framework.store_not_averaged({name: np.zeros_like(array) for name, array in rest.items()})
        before = copied_values(subject.read())
        Replica(transport, framework, Settings())
        return before, copied_values(subject.read()), rest, copied_values(framework.not_averaged())

    framework = subjects[0].framework
    results = run_ranks(size, run)
    first, _, rest, _ = results[0]
    for rank, (_, weights, _, others) in enumerate(results):
        place = f"on rank {rank} of {size} when training begins"
        expect_same(framework, weights, first, f"the model {place}, which begins with rank 0's weights,")
        expect_same(framework, others, rest, f"not_averaged() {place}")


def _check_slow_momentum(make: MakeSubject, size: int, base_buffers: BaseBuffers) -> None:
    settings = Settings(
        base=LocalSGD(), outer=SlowMomentum(SLOW_LR, SLOW_MOMENTUM), period=PERIOD, base_buffers=base_buffers
    )

    subjects = [make() for _ in range(size)]

    def run(transport: ThreadTransport) -> tuple[Values, list[_Round]]:
        subject = subjects[transport.rank]
        framework = subject.framework
        subject.assign(random_values(entries_of(framework), 21, transport.rank))
        replica = Replica(transport, framework, settings)
        start, rounds = copied_values(subject.read()), []
        for number in range(ROUNDS):
            used = []
            for step in range(PERIOD):
                # Powers of two, which are exact in every dtype.
                rates = [2.0 ** -(2 + group + number + step) for group in range(len(framework.learning_rates()))]
                used.append(rates)
                subject.set_learning_rates(rates)
                subject.set_gradients(random_values(trained_entries(framework), 22, transport.rank, number, step))
                replica.before_step()
                subject.step()
                before = copied_values(subject.read()), copied_values(framework.optimizer_buffers())
                replica.after_step()
            after = copied_values(subject.read()), copied_values(framework.optimizer_buffers())
            mean_rates = np.mean(used, axis=0).tolist()
            rounds.append(_Round(mean_rates, before[0], after[0], before[1], after[1]))
        return start, rounds

    framework = subjects[0].framework
    results = run_ranks(size, run)
    entries = entries_of(framework)
    anchor: Wide = {entry.name: _wide(results[0][0][entry.name]) for entry in entries}
    slow: Wide = {entry.name: np.zeros(entry.shape) for entry in entries}
    for number in range(ROUNDS):
        by_rank = [rounds[number] for _, rounds in results]
        place = f"on {size} ranks after the outer step of round {number + 1}, base_buffers={base_buffers!r}"
        expected = {
            entry.name: _slow_momentum(entry, by_rank, anchor, slow).astype(by_rank[0].before[entry.name].dtype)
            for entry in entries
        }
        expect_same(framework, by_rank[0].after, expected, f"the model of rank 0 {place}", ROUNDINGS)
        for rank, other in enumerate(by_rank[1:], start=1):
            expect_same(
                framework, other.after, by_rank[0].after, f"the model of rank {rank} {place}, against rank 0's,"
            )
        anchor = {name: _wide(array) for name, array in by_rank[0].after.items()}
        _check_buffers(framework, by_rank, base_buffers, place)


def _slow_momentum(entry: Entry, by_rank: Sequence[_Round], anchor: Wide, slow: Wide) -> Any:
    """Algorithm 1 of SlowMo (arXiv 1910.00643), lines 7 and 8; statistics become the average."""
    mean = np.mean([_wide(each.before[entry.name]) for each in by_rank], axis=0)
    if entry.group is None:
        return mean
    rate = by_rank[0].rates[entry.group]
    slow[entry.name] = SLOW_MOMENTUM * slow[entry.name] + (anchor[entry.name] - mean) / rate
    return anchor[entry.name] - SLOW_LR * rate * slow[entry.name]


def _check_buffers(framework: Framework, by_rank: Sequence[_Round], base_buffers: BaseBuffers, place: str) -> None:
    """The outer step averages the optimizer's buffers over the ranks with "average", and keeps them with "maintain"."""
    first = by_rank[0].buffers_before
    if base_buffers == "maintain":
        for rank, each in enumerate(by_rank):
            expect_same(framework, each.buffers_after, each.buffers_before, f"optimizer buffers of rank {rank} {place}")
        return
    mean = {
        name: np.mean([_wide(each.buffers_before[name]) for each in by_rank], axis=0).astype(array.dtype)
        for name, array in first.items()
    }
    for rank, each in enumerate(by_rank):
        expect_same(framework, each.buffers_after, mean, f"optimizer buffers of rank {rank} {place}", ROUNDINGS)


def _check_gradient_average(make: MakeSubject, size: int) -> None:
    """With ``AllReduce``, every rank steps along the mean of the gradients."""
    alone, *subjects = [make() for _ in range(size + 1)]

    def gradients(framework: Framework, rank: int, step: int) -> Values:
        return random_values(trained_entries(framework), 23, rank, step)

    def train(transport: ThreadTransport) -> Values:
        subject = subjects[transport.rank]
        framework = subject.framework
        replica = Replica(transport, framework, Settings(base=AllReduce()))
        for step in range(ROUNDS):
            subject.set_gradients(gradients(framework, transport.rank, step))
            subject.gather_gradients()
            replica.average_gradients()
            subject.scatter_gradients()
            replica.before_step()
            subject.step()
            replica.after_step()
        return copied_values(subject.read())

    for step in range(ROUNDS):
        by_rank = [gradients(alone.framework, rank, step) for rank in range(size)]
        alone.set_gradients(
            {
                name: np.mean([_wide(each[name]) for each in by_rank], axis=0).astype(array.dtype)
                for name, array in by_rank[0].items()
            }
        )
        alone.step()
    results = run_ranks(size, train)
    place = f"on {size} ranks after {ROUNDS} steps along averaged gradients"
    expect_same(alone.framework, results[0], alone.read(), f"the model of rank 0 {place}", ROUNDINGS)
    for rank, weights in enumerate(results[1:], start=1):
        expect_same(alone.framework, weights, results[0], f"the model of rank {rank} {place}, against rank 0's,")


def _wide(array: Array) -> Any:
    return array.astype(np.float64)
