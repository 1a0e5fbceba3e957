"""A quadratic trained in NumPy in an elastic job some ranks of which kill themselves; what is left prints JSON.

    mpirun --with-ft ulfm -np 4 python tests/support/elastic_numbers.py '{"method": "slowmo", "kill": ["0:vote:3"]}'

Small enough that a test can afford a job for every moment at which a rank may die.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from kill_points import die, kill_at, parsed
from numpy_model import Worker, in_shared_memory
from reference import quadratic

from lentando.comm import world
from lentando.comm.elastic import transaction
from lentando.comm.transport import Array
from lentando.optimizers.replica import Replica
from lentando.optimizers.rules.adacomm import AdaptivePeriod
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.push_sum import PushSum
from lentando.optimizers.rules.slow_momentum import SlowMomentum

DIMENSION = 50
RANKS = 4
RATE = 0.1
STEPS = 40
SEEN = 8

SLOW = SlowMomentum(1.0, 0.6)
METHODS: dict[str, dict[str, Any]] = {
    "localsgd": {"base": LocalSGD(), "period": 4, "base_buffers": "average"},
    "slowmo": {"base": LocalSGD(), "outer": SLOW, "period": 4, "base_buffers": "reset", "algorithm": "ring"},
    "allreduce": {"base": AllReduce()},
    "sgp": {"base": SGP()},
    "osgp": {"base": OSGP(staleness=2)},
    "dpsgd": {"base": DPSGD()},
    "slowmo over sgp": {"base": SGP(), "outer": SLOW, "period": 4},
    "slowmo over osgp": {"base": OSGP(), "outer": SLOW, "period": 4},
    "slowmo without average": {"base": SGP(), "outer": SlowMomentum(0.9, 0.3), "period": 4, "exact_average": False},
    "adacomm": {"base": LocalSGD(), "period": AdaptivePeriod(8, interval_steps=8)},
}


def start(dimension: int = DIMENSION) -> Array:
    """Initial parameters, float64."""
    drawn: Array = np.random.default_rng(5).normal(scale=3.0, size=dimension)
    return drawn


def loss(numbers: list[int], x: Array) -> float:
    """Mean of the quadratics of some ranks."""
    total = 0.0
    for number in numbers:
        own = np.random.default_rng([0, 1, number])
        curvature, centre = own.uniform(0.2, 1.0, x.size), own.normal(size=x.size)
        total += float((curvature * (x - centre) ** 2).sum()) / 2
    return total / len(numbers)


def state(worker: Worker) -> dict[str, Array]:
    """Parameters, and slow momentum if there is one."""
    outer = worker.replica.state_dict()["outer"]
    found = {"x": worker.model.x.copy()}
    if outer is not None and outer["slow_buffers"]["flat"][0] is not None:
        found["u"] = outer["slow_buffers"]["flat"][0].copy()
    return found


def main(
    method: str,
    kill: list[str],
    momentum: float = 0.0,
    folder: str = "",
    still: bool = False,
    dimension: int = DIMENSION,
) -> None:
    """Train.

    Args:
        method: of ``METHODS``.
        kill: see ``kill_points.parsed``; "step" is an inner step, before which the rank dies.
        momentum: of the base optimizer.
        folder: where each rank writes what it holds after step ``SEEN``, at each recovery, and in the end.
        still: no gradients, but parameters that differ from rank to rank: gossip alone.
        dimension: number of parameters.
    """
    logging.basicConfig(format="%(message)s")
    world.init(elastic=True)
    transport = world.transport()
    number = transport.rank
    last_step = STEPS
    for victim, where, count in parsed(kill):
        if victim == number and where == "step":
            last_step = int(count)
        elif victim == number:
            kill_at(where, count)
    gradient = (lambda number, step, x: np.zeros_like(x)) if still else quadratic(dimension)
    reported = (lambda worker: loss([worker.rank], worker.model.x)) if method == "adacomm" else None
    place = in_shared_memory
    worker = Worker(
        transport, gradient, start(dimension), lambda step: RATE, momentum, reported, place, **METHODS[method]
    )
    estimates = []

    def recover() -> None:
        estimates.append(worker.model.x.copy())
        Replica.recover(worker.replica)

    worker.replica.recover = recover  # type: ignore[method-assign]
    worker.run(1)
    if still:  # after the first step, before which all must be equal
        worker.model.x[:] += number**2
    worker.run(min(SEEN, last_step) - 1)
    seen = state(worker)
    worker.run(last_step - SEEN)
    if last_step < STEPS:
        die()
    if folder:
        np.savez(
            Path(folder, f"{number}.npz"), *estimates, **seen, **{f"last_{k}": v for k, v in state(worker).items()}
        )
    base = worker.replica.base.steps
    distance = worker.replica.consensus_distance()
    with worker.replica.averaged():
        average = worker.model.x.copy()
    living = transaction(transport, lambda: world.transport().allgather(np.array([number])))[:, 0].tolist()
    found = {
        "number": number,
        "rank": world.rank(),
        "size": world.size(),
        "living": living,
        "first_loss": loss(living, start(dimension)),
        "loss": loss(living, average),
        "average": average.tobytes().hex()[:64],
        "distance": distance,
        "weight": base.weight if isinstance(base, PushSum) else 1.0,
        "steps": worker.replica.inner_steps,
        "rounds": worker.replica.rounds,
        "period": worker.replica.period,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
