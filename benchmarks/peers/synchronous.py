"""One rank of a job that times iterations of synchronous SGD on one node, by one library.

    mpirun -np 2 python benchmarks/peers/synchronous.py lentando
    torchrun --nproc-per-node 2 benchmarks/peers/synchronous.py gloo

``benchmarks/run.py synchronous`` starts such jobs in turn. All settings are the defaults: of ``DistributedOptimizer``,
of Horovod's, and of ``DistributedDataParallel`` over Gloo. Prints a line of JSON: for each loop, the seconds of an
iteration on the slowest rank. All ranks compute at the same time, in ``compute alone`` too. With a barrier after each
iteration, the slowest rank of each iteration counts, as for any method that communicates in each: what such a method
takes beyond that is its own time.

Python's garbage collector does not run while a loop is timed. Among these models a full collection takes 0.2 s, and it
comes once in some thirty iterations: in one loop or another, and on each rank in another iteration. And malloc keeps
what is free: as glibc's is set, it returns all gradients to the kernel when the optimizer sets them to None, and the
next backward pass takes some 6,000 page faults, or none, depending on what else the process holds in memory.
"""

import argparse
import ctypes
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

MLP, RESNET, MANY = "MLP of 25 MB", "ResNet-18", "5,000 parameters"
ALONE, WITH_BARRIER = "compute alone", "compute alone and a barrier"
SYNCHRONOUS, OVERLAP = "synchronous SGD", "overlap=True"
PERIOD, WARM_UP = 12, 4
PARAMETERS, ELEMENTS = 5000, 64
KEPT_BYTES = 1 << 30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's ``mallopt``."""
Step = Callable[[], object]
Wrap = Callable[[nn.Module], tuple[nn.Module, Any]]
"""Makes of a model what is called forward, and its optimizer."""


class Block(nn.Module):
    """Two convolutions with a connection around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.convolutions(features) + self.around(features))


class Many(nn.Module):
    """So many small parameters, which compute little."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(ELEMENTS) for _ in range(PARAMETERS)])
        self.constants = torch.randn(PARAMETERS, ELEMENTS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (torch.stack(list(self.weights)) * self.constants).mean() * inputs


def resnet18() -> nn.Module:
    """ResNet-18 (He et al. 2016, arXiv 1512.03385) with 10 classes: 62 parameters, 45 MB."""
    blocks = []
    inputs = 64
    for outputs in (64, 128, 256, 512):
        blocks += [Block(inputs, outputs, 1 if outputs == 64 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def mlp() -> nn.Module:
    """Six layers of 1024 x 1024."""
    return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.ReLU())))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    MLP: (mlp, (32, 1024)),
    RESNET: (resnet18, (16, 3, 32, 32)),
    MANY: (Many, ()),
}
"""How each is made, and the shape of its batch."""
ITERATIONS = {MLP: 2 * PERIOD, RESNET: PERIOD, MANY: PERIOD}
"""Of each loop, whole rounds of SlowMo."""


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Without momentum for many parameters, which would take most of the time of a step."""
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.0 if isinstance(model, Many) else 0.9)


def training(name: str, wrap: Wrap) -> Step:
    """A loop that trains a model, by the optimizer that a library makes of it."""
    make, shape = MODELS[name]
    model, optimizer = wrap(make())
    inputs = torch.randn(shape)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    return step


def by_ddp(model: nn.Module) -> tuple[nn.Module, Any]:
    optimizer = sgd(model)
    return nn.parallel.DistributedDataParallel(model), optimizer


def by_horovod(model: nn.Module) -> tuple[nn.Module, Any]:
    import horovod.torch as hvd

    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    return model, hvd.DistributedOptimizer(sgd(model), named_parameters=model.named_parameters())


def by_lentando(method: str) -> Wrap:
    import lentando.torch as lt

    settings: dict[str, dict[str, Any]] = {
        SYNCHRONOUS: {},
        OVERLAP: {"base": lt.AllReduce(overlap=True)},
        "SlowMo": {"base": lt.LocalSGD(), "period": PERIOD},
        "SGP": {"base": lt.SGP()},
    }

    def wrap(model: nn.Module) -> tuple[nn.Module, Any]:
        make = lt.SlowMo if method == "SlowMo" else lt.DistributedOptimizer
        return model, make(sgd(model), model=model, **settings[method])

    return wrap


def then_barrier(step: Step) -> Step:
    """An iteration after which the ranks wait for each other."""
    from mpi4py import MPI

    def step_and_wait() -> None:
        step()
        MPI.COMM_WORLD.Barrier()

    return step_and_wait


def loops(library: str, names: Sequence[str]) -> dict[str, Callable[[], Step]]:
    """What makes each loop. Those that need threads come last: ranks that have such threads wait in another way."""
    found: dict[str, Callable[[], Step]] = {}

    def add(name: str, method: str, wrap: Wrap, after: Callable[[Step], Step] = lambda step: step) -> None:
        found[f"{name}, {method}"] = lambda: after(training(name, wrap))

    def bare(model: nn.Module) -> tuple[nn.Module, Any]:
        return model, sgd(model)

    for name in names:
        add(name, ALONE, bare)
        if library == "lentando":
            add(name, WITH_BARRIER, bare, then_barrier)
            for method in (SYNCHRONOUS, *(("SlowMo", "SGP") if name == MANY else ())):
                add(name, method, by_lentando(method))
        else:
            add(name, SYNCHRONOUS, by_ddp if library == "gloo" else by_horovod)
    if library == "lentando":
        for name in names:
            add(name, OVERLAP, by_lentando(OVERLAP))
    return found


def keep_free_memory() -> None:
    """Let malloc keep free memory, and take blocks of up to 32 MB, the most that it allows, from there."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's
        assert libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        assert libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)


def main() -> None:
    # Not where run.py imports this module, which does not find it.
    from operations import Horovod, Lentando, TorchDistributed, finish, seconds_per_call

    assert __doc__ is not None
    libraries = {"lentando": Lentando, "gloo": lambda: TorchDistributed("gloo"), "horovod": Horovod}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=libraries)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument("--iterations", type=int, help="of each loop (default: whole rounds of SlowMo, by model)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_free_memory()
    if options.library == "lentando":
        import lentando.torch as lt

        lt.init()
    library: Any = libraries[options.library]()
    torch.manual_seed(1)
    found = {}
    gc.disable()
    for loop, make in loops(options.library, options.models).items():
        step = make()
        gc.collect()
        for _ in range(WARM_UP):
            step()
        found[loop] = seconds_per_call(library, step, options.iterations or ITERATIONS[loop.rpartition(", ")[0]])
        del step
    finish(options.library, library, found)


if __name__ == "__main__":
    main()
