"""Train a small convolutional network on handwritten digits, on one or several ranks.

The ranks may be real, or simulated in one process:

    python examples/digits_torch.py
    mpirun -np 4 python examples/digits_torch.py --algorithm slowmo --base sgp --period 12
    mpirun -np 4 python examples/digits_torch.py --algorithm adacomm --slow-momentum 0.3
    mpirun --with-ft ulfm -np 4 python examples/digits_torch.py --elastic
    mpirun -np 4 python examples/digits_torch.py --compare --report runs/digits
    python examples/digits_torch.py --algorithm osgp --simulate 16 --batch-size 8
"""

import argparse
import time
from zlib import crc32

import numpy as np
import torch
from digits_common import Run, arguments, load_digits, make_optimizer, train_all
from torch import nn
from tqdm import tqdm

import lentando.torch as lt
from lentando.comm import simulate


def make_model(seed: int) -> nn.Module:
    """A convolutional network from 8 x 8 pixels to 10 classes."""
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
    """Parse the command line and train. Returns the runs of this rank."""
    lt.init(elastic=options.elastic)
    torch.set_num_threads(1)  # ranks share the cores
    data = load_digits(lt.rank(), lt.size())

    def train(algorithm: str, seed: int) -> Run:
        nonlocal data
        model = make_model(seed)
        sgd = torch.optim.SGD(
            model.parameters(), lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0
        )
        optimizer = make_optimizer(lt, options, algorithm, sgd, model)
        generator = np.random.default_rng([seed, lt.rank()])
        run = Run("torch", algorithm, seed)
        started = time.perf_counter()
        about = f"{algorithm}, seed {seed}"
        epochs = tqdm(range(options.epochs), about, unit="epoch", mininterval=0.5, disable=lt.rank() != 0)
        for _ in epochs:
            if options.elastic:
                lt.barrier()  # after it, all ranks have the same size of the job
                data = load_digits(lt.rank(), lt.size())
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
        run.accuracy = float((predicted == data.test_labels).mean())
        run.count(optimizer.report(), options)
        return run

    return train_all(options, lt, train)


if __name__ == "__main__":
    assert __doc__ is not None
    flags = arguments(__doc__.splitlines()[0])
    if flags.simulate:
        simulate(lambda: main(flags), size=flags.simulate)
    else:
        main(flags)
