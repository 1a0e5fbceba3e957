"""One program for every launcher: what ranks compute together, printed by rank 0 as one line of JSON.

Alone, it runs on simulated ranks: `python tests/launchers/same_results.py --simulate 3`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from numpy_model import Worker

from lentando.comm import operations, world
from lentando.comm.collectives import all_reduce
from lentando.comm.dtypes import bfloat16
from lentando.comm.transport import Array
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.slow_momentum import SlowMomentum

STEPS = 24
METHODS: dict[str, dict[str, Any]] = {
    "synchronous": {"base": AllReduce(algorithm="ring")},
    "slow momentum": {"base": LocalSGD(), "outer": SlowMomentum(slow_momentum=0.5), "period": 4},
    "SGP": {"base": SGP()},
    "D-PSGD": {"base": DPSGD()},
    "slow momentum over OSGP": {
        "base": OSGP(staleness=2, deterministic=True),
        "outer": SlowMomentum(slow_momentum=0.5),
        "period": 6,
    },
}


def checksum(array: Array) -> int:
    return crc32(array.tobytes())


def pull(rank: int, step: int, x: Array) -> Array:
    """A noisy gradient towards a point that differs between ranks."""
    noise = np.random.default_rng([rank, step]).normal(size=x.size)
    return (x - rank + 0.1 * noise).astype(x.dtype)


def train(settings: dict[str, Any]) -> int:
    worker = Worker(
        world.transport(),
        pull,
        np.linspace(-1, 1, 101, dtype=np.float32),
        lambda step: 0.1 / (1 + step),
        momentum=0.9,
        **settings,
        algorithm="ring",
    )
    worker.run(STEPS)
    return checksum(worker.model.x)


def results() -> dict[str, Any]:
    """Checksums of what must be bit-identical everywhere, and ``backend``: what each engine may round in its way."""
    world.init()
    rank, size = world.rank(), world.size()
    values = np.random.default_rng(rank).normal(size=1003)
    found: dict[str, Any] = {"size": size}
    for dtype in (np.float32, np.float64, np.float16, bfloat16):
        array = values.astype(dtype)
        all_reduce(world.transport(), array, mean=True, algorithm="ring")
        found[f"ring {array.dtype}"] = checksum(array)
    counts = np.arange(5) * 10**rank
    operations.allreduce(counts, operations.Sum)
    found["integers"] = counts.tolist()
    found["gathered"] = checksum(operations.allgather(np.full(rank + 1, rank, np.int16)))
    from_root = np.full(7, rank, bfloat16)
    operations.broadcast(from_root, size - 1)
    found["broadcast"] = from_root.astype(float).tolist()
    for name, settings in METHODS.items():
        found[name] = operations.allgather_object(train(settings))
    total = values[:5].copy()
    world.transport().allreduce(total)
    found["backend"] = total.tolist()
    by_rank = operations.allgather_object(found)
    assert all(other == found for other in by_rank), by_rank
    return {**found, "transport": world.transport().name}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--simulate", type=int)
    options = parser.parse_args()
    if options.simulate:
        from lentando.comm import simulate

        found = simulate(results, size=options.simulate)[0]
    else:
        found = results()
    if options.simulate or world.rank() == 0:
        sys.stdout.write(f"RESULTS {json.dumps(found)}\n")


if __name__ == "__main__":
    main()
