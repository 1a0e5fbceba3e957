"""One rank of a job that times training iterations by one library. ``benchmarks/run.py`` starts such jobs in turn.

    mpirun -np 4 python benchmarks/peers/iterations.py lentando --compute-seconds 0.08

A stack of equal layers learns noise. Each sleeps for a given time beside its computation, in forward and in backward,
as if it ran on a device, and the cores were not shared with the other ranks of the machine. Prints a line of JSON:
for each method, the seconds of an iteration on the slowest rank.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

ITERATIONS = 24
"""Two rounds of the period."""
PERIOD = 12
WARM_UP = PERIOD
Step = Callable[[], object]


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
    """Layers of 1 MB, which together compute for ``seconds`` and somewhat more: a third of it in forward.

    Args:
        layers: how many.
        seconds: of all.
        take: passes the time of one layer in forward; it sleeps by default.
    """

    def __init__(self, layers: int, seconds: float, take: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 511) for _ in range(layers))
        self._take = partial(time.sleep, seconds / 3 / layers) if take is None else take

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs = nn.functional.pad(torch.relu(layer(_Takes.apply(inputs, self._take))), (0, 1))
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


def lentando(make: Callable[[], nn.Module]) -> tuple[int, dict[str, Step], Callable[[float], float]]:
    import lentando.torch as lt

    lt.init()
    methods: dict[str, Callable[[nn.Module], Any]] = {
        "AllReduce": lambda model: lt.DistributedOptimizer(sgd(model), model=model),
        "SlowMo": lambda model: lt.SlowMo(sgd(model), model=model, period=PERIOD, slow_momentum=0.5),
        "SGP": lambda model: lt.DistributedOptimizer(sgd(model), model=model, base=lt.SGP()),
        "OSGP": lambda model: lt.DistributedOptimizer(sgd(model), model=model, base=lt.OSGP()),
    }
    steps: dict[str, Step] = {"compute alone": training(alone := make(), sgd(alone))}
    for name, wrap in methods.items():
        model = make()
        steps[name] = training(model, wrap(model))
    return lt.rank(), steps, lambda seconds: float(lt.allreduce(torch.tensor(seconds), op=lt.Max))


def gloo(make: Callable[[], nn.Module]) -> tuple[int, dict[str, Step], Callable[[float], float]]:
    import torch.distributed as dist
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")

    def slowest(seconds: float) -> float:
        longest = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        return float(longest)

    parallel, local = DistributedDataParallel(make()), make()
    averaged = PostLocalSGDOptimizer(sgd(local), PeriodicModelAverager(period=PERIOD))
    steps = {"DDP": training(parallel, sgd(parallel)), "PostLocalSGD": training(local, averaged)}
    return dist.get_rank(), steps, slowest


def horovod(make: Callable[[], nn.Module]) -> tuple[int, dict[str, Step], Callable[[float], float]]:
    import horovod.torch as hvd

    hvd.init()
    model = make()
    optimizer = hvd.DistributedOptimizer(sgd(model), named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    def slowest(seconds: float) -> float:
        return float(hvd.allreduce(torch.tensor([seconds], dtype=torch.float64), op=hvd.Max, name="slowest"))

    return hvd.rank(), {"Horovod": training(model, optimizer)}, slowest


LIBRARIES = {"lentando": lentando, "gloo": gloo, "horovod": horovod}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--compute-seconds", type=float, required=True, help="what an iteration computes at least")
    parser.add_argument("--layers", type=int, default=6, help="of 1 MB each (default %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(1)
    rank, steps, slowest = LIBRARIES[options.library](lambda: Model(options.layers, options.compute_seconds))
    found = {}
    for name, step in steps.items():
        for _ in range(WARM_UP):
            step()
        slowest(0.0)
        started = time.perf_counter()
        for _ in range(ITERATIONS):
            step()
        found[name] = slowest((time.perf_counter() - started) / ITERATIONS)
    if rank == 0:
        print(json.dumps(found), flush=True)
    slowest(0.0)
    if options.library == "gloo":
        os._exit(0)  # its threads may outlive the store that they talk to, and complain


if __name__ == "__main__":
    main()
