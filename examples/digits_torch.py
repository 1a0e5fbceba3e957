"""Train a small convolutional network on handwritten digits, alone or on several ranks.

On real ranks, or on simulated ones in one process:

    python examples/digits_torch.py
    mpirun -np 4 python examples/digits_torch.py --algorithm slowmo --base sgp --period 12
    mpirun -np 4 python examples/digits_torch.py --algorithm adacomm --slow-momentum 0.3
    mpirun -np 4 python examples/digits_torch.py --compare --report runs/digits
    python examples/digits_torch.py --algorithm osgp --simulate 16 --batch-size 8
"""

import argparse
import time
from zlib import crc32

import numpy as np
import torch
from digits_common import Run, arguments, load_digits, train_all
from torch import nn
from tqdm import tqdm

import lentando.torch as lt
from lentando.comm import simulate


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


def main(options: argparse.Namespace) -> list[Run]:
    """Train as the flags say; the runs, as this rank saw them."""
    lt.init()
    torch.set_num_threads(1)  # ranks share the cores
    data = load_digits(lt.rank(), lt.size())

    bases = {
        "allreduce": lt.AllReduce(),
        "localsgd": lt.LocalSGD(),
        "sgp": lt.SGP(),
        "osgp": lt.OSGP(staleness=options.staleness, deterministic=options.deterministic),
        "dpsgd": lt.DPSGD(),
    }

    def make_optimizer(algorithm: str, model: nn.Module) -> lt.DistributedOptimizer:
        sgd = torch.optim.SGD(
            model.parameters(), lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0
        )
        if algorithm == "slowmo":
            return lt.SlowMo(
                sgd,
                model=model,
                base=bases[options.base],
                period=options.period,
                slow_momentum=options.slow_momentum,
                slow_lr=options.slow_lr,
                base_buffers=options.base_buffers,
                algorithm=options.reduction,
            )
        if algorithm == "adacomm":
            return lt.AdaComm(
                sgd,
                model=model,
                base=bases[options.base],
                initial_period=options.initial_period,
                interval_steps=options.interval_steps,
                slow_momentum=options.slow_momentum,
                algorithm=options.reduction,
            )
        return lt.DistributedOptimizer(
            sgd,
            model=model,
            base=bases[algorithm],
            period=options.period if algorithm == "localsgd" else None,
            base_buffers=options.base_buffers,
            algorithm=options.reduction,
        )

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

        run.consensus_distance = optimizer.consensus_distance()
        model.eval()
        with optimizer.averaged(), torch.no_grad():
            predicted = model(torch.from_numpy(data.test_images)).argmax(1).numpy()
            run.checksum = crc32(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values()))
        report = optimizer.report()
        run.accuracy = float((predicted == data.test_labels).mean())
        if algorithm == "adacomm":
            run.periods = [options.initial_period, *(decision["period"] for decision in report["decisions"])]
        run.rounds = report["inner_steps" if algorithm == "allreduce" else "rounds"]
        run.megabytes = report["bytes_sent"] / 1e6
        run.communication_seconds = report["communication_seconds"]
        return run

    return train_all(options, lt.rank(), lt.size(), train, lt.allgather_object)


if __name__ == "__main__":
    assert __doc__ is not None
    flags = arguments(__doc__.splitlines()[0])
    if flags.simulate:
        simulate(lambda: main(flags), size=flags.simulate)
    else:
        main(flags)
