"""How much of an exchange hides behind computation: MPI alone against Lentando's transport, in the same run.

    mpirun -np 2 python benchmarks/overlap.py
    mpirun -np 2 python benchmarks/overlap.py --size 25MB --repeats 15 --markdown overlap.md

Each rank sends a buffer to the next one and computes meanwhile, for somewhat longer than the exchange alone takes.
MPI moves large messages only while a thread is inside one of its calls. Lentando keeps a thread there. On one machine
that thread copies the bytes itself, so it needs a core of its own: run fewer ranks than cores, or one per host.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
from all_reduce import in_words, number_of_bytes
from measuring import facts, measure, parse, report, table
from mpi4py import MPI
from tqdm import tqdm

from lentando.comm.transport import Array
from lentando.comm.transports.mpi import MPITransport

COMPUTE, EXCHANGE = "compute alone", "exchange alone"
MPI_BOTH, OURS_BOTH = "Isend, Irecv, compute, Waitall", "exchange, compute, wait"
LONGER = 1.1
"""Computing takes this many times as long as exchanging, so that all of the exchange could hide."""


def matrix_products(comm: MPI.Intracomm, seconds: float) -> Callable[[], None]:
    """Computation that takes about this long, in one thread and outside the interpreter, as a training step's does."""
    matrix = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    product = np.empty_like(matrix)

    def compute(products: int) -> None:
        for _ in range(products):
            np.matmul(matrix, matrix, out=product)

    one = measure(comm, {"one": partial(compute, 1)}, 3)["one"]
    return partial(compute, max(1, round(seconds / one.median)))


def exchange_by_mpi(comm: MPI.Intracomm, sent: Array, received: Array) -> list[MPI.Request]:
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    return [comm.Irecv(received, source), comm.Isend(sent, to)]


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", type=number_of_bytes, default="12.5MB", help="size of the message (default %(default)s)"
    )
    options = parse(parser, repeats=9, several_ranks=True)

    comm = MPI.COMM_WORLD
    transport = MPITransport()
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    sent, received = np.ones(options.size, np.uint8), np.empty(options.size, np.uint8)
    where = facts(comm)

    def exchange() -> None:
        MPI.Request.Waitall(exchange_by_mpi(comm, sent, received))

    alone = measure(comm, {EXCHANGE: exchange}, 3)[EXCHANGE]
    compute = matrix_products(comm, LONGER * alone.median)

    def by_mpi() -> None:
        pending = exchange_by_mpi(comm, sent, received)
        compute()
        MPI.Request.Waitall(pending)

    def by_transport() -> None:
        request = transport.exchange([(to, sent)], [(source, received)])
        compute()
        request.wait()

    cases = {COMPUTE: compute, EXCHANGE: exchange, MPI_BOTH: by_mpi, OURS_BOTH: by_transport}
    with tqdm(total=options.repeats * len(cases), disable=comm.rank != 0, leave=False) as progress:
        found = measure(comm, cases, options.repeats, progress)

    def hidden(name: str) -> str:
        """The share of the exchange that took no time of its own: median over measurements that followed each other."""
        in_turn = zip(found[COMPUTE].seconds, found[EXCHANGE].seconds, found[name].seconds, strict=True)
        shares = [(computing + exchanging - both) / exchanging for computing, exchanging, both in in_turn]
        return f"{100 * statistics.median(shares):.0f} %"

    if comm.rank == 0:
        rows = [
            [name, str(sample), hidden(name) if name in (MPI_BOTH, OURS_BOTH) else ""] for name, sample in found.items()
        ]
        caption = (
            f"{in_words(options.size)} from each rank to the next; {where}. Median and quartiles of {options.repeats} "
            "measurements in turn. Hidden: the share of the exchange that adds nothing to the computation."
        )
        report(f"{table(['what', 'time', 'hidden'], rows)}\n\n{caption}", options.markdown)
    transport.close()


if __name__ == "__main__":
    main()
