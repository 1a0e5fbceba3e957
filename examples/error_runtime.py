"""Training loss against time: synchronous SGD, fixed periods and AdaComm, on a modelled network or on a real one.

The experiment of AdaComm's paper (Wang and Joshi, MLSys 2019, arXiv 1810.08313) on handwritten digits: a small network
at a constant learning rate, where every worker samples its batches from all of the data. Y is the mean compute time of
a step, D the time of an average of the model. On simulated workers Y is 1 s and D is chosen; on real ones both are
measured first.

    python examples/error_runtime.py --report runs/error_runtime          # the whole table, minutes on two cores
    python examples/error_runtime.py --quick                              # less than half a minute
    python examples/error_runtime.py --workers 8 --ratio 2 --compute exponential
    mpirun -np 4 python examples/error_runtime.py --real --report runs/error_runtime_real

As in the paper, synchronous SGD is period 1: for plain SGD the average of the models after a step is the model after a
step along the average gradient. It takes --steps steps, and every other method gets the time that these took.

AdaComm's initial period and interval were chosen by a small grid search, as in the paper, on seeds 100 and 101 with 4
workers and constant compute: 150 Y in all settings, and a first period of 64 at D/Y = 4 and of 4 at D/Y = 0.2, which is
16 D/Y. That choice matters: a first period of 64 at D/Y = 0.2 is slower than synchronous SGD.
The learning rate is the same for all methods in all settings.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from math import ceil
from multiprocessing import get_context
from pathlib import Path

import error_runtime_report as report
import numpy as np
import torch
from error_runtime_training import METHODS, SYNCHRONOUS, Array, Course, Perceptron, batches, compute, train_each, wrap
from tqdm import tqdm

import lentando.torch as lt
from lentando.comm import simulate
from lentando.comm.simulation import Compute, Network
from lentando.comm.world import transport


@dataclass(frozen=True)
class Setting:
    """Setting of a training run: workers, D / Y, and the distribution of the compute time of a step."""

    workers: int
    ratio: float
    compute: str
    methods: tuple[str, ...] = METHODS

    def in_words(self) -> str:
        return f"{self.workers} workers, D/Y = {self.ratio:g}, {self.compute} compute"


FULL = (
    Setting(4, 4.0, "constant"),
    Setting(4, 4.0, "exponential"),
    Setting(4, 0.2, "constant"),
    Setting(4, 0.2, "exponential"),
    Setting(16, 4.0, "exponential", (SYNCHRONOUS, "AdaComm")),
    Setting(64, 4.0, "exponential", (SYNCHRONOUS, "AdaComm")),
)


# --- simulated ----------------------------------------------------------------------------------------------


def network_for(workers: int, average_seconds: float, options: argparse.Namespace) -> Network:
    """Return a network on which the messages of one round take this long, from a round simulated at 1 byte/s."""

    def rounds() -> float:
        lt.init()
        optimizer = wrap(SYNCHRONOUS, Perceptron(0, options), options, np.inf)
        started = transport().clock()
        optimizer.step()
        return transport().clock() - started

    bytes_each = simulate(rounds, workers, network=Network(0.0, 1.0), isolate=False)[0]
    return Network(0.0, bytes_each / average_seconds)


def simulated(
    methods: Sequence[str], seed: int, options: argparse.Namespace, network: Network, times: Compute, workers: int
) -> dict[str, Course]:
    torch.set_num_threads(1)

    def run(work: Callable[[], Course]) -> Course:
        # Every rank has its own generators, so that no state of the process has to be isolated.
        course: Course = simulate(work, workers, network=network, compute=times, seed=seed, isolate=False)[0]
        return course

    mean = float(np.mean(times.trace)) if times.trace else times.mean_seconds
    return train_each(methods, seed, options, mean, run)


def simulated_at(setting: Setting, seed: int, options: argparse.Namespace) -> dict[str, Course]:
    network = network_for(setting.workers, setting.ratio, options)
    options = with_initial_period(options, setting.ratio)
    return simulated(setting.methods, seed, options, network, Compute(1.0, setting.compute), setting.workers)


def main_simulated(options: argparse.Namespace) -> list[report.Result]:
    settings = FULL
    if options.quick:
        settings = FULL[:1]
    if options.workers or options.ratio is not None or options.compute:
        ratio = 4.0 if options.ratio is None else options.ratio
        settings = (Setting(options.workers or 4, ratio, options.compute or "constant", chosen_methods(options)),)
    seeds = range(options.seed, options.seed + options.seeds)
    # Longest first, so that no process starts a long run at the end.
    tasks = sorted(((s, seed) for s in settings for seed in seeds), key=lambda t: -t[0].workers * len(t[0].methods))
    done: dict[tuple[Setting, int], dict[str, Course]] = {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(simulated_at, *task, options): task for task in tasks}
        for future in tqdm(as_completed(futures), "simulating", len(tasks), unit="training set", mininterval=0.5):
            done[futures[future]] = future.result()
    return [report.Result(s.in_words(), 1.0, s.ratio, [done[s, seed] for seed in seeds]) for s in settings]


# --- real ---------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> tuple[list[float], float]:
    """Measure samples of Y on all ranks, and D.

    Y is the time of a step without communication. D is the additional time of a step with an average over the compute
    time of the slowest rank.
    """
    drawn = batches(0, options)

    def steps(period: int, count: int) -> Array:
        """Return the seconds until the loss and of the whole step on each rank: shape (2, ranks, count)."""
        model = Perceptron(0, options)
        sgd = torch.optim.SGD([model.flat], lr=0.0, foreach=False)
        optimizer = lt.DistributedOptimizer(sgd, base=lt.LocalSGD(), period=period)
        model.bind()
        lt.barrier()
        own = []
        for number in range(-count // 4, count):  # the first steps are a warm-up
            started = time.perf_counter()
            loss = compute(model, next(drawn), options)
            computed = time.perf_counter()
            optimizer.step(loss=loss)
            if number >= 0:
                own.append((computed - started, time.perf_counter() - started))
        return np.moveaxis(np.array(lt.allgather_object(own)), 2, 0)

    # Alternating, because the speed of a machine varies.
    turns = [(steps(10**9, 100), steps(1, 60)) for _ in range(5)]
    computed, whole = np.concatenate([local for local, _ in turns], axis=2)
    inside, averaging = np.concatenate([together for _, together in turns], axis=2)
    slowest = inside.max(axis=0) + (whole - computed).mean()
    return whole.ravel().tolist(), float((averaging.mean(axis=0) - slowest).mean())


def main_real(options: argparse.Namespace) -> list[report.Result]:
    """Measure, train on real ranks, and simulate the same on rank 0. Returns nothing on other ranks."""
    lt.init()
    torch.set_num_threads(1)
    times, average_seconds = measure(options)
    mean = float(np.mean(times))
    options = with_initial_period(options, average_seconds / mean)
    seeds = range(options.seed, options.seed + options.seeds)
    methods = chosen_methods(options)
    bar = tqdm(total=len(seeds) * len(methods), desc="training", unit="training", disable=lt.rank() != 0)

    def run(work: Callable[[], Course]) -> Course:
        course = work()
        bar.update()
        # All ranks use the time of rank 0 as the limit of the other methods.
        course.seconds = lt.broadcast_object(course.seconds)
        return course

    real = [train_each(methods, seed, options, mean, run) for seed in seeds]
    bar.close()
    if lt.rank() != 0:
        return []
    workers = lt.size()
    options = argparse.Namespace(**{**vars(options), "step_seconds": 0.0})  # virtual time passes without waiting
    network = network_for(workers, average_seconds, options)
    model = Compute(distribution="trace", trace=times)
    virtual = [
        simulated(methods, seed, options, network, model, workers) for seed in tqdm(seeds, "simulating", unit="seed")
    ]
    y, d = mean * 1e3, average_seconds * 1e3
    words = f"{workers} ranks, Y = {y:.3g} ms, D = {d:.3g} ms, D/Y = {d / y:.3g}"
    return [
        report.Result(f"measured: {words}", mean, average_seconds, real),
        report.Result(f"simulated with these Y and D: {words}", mean, average_seconds, virtual),
    ]


def chosen_methods(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the methods in the order of the table, always with synchronous SGD."""
    return tuple(method for method in METHODS if method in (SYNCHRONOUS, *(options.methods or METHODS)))


