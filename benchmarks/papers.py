"""The papers' experiments on simulated workers: rows and seeds that are missing, how long they will take, and tables.

    python benchmarks/run.py papers --remaining                        what is missing, and how long it will take
    python benchmarks/run.py papers                                    all of it, in one process at a time
    python benchmarks/run.py papers --jobs 2 --hours 1                 two at a time; none is begun after an hour
    python benchmarks/run.py papers --only images --rows sgp --seeds 0 1
    python benchmarks/run.py papers --only images --runs runs/long -- --epochs 30 --lr 0.05
    python benchmarks/run.py papers --tables docs/papers.md            only the tables, from what is complete

Each run is a process of its own, and leaves one JSON file when it is complete. What is complete is never repeated: this
can be killed at any time, started again, and run twice at a time. What follows -- is given to the experiment's program;
a folder of runs holds those of one kind. --tables replaces what stands between the comments that name an experiment
(<!-- images --> and <!-- end of images -->) in a file, and leaves the tables of experiments without complete runs.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Experiment:
    """An experiment: its program in examples/, and about how long one of its runs takes on one core."""

    program: str
    minutes: float


EXPERIMENTS = {
    "images": Experiment("cifar/effect.py", 2.4),
    "translation": Experiment("translation/translation_effect.py", 7),
    "adacomm": Experiment("cifar/adacomm_effect.py", 1.4),
}


class Runs:
    """The runs of one experiment in a folder."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.folder: Path = options.runs / name
        self._command = [sys.executable, str(ROOT / "examples" / EXPERIMENTS[name].program)]
        self._given = ["--output", str(self.folder), *options.given]
        self._chosen = ["--seeds", *map(str, options.seeds)] + (["--rows", *options.rows] if options.rows else [])

    def missing(self) -> list[tuple[str, str]]:
        """Rows and seeds that are not complete."""
        shown = self._output(*self._chosen, "--missing")
        return [(row, seed) for row, seed in (line.split() for line in shown.splitlines())]

    def table(self) -> str:
        return self._output("--table").strip()

    def run(self, row: str, seed: str) -> None:
        self._output("--rows", row, "--seeds", seed)

    def complete(self) -> list[Path]:
        """The files of the runs that are complete."""
        return sorted(self.folder.glob("*-seed*.json"))

    def seconds(self, row: str) -> float:
        """About how long a run of a row takes: as long as others of it, or else of other rows."""
        timed = {file: json.loads(file.read_text())["run_seconds"] for file in self.complete()}
        alike = [seconds for file, seconds in timed.items() if re.fullmatch(rf"{row}-seed\d+\.json", file.name)]
        return statistics.fmean(alike or timed.values() or [60 * EXPERIMENTS[self.name].minutes])

    def _output(self, *arguments: str) -> str:
        """What the program prints. Its errors appear as they are."""
        run = subprocess.run([*self._command, *self._given, *arguments], check=False, stdout=subprocess.PIPE, text=True)
        if run.returncode:
            raise SystemExit(f"{shlex.join(map(str, run.args))} ended with status {run.returncode}")
        return run.stdout


def in_words(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"


def write_tables(file: Path, experiments: Sequence[Runs]) -> None:
    """Replace the tables in a file of text, each between two comments that name its experiment."""
    if not file.is_file():
        raise SystemExit(f"there is no file {file}, into which the tables could go")
    text = file.read_text()
    for runs in experiments:
        begin, end = f"<!-- {runs.name} -->\n", f"<!-- end of {runs.name} -->"
        before, found, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found or not found_end:
            raise SystemExit(f"{file} does not say where the table goes: {begin.strip()} and {end} are missing")
        if runs.complete():
            text = f"{before}{begin}\n{runs.table()}\n\n{end}{after}"
    file.write_text(text)


def main(arguments: Sequence[str]) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="run.py papers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="experiments")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="of one experiment (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--runs", type=Path, default=Path("runs/papers"), metavar="DIR", help="(default: runs/papers)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (default: 1)")
    parser.add_argument("--hours", type=float, metavar="H", help="begin no run after so long")
    parser.add_argument(
        "--remaining", action="store_true", help="only print what is missing, and how long it will take"
    )
    parser.add_argument("--tables", type=Path, metavar="FILE", help="only write the tables into this file")
    parser.add_argument("given", nargs="*", metavar="-- ARGUMENT", help="for the program of one experiment")
    options = parser.parse_args(arguments)
    if (options.rows or options.given) and len(options.only) > 1:
        parser.error("--rows and arguments of a program need --only with one experiment")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    experiments = [Runs(name, options) for name in options.only]
    if options.tables is not None:
        write_tables(options.tables, experiments)
        return
    began = time.monotonic()
    todo = [(runs, row, seed) for runs in experiments for row, seed in runs.missing()]
    todo.sort(key=lambda task: int(task[2]))  # all rows with one seed, before the next seed

    def remaining() -> str:
        left = sum(runs.seconds(row) for runs, row, _ in todo)
        return f"{len(todo)} runs missing, about {in_words(left / options.jobs)} with {options.jobs} at a time"

    for runs in experiments:
        rows = [f"{row} ({seed})" for theirs, row, seed in todo if theirs is runs]
        print(f"{runs.name}: {', '.join(rows) or 'complete'}")
    print(remaining(), flush=True)
    if options.remaining:
        return

    def work(task: tuple[Runs, str, str]) -> None:
        runs, row, seed = task
        if options.hours is None or time.monotonic() - began < 3600 * options.hours:
            runs.run(row, seed)
            todo.remove(task)
            print(f"{runs.name}, {row}, seed {seed}; {remaining()}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(work, task) for task in tuple(todo)]:
            done.result()
    for runs in experiments:
        print(f"\n{runs.name}\n\n{runs.table()}")
