"""Train a row of the papers' tables on CIFAR-10, CIFAR-100, ImageNet or Fashion-MNIST, in PyTorch.

The rows, the data and the flags are described in README.md:

    python examples/cifar/train_torch.py --list
    mpirun -np 32 python examples/cifar/train_torch.py --row sgp-slowmo --data ~/data --output runs/sgp
    mpirun -np 32 python examples/cifar/train_torch.py ... --resume    # after a crash, from the last checkpoint
    lentando report runs/sgp    # figures, as one HTML page
"""

import argparse
from typing import Any

import models_torch as models
import torch
from command_line import arguments
from loader import Batch
from torch import nn
from training import load_data, train

import lentando.torch as lt
from lentando.comm import simulate


class TorchLearner:
    """A network, SGD with Nesterov momentum, and the method of the row around it."""

    def __init__(self, options: argparse.Namespace, channels: int, classes: int) -> None:
        recipe = options.recipe
        gpus = torch.cuda.device_count()
        self._device = torch.device("cuda", lt.local_rank() % gpus) if gpus else torch.device("cpu")
        if gpus:
            torch.cuda.set_device(self._device)  # NCCL and CUDA-aware MPI send from the current device
        self._model = models.build(recipe.model, channels, classes, options.seed).to(self._device)
        sgd = torch.optim.SGD(
            self._model.parameters(), recipe.lr, recipe.momentum,
            weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0,
        )  # fmt: skip
        self.optimizer = recipe.optimizer(lt, sgd, self._model, options.reduction)

    def step(self, batch: Batch, learning_rate: float) -> torch.Tensor:
        images, labels = self._on_device(batch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._model.train()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self._model(images), labels)
        loss.backward()
        self.optimizer.step(loss=loss)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        images, labels = self._on_device(batch)
        self._model.eval()
        scores = self._model(images)
        loss = nn.functional.cross_entropy(scores, labels, reduction="sum")
        return float(loss), int((scores.argmax(1) == labels).sum())

    def weights(self) -> list[Any]:
        return [tensor.cpu().numpy() for tensor in self._model.state_dict().values()]

    def _on_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = map(torch.from_numpy, batch)
        return images.to(self._device), labels.to(self._device)


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Train on the rank that calls it. Returns the results."""
    lt.init()
    torch.set_num_threads(max(1, torch.get_num_threads() // lt.local_size()))  # ranks share the cores
    data = load_data(lt, options)
    return train(lt, TorchLearner(options, data.channels, data.classes), data, options)


if __name__ == "__main__":
    assert __doc__ is not None
    flags = arguments(__doc__)
    if flags.simulate:
        simulate(lambda: main(flags), size=flags.simulate)
    else:
        main(flags)
