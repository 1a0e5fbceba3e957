"""One of four workers is three times slower: how long each way of training takes to the loss of synchronous SGD.

    python benchmarks/unequal.py                                # simulated, in virtual time
    python benchmarks/unequal.py --markdown benchmarks/results/unequal.md
    mpirun -np 4 python benchmarks/unequal.py --real --data own --learning-rate 0.45 --loss 0.12     # by the clock
    mpirun -np 3 python benchmarks/unequal.py --real --data own --learning-rate 0.45 --loss 0.12     # the fast ones

A small network learns the handwritten digits of scikit-learn. The loss is that of all of its training data, at the end
of each round. Workers have either data that are alike, or shards of their own, by the digit. The learning rate of
each way is chosen from the same list, with other seeds than those that are shown. Real ranks sleep what a computation
leaves of the time of a step.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import mean, median
from typing import Any

import destinations
import numpy as np
import torch
from measuring import machine, seconds_to, table
from torch import nn
from torch.nn import functional

import lentando.torch as lt
from lentando.comm import world
from lentando.comm.cluster import Compute, Network
from lentando.comm.simulation import simulate

PERIOD, SLOWER, SLOW_RANK, WORKERS = 12, 3.0, 3, 4
NETWORK = Network(latency_seconds=1e-3, bandwidth_bytes_per_second=1.25e7)
SYNCHRONOUS, EQUAL, LEFT_OUT = "synchronous SGD", "equal periods", "the slow worker left out"
LEARNING_RATES = (0.2, 0.3, 0.45, 0.65, 1.0, 1.5)
"""From which each way gets its own."""
FIRST_TUNING_SEED = 1000
DATA = {
    "alike": "Data that are alike: worker i has every fourth image, from the i-th on.",
    "own": (
        "Shards of their own: the images are sorted by digit and cut into four, so that the slow worker has all images "
        "of 8 and 9 and half of those of 7, and no other has any of 8 and 9."
    ),
}
Curve = list[tuple[float, float]]
"""Seconds since the start, and the loss, at the end of each round."""


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        workers: number of workers: 4 with the slow one, or 3.
        settings: settings of ``DistributedOptimizer``.
    """

    workers: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What a way takes to the loss of synchronous SGD.

    Attributes:
        learning_rate: learning rate that was chosen.
        seconds: time to the loss, by seed; infinite if it was not reached within the limit.
    """

    learning_rate: float
    seconds: list[float]


def ways(step_seconds: float) -> dict[str, Way]:
    """The ways to train, by name."""
    slow: dict[str, Any] = {"base": lt.LocalSGD(), "outer": lt.SlowMomentum(1.0, 0.5), "base_buffers": "maintain"}
    by_seconds = {**slow, "period": lt.RoundSeconds(PERIOD * step_seconds, initial_steps=2)}
    given = lt.StepsByRank([PERIOD] * SLOW_RANK + [int(PERIOD / SLOWER)])
    return {
        SYNCHRONOUS: Way(WORKERS, {"base": lt.AllReduce()}),
        EQUAL: Way(WORKERS, {**slow, "period": PERIOD}),
        LEFT_OUT: Way(SLOW_RANK, {**slow, "period": PERIOD}),
        "rounds by seconds, equal weights": Way(WORKERS, by_seconds),
        "rounds by seconds, weighted by steps": Way(WORKERS, {**by_seconds, "weighting": "steps"}),
        "rounds by seconds, normalized": Way(WORKERS, {**by_seconds, "weighting": "normalized"}),
        "steps by rank given, normalized": Way(WORKERS, {**slow, "period": given, "weighting": "normalized"}),
    }


def chosen_ways(options: argparse.Namespace) -> dict[str, Way]:
    """The ways of the command line, and synchronous SGD, whose loss is the goal."""
    wanted = ways(options.step_seconds)
    return {name: way for name, way in wanted.items() if name == SYNCHRONOUS or name in (options.ways or list(wanted))}


def shard(labels: torch.Tensor, data: str, rank: int, workers: int) -> torch.Tensor:
    """Numbers of the images of a worker. Without the slow worker, no worker has its shard."""
    if data == "alike":
        return torch.arange(rank, len(labels), workers)
    return torch.argsort(labels, stable=True).tensor_split(WORKERS)[rank]


def training(
    options: argparse.Namespace, way: Way, data: str, seed: int, learning_rate: float, enough: float
) -> Callable[..., Curve]:
    """A function that trains one replica.

    Args:
        options: the command line.
        way: the way to train.
        data: "alike" or "own", by which images are given to workers.
        seed: seed of the model and of the batches.
        learning_rate: learning rate of SGD.
        enough: loss at which it ends. Synchronous SGD ends after as many steps as ``--rounds`` say.
    """
    from sklearn.datasets import load_digits

    pixels, numbers = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(numbers))
    images, labels = torch.from_numpy(pixels[order] / 16.0), torch.from_numpy(numbers[order]).long()

    def train(*_: Any) -> Curve:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
        sgd = torch.optim.SGD(model.parameters(), lr=learning_rate)
        optimizer = lt.DistributedOptimizer(sgd, model=model, **way.settings)
        own = shard(labels, data, lt.rank(), lt.size())
        generator = torch.Generator().manual_seed(1000 * seed + lt.rank())
        clock = world.transport().clock
        curve: Curve = []
        steps, began, is_over = 0, clock(), False
        while not is_over:
            step_began = time.perf_counter()
            chosen = own[torch.randint(len(own), (options.batch,), generator=generator)]
            optimizer.zero_grad()
            functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            if options.real:
                seconds = options.step_seconds * (SLOWER if lt.rank() == SLOW_RANK else 1.0)
                time.sleep(max(0.0, seconds - (time.perf_counter() - step_began)))
            optimizer.step()
            steps += 1
            ended = steps // PERIOD if optimizer.period is None else optimizer.rounds
            if ended > len(curve):  # all replicas are equal, so that all ranks find the same loss
                with torch.no_grad():
                    curve.append((clock() - began, float(functional.cross_entropy(model(images), labels))))
                is_late = curve[-1][0] > options.limit_seconds
                if options.real:
                    is_late = bool(lt.allreduce(torch.tensor(float(is_late)), op=lt.Max))
                is_over = is_late or curve[-1][1] <= enough
                if optimizer.period is None:
                    is_over = len(curve) == options.rounds
        return curve

    return train


def curve_of(options: argparse.Namespace, way: Way, train: Callable[..., Curve]) -> Curve:
    """The curve of rank 0, on the ranks of this job or on simulated ones."""
    if options.real:
        return train()
    stragglers = {SLOW_RANK: SLOWER} if way.workers > SLOW_RANK else {}
    compute = Compute(options.step_seconds, stragglers=stragglers)
    curve: Curve = simulate(train, way.workers, network=NETWORK, compute=compute)[0]
    return curve


def compare(options: argparse.Namespace, data: str) -> dict[str, Found]:
    """Tune all ways alike, and measure them with other seeds."""
    tuning = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds)
    shown = range(options.seeds)
    limit, found = options.limit_seconds, {}
    goals: dict[int, float] = {}

    def run(way: Way, seed: int, rate: float) -> Curve:
        return curve_of(options, way, training(options, way, data, seed, rate, goals.get(seed, -inf)))

    for name, way in chosen_ways(options).items():
        is_goal = name == SYNCHRONOUS
        scores = {}
        for rate in options.learning_rates:
            curves = [(run(way, seed, rate), goals.get(seed, -inf)) for seed in tuning]
            last = (curve[-1][1] if is_goal else min(limit, seconds_to(curve, goal)) for curve, goal in curves)
            scores[rate] = mean(last)
        rate = min(scores, key=lambda each: scores[each])
        if is_goal:
            goals = {seed: run(way, seed, rate)[-1][1] for seed in (*tuning, *shown)}
        found[name] = Found(rate, [seconds_to(run(way, seed, rate), goals[seed], limit) for seed in shown])
        print(f"{data}: {name}, learning rate {rate:g}: {in_words(found[name].seconds)}", flush=True)
    return found


def run_for_real(options: argparse.Namespace) -> None:
    """Train once in each way on the ranks of this job, and print the times."""
    lt.init()
    for name, way in chosen_ways(options).items():
        if way.workers == lt.size() and name != SYNCHRONOUS:
            curve = curve_of(options, way, training(options, way, options.data, 0, options.learning_rate, options.loss))
            if lt.rank() == 0:
                last, loss = curve[-1][0], curve[-1][1]
                print(f"{name:38} loss {loss:.4f} after {last:.1f} s, {len(curve)} rounds", flush=True)


def in_words(seconds: Sequence[float]) -> str:
    """Times in seconds by seed, as text for tables and messages."""
    return ", ".join("never" if one == inf else f"{one:.1f}" for one in seconds)


def rows_of(found: dict[str, Found]) -> list[list[str]]:
    """Rows of a table: a way each."""

    def sooner(name: str, reference: str) -> str:
        if name == SYNCHRONOUS or reference not in found:
            return ""
        own, other = (median(found[each].seconds) for each in (name, reference))
        if own == inf:
            return ""
        return "other never" if other == inf else f"{other / own:.2f}"

    return [
        [
            name,
            f"{one.learning_rate:g}",
            "never" if median(one.seconds) == inf else f"{median(one.seconds):.1f}",
            in_words(one.seconds),
            sooner(name, EQUAL),
            sooner(name, LEFT_OUT),
        ]
        for name, one in found.items()
    ]


def page(options: argparse.Namespace, tables: dict[str, str]) -> str:
    """The page of results, in Markdown: the tables and what was measured."""
    text = (
        f"Four workers (simulated, in virtual time), a step of {1e3 * options.step_seconds:g} ms, three times as long "
        "on one of them. A network of 2,410 parameters learns digits by SGD with batches of "
        f"{options.batch}; SlowMo with slow momentum 0.5, period {PERIOD}, or rounds of "
        f"{PERIOD * options.step_seconds:g} s. The goal is the loss, on the data of all four, that synchronous SGD has "
        f"after {PERIOD * options.rounds} steps with the same seed, with the learning rate whose mean loss is the "
        f"lowest then. Every other way gets the learning rate that takes the fewest seconds to it on average, of "
        f"{', '.join(f'{rate:g}' for rate in options.learning_rates)}, by {options.tuning_seeds} seeds that are not "
        f"shown. Never: not within {options.limit_seconds:g} s. {machine()}"
    )
    parts = [f"## Data: {name}\n\n{DATA[name]}\n\n{each}" for name, each in tables.items()]
    return "\n\n".join([f"# One slow worker\n\n{text}", *parts]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train in every way, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(DATA), help="alike, or own shards (default: both)")
    parser.add_argument("--seeds", type=int, default=5, help="that are shown (default %(default)s)")
    parser.add_argument("--tuning-seeds", type=int, default=3, help="that choose learning rates (default %(default)s)")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=LEARNING_RATES)
    parser.add_argument("--rounds", type=int, default=20, help=f"{PERIOD} steps each, of synchronous SGD")
    parser.add_argument("--limit-seconds", type=float, default=150.0, help="after which a run ends (default 150)")
    parser.add_argument("--step-seconds", type=float, default=0.1, help="time of a step of the fast workers")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--markdown", type=destinations.file, help="file to write the tables to")
    parser.add_argument("--real", action="store_true", help="train once on the ranks of this job, by the clock")
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="by their names in the table (default: all)")
    parser.add_argument("--learning-rate", type=float, default=0.45, help="of real ranks (default %(default)s)")
    parser.add_argument("--loss", type=float, default=0.12, help="that real ranks are to reach (default %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.real:
        options.data = options.data or "alike"
        run_for_real(options)
        return
    header = ["way", "learning rate", "median s", "seconds by seed", "times sooner than equal periods", "than left out"]
    chosen = tuple(DATA) if options.data is None else (options.data,)
    tables = {data: table(header, rows_of(compare(options, data))) for data in chosen}
    for each in tables.values():
        print(each)
    if options.markdown is not None:
        options.markdown.write_text(page(options, tables))


if __name__ == "__main__":
    main()
