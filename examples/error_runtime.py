"""Training loss against time: synchronous SGD, fixed periods and AdaComm, on a modelled network or on a real one.

The experiment of AdaComm's paper (Wang and Joshi, MLSys 2019, arXiv 1810.08313) on handwritten digits: a small network
at a constant learning rate, every worker drawing its batches from all of the data. Y is what a step computes on
average, D what an average of the model takes; on simulated workers Y is 1 s and D is chosen, on real ones both are
measured first.

    python examples/error_runtime.py --report runs/error_runtime          # the whole table, minutes on two cores
    python examples/error_runtime.py --quick                              # less than half a minute
    python examples/error_runtime.py --workers 8 --ratio 2 --compute exponential
    mpirun -np 4 python examples/error_runtime.py --real --report runs/error_runtime_real

Synchronous SGD is here what it is in the paper, period 1: for plain SGD the average of the models after a step is the
model after a step along the average gradient. It gets --steps steps, every other method as much time as these took.

AdaComm's initial period and interval were chosen by a grid search, as in the paper, on seeds 100 to 102 with 4 workers
and D/Y = 4, and are the same in all settings; so is the learning rate, for all methods.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import error_runtime_report as report
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

import lentando.torch as lt
from lentando.comm import simulate
from lentando.comm.simulation import Compute, Network
from lentando.comm.world import transport

Array: TypeAlias = NDArray[Any]

SYNCHRONOUS = "synchronous SGD"
ADAPTIVE = ("AdaComm", "AdaComm, slow momentum")
FIXED = ("period 4", "period 16", "period 64")
METHODS = (SYNCHRONOUS, *FIXED, *ADAPTIVE)
POINTS = 400
"""Points of a curve, at most."""


@dataclass(frozen=True)
class Setting:
    """Where a training runs: workers, D / Y, and how the compute time of a step is distributed."""

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


@dataclass
class Course:
    """One training, by rank 0's clock.

    Attributes:
        steps: inner steps taken.
        seconds: how long they took.
        curve: seconds and training loss (weight decay's term included) of the averaged model.
        periods: seconds from which on a period held, and the period.
    """

    steps: int = 0
    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)
    periods: list[tuple[float, int]] = field(default_factory=list)


@lru_cache
def digits() -> tuple[Array, Array]:
    """The 1797 handwritten digits of scikit-learn, all of them: what is asked here is the training loss."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images / 16.0
    return (images - images.mean(axis=0)).astype(np.float32), labels


class Perceptron:
    """64 pixels, one hidden layer, 10 classes; its gradient by hand: autograd would take most of the simulator's time.

    Attributes:
        flat: all parameters, the one tensor that PyTorch's optimizer sees.
    """

    def __init__(self, seed: int, options: argparse.Namespace) -> None:
        self._shapes = [(64, options.hidden), (options.hidden,), (options.hidden, 10), (10,)]
        generator = np.random.default_rng(seed)
        parts = [generator.normal(scale=shape[0] ** -0.5, size=shape) * (len(shape) > 1) for shape in self._shapes]
        self.flat = nn.Parameter(torch.from_numpy(np.concatenate([part.ravel() for part in parts]).astype(np.float32)))
        self.flat.grad = torch.zeros_like(self.flat)

    def bind(self) -> None:
        """Once the optimizer has put the parameters where it wants them."""
        assert self.flat.grad is not None
        self._parameters = self._cut(self.flat.detach().numpy())
        self._gradients = self._cut(self.flat.grad.numpy())

    def backward(self, images: Array, labels: Array) -> float:
        """The mean cross-entropy of a batch; leaves its gradient."""
        second = self._parameters[2]
        hidden, probabilities = self._forward(images, self._parameters)
        rows = np.arange(len(labels))
        loss = -float(np.log(probabilities[rows, labels]).mean())
        probabilities[rows, labels] -= 1
        probabilities /= len(labels)
        to_hidden = (probabilities @ second.T) * (hidden > 0)
        for gradient, value in zip(
            self._gradients,
            (images.T @ to_hidden, to_hidden.sum(axis=0), hidden.T @ probabilities, probabilities.sum(axis=0)),
            strict=True,
        ):
            gradient[...] = value
        return loss

    def training_loss(self, flat: Array, options: argparse.Namespace) -> float:
        """What SGD with weight decay minimizes, over all of the data."""
        images, labels = digits()
        _, probabilities = self._forward(images, self._cut(flat))
        loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean(dtype=np.float64)
        return float(loss) + options.weight_decay / 2 * float(np.square(flat, dtype=np.float64).sum())

    def _cut(self, flat: Array) -> list[Array]:
        ends = np.cumsum([np.prod(shape) for shape in self._shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), self._shapes, strict=True)]

    @staticmethod
    def _forward(images: Array, parameters: list[Array]) -> tuple[Array, Array]:
        first, first_bias, second, second_bias = parameters
        hidden = np.maximum(images @ first + first_bias, 0)
        scores = hidden @ second + second_bias
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=1, keepdims=True)
        return hidden, np.maximum(scores, 1e-30, out=scores)


