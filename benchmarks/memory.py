"""Memory that SlowMo and synchronous SGD take beyond the base optimizer, in copies of the parameters.

    mpirun -np 4 python benchmarks/memory.py
    mpirun -np 4 python benchmarks/memory.py --base sgp --size 400MB
    mpirun -np 4 python benchmarks/memory.py --delay 1 --wire-dtype int8
    mpirun -np 4 python benchmarks/memory.py --weighting samples
    mpirun -np 4 python benchmarks/memory.py --base all-reduce        # synchronous SGD, without outer steps
    python benchmarks/run.py memory                                   # all options, each in a job of its own

A rank's memory is its proportional set size (Linux): what ranks share counts once, divided among them.
"""

import argparse
import ctypes
import gc
import json
import os
from pathlib import Path
from typing import Any

import destinations
import torch
from all_reduce import in_words, number_of_bytes
from measuring import facts, report, table
from mpi4py import MPI
from torch import nn

import lentando.torch as lt
from lentando.comm.reductions.staged import LONG_PIECE_BYTES, PIECES

PERIOD = 2
CODED_BITS = {"int8": 8.125, "int4": 4.125, None: 32}
"""Bits of a parameter in a message."""
SYNCHRONOUS = "all-reduce"
BASES = {SYNCHRONOUS: lt.AllReduce, "local": lt.LocalSGD, "sgp": lt.SGP, "osgp": lt.OSGP}


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
    parser.add_argument("--fragments", type=int, default=1, help="of the model (default %(default)s)")
    parser.add_argument("--wire-dtype", choices=["int8", "int4"], help="of the outer steps")
    parser.add_argument("--weighting", choices=["equal", "samples"], default="equal", help="(default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the numbers alone")
    parser.add_argument("--markdown", type=destinations.file, metavar="FILE", help="append the table to FILE")
    options = parser.parse_args()
    lt.init()
    comm = MPI.COMM_WORLD
    layers = 25
    model = nn.ModuleList(nn.Linear(options.size // 4 // layers, 1, bias=False) for _ in range(layers))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train(optimizer: torch.optim.Optimizer, steps: int, **of_a_step: int) -> None:
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step(**of_a_step)

    train(sgd, 2)
    comm.Barrier()
    before = used_bytes()
    slow: dict[str, Any] = {
        "period": PERIOD,
        "slow_momentum": 0.5,
        "delay": options.delay,
        "fragments": options.fragments,
        "wire_dtype": options.wire_dtype,
        "weighting": options.weighting,
    }
    base = BASES[options.base]()
    optimizer: lt.DistributedOptimizer
    if options.base == SYNCHRONOUS:
        optimizer = lt.DistributedOptimizer(sgd, model=model, base=base)
    else:
        optimizer = lt.SlowMo(sgd, model=model, base=base, **slow)
    # One more step than two rounds and the delay, which creates the base state again.
    train(optimizer, 2 * PERIOD + options.delay + 1, **({} if options.weighting == "equal" else {"samples": 1}))
    comm.Barrier()
    copies = comm.allgather((used_bytes() - before) / options.size)
    where = facts(comm)
    if comm.rank == 0:
        goal = expected(options, comm.size)
        if options.json:
            print(json.dumps({"largest": max(copies), "smallest": min(copies), "expected": goal}), flush=True)
        else:
            rows = [[method(options), f"{max(copies):.2f}", f"{min(copies):.2f}", f"{goal:.2f}"]]
            caption = f"Copies of a model of {in_words(options.size)} in float32, beyond SGD with momentum. {where}."
            header = ["method", "copies, largest rank", "smallest rank", "expected"]
            report(f"{table(header, rows)}\n\n{caption}", options.markdown)
    lt.shutdown()


def expected(options: argparse.Namespace, size: int) -> float:
    """Copies of the parameters that SlowMo over Local SGD, or synchronous SGD, should take on each rank."""
    if options.base == SYNCHRONOUS:
        # Gradients stay where they are, and pass through staging memory; or they are copied.
        return PIECES * LONG_PIECE_BYTES / options.size if size <= (os.cpu_count() or 1) else 1
    is_coded = options.wire_dtype is not None
    messages = (2 - 1 / size) * CODED_BITS[options.wire_dtype] / 32  # of all parts, and of all ranks' own part
    if options.delay or options.fragments > 1:
        # Anchor, contribution, sum, momentum; two errors, and the sum of this rank's part.
        return 4 + (2 + messages + 1 / size if is_coded else 0)
    is_plain = not is_coded and options.weighting == "equal"  # then nothing is kept of the sum within a node
    shards = (2 if is_plain else 3) / size  # anchor, momentum and sum
    if not is_plain:
        shards += 1 + messages + (1 + 2 / size if is_coded else 0)  # anchor, and errors of this rank and of its shard
    return shards


def method(options: argparse.Namespace) -> str:
    """The options that are not the defaults, in words."""
    chosen = {
        "delay": options.delay or None,
        "fragments": options.fragments if options.fragments > 1 else None,
        "wire_dtype": options.wire_dtype,
        "weighting": options.weighting if options.weighting != "equal" else None,
    }
    words = ", ".join(f"{name}={value}" for name, value in chosen.items() if value is not None)
    if options.base == SYNCHRONOUS:
        return "synchronous SGD"
    return f"SlowMo over {options.base}{f', {words}' if words else ''}"


if __name__ == "__main__":
    main()