def with_initial_period(options: argparse.Namespace, ratio: float) -> argparse.Namespace:
    """Return the options with AdaComm's first period, by default in proportion to D/Y."""
    if options.initial_period is not None:
        return options
    return argparse.Namespace(**{**vars(options), "initial_period": min(64, max(1, ceil(16 * ratio)))})


def arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--real", action="store_true", help="train on the ranks of mpirun, then simulate the same")
    parser.add_argument("--quick", action="store_true", help="4 workers, D/Y = 4, fewer steps and seeds")
    parser.add_argument("--workers", type=int, help="simulated workers, instead of the whole table")
    parser.add_argument("--ratio", type=float, help="D/Y, instead of the whole table")
    parser.add_argument("--compute", choices=("constant", "exponential", "lognormal"), help="of Y")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="methods to compare (not for the table)")
    parser.add_argument("--steps", type=int, help="steps of synchronous SGD (default: 1600; 400 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 5; 1 with --quick or --real)")
    parser.add_argument("--initial-period", type=int, help="AdaComm's first period (default: 16 D/Y, at most 64)")
    parser.add_argument("--interval", type=float, default=150.0, help="time between AdaComm's decisions, in units of Y")
    parser.add_argument("--slow-momentum", type=float, default=0.3, help="slow momentum of AdaComm")
    parser.add_argument("--lr", type=float, default=1.2, help="constant learning rate of all methods")
    parser.add_argument("--weight-decay", type=float, default=3e-3, help="of SGD")
    parser.add_argument("--batch-size", type=int, default=8, help="images per step and worker")
    parser.add_argument("--hidden", type=int, default=32, help="units of the hidden layer")
    parser.add_argument("--step-seconds", type=float, default=0.0,
                        help="with --real, minimum time of a step, as for a larger model")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that simulate")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write error_runtime.png, .html and .json there")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of as a table")
    options = parser.parse_args()
    options.steps = options.steps or (400 if options.quick else 1600)
    options.seeds = options.seeds or (1 if options.quick or options.real else 5)
    return options


if __name__ == "__main__":
    flags = arguments()
    results = main_real(flags) if flags.real else main_simulated(flags)
    if results:
        report.write(results, flags)
