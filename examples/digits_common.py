"""Code of the digits examples for both frameworks: data, flags, progress bar, table, report.

The data are the 1797 handwritten digits (8 x 8 pixels) that scikit-learn includes, so that nothing is downloaded.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lentando.optimizers.planning import measurement_line

ALGORITHMS = ("slowmo", "localsgd", "allreduce", "sgp", "osgp", "dpsgd", "adacomm")
COMPARED = ALGORITHMS[:3]
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Digits:
    """Images as float32 of shape (count, 1, 8, 8) in [0, 1], and labels 0 to 9 as int64."""

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int64]

    def batches(self, batch_size: int, generator: np.random.Generator) -> Iterator[tuple[Any, Any]]:
        """One epoch of this rank's training data in random order, without the incomplete last batch."""
        order = generator.permutation(len(self.train_labels))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield self.train_images[chosen], self.train_labels[chosen]


@lru_cache  # simulated ranks share it
def _all_digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    return (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8), labels


def load_digits(rank: int, size: int) -> Digits:
    """This rank's share of the training data, equally large on every rank, and all of the held-out test data."""
    images, labels = _all_digits()
    order = np.random.default_rng(0).permutation(len(labels))  # the same split for every seed and every rank
    test, train = np.split(order, [int(TEST_SHARE * len(order))])
    train = train[: len(train) // size * size][rank::size]
    return Digits(images[train], labels[train], images[test], labels[test])


def arguments(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line of an example."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="slowmo", help="how the ranks train together")
    parser.add_argument(
        "--compare", nargs="*", choices=ALGORITHMS, default=argparse.SUPPRESS, metavar="ALGORITHM",
        help=f"train with several ({', '.join(COMPARED)} if none is named) over --seeds seeds, then compare",
    )  # fmt: skip
    parser.add_argument("--base", choices=("localsgd", "allreduce", "sgp", "osgp", "dpsgd"), default="localsgd",
                        help="base algorithm of slowmo and adacomm")  # fmt: skip
    parser.add_argument("--staleness", type=int, default=1, help="inner steps after which osgp waits for a message")
    parser.add_argument("--wire-dtype", choices=("bfloat16", "float16"), help="dtype of messages of sgp, osgp, dpsgd")
    parser.add_argument("--deterministic", action="store_true", help="osgp uses messages at the bound, never earlier")
    parser.add_argument(
        "--reduction", choices=("auto", "ring", "backend"), default="auto", help="how averages are formed"
    )
    parser.add_argument("--period", type=int, default=12, help="inner steps between averages (slowmo, localsgd)")
    parser.add_argument("--initial-period", type=int, default=22, help="the first period of adacomm")
    parser.add_argument("--interval-steps", type=int, default=22, help="inner steps between decisions of adacomm")
    parser.add_argument("--slow-momentum", type=float, help="beta of SlowMo (default: 0.5, and 0 for adacomm)")
    parser.add_argument("--slow-lr", type=float, default=1.0, help="alpha of SlowMo")
    parser.add_argument("--base-buffers", choices=("reset", "maintain", "average"), default="reset",
                        help="the base optimizer's momentum at each average (slowmo, localsgd)")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training data")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step and rank")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of SGD")
    parser.add_argument("--momentum", type=float, default=0.9, help="Nesterov momentum of SGD")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and order of the data")
    parser.add_argument("--seeds", type=int, default=3, help="with --compare: number of seeds, from --seed on")
    parser.add_argument("--simulate", type=int, metavar="N", help="train on N simulated ranks in this process")
    parser.add_argument("--elastic", action="store_true", help="continue when ranks die (mpirun --with-ft ulfm)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write metrics.jsonl and loss.png there")
    parser.add_argument("--no-table", action="store_true", help="leave the table to digits_table.py")
    options = parser.parse_args(argv)
    options.algorithms = [options.algorithm]
    if "compare" in options:
        options.algorithms = options.compare or COMPARED
    else:
        options.seeds = 1
    return options


@dataclass
class Run:
    """Results of one training run, combined over all ranks.

    Attributes:
        framework: name of the framework.
        algorithm: name of the algorithm.
        seed: seed of initial weights and data order.
        accuracy: share of the test data that the averaged model classifies correctly.
        rounds: number of averages.
        megabytes: MB sent by each rank (mean over ranks).
        communication_seconds: time spent in communication, waiting included (mean over ranks).
        seconds: wall-clock time of the training.
        consensus_distance: distance between the replicas at the end.
        checksum: checksum of the averaged model, to compare runs.
        periods: inner steps between averages, in the order in which adacomm chose them.
        epochs: for each epoch, seconds since the start and mean training loss over ranks.
        report: report of the optimizer, which ``lentando plan --from metrics.jsonl`` reads.
    """

    framework: str
    algorithm: str
    seed: int
    accuracy: float = 0.0
    rounds: int = 0
    megabytes: float = 0.0
    communication_seconds: float = 0.0
    seconds: float = 0.0
    consensus_distance: float = 0.0
    checksum: int = 0
    periods: list[int] = field(default_factory=list)
    epochs: list[tuple[float, float]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def count(self, report: dict[str, Any], options: argparse.Namespace) -> None:
        """Copy the report of an optimizer into the run."""
        self.rounds = report["inner_steps" if self.algorithm == "allreduce" else "rounds"]
        self.megabytes = report["bytes_sent"] / 1e6
        self.communication_seconds = report["communication_seconds"]
        if self.algorithm == "adacomm":
            self.periods = [options.initial_period, *(decision["period"] for decision in report["decisions"])]
        self.report = measurement_line(report)

    @classmethod
    def mean(cls, runs: Sequence["Run"]) -> "Run":
        """Combine the results of all ranks into one run: means over ranks, times of rank 0."""

        def over_ranks(name: str) -> float:
            return statistics.fmean(getattr(run, name) for run in runs)

        curves = zip(*(run.epochs for run in runs), strict=True)
        return replace(
            runs[0],
            megabytes=over_ranks("megabytes"),
            communication_seconds=over_ranks("communication_seconds"),
            epochs=[(points[0][0], statistics.fmean(loss for _, loss in points)) for points in curves],
        )


def make_optimizer(lt: Any, options: argparse.Namespace, algorithm: str, base_optimizer: Any, model: Any) -> Any:
    """Wrap an optimizer with the selected method. ``lt`` is ``lentando.torch`` or ``lentando.tensorflow``."""
    bases = {
        "allreduce": lt.AllReduce(),
        "localsgd": lt.LocalSGD(),
        "sgp": lt.SGP(wire_dtype=options.wire_dtype),
        "osgp": lt.OSGP(
            staleness=options.staleness, deterministic=options.deterministic, wire_dtype=options.wire_dtype
        ),
        "dpsgd": lt.DPSGD(wire_dtype=options.wire_dtype),
    }
    if algorithm == "slowmo":
        return lt.SlowMo(
            base_optimizer,
            model=model,
            base=bases[options.base],
            period=options.period,
            slow_momentum=0.5 if options.slow_momentum is None else options.slow_momentum,
            slow_lr=options.slow_lr,
            base_buffers=options.base_buffers,
            algorithm=options.reduction,
        )
    if algorithm == "adacomm":
        return lt.AdaComm(
            base_optimizer,
            model=model,
            base=bases[options.base],
            initial_period=options.initial_period,
            interval_steps=options.interval_steps,
            slow_momentum=options.slow_momentum or 0.0,
            algorithm=options.reduction,
        )
    return lt.DistributedOptimizer(
        base_optimizer,
        model=model,
        base=bases[algorithm],
        period=options.period if algorithm == "localsgd" else None,
        base_buffers=options.base_buffers,
        algorithm=options.reduction,
    )


def train_all(options: argparse.Namespace, lt: Any, train: Callable[[str, int], Run]) -> list[Run]:
    """Train with each algorithm and seed; rank 0 prints the table and writes the report. Returns this rank's runs.

    Args:
        options: parsed command line.
        lt: ``lentando.torch`` or ``lentando.tensorflow``.
        train: function that trains with an algorithm and a seed.
    """
    plan = [(algorithm, options.seed + n) for n in range(options.seeds) for algorithm in options.algorithms]
    own, runs = [], []
    for algorithm, seed in plan:
        own.append(train(algorithm, seed))
        runs.append(Run.mean([Run(**run) for run in lt.allgather_object(asdict(own[-1]))]))
    if lt.rank() == 0:
        if not options.no_table:
            print_table(runs, lt.size())
        if options.report is not None:
            write_report(options.report, runs, lt.size())
    return own


def print_table(runs: Sequence[Run], size: int) -> None:
    """Print one line per framework and algorithm: means over seeds, and the range of the accuracy."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    seeds = len({run.seed for run in runs})
    title = f"handwritten digits, {size} rank{'s' * (size > 1)}, {seeds} seed{'s' * (seeds > 1)}"
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_style="", header_style=""
    )  # a pipe behind mpirun looks like a terminal
    for heading in (
        "framework",
        "algorithm",
        "accuracy",
        "min .. max",
        "final loss",
        "rounds",
        "MB/rank",
        "comm s",
        "total s",
        "consensus",
    ):
        table.add_column(heading, justify="left" if heading in ("framework", "algorithm") else "right", no_wrap=True)
    for framework, algorithm in dict.fromkeys((run.framework, run.algorithm) for run in runs):
        same = [run for run in runs if (run.framework, run.algorithm) == (framework, algorithm)]
        accuracies = [run.accuracy for run in same]

        def mean(name: str, same: Sequence[Run] = same) -> float:
            return statistics.fmean(getattr(run, name) for run in same)

        table.add_row(
            framework,
            algorithm,
            f"{mean('accuracy'):.4f}",
            f"{min(accuracies):.4f} .. {max(accuracies):.4f}",
            f"{statistics.fmean(run.epochs[-1][1] for run in same):.4f}",
            f"{mean('rounds'):.0f}",
            f"{mean('megabytes'):.2f}",
            f"{mean('communication_seconds'):.2f}",
            f"{mean('seconds'):.2f}",
            f"{mean('consensus_distance'):.1e}",
        )
    Console(width=120).print(table)
    for run in runs:
        if run.periods:
            print(f"periods of {run.algorithm}, seed {run.seed}: {', '.join(map(str, run.periods))}")


def read_report(folder: Path) -> tuple[list[Run], int]:
    """Read the runs that ``write_report`` wrote, and their number of ranks."""
    runs, epochs, size = [], [], 0
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        size = line.pop("ranks")
        if line.pop("summary", False):
            runs.append(Run(**line, epochs=epochs))
            epochs = []
        else:
            epochs.append((line["seconds"], line["loss"]))
    return runs, size


def write_report(folder: Path, runs: Sequence[Run], size: int) -> None:
    """Write ``metrics.jsonl`` (a line per epoch, and one per run) and ``loss.png`` (training loss against time)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as lines:
        for run in runs:
            about = {"framework": run.framework, "algorithm": run.algorithm, "seed": run.seed, "ranks": size}
            for epoch, (seconds, loss) in enumerate(run.epochs, 1):
                lines.write(json.dumps({**about, "epoch": epoch, "seconds": round(seconds, 4), "loss": loss}) + "\n")
            summary = {name: value for name, value in asdict(run).items() if name != "epochs"}
            lines.write(json.dumps({**about, "summary": True, **summary}) + "\n")

    import matplotlib as mpl

    mpl.use("Agg")  # no screen needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, algorithm in enumerate(dict.fromkeys(run.algorithm for run in runs)):
        for run in (run for run in runs if run.algorithm == algorithm):
            seconds, losses = zip(*run.epochs, strict=True)
            label = algorithm if run.seed == runs[0].seed else None
            axes.plot(seconds, losses, color=f"C{number}", label=label, alpha=0.8, linewidth=1.5)
    axes.set(xlabel="seconds", ylabel="training loss", yscale="log", title=f"Handwritten digits on {size} ranks")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)
    sys.stdout.write(f"report written to {folder / 'metrics.jsonl'} and {folder / 'loss.png'}\n")
