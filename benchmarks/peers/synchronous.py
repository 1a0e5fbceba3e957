"""One rank of a job that times iterations of synchronous SGD on one node, by one library.

    mpirun -np 2 python benchmarks/peers/synchronous.py lentando
    torchrun --nproc-per-node 2 benchmarks/peers/synchronous.py gloo

``benchmarks/run.py synchronous`` starts such jobs in turn. All settings are the defaults: of ``DistributedOptimizer``,
of Horovod's, and of ``DistributedDataParallel`` over Gloo. Prints a line of JSON: for each loop, the seconds of an
iteration on the slowest rank. All ranks compute at the same time, in ``compute alone`` too.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

MLP, RESNET, MANY = "MLP of 25 MB", "ResNet-18", "5,000 parameters"
ALONE, SYNCHRONOUS = "compute alone", "synchronous SGD"
PERIOD, WARM_UP = 12, 4
PARAMETERS, ELEMENTS = 5000, 64
Step = Callable[[], object]


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


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Without momentum for many parameters, which would take most of the time of a step."""
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.0 if isinstance(model, Many) else 0.9)


def training(name: str, wrap: Callable[[nn.Module], tuple[nn.Module, Any]]) -> Step:
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


def by_lentando(method: str) -> Callable[[nn.Module], tuple[nn.Module, Any]]:
    import lentando.torch as lt

    settings: dict[str, dict[str, Any]] = {
        SYNCHRONOUS: {},
        "overlap=True": {"base": lt.AllReduce(overlap=True)},
        "SlowMo": {"base": lt.LocalSGD(), "period": PERIOD},
        "SGP": {"base": lt.SGP()},
    }

    def wrap(model: nn.Module) -> tuple[nn.Module, Any]:
        make = lt.SlowMo if method == "SlowMo" else lt.DistributedOptimizer
        return model, make(sgd(model), model=model, **settings[method])

    return wrap


def loops(library: str, names: Sequence[str]) -> dict[str, Step]:
    found: dict[str, Step] = {}
    for name in names:
        found[f"{name}, {ALONE}"] = training(name, lambda model: (model, sgd(model)))
        if library == "lentando":
            for method in (SYNCHRONOUS, "overlap=True", *(("SlowMo", "SGP") if name == MANY else ())):
                found[f"{name}, {method}"] = training(name, by_lentando(method))
        else:
            found[f"{name}, {SYNCHRONOUS}"] = training(name, by_ddp if library == "gloo" else by_horovod)
    return found


def main() -> None:
    # Not where run.py imports this module, which does not find it.
    from operations import Horovod, Lentando, TorchDistributed, finish, seconds_per_call

    assert __doc__ is not None
    libraries = {"lentando": Lentando, "gloo": lambda: TorchDistributed("gloo"), "horovod": Horovod}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=libraries)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument(
        "--iterations", type=int, default=2 * PERIOD, help="of each loop, whole rounds of SlowMo (default %(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.library == "lentando":
        import lentando.torch as lt

        lt.init()
    library: Any = libraries[options.library]()
    torch.manual_seed(1)
    found = {}
    for loop, step in loops(options.library, options.models).items():
        for _ in range(WARM_UP):
            step()
        found[loop] = seconds_per_call(library, step, options.iterations)
    finish(options.library, library, found)


if __name__ == "__main__":
    main()
