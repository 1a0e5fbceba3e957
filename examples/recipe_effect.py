"""What the experiments on simulated workers share: rows and seeds, one file for each finished run, and a table.

Runs that are complete are never repeated, and a run that another process works on is left to it: an experiment can be
killed, started again, cut into parts (``--rows``, ``--seeds``), and worked on by several processes at a time.
"""

import argparse
import fcntl
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Column:
    """A column of a table: the figure of a run, what it is multiplied by, its digits, and its unit."""

    heading: str
    figure: str
    factor: float = 1.0
    digits: int = 4
    unit: str = ""

    def cell(self, runs: Sequence[Mapping[str, Any]]) -> str:
        """Mean and standard deviation over the runs that have the figure, and how many of them if not all."""
        values = [self.factor * run[self.figure] for run in runs if run.get(self.figure) is not None]
        if not values:
            return ""
        some = "" if len(values) == len(runs) else f" ({len(values)} of {len(runs)})"
        return f"{self._mean(values, '')}{self.unit}{some}"

    def difference(self, runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
        """Mean and standard deviation, over pairs of runs, of the first figure less the second."""
        values = [self.factor * (run[self.figure] - other[self.figure]) for run, other in runs]
        return self._mean(values, "+") + (" points" if self.unit == " %" else self.unit)

    def _mean(self, values: Sequence[float], sign: str) -> str:
        spread = f" ± {statistics.stdev(values):.{self.digits}f}" if len(set(values)) > 1 else ""
        return f"{statistics.fmean(values):{sign}.{self.digits}f}{spread}"


def arguments(description: str, rows: Sequence[str], data: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--data", type=Path, default=Path(data), metavar="DIR", help=f"(default: {data})")
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows), metavar="ROW", help=", ".join(rows))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--missing", action="store_true", help="only print the rows and seeds that are not complete")
    return parser


def file_of(folder: Path, row: str, seed: int) -> Path:
    """Where the results of a run lie, once it is complete."""
    return folder / f"{row}-seed{seed}.json"


def runs_of(folder: Path, row: str) -> list[dict[str, Any]]:
    """The complete runs of a row."""
    files = sorted(folder.glob(f"{row}-seed*.json"))
    return [json.loads(file.read_text()) for file in files]


def run_missing(
    options: argparse.Namespace, settings: Mapping[str, Any], train: Callable[[str, int], Mapping[str, Any]]
) -> None:
    """Train the chosen rows with the chosen seeds, except for what is complete or being worked on.

    Args:
        options: parsed command line.
        settings: what all rows share and flags may change; a folder holds runs of one kind.
        train: function that trains a row with a seed, and returns the results.
    """
    missing = [
        (row, seed) for seed in options.seeds for row in options.rows if not file_of(options.output, row, seed).exists()
    ]
    if options.missing:
        for row, seed in missing:
            print(row, seed)
        raise SystemExit
    options.output.mkdir(parents=True, exist_ok=True)
    about = options.output / "settings.json"
    wanted = json.loads(json.dumps(settings))
    if about.exists() and (found := json.loads(about.read_text())) != wanted:
        raise SystemExit(
            f"{options.output} holds runs with other settings: {found}, not {wanted}. Choose another folder"
        )
    _write(about, wanted)
    for row, seed in missing:
        file = file_of(options.output, row, seed)
        with file.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it does
            except BlockingIOError:
                continue
            if not file.exists():
                began = time.perf_counter()
                results = {**train(row, seed), "row": row, "seed": seed}
                results["run_seconds"] = time.perf_counter() - began
                _write(file, results)
            file.with_suffix(".lock").unlink(missing_ok=True)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that other processes find all of it or nothing."""
    unfinished = file.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps(content) + "\n")
    unfinished.replace(file)


def table(folder: Path, rows: Mapping[str, str], columns: Sequence[Column]) -> str:
    """Means and standard deviations over the seeds of the complete runs, as Markdown.

    Args:
        folder: folder of the runs.
        rows: what the paper reports by row.
        columns: figures of the runs.
    """
    headings = ["row", "paper", *(column.heading for column in columns), "seeds"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    by_row = {row: runs_of(folder, row) for row in rows}
    if not any(by_row.values()):
        return "No run has been completed yet."
    lines += [
        f"| `{row}` | {rows[row]} | {' | '.join(column.cell(runs) for column in columns)} | {len(runs)} |"
        for row, runs in by_row.items()
        if runs
    ]
    return "\n".join(lines)


def differences(folder: Path, pairs: Sequence[tuple[str, str]], columns: Sequence[Column]) -> str:
    """Return how much rows differ from others, as Markdown.

    Runs with the same seed have the same first weights and see the data in the same order, so that the mean and the
    standard deviation of their differences are shown.

    Args:
        folder: folder of the runs.
        pairs: rows, each with the one that is subtracted from it.
        columns: figures of the runs.
    """
    headings = ["row", "minus", *(column.heading for column in columns), "seeds"]
    lines = []
    for row, other in pairs:
        others = {run["seed"]: run for run in runs_of(folder, other)}
        found = [(run, others[run["seed"]]) for run in runs_of(folder, row) if run["seed"] in others]
        if found:
            cells = [column.difference(found) for column in columns]
            lines.append(f"| `{row}` | `{other}` | {' | '.join(cells)} | {len(found)} |")
    if not lines:
        return ""
    return "\n".join(["", f"| {' | '.join(headings)} |", "|---" * len(headings) + "|", *lines])
