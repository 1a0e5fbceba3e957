"""How well the delay model predicts: a real model's steps, predicted from its parts, then run.

    mpirun -np 2 python benchmarks/prediction.py
    mpirun -np 4 python benchmarks/prediction.py --hidden 1024

On every rank at once, because ranks share cores and caches: measures Y, the steps of the bare torch optimizer without
communication; measures D as ``lentando measure`` does; predicts; then trains with each algorithm and compares. Y and
the algorithms take turns, so that whatever else the machine does meets all of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import destinations
import numpy as np
import torch
from measuring import facts, report, table
from mpi4py import MPI
from torch import nn

import lentando.torch as lt
from lentando.comm import world
from lentando.comm.topology import OnePeerExponential
from lentando.optimizers.measure import measure_delays
from lentando.optimizers.planning import (
    Measurement,
    all_reduce_seconds,
    append_measurement,
    as_compute,
    estimate_compute,
    gossip_rate,
    local_sgd_seconds,
)

Step = Callable[[], object]


def make(hidden: int, batch: int) -> tuple[nn.Module, Callable[[], None]]:
    """A perceptron, and what computes its gradients on a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(256, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )
    images, labels = torch.randn(batch, 256), torch.randint(10, (batch,))

    def backward() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        nn.functional.cross_entropy(model(images), labels).backward()

    return model, backward


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def bare(hidden: int, batch: int) -> Step:
    model, backward = make(hidden, batch)
    optimizer = sgd(model)

    def step() -> None:
        backward()
        optimizer.step()

    return step


def distributed(hidden: int, batch: int, **method: object) -> tuple[Step, lt.DistributedOptimizer]:
    model, backward = make(hidden, batch)
    optimizer = lt.DistributedOptimizer(sgd(model), model=model, **method)

    def step() -> None:
        backward()
        optimizer.step()

    return step, optimizer


def timed(step: Step, steps: int) -> list[float]:
    """Seconds of each step, from when all ranks have come."""
    MPI.COMM_WORLD.Barrier()
    marks = [time.perf_counter()]
    for _ in range(steps):
        step()
        marks.append(time.perf_counter())
    return np.diff(marks).tolist()


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768, help="width of the layers (default 768: 0.8M parameters)")
    parser.add_argument("--batch", type=int, default=256, help="images per step and rank (default 256)")
    parser.add_argument("--steps", type=int, default=24, help="steps of each turn (default 24)")
    parser.add_argument("--turns", type=int, default=7, help="turns (default 7)")
    parser.add_argument("--period", type=int, default=12, help="of Local SGD (default 12)")
    parser.add_argument("--markdown", type=destinations.file, metavar="FILE", help="append the table")
    parser.add_argument(
        "--record", type=destinations.file, metavar="FILE", help="append measured values, for lentando plan"
    )
    options = parser.parse_args()

    lt.init()
    torch.set_num_threads(1)
    size, comm = lt.size(), MPI.COMM_WORLD
    shape = (options.hidden, options.batch)
    elements = sum(parameter.numel() for parameter in make(*shape)[0].parameters())
    alone = bare(*shape)
    methods = {
        "AllReduce": distributed(*shape, base=lt.AllReduce()),
        f"Local SGD, period {options.period}": distributed(*shape, base=lt.LocalSGD(), period=options.period),
        "SGP": distributed(*shape, base=lt.SGP()),
    }
    for step in (alone, *(step for step, _ in methods.values())):
        timed(step, 2 * options.period)  # warm up
    delays: list[Measurement] = []
    alone_seconds: list[float] = []
    run_seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(options.turns):
        delays.append(measure_delays(world.transport(), elements, repeats=5))
        alone_seconds += timed(alone, options.steps)
        for name in methods if turn % 2 else reversed(methods):
            run_seconds[name].append(statistics.fmean(timed(methods[name][0], options.steps)))

    measured = Measurement(size, 4 * elements)
    for operation in delays[0].delays:
        columns = zip(*(one.delays[operation] for one in delays), strict=True)
        measured.delays[operation] = [
            (points[0][0], statistics.median(seconds for _, seconds in points)) for points in columns
        ]
    own = estimate_compute(alone_seconds)
    estimates = comm.allgather([own.mean_seconds, own.deviation_seconds])
    means, deviations = (list(column) for column in zip(*estimates, strict=True))
    measured.compute_seconds_by_rank, measured.compute_deviation_seconds_by_rank = means, deviations
    compute = as_compute(means, deviations)
    costs = measured.delays_at(4 * elements)
    assert costs is not None
    graphs = OnePeerExponential().for_size(size)
    predicted = dict(
        zip(
            methods,
            (
                all_reduce_seconds(compute, size, costs),
                local_sgd_seconds(compute, size, costs, options.period),
                gossip_rate(compute, graphs, costs).seconds,
            ),
            strict=True,
        )
    )
    rows = []
    for name, seconds in predicted.items():
        by_turn = [max(turns) for turns in zip(*comm.allgather(run_seconds[name]), strict=True)]
        found = statistics.fmean(by_turn)
        low, high = min(by_turn), max(by_turn)
        reported = methods[name][1].report()["predicted_seconds_per_step"]
        rows.append(
            [
                name,
                f"{1e3 * seconds:.2f}",
                f"{1e3 * found:.2f}",
                f"{1e3 * low:.2f} to {1e3 * high:.2f}",
                f"{100 * (seconds / found - 1):+.1f} %",
                "" if reported is None else f"{1e3 * reported:.2f}",
            ]
        )
    about = facts(comm)
    if lt.rank() == 0:
        mean = statistics.fmean(means)
        spread = statistics.fmean(deviations)
        text = (
            f"{elements} parameters, {size} ranks: Y {1e3 * mean:.2f} ms (standard deviation {1e3 * spread:.2f} ms), "
            f"D {1e3 * costs.gradient_average:.2f} ms (average of gradients), {1e3 * costs.outer_step:.2f} ms (outer "
            f"step), {1e3 * (costs.exchange + costs.exchange_local):.2f} ms (gossip)"
        )
        header = ["algorithm", "predicted ms", "measured ms", "turns", "difference", "report() predicts"]
        report(f"{text}\n\n{table(header, rows)}\n\n{about}", options.markdown)
        if options.record is not None:
            append_measurement(options.record, measured)


if __name__ == "__main__":
    main()
