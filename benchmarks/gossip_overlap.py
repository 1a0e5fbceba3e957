"""How much of the gossip's messages hides behind computation, and what rounding them to 16 bits saves, in one run.

    mpirun -np 2 python benchmarks/gossip_overlap.py
    mpirun -np 4 python benchmarks/gossip_overlap.py --size 12.5MB --markdown gossip_overlap.md

An iteration computes for as long as its exchange takes, then gossips with one peer. Waiting is the time that a rank
spends blocked in the transport. On one machine the bytes are copied by the cores that compute: put one rank on each
host, or see little.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from all_reduce import in_words, number_of_bytes
from measuring import Sample, facts, measure, parse, report, table
from mpi4py import MPI
from overlap import matrix_products
from tqdm import tqdm

from lentando.comm.flat import Entry, FlatBuffer, FlatLayout
from lentando.comm.topology import OnePeerExponential
from lentando.comm.transport import Message, Request
from lentando.comm.transports.mpi import MPITransport
from lentando.optimizers.rules.gossip import OSGP, SGP

ITERATIONS = 4
"""Iterations of one measurement."""


class WatchedTransport(MPITransport):
    """Counts the seconds that a rank is blocked in exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.blocked_seconds = 0.0

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        started = self.clock()
        request = super().exchange(sends, receives, tag, overlap=overlap)
        self.blocked_seconds += self.clock() - started
        return WatchedRequest(request, self)


class WatchedRequest:
    def __init__(self, request: Request, transport: WatchedTransport) -> None:
        self._request, self._transport = request, transport

    def wait(self) -> None:
        started = self._transport.clock()
        self._request.wait()
        self._transport.blocked_seconds += self._transport.clock() - started

    def test(self) -> bool:
        return self._request.test()


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", type=number_of_bytes, default="12.5MB", help="size of the model (default %(default)s)"
    )
    parser.add_argument("--staleness", type=int, default=1, help="of OSGP, in steps (default %(default)s)")
    options = parse(parser, repeats=9, several_ranks=True)

    comm = MPI.COMM_WORLD
    transport = WatchedTransport()
    where = facts(comm)
    layout = FlatLayout([Entry("weights", (options.size // 4,), "float32", 0)])
    model = FlatBuffer(layout)
    model.array[:] = np.random.default_rng(0).normal(size=layout.size)  # or there would be nothing to round
    topology = OnePeerExponential()
    methods = {
        "SGP": SGP(topology).bind(transport, [model], []),
        "OSGP": OSGP(topology, options.staleness).bind(transport, [model], []),
        "SGP in bfloat16": SGP(topology, "bfloat16").bind(transport, [model], []),
        "SGP in float16": SGP(topology, "float16").bind(transport, [model], []),
        "OSGP in bfloat16": OSGP(topology, options.staleness, wire_dtype="bfloat16").bind(transport, [model], []),
    }
    waited: dict[str, list[float]] = {name: [] for name in methods}

    def mix(name: str) -> None:
        methods[name].after_step()

    alone = measure(comm, {"mix": partial(mix, "SGP")}, 3)["mix"]
    compute = matrix_products(comm, alone.median)

    def iterate(name: str) -> None:
        before = transport.blocked_seconds
        for _ in range(ITERATIONS):
            compute()
            methods[name].after_step()
        waited[name].append((transport.blocked_seconds - before) / ITERATIONS)

    def only_compute() -> None:
        for _ in range(ITERATIONS):
            compute()

    cases: dict[str, Callable[[], None]] = {"compute alone": only_compute}
    cases |= {name: partial(iterate, name) for name in methods}
    with tqdm(total=options.repeats * len(cases), disable=comm.rank != 0, leave=False) as progress:
        found = measure(comm, cases, options.repeats, progress)
    for method in methods.values():
        method.wait_in_flight()

    blocked = {name: statistics.median(comm.allgather(statistics.median(times))) for name, times in waited.items()}
    if comm.rank == 0:
        rows = []
        for name, sample in found.items():
            each = Sample(tuple(seconds / ITERATIONS for seconds in sample.seconds))
            rows.append([name, str(each), f"{1e3 * blocked[name]:.1f} ms" if name in blocked else ""])
        hidden = 100 * (1 - blocked["OSGP"] / blocked["SGP"])
        caption = (
            f"{in_words(options.size)} to one peer per iteration, staleness {options.staleness}; {where}. Median and "
            f"quartiles of {options.repeats} measurements of {ITERATIONS} iterations in turn; "
            f"waiting is the median over ranks. OSGP hides {hidden:.0f} % of the time that SGP waits for messages."
        )
        report(f"{table(['what', 'iteration', 'waiting'], rows)}\n\n{caption}", options.markdown)
    transport.close()


if __name__ == "__main__":
    main()
