"""Train a small convolutional network on handwritten digits, alone or on several ranks.

python examples/digits_torch.py
mpirun -np 4 python examples/digits_torch.py --algorithm slowmo --period 12
mpirun -np 4 python examples/digits_torch.py --compare --report runs/digits
"""

import time

import numpy as np
import torch
from digits_common import Run, arguments, load_digits, train_all
from torch import nn
from tqdm import tqdm

import lentando.torch as lt


def make_model(seed: int) -> nn.Module:
    """8 x 8 pixels to 10 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def main() -> None:
    """Train as the flags say."""
    assert __doc__ is not None
    options = arguments(__doc__.splitlines()[0])
    lt.init()
    torch.set_num_threads(1)  # ranks share the cores
    data = load_digits(lt.rank(), lt.size())

    def make_optimizer(algorithm: str, model: nn.Module) -> lt.DistributedOptimizer:
        sgd = torch.optim.SGD(
            model.parameters(), lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0
        )
        if algorithm == "slowmo":
            return lt.SlowMo(
                sgd,
                model=model,
                period=options.period,
                slow_momentum=options.slow_momentum,
                slow_lr=options.slow_lr,
                base_buffers=options.base_buffers,
            )
        if algorithm == "localsgd":
            return lt.DistributedOptimizer(
                sgd, model=model, base=lt.LocalSGD(), period=options.period, base_buffers=options.base_buffers
            )
        return lt.DistributedOptimizer(sgd, model=model, base=lt.AllReduce())

    def train(algorithm: str, seed: int) -> Run:
        model = make_model(seed)
        optimizer = make_optimizer(algorithm, model)
        generator = np.random.default_rng([seed, lt.rank()])
        run = Run(algorithm, seed)
        started = time.perf_counter()
        about = f"{algorithm}, seed {seed}"
        epochs = tqdm(range(options.epochs), about, unit="epoch", mininterval=0.5, disable=lt.rank() != 0)
        for _ in epochs:
            losses = []
            for images, labels in data.batches(options.batch_size, generator):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels))
                loss.backward()
                optimizer.step(loss=loss)
                losses.append(loss.item())
            run.epochs.append((time.perf_counter() - started, float(np.mean(losses))))
            epochs.set_postfix(loss=f"{run.epochs[-1][1]:.4f}", refresh=False)
        run.seconds = time.perf_counter() - started

        model.eval()
        with optimizer.averaged(), torch.no_grad():
            predicted = model(torch.from_numpy(data.test_images)).argmax(1).numpy()
        report = optimizer.report()
        run.accuracy = float((predicted == data.test_labels).mean())
        run.rounds = report["rounds"] or report["inner_steps"]  # AllReduce averages at every step
        run.megabytes = report["bytes_sent"] / 1e6
        run.communication_seconds = report["communication_seconds"]
        return run

    train_all(options, lt.rank(), lt.size(), train, lt.allgather_object)


if __name__ == "__main__":
    main()