def batches(seed: int, options: argparse.Namespace) -> Iterator[tuple[Array, Array]]:
    images, labels = digits()
    generator = np.random.default_rng([seed, lt.rank()])
    while True:
        for chosen in generator.integers(len(labels), size=(256, options.batch_size)):
            yield images[chosen], labels[chosen]


def wrap(method: str, model: Perceptron, options: argparse.Namespace, interval: float) -> lt.DistributedOptimizer:
    sgd = torch.optim.SGD([model.flat], lr=options.lr, weight_decay=options.weight_decay, foreach=False)
    if method in ADAPTIVE:
        optimizer = lt.AdaComm(
            sgd,
            initial_period=options.initial_period,
            interval=interval,
            slow_momentum=options.slow_momentum if method == ADAPTIVE[1] else 0.0,
        )
    else:
        period = 1 if method == SYNCHRONOUS else int(method.split()[1])
        optimizer = lt.DistributedOptimizer(sgd, base=lt.LocalSGD(), period=period)
    model.bind()
    return optimizer


def train(
    method: str,
    seed: int,
    options: argparse.Namespace,
    interval_seconds: float,
    limit: Callable[[int, float], bool],
    points_apart_seconds: float,
) -> Course:
    """Train on every rank until ``limit(steps, seconds)``; the course as rank 0 saw it."""
    lt.init()
    model = Perceptron(seed, options)
    optimizer = wrap(method, model, options, interval_seconds)
    clock = transport().clock
    lt.barrier()
    started, checked = clock(), 0
    course = Course()
    snapshots = [(0.0, model.flat.detach().numpy().copy())]
    ends = period = optimizer.report()["period"]
    course.periods.append((0.0, period))
    for batch in batches(seed, options):
        step(model, optimizer, batch, options)
        course.steps += 1
        if course.steps < ends:
            continue
        # A round has ended: every replica is the average.
        seconds = clock() - started
        after = optimizer.report()["period"]
        if after != period:
            course.periods.append((seconds, after))
        ends, period = course.steps + after, after
        if seconds >= snapshots[-1][0] + points_apart_seconds:
            snapshots.append((seconds, model.flat.detach().numpy().copy()))
        if course.steps >= checked + 16:  # seldom, because it is a message
            checked = course.steps
            course.seconds = float(lt.broadcast(torch.tensor([seconds], dtype=torch.float64), root_rank=0))
            if limit(course.steps, course.seconds):
                break
    if lt.rank() == 0:
        for seconds, parameters in snapshots[:: max(1, len(snapshots) // POINTS)]:
            course.curve.append((seconds, model.training_loss(parameters, options)))
    return course


def step(model: Perceptron, optimizer: Any, batch: tuple[Array, Array], options: argparse.Namespace) -> None:
    started = time.perf_counter()
    loss = model.backward(*batch)
    if options.step_seconds:
        time.sleep(max(0.0, options.step_seconds - (time.perf_counter() - started)))
    optimizer.step(loss=loss)


def train_each(
    methods: Sequence[str],
    seed: int,
    options: argparse.Namespace,
    mean_step_seconds: float,
    run: Callable[[Callable[[], Course]], Course],
) -> dict[str, Course]:
    """Train by each method, each as long as synchronous SGD, the first, needs for its steps.

    Args:
        methods: names.
        seed: of initial weights and batches.
        options: the flags.
        mean_step_seconds: Y.
        run: lets all ranks train, and returns rank 0's course.
    """
    interval_seconds = options.interval * mean_step_seconds
    courses: dict[str, Course] = {}
    for method in methods:
        if method == SYNCHRONOUS:
            ends, apart_seconds = partial(_after_steps, options.steps), 0.0
        else:
            budget_seconds = courses[SYNCHRONOUS].seconds
            ends, apart_seconds = partial(_after_seconds, budget_seconds), budget_seconds / POINTS
        courses[method] = run(partial(train, method, seed, options, interval_seconds, ends, apart_seconds))
    return courses


def _after_steps(limit: int, steps: int, seconds: float) -> bool:
    return steps >= limit


def _after_seconds(limit: float, steps: int, seconds: float) -> bool:
    return seconds >= limit


# --- simulated ----------------------------------------------------------------------------------------------


def network_for(workers: int, average_seconds: float, options: argparse.Namespace) -> Network:
    """A network on which one round's messages take this long: found by having one take place at 1 byte/s."""

    def rounds() -> float:
        lt.init()
        optimizer = wrap(SYNCHRONOUS, Perceptron(0, options), options, np.inf)
        started = transport().clock()
        optimizer.step()
        return transport().clock() - started

    bytes_each = simulate(rounds, workers, network=Network(0.0, 1.0), isolate=False)[0]
    return Network(0.0, bytes_each / average_seconds)


def simulated(
    methods: Sequence[str], seed: int, options: argparse.Namespace, network: Network, compute: Compute, workers: int
) -> dict[str, Course]:
    torch.set_num_threads(1)

    def run(work: Callable[[], Course]) -> Course:
        # Every rank has generators of its own: nothing of the process's needs to be kept apart.
        course: Course = simulate(work, workers, network=network, compute=compute, seed=seed, isolate=False)[0]
        return course

    mean = float(np.mean(compute.trace)) if compute.trace else compute.mean_seconds
    return train_each(methods, seed, options, mean, run)


def simulated_at(setting: Setting, seed: int, options: argparse.Namespace) -> dict[str, Course]:
    compute = Compute(1.0, setting.compute)  # type: ignore[arg-type]
    network = network_for(setting.workers, setting.ratio, options)
    return simulated(setting.methods, seed, options, network, compute, setting.workers)


def main_simulated(options: argparse.Namespace) -> list[report.Result]:
    settings = FULL
    if options.quick:
        settings = FULL[:1]
    if options.workers or options.ratio is not None or options.compute:
        ratio = 4.0 if options.ratio is None else options.ratio
        settings = (Setting(options.workers or 4, ratio, options.compute or "constant"),)
    seeds = range(options.seed, options.seed + options.seeds)
    # Longest first, so that no process is left with a long one at the end.
    tasks = sorted(((s, seed) for s in settings for seed in seeds), key=lambda t: -t[0].workers * len(t[0].methods))
    done: dict[tuple[Setting, int], dict[str, Course]] = {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(simulated_at, *task, options): task for task in tasks}
        for future in tqdm(as_completed(futures), "simulating", len(tasks), unit="training set", mininterval=0.5):
            done[futures[future]] = future.result()
    return [report.Result(s.in_words(), 1.0, s.ratio, [done[s, seed] for seed in seeds]) for s in settings]


# --- real ---------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds of steps without communication on all ranks, and of an average without steps: Y's samples, and D."""
    model = Perceptron(0, options)
    sgd = torch.optim.SGD([model.flat], lr=0.0, foreach=False)
    local = lt.DistributedOptimizer(sgd, base=lt.LocalSGD(), period=10**9)
    model.bind()
    drawn = batches(0, options)
    times = []
    lt.barrier()
    for number in range(250):
        started = time.perf_counter()
        step(model, local, next(drawn), options)
        if number >= 50:
            times.append(time.perf_counter() - started)
    sgd = torch.optim.SGD([model.flat], lr=0.0, foreach=False)
    averaging = lt.DistributedOptimizer(sgd, base=lt.LocalSGD(), period=1)
    seconds = []
    for optimizer in (local, averaging):
        optimizer.step()
        lt.barrier()
        started = time.perf_counter()
        for _ in range(100):
            optimizer.step()
        seconds.append((time.perf_counter() - started) / 100)
    everyones: list[list[float]] = lt.allgather_object(times)
    average_seconds: float = lt.broadcast_object(seconds[1] - seconds[0])
    return [value for own in everyones for value in own], average_seconds


def main_real(options: argparse.Namespace) -> list[report.Result]:
    """Measure, train on real ranks, and let rank 0 predict the same by the simulator. Empty on other ranks."""
    lt.init()
    torch.set_num_threads(1)
    times, average_seconds = measure(options)
    mean = float(np.mean(times))
    seeds = range(options.seed, options.seed + options.seeds)
    bar = tqdm(total=len(seeds) * len(METHODS), desc="training", unit="training", disable=lt.rank() != 0)

    def run(work: Callable[[], Course]) -> Course:
        course = work()
        bar.update()
        # Ranks agree about the time that the others get: rank 0's.
        course.seconds = lt.broadcast_object(course.seconds)
        return course

    real = [train_each(METHODS, seed, options, mean, run) for seed in seeds]
    bar.close()
    if lt.rank() != 0:
        return []
    workers = lt.size()
    options = argparse.Namespace(**{**vars(options), "step_seconds": 0.0})  # virtual steps need not be waited for
    compute = Compute(distribution="trace", trace=times)
    network = network_for(workers, average_seconds, options)
    virtual = [
        simulated(METHODS, seed, options, network, compute, workers) for seed in tqdm(seeds, "simulating", unit="seed")
    ]
    y, d = mean * 1e3, average_seconds * 1e3
    words = f"{workers} ranks, Y = {y:.3g} ms, D = {d:.3g} ms, D/Y = {d / y:.3g}"
    return [
        report.Result(f"measured: {words}", mean, average_seconds, real),
        report.Result(f"simulated with these Y and D: {words}", mean, average_seconds, virtual),
    ]


def arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--real", action="store_true", help="train on mpirun's ranks, then simulate that")
    parser.add_argument("--quick", action="store_true", help="4 workers, D/Y = 4, fewer steps and seeds")
    parser.add_argument("--workers", type=int, help="simulated workers, instead of the whole table")
    parser.add_argument("--ratio", type=float, help="D/Y, instead of the whole table")
    parser.add_argument("--compute", choices=("constant", "exponential", "lognormal"), help="of Y")
    parser.add_argument("--steps", type=int, help="steps of synchronous SGD (default: 1600; 400 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, help="how many (default: 5; 1 with --quick or --real)")
    parser.add_argument("--initial-period", type=int, default=64, help="AdaComm's first period")
    parser.add_argument("--interval", type=float, default=150.0, help="time between AdaComm's decisions, in units of Y")
    parser.add_argument("--slow-momentum", type=float, default=0.3, help="of AdaComm with slow momentum")
    parser.add_argument("--lr", type=float, default=1.2, help="learning rate, constant and of all methods")
    parser.add_argument("--weight-decay", type=float, default=3e-3, help="of SGD")
    parser.add_argument("--batch-size", type=int, default=8, help="images per step and worker")
    parser.add_argument("--hidden", type=int, default=32, help="units of the hidden layer")
    parser.add_argument("--step-seconds", type=float, default=0.0,
                        help="with --real, the least time of a step, as of a larger model")  # fmt: skip
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
