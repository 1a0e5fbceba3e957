"""One rank of a job that times training iterations by one library. ``benchmarks/run.py`` starts such jobs in turn.

    mpirun -np 4 python benchmarks/peers/iterations.py lentando --compute-seconds 0.08

A stack of equal layers learns noise. In forward and in backward each layer sleeps for a given time in addition to its
computation, to emulate a device where ranks do not share cores. Prints a line of JSON:
for each method, the seconds of an iteration on the slowest rank.
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import nn

PERIOD = 12
ITERATIONS = 2 * PERIOD
"""Two whole rounds: two averages begin, and two are adopted."""
WARM_UP = 2 * PERIOD
"""The first average of a model is slower than others: it opens connections, and memory is new."""
DDP_BUCKETS = {"DDP": {}, "DDP, buckets of 2 MB": {"bucket_cap_mb": 2}, "DDP, buckets of 1 MB": {"bucket_cap_mb": 1}}
"""Options of PyTorch's. Its default of 25 MB leaves one bucket to so small a model."""
DELAYED = {
    "SlowMo(delay=2)": {"delay": 2},
    "SlowMo(delay=12)": {"delay": PERIOD},
    "SlowMo(delay=3, fragments=4)": {"delay": 3, "fragments": 4},
    "SlowMo(int8, delay=4)": {"delay": 4, "wire_dtype": "int8"},
}
"""Outer steps that hide behind so many iterations: an average that takes as long as an iteration hides behind 2."""
ALONE, ALONE_WITH_GOSSIP = "compute alone", "compute alone, for gossip"
FLOOR = "bare MPI, as OSGP sends"
WITH_GOSSIP = (ALONE_WITH_GOSSIP, "SGP", "OSGP", FLOOR)
Step = Callable[[], object]
Begin = Callable[[], Step]
"""Makes a model and its optimizer, which may exchange their values: only those that are timed are made."""
Make = Callable[[bool], nn.Module]
"""Makes a model, which computes for as long as gossip sends or as an all-reduce takes."""


class _Takes(torch.autograd.Function):
    """Identity that lets some time pass, on the way there and on the way back."""

    @staticmethod
    def forward(context: Any, inputs: torch.Tensor, take: Callable[[], object]) -> torch.Tensor:
        context.take = take
        take()
        return inputs.view_as(inputs)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        for _ in range(2):
            context.take()
        return gradients[0], None


class Model(nn.Module):
    """Layers of 1 MB, which together compute for a little more than ``seconds``, a third of it in forward.

    In backward, the time of a layer passes before its gradients are available.

    Args:
        layers: number of layers.
        seconds: time of all layers.
        take: function that passes the time of one layer in forward; by default it sleeps.
    """

    def __init__(self, layers: int, seconds: float, take: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 511) for _ in range(layers))
        self._take = partial(time.sleep, seconds / 3 / layers) if take is None else take

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs = nn.functional.pad(torch.relu(_Takes.apply(layer(inputs), self._take)), (0, 1))
        return inputs


def training(model: nn.Module, optimizer: Any) -> Step:
    inputs, targets = torch.randn(8, 512), torch.randn(8, 512)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()

    return step


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


class BareExchange:
    """What gossip could reach at best: SGD, while a message of the model's size travels to the next rank, by MPI alone.

    A thread asks for it now and then. Nothing is done with what arrives.
    """

    def __init__(self, model: nn.Module) -> None:
        from mpi4py import MPI

        self._optimizer = sgd(model)
        self._comm = MPI.COMM_WORLD.Dup()
        size = sum(4 * parameter.numel() for parameter in model.parameters())
        self._sent, self._received = (self._pieces(np.zeros(size, np.uint8)) for _ in range(2))
        self._pending: SimpleQueue[list[Any]] = SimpleQueue()
        self._arrived = threading.Semaphore()
        threading.Thread(target=self._ask, daemon=True).start()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        self._optimizer.step()
        self._arrived.acquire()
        rank, size = self._comm.rank, self._comm.size
        pending = [self._comm.Irecv(piece, (rank - 1) % size) for piece in self._received]
        self._pending.put(pending + [self._comm.Isend(piece, (rank + 1) % size) for piece in self._sent])

    def _ask(self) -> None:
        while True:
            pending = self._pending.get()
            while pending:
                if pending[0].Testall(pending[:64]):
                    del pending[:64]
                else:
                    time.sleep(1e-3)
            self._arrived.release()

    @staticmethod
    def _pieces(memory: Any) -> list[Any]:
        """Of a size that Open MPI sends at once."""
        return [memory[start : start + 64_000] for start in range(0, memory.size, 64_000)]


