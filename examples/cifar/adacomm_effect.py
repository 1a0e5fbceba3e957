"""AdaComm's effect on 4 simulated workers, a small VGG-like network and Fashion-MNIST, by simulated time.

A step computes for Y = 1 s; an average of the weights takes D. D/Y is 4, about that of VGG-16 in the paper (arXiv
1810.08313), or 0.2, as with ResNet-50, whose computation dominates. Synchronous SGD is period 1. It takes --steps
steps, and every other method gets the time that these took. Rows with -decay divide the learning rate by 10 after a
half and after three quarters of as many steps of their own, AdaComm's not before the period is 1, as in the paper:
a rate that falls earlier freezes the error of long periods. Rows with momentum have 0.9 in the workers and a fifth of
the rate; AdaComm's block momentum is 0.3. AdaComm begins with a period of 16 D/Y and decides every 200 Y: with shorter
intervals, the noise of the loss is larger than its fall, and the period is soon halved to 1. This, the batches of 32
and the rate were chosen with seed 10, which the tables do not use.

Each run is written to a file of its own as soon as it is complete: see effect.py, whose flags these are.

    make data
    python examples/cifar/adacomm_effect.py --output runs/adacomm                           # an hour or two
    python examples/cifar/adacomm_effect.py --output runs/adacomm --rows tau-1-at-4 --seeds 0
    python examples/cifar/adacomm_effect.py --output runs/adacomm --table
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from archives import Data, DataError, load
from loader import Loader
from recipes import PRESETS, Recipe
from train_torch import TorchLearner

import lentando.torch as lt
from lentando.comm import simulate
from lentando.comm.simulation import Compute, Network
from lentando.comm.world import transport

sys.path.append(str(Path(__file__).parents[1]))
import error_runtime_report as report
from error_runtime_training import Course
from recipe_effect import arguments, run_missing, runs_of

WORKERS = 4
RATIOS = (4.0, 0.2)
"""D/Y."""
INTERVAL_SECONDS = 200.0
POINTS = 100
"""Points of a curve, at most."""
CHECK_STEPS = 16
"""Steps after which the ranks compare their clocks with the time that they have."""
MEASURED = 1024
"""Training images whose loss is a point."""
MILESTONES = (0.5, 0.75)
PLAIN = replace(
    PRESETS["adacomm-vgg16-cifar10"]["sync"], model="vgg6", dataset="fashion-mnist", batch_size=32, base="localsgd",
    lr=0.1, interval_seconds=INTERVAL_SECONDS,
)  # fmt: skip
MOMENTUM = {"momentum": 0.9, "lr": PLAIN.lr / 5}


def _methods(ratio: float) -> dict[str, Recipe]:
    first = max(1, math.ceil(16 * ratio))
    methods = {f"tau-{period}": replace(PLAIN, period=period) for period in (1, 4, 16, 64)}
    methods["adacomm"] = replace(PLAIN, period=first, adaptive=True)
    methods["tau-1-momentum"] = replace(methods["tau-1"], **MOMENTUM)
    methods["adacomm-block-momentum"] = replace(methods["adacomm"], **MOMENTUM, slow_momentum=0.3)
    return methods


ROWS = {
    f"{method}{decay}-at-{ratio:g}": (ratio, decay != "", recipe)
    for ratio in RATIOS
    for decay in ("", "-decay")
    for method, recipe in _methods(ratio).items()
}
"""D/Y, whether the learning rate decays, and the recipe of each row."""


def network_for(ratio: float, options: argparse.Namespace, data: Data) -> Network:
    """A network on which an average takes ``ratio`` seconds, from one that is simulated at 1 byte/s."""

    def average() -> float:
        lt.init()
        learner = learner_of(replace(PLAIN, period=1), 0, data)
        started = transport().clock()
        learner.step(next(loader_of(data, 0).batches(0)), 0.0)
        return transport().clock() - started

    found = simulate(average, WORKERS, network=Network(0.0, 1.0), compute=Compute(0.0, "constant"), isolate=False)
    return Network(0.0, found[0] / ratio)


def learner_of(recipe: Recipe, seed: int, data: Data) -> TorchLearner:
    options = argparse.Namespace(recipe=recipe, seed=seed, reduction="auto")
    return TorchLearner(options, data.channels, data.classes)


def loader_of(data: Data, seed: int) -> Loader:
    shard = {"mean": data.mean, "deviation": data.deviation, "rank": lt.rank(), "size": lt.size()}
    return Loader(data.train, **shard, batch_size=PLAIN.batch_size, seed=seed)


def train(row: str, seed: int, options: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Train on every rank until the time is over.

    Returns:
        The course that rank 0 recorded, and AdaComm's losses: that of the first round, and that of each interval.
    """
    ratio, decays, recipe = ROWS[row]
    limit = CHECK_STEPS * math.ceil(options.steps / CHECK_STEPS) * (1 + ratio)
    lt.init()
    learner, clock = learner_of(recipe, seed, data), transport().clock
    part = data.train[0][:MEASURED], data.train[1][:MEASURED]
    (measured,) = Loader(part, data.mean, data.deviation, batch_size=MEASURED, rank=0, size=1, augment=False).batches(0)

    def loss() -> float:
        """Of rank 0's replica, which is the average at the end of a round."""
        return learner.evaluate(measured)[0] / MEASURED

    course, period = Course(), learner.optimizer.period
    started, ends, checked, passed, postponed = clock(), period, 0, 0, 0.0
    course.periods.append((0.0, period))
    if lt.rank() == 0:
        course.curve.append((0.0, loss()))
    loader = loader_of(data, seed)
    for epoch in count():
        for batch in loader.batches(epoch):
            if decays and passed < len(MILESTONES):
                late = course.steps - MILESTONES[passed] * options.steps - postponed
                if late >= 0 and (period == 1 or not recipe.adaptive):
                    passed, postponed = passed + 1, postponed + late
            learner.step(batch, recipe.lr * 0.1**passed)
            course.steps += 1
            if course.steps < ends:
                continue
            seconds, after = clock() - started, learner.optimizer.period
            if after != period:
                course.periods.append((seconds, after))
            ends, period = course.steps + after, after
            if lt.rank() == 0 and seconds >= course.curve[-1][0] + limit / POINTS:
                course.curve.append((seconds, loss()))
            if course.steps >= checked + CHECK_STEPS:  # rarely, because it sends a message
                checked, course.seconds = course.steps, lt.broadcast_object(seconds)
                if course.seconds >= 0.999 * limit:  # messages of a few bytes take time, too
                    if lt.rank() == 0 and seconds > course.curve[-1][0]:
                        course.curve.append((seconds, loss()))
                    found = asdict(course)
                    if recipe.adaptive:
                        found["first_loss"] = learner.optimizer.schedule.state_dict()["first_loss"]
                        found["losses"] = [decision["loss"] for decision in learner.optimizer.report()["decisions"]]
                    return found
    raise AssertionError


