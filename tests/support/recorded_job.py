"""Communicates in every way that a timeline records: sums, asynchronous sums, outer steps, gradients and gossip."""

import numpy as np
from numpy_model import Worker

from lentando.comm import operations, world
from lentando.comm.operations import Sum
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import SGP
from lentando.optimizers.rules.local_sgd import LocalSGD

world.init()
operations.allreduce(np.ones(3, np.float32), Sum, "loss")
for _ in range(2):
    handles = [operations.allreduce_call(np.ones(5), Sum, name=f"gradient {number}").start() for number in range(4)]
    for handle in handles:
        handle.wait()
for base, period in ((LocalSGD(), 2), (AllReduce(), None), (SGP(), None)):
    worker = Worker(
        world.transport(), lambda _rank, _step, x: 0.1 * x, np.ones(100), lambda _: 0.1, base=base, period=period
    )
    worker.run(4)
world.shutdown()
