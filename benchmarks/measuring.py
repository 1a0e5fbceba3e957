"""What the benchmarks share: their options, timing of all ranks together, the facts of the machine, and tables."""

import argparse
import datetime as dt
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import destinations
import mpi4py
import numpy as np
from mpi4py import MPI
from tqdm import tqdm

import lentando

SAMPLE_SECONDS = 0.005
"""What is shorter than this is done several times in a row."""


@dataclass(frozen=True)
class Sample:
    """How long something took, each time that it was measured."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the samples in seconds."""
        return statistics.median(self.seconds)

    def times_faster_than(self, other: "Sample") -> float:
        """Median of the ratios of measurements that followed each other."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True))

    def __str__(self) -> str:
        unit, length = ("s", 1.0) if self.median >= 1 else ("ms", 1e-3)
        if len(self.seconds) == 1:  # has no quartiles
            return f"{self.median / length:.3g} {unit}"
        first, median, third = (f"{seconds / length:.3g}" for seconds in statistics.quantiles(self.seconds, n=4))
        return f"{median} ({first} to {third}) {unit}"


def parse(parser: argparse.ArgumentParser, *, repeats: int, several_ranks: bool = False) -> argparse.Namespace:
    """Parse the options of a program that measures in turn, with those that all such programs have."""
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="measurements of each, in turn (default %(default)s)"
    )
    parser.add_argument("--markdown", type=destinations.file, metavar="FILE", help="append the table to FILE")
    options = parser.parse_args()
    if several_ranks and MPI.COMM_WORLD.size == 1:
        parser.error(f"this needs at least two ranks: mpirun -np 2 python benchmarks/{parser.prog}")
    return options


def measure(
    comm: MPI.Intracomm, cases: Mapping[str, Callable[[], object]], repeats: int, progress: "tqdm[object] | None" = None
) -> dict[str, Sample]:
    """Time the cases in turn, ``repeats`` times over, so that whatever else the machine does meets all of them.

    The first execution of each is not counted. A time is that of the slowest rank. ``progress`` advances by one for
    each case and repeat.
    """
    calls = {name: comm.bcast(_calls_in_a_sample(comm, case)) for name, case in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats):
        for name in list(cases) if repeat % 2 else reversed(list(cases)):  # alternates the order
            times[name].append(_seconds(comm, cases[name], calls[name]))
            if progress is not None:
                progress.update()
    return {name: Sample(tuple(seconds)) for name, seconds in times.items()}


def _calls_in_a_sample(comm: MPI.Intracomm, case: Callable[[], object]) -> int:
    _seconds(comm, case, 1)
    return min(200, max(1, round(SAMPLE_SECONDS / _seconds(comm, case, 1))))


def _seconds(comm: MPI.Intracomm, case: Callable[[], object], calls: int) -> float:
    comm.Barrier()
    started = time.perf_counter()
    for _ in range(calls):
        case()
    slowest = np.array([(time.perf_counter() - started) / calls])
    comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    return float(slowest[0])


def seconds_to(curve: Sequence[tuple[float, float]], loss: float, limit: float = inf) -> float:
    """Time after which a curve of seconds and losses reached a loss; infinite if it did not within the limit."""
    return next((seconds for seconds, found in curve if found <= loss and seconds <= limit), inf)


def facts(comm: MPI.Intracomm) -> str:
    """Where and when this ran, in one line. Collective: it counts the nodes."""
    nodes = len(set(comm.allgather(platform.node())))
    return f"{comm.Get_size()} ranks on {nodes} node(s), {machine()}"


def machine() -> str:
    """The processor, the versions and the date, in one line."""
    library = MPI.Get_library_version().strip("\0 \n").splitlines()[0].split(", package")[0]
    return (
        f"{os.cpu_count()} cores of {_processor()} each; {library}; "
        f"mpi4py {mpi4py.__version__}, NumPy {np.__version__}, "
        f"Python {platform.python_version()}, lentando {lentando.__version__}{_commit()}; "
        f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}"
    )


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _commit() -> str:
    """The commit of the checkout, where there is one."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" at {found.stdout.strip()}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as it is, and is Markdown too: first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([f"| {line(header)} |", f"|{rule}|", *(f"| {line(row)} |" for row in rows)])


def report(text: str, markdown: Path | None) -> None:
    """Print, and append to a file if there is one. A new file begins with a title."""
    print(f"\n{text}")
    if markdown is not None:
        title = "" if markdown.exists() else f"# Measurements: {markdown.stem}\n\n"
        with markdown.open("a") as file:
            file.write(title)
            file.write(f"{text}\n\n")
