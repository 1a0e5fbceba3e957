"""What gossip adds to training on one node, where ranks read each other's memory: SGP and OSGP against SGD alone.

    mpirun -np 2 python benchmarks/gossip_on_node.py
    python benchmarks/run.py gossip                     the same, and on 4 ranks

Models of one size train in turn, in the same run, so that whatever else the machine does meets all alike.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from all_reduce import in_words, number_of_bytes
from measuring import Sample, facts, measure, parse, report, table
from mpi4py import MPI
from torch import nn
from tqdm import tqdm

import lentando.torch as lt

ITERATIONS = 6
"""Iterations of one measurement."""
WIDTH = 1024
"""Inputs and outputs of a layer."""
ALONE = "SGD alone"
BASES: dict[str, Any] = {"SGP": lt.SGP(), "OSGP": lt.OSGP(), "D-PSGD": lt.DPSGD()}


def training(layers: int, batch: int, base: Any = None) -> Callable[[], None]:
    """Iterations of a multilayer perceptron, which learns noise."""
    model = nn.Sequential(*(each for _ in range(layers) for each in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if base is not None:
        optimizer = lt.DistributedOptimizer(optimizer, model=model, base=base)
    inputs = torch.randn(batch, WIDTH)

    def train() -> None:
        for _ in range(ITERATIONS):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    return train


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=number_of_bytes, default="25MB", help="of the model (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="samples of a batch (default %(default)s)")
    options = parse(parser, repeats=9, several_ranks=True)
    lt.init()
    torch.manual_seed(1)
    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    layers = max(1, round(options.size / 4 / WIDTH**2))
    make = partial(training, layers, options.batch)
    cases = {ALONE: make(), **{name: make(base) for name, base in BASES.items()}}
    with tqdm(total=options.repeats * len(cases), disable=comm.rank != 0, leave=False) as progress:
        found = measure(comm, cases, options.repeats, progress)
    where = facts(comm)
    if comm.rank == 0:
        each = {
            name: Sample(tuple(seconds / ITERATIONS for seconds in sample.seconds)) for name, sample in found.items()
        }
        rows = [
            [name, str(sample), "" if name == ALONE else f"{each[ALONE].times_faster_than(sample):.2f}"]
            for name, sample in each.items()
        ]
        caption = (
            f"A multilayer perceptron of {in_words(layers * 4 * WIDTH**2)}, batches of {options.batch}; {where}. "
            f"Median and quartiles of {options.repeats} measurements of {ITERATIONS} iterations in turn; ratios: "
            "median of the pairs."
        )
        report(f"{table(['method', 'iteration', 'of SGD alone'], rows)}\n\n{caption}", options.markdown)
    lt.shutdown()


if __name__ == "__main__":
    main()
