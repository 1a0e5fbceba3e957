"""A quadratic trained in NumPy in an elastic job some ranks of which kill themselves; what is left prints JSON.

    mpirun --with-ft ulfm -np 4 python tests/support/elastic_numbers.py '{"method": "slowmo", "kill": ["0:vote:3"]}'

Small enough that a test can afford a job for every moment at which a rank may die.
"""

import json
import logging
import sys
from typing import Any

import numpy as np
from killing import kill_at, parsed
from numpy_model import Worker
from reference import quadratic

from lentando.comm import world
from lentando.comm.elastic import transaction
from lentando.comm.transport import Array
from lentando.optimizers.adacomm import AdaptivePeriod
from lentando.optimizers.base_algorithms import AllReduce, LocalSGD
from lentando.optimizers.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.push_sum import PushSum
from lentando.optimizers.slow_momentum import SlowMomentum

DIMENSION = 50
RANKS = 4
RATE = 0.1
STEPS = 40

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


def start() -> Array:
    """Initial parameters, float64."""
    drawn: Array = np.random.default_rng(5).normal(scale=3.0, size=DIMENSION)
    return drawn


def loss(numbers: list[int], x: Array) -> float:
    """Mean of the quadratics of some ranks."""
    total = 0.0
    for number in numbers:
        own = np.random.default_rng([0, 1, number])
        curvature, centre = own.uniform(0.2, 1.0, DIMENSION), own.normal(size=DIMENSION)
        total += float((curvature * (x - centre) ** 2).sum()) / 2
    return total / len(numbers)


def main(method: str, kill: list[str], steps: int = STEPS, momentum: float = 0.0, folder: str = "") -> None:
    """Train; write the state after the eighth step and the last one into a folder, if one is given."""
    logging.basicConfig(format="%(message)s")
    world.init(elastic=True)
    transport = world.transport()
    number = transport.rank
    for victim, where, count in parsed(kill):
        if victim == number:
            kill_at(where, count)
    worker = Worker(
        transport,
        quadratic(DIMENSION),
        start(),
        lambda step: RATE,
        momentum,
        (lambda worker: loss([worker.rank], worker.model.x)) if method == "adacomm" else None,
        **METHODS[method],
    )
    for step in range(steps):
        worker.run(1)
        if folder and step in (7, steps - 1):
            outer = worker.replica.state_dict()["outer"]
            np.savez(f"{folder}/{number}-{step}.npz", x=worker.model.x, u=outer["slow_buffers"]["flat"][0])
    base = worker.replica.base
    distance = worker.replica.consensus_distance()
    with worker.replica.averaged():
        average = worker.model.x.copy()
    living = transaction(transport, lambda: world.transport().allgather(np.array([number])))[:, 0].tolist()
    found = {
        "number": number,
        "rank": world.rank(),
        "size": world.size(),
        "living": living,
        "first_loss": loss(living, start()),
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
