"""Simulated elastic jobs whose ranks die by schedules drawn from a seed; each checks what is promised of those left.

    python tests/support/elastic_schedules.py --seed 1234             # one again: its schedule, and what breaks
    python tests/support/elastic_schedules.py --seed 0 --count 10000

The same seed is the same run bit-identically.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Any

import numpy as np
from methods import methods
from numpy_model import Worker
from reference import quadratic

from lentando.comm import elastic, world
from lentando.comm.errors import LentandoError
from lentando.comm.simulation import Compute, Death, Fault, Network, Pause, Slow, simulate
from lentando.comm.transport import Array
from lentando.optimizers.rules.push_sum import PushSum

DIMENSION = 12
STEPS = 14
STEP_SECONDS = 1.0
GRADIENT = quadratic(DIMENSION)
METHODS = methods()


@dataclass(frozen=True)
class Schedule:
    """What happens in a job.

    Attributes:
        seed: it was drawn from.
        method: how the ranks train.
        size: number of ranks at the start.
        notice_seconds: after which the others know of a death; a step computes for one second.
        jitter_seconds: of messages.
        faults: deaths, and ranks that are slow or stand still.
    """

    seed: int
    method: str
    size: int
    notice_seconds: float
    jitter_seconds: float
    faults: tuple[Fault, ...]

    @classmethod
    def draw(cls, seed: int) -> "Schedule":
        random = Random(seed)
        size = random.randint(2, 6)
        dying = random.sample(range(size), random.randint(1, size - 1))
        faults: list[Fault] = [_death(random, rank) for rank in dying]
        if random.random() < 0.3:
            faults.append(Slow(random.randrange(size), random.choice((0.1, 3.0, 10.0))))
        if random.random() < 0.3:
            faults.append(Pause(random.randrange(size), random.uniform(0, STEPS), random.uniform(0, 10)))
        notice_seconds, jitter_seconds = random.choice((0.0, 0.01, 2.5)), random.choice((0.0, 0.3))
        possible = [name for name, settings in METHODS.items() if "delay" not in settings]  # refused there
        return cls(seed, random.choice(possible), size, notice_seconds, jitter_seconds, tuple(faults))


def _death(random: Random, rank: int) -> Death:
    kind = random.randrange(4)
    if kind == 0:
        return Death(rank, random.uniform(0, 1.2 * STEPS * STEP_SECONDS))
    if kind == 1:
        return Death(rank, at_message=random.randrange(3 * STEPS))
    if kind == 2:
        return Death(rank, in_collective=random.randrange(3 * STEPS))
    return Death(rank, in_repair=random.randrange(3))


class Job:
    """A job in flight: what its ranks, all in this process, report to each other's judge."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.before: dict[tuple[str, int, int], Array] = {}
        self.drained: dict[int, tuple[float, Array]] = {}
        self.judged = 0

    def run(self) -> list[dict[str, Any] | None]:
        """What each rank found, None for those that died."""
        schedule = self.schedule
        return simulate(
            self.train,
            schedule.size,
            network=Network(1e-3, 1e9, schedule.jitter_seconds),
            compute=Compute(STEP_SECONDS, "exponential"),
            faults=schedule.faults,
            notice_seconds=schedule.notice_seconds,
            seed=schedule.seed,
            isolate=False,
        )

    def train(self) -> dict[str, Any]:
        world.init(elastic=True)
        transport, number = world.transport(), world.rank()
        settings = {**METHODS[self.schedule.method], "algorithm": ("auto", "ring", "backend")[self.schedule.seed % 3]}
        start = np.random.default_rng(1).normal(size=DIMENSION)
        worker = Worker(transport, GRADIENT, start, None, 0.9, **settings)
        replica, model = worker.replica, worker.model
        is_exact = settings.get("exact_average", True) and "outer" not in settings
        for step in range(STEPS):
            model.gradient[:] = GRADIENT(number, step, model.x)
            loss = float(np.square(model.x).sum())
            if replica.averages_gradients:
                self.before["gradient", step, number] = model.gradient.copy()
                replica.average_gradients()
                self.judge("gradient", step, model.gradient)
            replica.before_step()
            model.step()
            replica.record_loss(loss)
            rounds = replica.rounds
            self.before["round", step, number] = model.x.copy()
            replica.after_step()
            if replica.rounds > rounds and is_exact and not isinstance(replica.base.steps, PushSum):
                self.judge("round", step, model.x)
        with replica.averaged():
            average = model.x.copy()
            living = self.living()
        weight = 1.0
        if isinstance(replica.base.steps, PushSum):
            weight = replica.base.steps.weight
            self.drained[number] = weight, replica.base.steps.biased[0].copy()
        else:
            self.drained[number] = weight, model.x.copy()
        counts = {"steps": replica.inner_steps, "rounds": replica.rounds, "living": living}
        return {"average": average, "x": model.x.copy(), **counts}

    def living(self) -> list[int]:
        """The ranks of the last thing that all have done together, by their numbers at the start."""
        transport = world.transport()
        return [elastic.initial_number(transport, rank) for rank in range(transport.size)]

    def judge(self, what: str, step: int, average: Array) -> None:
        """The average is that of what the ranks had that took part."""
        own = [self.before[what, step, number] for number in self.living()]
        self.judged += 1
        np.testing.assert_allclose(average, np.mean(own, axis=0), rtol=1e-10, atol=1e-12, err_msg=f"{what} of {step}")


