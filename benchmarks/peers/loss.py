"""One rank of a job that trains by one library until a training loss. ``benchmarks/run.py`` starts such jobs in turn.

    mpirun -np 4 python benchmarks/peers/loss.py lentando --compute-seconds 0.02

A small convolutional network learns scikit-learn's handwritten digits. Every library begins with the same weights,
takes the same batches in the same order, and the same learning rate. An iteration computes for a given time, in
forward and in backward: the rest is slept, as if it ran on a device, and the ranks did not share cores. Prints a line
of JSON: for each method, seconds and training loss as often as the replicas have adopted an average. With a delay they
are not equal then: the loss is the mean of theirs.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

SEED = 1
BATCH_SIZE = 16
LEARNING_RATE = 0.4
"""With which synchronous SGD gets furthest, of 0.1, 0.2 and 0.4, without momentum."""
PERIOD = 12
POINT_STEPS = 12
"""Steps between two points of a curve, for who has equal replicas after each."""
Step = Callable[[torch.Tensor, torch.Tensor], bool]
"""Trains on a batch; returns whether the replicas have just adopted an average."""


class Pace:
    """Lets an iteration compute for as long as it should, wherever it has got to."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def start(self) -> None:
        self._started = time.perf_counter()

    def until(self, share: float) -> None:
        """Return when this share of an iteration's computation should be over."""
        time.sleep(max(0.0, self._started + share * self._seconds - time.perf_counter()))


class Paced(torch.autograd.Function):
    """Identity that is passed when its time has come, on the way there and on the way back."""

    @staticmethod
    def forward(context: Any, inputs: torch.Tensor, pace: Pace, there: float, back: float) -> torch.Tensor:
        context.pace, context.back = pace, back
        pace.until(there)
        return inputs.view_as(inputs)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        context.pace.until(context.back)
        return gradients[0], None, None, None


class Network(nn.Module):
    """8 x 8 pixels to 10 classes, in three blocks, each of which takes a third of the computation.

    Args:
        width: channels of the first convolution; the second has twice as many.
        seconds: compute time of an iteration, a third of it in forward.
    """

    def __init__(self, width: int, seconds: float) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.Flatten()),
            nn.Linear(2 * width * 4 * 4, 10),
        )
        self._pace = Pace(seconds)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self._pace.start()
        count = len(self.blocks)
        for number, block in enumerate(self.blocks):
            there, back = (number + 1) / 3 / count, 1 / 3 + 2 / 3 * (count - number) / count
            images = Paced.apply(block(images), self._pace, there, back)
        return images