def lentando(make: Make) -> tuple[int, dict[str, Begin], Callable[[float], float]]:
    import lentando.torch as lt

    lt.init()

    def delayed(model: nn.Module, **options: Any) -> Any:
        return lt.SlowMo(sgd(model), model=model, period=PERIOD, slow_momentum=0.5, **options)

    methods: dict[str, Callable[[nn.Module], Any]] = {
        ALONE: sgd,
        "AllReduce": lambda model: lt.DistributedOptimizer(sgd(model), model=model),
        "AllReduce(overlap=False)": lambda model: lt.DistributedOptimizer(
            sgd(model), model=model, base=lt.AllReduce(overlap=False)
        ),
        "SlowMo": lambda model: lt.SlowMo(sgd(model), model=model, period=PERIOD, slow_momentum=0.5),
        **{name: partial(delayed, **options) for name, options in DELAYED.items()},
        ALONE_WITH_GOSSIP: sgd,
        FLOOR: BareExchange,  # not last: its last message arrives while others train
        "SGP": lambda model: lt.DistributedOptimizer(sgd(model), model=model, base=lt.SGP()),
        "OSGP": lambda model: lt.DistributedOptimizer(sgd(model), model=model, base=lt.OSGP()),
    }

    def begin(name: str) -> Step:
        model = make(name in WITH_GOSSIP)
        return training(model, methods[name](model))

    return (
        lt.rank(),
        {name: partial(begin, name) for name in methods},
        lambda seconds: float(lt.allreduce(torch.tensor(seconds), op=lt.Max)),
    )


def gloo(make: Make) -> tuple[int, dict[str, Begin], Callable[[float], float]]:
    import torch.distributed as dist
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")

    def slowest(seconds: float) -> float:
        longest = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        return float(longest)

    def parallel(options: Any) -> Step:
        model = DistributedDataParallel(make(False), **options)
        return training(model, sgd(model))

    def averaged() -> Step:
        model = make(False)
        return training(model, PostLocalSGDOptimizer(sgd(model), PeriodicModelAverager(period=PERIOD)))

    by_ddp = {name: partial(parallel, options) for name, options in DDP_BUCKETS.items()}
    return dist.get_rank(), {**by_ddp, "PostLocalSGD": averaged}, slowest


def horovod(make: Make) -> tuple[int, dict[str, Begin], Callable[[float], float]]:
    import horovod.torch as hvd

    hvd.init()

    def begin() -> Step:
        model = make(False)
        optimizer = hvd.DistributedOptimizer(sgd(model), named_parameters=model.named_parameters())
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        return training(model, optimizer)

    def slowest(seconds: float) -> float:
        return float(hvd.allreduce(torch.tensor([seconds], dtype=torch.float64), op=hvd.Max, name="slowest"))

    return hvd.rank(), {"Horovod": begin}, slowest


LIBRARIES = {"lentando": lentando, "gloo": gloo, "horovod": horovod}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--compute-seconds", type=float, required=True, help="what an iteration computes at least")
    parser.add_argument("--gossip-seconds", type=float, help="the same, for gossip (default: as long)")
    parser.add_argument("--methods", nargs="+", help="which to time (default: all of the library; compute alone too)")
    parser.add_argument("--layers", type=int, default=6, help="of 1 MB each (default %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(1)
    gossip_seconds = options.gossip_seconds or options.compute_seconds
    rank, methods, slowest = LIBRARIES[options.library](
        lambda with_gossip: Model(options.layers, gossip_seconds if with_gossip else options.compute_seconds)
    )
    found, steps = {}, []
    chosen = set(methods if options.methods is None else options.methods)
    chosen |= {ALONE} | ({ALONE_WITH_GOSSIP} if chosen & set(WITH_GOSSIP) else set())
    for name, begin in methods.items():
        if name not in chosen:
            continue
        steps.append(step := begin())  # and kept until the end
        slowest(0.0)
        for _ in range(WARM_UP):
            step()
        # Ranks do not wait for each other here: while an average is in flight, small messages queue behind it, so that
        # ranks would start at different times, and the first of them would wait for the last at the next outer step.
        started = time.perf_counter()
        for _ in range(ITERATIONS):
            step()
        found[name] = slowest((time.perf_counter() - started) / ITERATIONS)
    if rank == 0:
        print(json.dumps(found), flush=True)
    slowest(0.0)
    if options.library == "gloo":
        os._exit(0)  # its threads may log errors after their store is closed


if __name__ == "__main__":
    main()
