"""All-reduce by size and algorithm, against plain MPI_Allreduce in place, in the same run.

    mpirun -np 4 python benchmarks/all_reduce.py
    mpirun -np 4 python benchmarks/all_reduce.py --sizes 1MB,25MB --repeats 15 --markdown all_reduce.md

A ratio above 1 means that Lentando was faster.
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
from measuring import facts, measure, parse, report, table
from mpi4py import MPI
from tqdm import tqdm

from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transports.mpi import MPITransport

MPI_ALLREDUCE = "MPI_Allreduce"
ALGORITHMS: tuple[Algorithm, ...] = ("ring", "backend", "auto")
UNITS = {"KB": 1000, "MB": 1000**2, "GB": 1000**3}


def number_of_bytes(text: str) -> int:
    """Parse a size such as 4KB, 2.5MB or 1GB."""
    number, unit = text[:-2], text[-2:].upper()
    try:
        return int(float(number) * UNITS[unit])
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number and KB, MB or GB, such as 25MB") from None


def numbers_of_bytes(text: str) -> list[int]:
    """Parse sizes that are separated by commas."""
    return [number_of_bytes(size) for size in text.split(",")]


def in_words(size: int) -> str:
    unit = max((unit for unit in UNITS if size >= UNITS[unit]), key=UNITS.__getitem__, default="KB")
    return f"{size / UNITS[unit]:g} {unit}"


def cases(transport: MPITransport, size: int) -> dict[str, Callable[[], object]]:
    """The same sum of the same buffer by each algorithm. Zeros stay zeros, however often they are summed."""
    plain = np.zeros(size // 4, np.float32)
    buffer = shared_zeros(plain.size, plain.dtype)  # as a model's parameters
    found: dict[str, Callable[[], object]] = {MPI_ALLREDUCE: lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, plain)}
    for algorithm in ALGORITHMS:
        found[algorithm] = partial(plan_reduction(transport, buffer, algorithm).all_reduce, mean=False)
    return found


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes",
        type=numbers_of_bytes,
        default="4KB,64KB,250KB,1MB,4MB,25MB,100MB",
        help="sizes of the float32 buffer (default %(default)s)",
    )
    options = parse(parser, repeats=9)

    transport = MPITransport()
    comm = MPI.COMM_WORLD
    where = facts(comm)
    rows = []
    total = len(options.sizes) * options.repeats * (1 + len(ALGORITHMS))
    with tqdm(total=total, disable=transport.rank != 0, leave=False) as progress:
        for size in options.sizes:
            progress.set_description(in_words(size))
            found = measure(comm, cases(transport, size), options.repeats, progress)
            engine = found.pop(MPI_ALLREDUCE)
            ratios = [f"{sample.times_faster_than(engine):.2f}" for sample in found.values()]
            rows.append([in_words(size), str(engine), *map(str, found.values()), *ratios])
    if transport.rank == 0:
        header = ["float32 buffer", MPI_ALLREDUCE, *ALGORITHMS, *(f"{algorithm} ratio" for algorithm in ALGORITHMS)]
        caption = (
            f"{where}. Median and quartiles of {options.repeats} measurements in turn. Ratio: "
            f"{MPI_ALLREDUCE} in place / Lentando, median of the pairs; above 1 Lentando is faster."
        )
        report(f"{table(header, rows)}\n\n{caption}", options.markdown)
    transport.close()


if __name__ == "__main__":
    main()