class Digits:
    """The digits, of which every rank has an equal share."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self.images = torch.from_numpy((images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8))
        self.labels = torch.from_numpy(labels)

    def batches(self, rank: int, size: int, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """So many of a rank, in an order that depends on nothing but the rank."""
        own = self._share(rank, size)
        generator = np.random.default_rng([SEED, rank])
        of_an_epoch = len(own) // BATCH_SIZE
        for number in range(count):
            if number % of_an_epoch == 0:
                order = generator.permutation(own)
            start = number % of_an_epoch * BATCH_SIZE
            chosen = torch.from_numpy(order[start : start + BATCH_SIZE])
            yield self.images[chosen], self.labels[chosen]

    def loss(self, network: Network, parameters: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """The loss of this rank's replica, with these parameters, over the next rank's equal share.

        With a delay, replicas have moved on their own since the average, by their own share.
        """
        nn.utils.vector_to_parameters(parameters, network.blocks.parameters())
        share = self._share((rank + 1) % size, size)
        with torch.no_grad():
            return nn.functional.cross_entropy(network.blocks(self.images[share]), self.labels[share])

    def _share(self, rank: int, size: int) -> Any:
        length = len(self.labels) // size * size
        return np.random.default_rng(SEED).permutation(len(self.labels))[:length][rank::size]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def backward(model: nn.Module, optimizer: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The gradients of a batch; returns its loss."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss


class Lentando:
    """The methods of ours that send less. They may take more steps.

    Args:
        options: options of this program.
    """

    longer = 1.3

    def __init__(self, options: argparse.Namespace) -> None:
        import lentando.torch as lt

        lt.init()
        self._lt, self._interval = lt, 100 * options.compute_seconds
        self.rank, self.barrier = lt.rank(), lt.barrier
        self.size = lt.size()
        self._options: dict[str, dict[str, Any]] = {
            "SlowMo": {},
            f"SlowMo(delay={options.delay})": {"delay": options.delay},
            "SlowMo(int8)": {"wire_dtype": "int8"},
            f"SlowMo(int8, delay={options.int8_delay})": {"wire_dtype": "int8", "delay": options.int8_delay},
        }
        self.methods = (*self._options, "AdaComm")

    def mean(self, each: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._lt.allreduce(each)
        return found

    def training(self, method: str, network: Network) -> Step:
        if method == "AdaComm":
            optimizer = self._lt.AdaComm(
                sgd(network), model=network, initial_period=32, interval_seconds=self._interval
            )
        else:
            optimizer = self._lt.SlowMo(
                sgd(network), model=network, period=PERIOD, slow_momentum=0.5, **self._options[method]
            )
        left = optimizer.period + self._options.get(method, {}).get("delay", 0)

        def step(images: torch.Tensor, labels: torch.Tensor) -> bool:
            nonlocal left
            optimizer.step(loss=backward(network, optimizer, images, labels))
            left -= 1
            is_adopted = left == 0
            if is_adopted:
                left = optimizer.period
            return is_adopted

        return step


class Gloo:
    """Synchronous SGD by PyTorch."""

    methods = ("DDP",)
    longer = 1.0

    def __init__(self, options: argparse.Namespace) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        self.rank, self.size, self.barrier = dist.get_rank(), dist.get_world_size(), dist.barrier

    def mean(self, each: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(each)
        return each / self.size

    def training(self, method: str, network: Network) -> Step:
        parallel, taken = nn.parallel.DistributedDataParallel(network), 0
        optimizer = sgd(parallel)

        def step(images: torch.Tensor, labels: torch.Tensor) -> bool:
            nonlocal taken
            backward(parallel, optimizer, images, labels)
            optimizer.step()
            taken += 1
            return taken % POINT_STEPS == 0

        return step


LIBRARIES = {"lentando": Lentando, "gloo": Gloo}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--compute-seconds", type=float, required=True, help="what an iteration computes at least")
    parser.add_argument("--width", type=int, default=88, help="channels of the first convolution (default %(default)s)")
    parser.add_argument("--steps", type=int, default=168, help="of synchronous SGD (default %(default)s)")
    parser.add_argument("--delay", type=int, default=5, help="of SlowMo's outer steps (default %(default)s)")
    parser.add_argument("--int8-delay", type=int, default=2, help="the same with int8 (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    library, digits = LIBRARIES[options.library](options), Digits()
    curves = {}
    for method in library.methods:
        network = Network(options.width, options.compute_seconds)
        step = library.training(method, network)
        batches = list(digits.batches(library.rank, library.size, round(library.longer * options.steps)))
        library.barrier()
        started, seen = time.perf_counter(), []
        for images, labels in batches:
            if step(images, labels):
                reached = time.perf_counter() - started
                seen.append((reached, nn.utils.parameters_to_vector(network.parameters()).detach()))
        library.barrier()
        own = [digits.loss(network, parameters, library.rank, library.size) for _, parameters in seen]
        losses = library.mean(torch.stack(own)).tolist()
        curves[method] = [(seconds, loss) for (seconds, _), loss in zip(seen, losses, strict=True)]
    if library.rank == 0:
        print(json.dumps(curves), flush=True)
    library.barrier()
    if options.library == "gloo":
        os._exit(0)  # its threads may log errors after their store is closed


if __name__ == "__main__":
    main()
