"""One rank of a job that times loops as Horovod's users write them, by either library.

    mpirun -np 2 python benchmarks/peers/horovod_loops.py lentando
    horovodrun --gloo -np 2 python benchmarks/peers/horovod_loops.py horovod

``benchmarks/run.py horovod`` starts such jobs in turn. Nothing but the import differs between the libraries, and all
settings are the defaults. Prints a line of JSON: for each loop, the seconds of an iteration on the slowest rank.

The models compute little, so that the loops show what the library adds: each tensor is multiplied by constants and
summed. ``compute alone`` is the same loop without the library.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

SCALE = 8
"""ResNet-50's numbers of channels are divided by this."""
ONE_TENSOR = 25_000_000
"""Bytes."""
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""Channels inside the blocks of a stage, and the number of blocks."""
EXPANSION = 4
CLASSES = 1000
WARM_UP = 5
SMALL, LARGE = "160 tensors", "25 MB in one tensor"
ALONE = "compute alone"


def resnet50_shapes(scale: int) -> Iterator[tuple[int, ...]]:
    """Shapes of the 161 parameters of ResNet-50, with fewer channels."""

    def convolution(inputs: int, outputs: int, kernel: int) -> Iterator[tuple[int, ...]]:
        yield (outputs, inputs, kernel, kernel)
        yield from [(outputs,), (outputs,)]  # of the normalization

    inputs = 64 // scale
    yield from convolution(3, inputs, 7)
    for channels, blocks in STAGES:
        inner, outputs = channels // scale, EXPANSION * channels // scale
        for block in range(blocks):
            yield from convolution(inputs, inner, 1)
            yield from convolution(inner, inner, 3)
            yield from convolution(inner, outputs, 1)
            if block == 0:
                yield from convolution(inputs, outputs, 1)
            inputs = outputs
    yield from [(CLASSES, inputs), (CLASSES,)]


class Model(nn.Module):
    """Parameters of given shapes, each multiplied by constants and summed."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(shape) for shape in shapes])
        self.constants = [torch.randn(shape) for shape in shapes]

    def forward(self) -> torch.Tensor:
        pairs = zip(self.weights, self.constants, strict=True)
        return torch.stack([torch.dot(weight.view(-1), constant.view(-1)) for weight, constant in pairs]).mean()


def training(hvd: Any, shapes: list[tuple[int, ...]], alone: bool) -> Callable[[], object]:
    """A loop with the wrapped optimizer, or the bare one."""
    model = Model(shapes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if not alone:
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    def step() -> None:
        optimizer.zero_grad()
        model().backward()
        optimizer.step()

    return step


def functions(hvd: Any, shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    """All tensors in flight at once, then each of them awaited."""
    tensors = [torch.randn(shape) for shape in shapes]

    def step() -> None:
        handles = [hvd.allreduce_async_(tensor, name=str(number)) for number, tensor in enumerate(tensors)]
        for handle in handles:
            hvd.synchronize(handle)

    return step


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=("lentando", "horovod"))
    parser.add_argument("--iterations", type=int, default=60, help="of each loop (default %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(1)
    hvd = importlib.import_module(f"{options.library}.torch")
    hvd.init()

    small, large = list(resnet50_shapes(SCALE)), [(ONE_TENSOR // 4,)]
    loops = {
        f"{SMALL}, {ALONE}": training(hvd, small, alone=True),
        f"{SMALL}, DistributedOptimizer": training(hvd, small, alone=False),
        f"{SMALL}, allreduce_async_ and synchronize": functions(hvd, small),
        f"{LARGE}, {ALONE}": training(hvd, large, alone=True),
        f"{LARGE}, DistributedOptimizer": training(hvd, large, alone=False),
        f"{LARGE}, allreduce_async_ and synchronize": functions(hvd, large),
    }
    found = {}
    for name, step in loops.items():
        for _ in range(WARM_UP):
            step()
        hvd.allreduce(torch.zeros(1), name="together")
        started = time.perf_counter()
        for _ in range(options.iterations):
            step()
        seconds = torch.tensor([(time.perf_counter() - started) / options.iterations], dtype=torch.float64)
        found[name] = float(hvd.allreduce(seconds, op=hvd.Max, name="slowest"))
    if hvd.rank() == 0:
        print(json.dumps(found), flush=True)
    hvd.allreduce(torch.zeros(1), name="end")


if __name__ == "__main__":
    main()