def run(row: str, seed: int, options: argparse.Namespace) -> Mapping[str, Any]:
    data = load("fashion-mnist", options.data, any_size=options.any_size).limited(options.limit)
    simulated = {"network": network_for(ROWS[row][0], options, data), "compute": Compute(1.0, "constant")}
    found: dict[str, Any] = simulate(
        lambda: train(row, seed, options, data), WORKERS, **simulated, seed=seed, isolate=False
    )[0]
    return found


def formula(first_period: int, first_loss: float, losses: Sequence[float]) -> list[int]:
    """The periods by AdaComm's refined rule at a constant learning rate, from the losses of the intervals."""
    periods = [first_period]
    for loss in losses:
        basic = math.ceil(math.sqrt(loss / first_loss) * first_period)
        periods.append(basic if basic < periods[-1] else max(1, periods[-1] // 2))
    return changes(periods)


def changes(periods: Sequence[int]) -> list[int]:
    """The periods without those that are equal to the one before."""
    return [period for period, before in zip(periods, [0, *periods], strict=False) if period != before]


def table(folder: Path) -> str:
    """For each D/Y and kind of learning rate, the complete rows against those of synchronous SGD, as Markdown."""
    text = []
    for ratio in RATIOS:
        for decay in ("", "-decay"):
            for reference in ("tau-1", "tau-1-momentum"):
                title = f"D/Y = {ratio:g}, learning rate {'decays' if decay else 'fixed'}, against {reference}"
                with_momentum = [method for method in _methods(ratio) if "momentum" in method]
                methods = with_momentum if reference in with_momentum else list(_methods(ratio))
                text += _against(folder, methods, f"{decay}-at-{ratio:g}", title)
    return "\n".join(text)


def _against(folder: Path, methods: Sequence[str], ending: str, title: str) -> list[str]:
    by_method = {}
    for method in methods:
        runs = runs_of(folder, method + ending)
        fields = ("steps", "seconds", "curve", "periods")
        by_method[method] = {run["seed"]: Course(**{name: run[name] for name in fields}) for run in runs}
    seeds = sorted(by_method[methods[0]])
    complete = {method: runs for method, runs in by_method.items() if seeds and set(seeds) <= set(runs)}
    if not complete:
        return []
    courses = [{method: runs[seed] for method, runs in complete.items()} for seed in seeds]
    lines = ["", f"{title}; seeds {', '.join(map(str, seeds))}:", "", f"| {' | '.join(report.HEADINGS)} |"]
    lines.append("|---" * len(report.HEADINGS) + "|")
    lines += [f"| {' | '.join(row)} |" for row in report.rows(report.Result(title, 1.0, 0.0, courses))]
    if "adacomm" in complete and "decay" not in ending:
        lines += _periods(folder, f"adacomm{ending}")
    return lines


def _periods(folder: Path, row: str) -> list[str]:
    """AdaComm's periods next to those of its formula, as Markdown."""
    lines = ["", "| seed | AdaComm's periods | by its formula, from the same losses |", "|---|---|---|"]
    for run in runs_of(folder, row):
        taken = changes([period for _, period in run["periods"]])
        wanted = formula(taken[0], run["first_loss"], run["losses"])
        lines.append(f"| {run['seed']} | {', '.join(map(str, taken))} | {', '.join(map(str, wanted))} |")
    return lines


def main() -> None:
    assert __doc__ is not None
    parser = arguments(__doc__, list(ROWS), "data")
    parser.add_argument("--limit", type=int, default=8192, metavar="N", help="train on the first N images")
    parser.add_argument("--steps", type=int, default=800, metavar="N", help="of synchronous SGD (default: 800)")
    parser.add_argument("--any-size", action="store_true", help="accept fewer images than are published")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        settings = {"limit": options.limit, "steps": options.steps}
        try:
            run_missing(options, settings, lambda row, seed: run(row, seed, options))
        except DataError as error:
            raise SystemExit(str(error)) from None
    print(table(options.output))


if __name__ == "__main__":
    main()
