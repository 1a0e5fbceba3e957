"""Memory that SlowMo takes beyond its base optimizer, in copies of the parameters.

    mpirun -np 4 python benchmarks/memory.py
    mpirun -np 4 python benchmarks/memory.py --base sgp --size 400MB
    mpirun -np 4 python benchmarks/memory.py --delay 1
    mpirun -np 4 python benchmarks/memory.py --wire-dtype int8

A rank's memory is its proportional set size (Linux): what ranks share counts once, divided among them.
"""

import argparse
import ctypes
import gc
from pathlib import Path

import destinations
import torch
from all_reduce import in_words, number_of_bytes
from measuring import facts, report, table
from mpi4py import MPI
from torch import nn

import lentando.torch as lt

PERIOD = 2
CODED_BITS = {"int8": 8.125, "int4": 4.125}
"""Bits of a parameter in a message."""
BASES = {"local": lt.LocalSGD, "sgp": lt.SGP, "osgp": lt.OSGP}


def used_bytes() -> int:
    """Return the proportional set size of this process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # returns free memory to the system
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("Pss:")))


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=number_of_bytes, default="100MB", help="of the model (default %(default)s)")
    parser.add_argument("--base", choices=BASES, default="local", help="what SlowMo is over (default %(default)s)")
    parser.add_argument("--delay", type=int, default=0, help="of the outer steps (default %(default)s)")
    parser.add_argument("--wire-dtype", choices=CODED_BITS, help="of the outer steps, without a delay")
    parser.add_argument("--markdown", type=destinations.file, metavar="FILE", help="append the table to FILE")
    options = parser.parse_args()
    lt.init()
    comm = MPI.COMM_WORLD
    layers = 25
    model = nn.ModuleList(nn.Linear(options.size // 4 // layers, 1, bias=False) for _ in range(layers))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train(optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()

    train(sgd, 2)
    comm.Barrier()
    before = used_bytes()
    optimizer = lt.SlowMo(
        sgd,
        model=model,
        base=BASES[options.base](),
        period=PERIOD,
        slow_momentum=0.5,
        delay=options.delay,
        wire_dtype=options.wire_dtype,
    )
    train(optimizer, 2 * PERIOD + 1)  # one more step than two rounds, which creates the base state again
    comm.Barrier()
    copies = comm.allgather((used_bytes() - before) / options.size)
    where = facts(comm)
    if comm.rank == 0:
        # Anchor and slow momentum, which are sharded without a delay, and the base state that is created again; with a
        # delay the contribution and its sum as well.
        goal = 4 + 1 if options.delay else 2 / comm.size + 1
        method = f"SlowMo over {options.base}{f' with delay {options.delay}' if options.delay else ''}"
        if options.wire_dtype:
            # The whole anchor and the error; this rank's shards of anchor, momentum, sum and two errors; messages.
            goal = 2 + 5 / comm.size + (2 - 1 / comm.size) * CODED_BITS[options.wire_dtype] / 32 + 1
            method += f", {options.wire_dtype}"
        rows = [[method, f"{max(copies):.2f}", f"{min(copies):.2f}", f"{goal:.2f}"]]
        names = "2 + 5/n + messages + 1" if options.wire_dtype else "4 + 1" if options.delay else "2/n + 1"
        header = ["method", "copies, largest rank", "smallest rank", names]
        caption = f"Copies of a model of {in_words(options.size)} in float32, beyond SGD with momentum. {where}."
        report(f"{table(header, rows)}\n\n{caption}", options.markdown)
    lt.shutdown()


if __name__ == "__main__":
    main()