def check(schedule: Schedule) -> bytes:
    """Run a schedule; what all ranks ended with, as a digest.

    Raises:
        AssertionError, LentandoError: if a promise is broken.
    """
    job = Job(schedule)
    found = job.run()
    dying = {fault.rank for fault in schedule.faults if isinstance(fault, Death)}
    ended = {number: own for number, own in enumerate(found) if own is not None}
    lost = set(range(schedule.size)) - set(ended) - dying
    assert not lost, f"ranks {sorted(lost)} did not come to the end"
    assert len({own["rounds"] for own in ended.values()}) == 1, "the ranks took unequally many outer steps"
    for number, own in ended.items():
        assert own["steps"] == STEPS, f"rank {number} took {own['steps']} steps"
        assert np.isfinite(own["x"]).all(), f"rank {number}: {own['x']}"
        assert set(ended) <= set(own["living"]), f"rank {number} averaged with {own['living']}, {sorted(ended)} live"
    averages = {own["average"].tobytes() for own in ended.values()}
    assert len(averages) == 1, "the averages differ between ranks"
    first = next(iter(ended.values()))
    if set(first["living"]) <= set(job.drained):  # no rank that took part has died before it reported
        weights, biased = zip(*(job.drained[number] for number in first["living"]), strict=True)
        assert abs(sum(weights) - len(weights)) < 1e-9, f"the weights of {len(weights)} ranks sum to {sum(weights)}"
        np.testing.assert_allclose(first["average"], np.mean(biased, axis=0), rtol=1e-9, atol=1e-11)
    return blake2b(b"".join(own["x"].tobytes() + own["average"].tobytes() for own in ended.values())).digest()


@contextmanager
def quiet() -> Iterator[None]:
    logging.getLogger("lentando").disabled = True
    try:
        yield
    finally:
        logging.getLogger("lentando").disabled = False


def failures(first: int, count: int, twice_every: int = 10) -> list[str]:
    """Run so many schedules; what was broken, each with the command that runs it again."""
    found = []
    with quiet():
        for seed in range(first, first + count):
            schedule = Schedule.draw(seed)
            try:
                digest = check(schedule)
                if seed % twice_every == 0:
                    assert check(schedule) == digest, "the same seed gave other bits"
            except (AssertionError, LentandoError) as error:
                again = f"python tests/support/elastic_schedules.py --seed {seed}"
                found.append(f"{schedule}\n    {type(error).__name__}: {error}\n    again: {again}")
    return found


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--count", type=int, default=1, help="how many, with seeds that follow")
    options = parser.parse_args()
    if options.count == 1:
        schedule = Schedule.draw(options.seed)
        print(schedule)
        logging.basicConfig(format="%(message)s")
        check(schedule)
        return 0
    found = failures(options.seed, options.count)
    print(*found, sep="\n")
    print(f"{options.count} schedules, {len(found)} broken")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
