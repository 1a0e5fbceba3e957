"""What step() costs between outer steps, over the bare torch optimizer's, on a model of many small parameters.

    python benchmarks/step_overhead.py
    mpirun -np 4 python benchmarks/step_overhead.py

Both optimizers step in turn, in the same run, so that whatever else the machine does meets both alike.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import destinations
import torch
from measuring import facts, report, table
from mpi4py import MPI

import lentando.torch as lt


def make(count: int) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.randn(10)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn(10)
    return parameters


def seconds(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=100, help="number of parameters (default 100)")
    parser.add_argument("--steps", type=int, default=3000, help="steps of each optimizer (default 3000)")
    parser.add_argument("--markdown", type=destinations.file, metavar="FILE", help="append the table to FILE")
    options = parser.parse_args()

    lt.init()
    torch.set_num_threads(1)
    bare = torch.optim.SGD(make(options.parameters), lr=0.01, momentum=0.9)
    # The period lies beyond the end of the run: what is timed is the 47 of 48 steps that send nothing.
    wrapped = lt.SlowMo(torch.optim.SGD(make(options.parameters), lr=0.01, momentum=0.9), period=10 * options.steps)
    loss = torch.tensor(1.0)
    times: dict[str, list[float]] = {"bare": [], "wrapped": []}
    for number in range(options.steps):
        for name in ("bare", "wrapped") if number % 2 else ("wrapped", "bare"):  # neither always comes second
            times[name].append(seconds(bare.step if name == "bare" else lambda: wrapped.step(loss=loss)))
    pairs = list(zip(times["bare"], times["wrapped"], strict=True))[options.steps // 10 :]
    bare_us, wrapped_us = (1e6 * statistics.median(column) for column in zip(*pairs, strict=True))
    paired_us = 1e6 * statistics.median(ours - theirs for theirs, ours in pairs)
    where = facts(MPI.COMM_WORLD)
    if lt.rank() == 0:
        row = [f"{bare_us:.1f}", f"{wrapped_us:.1f}", f"{paired_us:.1f}", f"{100 * paired_us / bare_us:.1f}"]
        header = ["parameters", "bare optimizer (us)", "wrapped (us)", "the wrapper adds (us)", "in %"]
        caption = f"step() between outer steps: medians of {len(pairs)} alternating steps on rank 0; {where}."
        report(f"{table(header, [[str(options.parameters), *row]])}\n\n{caption}", options.markdown)
    lt.shutdown()


if __name__ == "__main__":
    main()
