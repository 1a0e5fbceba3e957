"""The logs that ``optimizer.open_log`` writes, as columns of numbers."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.run_log import FILE_NAME

__all__ = ["Run", "read_run", "read_runs"]


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: name of its folder, or more of the path, in which runs that are compared differ.
        method: the optimizer, as it describes itself.
        ranks: number of ranks.
        lines: what was written, oldest first.
        sends: sender and receiver of each message, by step of gossip; empty where ranks average alone.
        steps_until_repeated: number of steps after which gossip uses the same graphs again.
    """

    name: str
    method: str
    ranks: int
    lines: list[dict[str, float]]
    sends: Sequence[Sequence[Sequence[int]]] = ()
    steps_until_repeated: int = 1

    def points(self, across: str, up: str) -> tuple[list[float], list[float]]:
        """Return two columns, without the lines in which one of them is unknown.

        Args:
            across: name of the first column, such as ``step``.
            up: name of the second column, such as ``loss``.
        """
        known = [(line[across], line[up]) for line in self.lines if None not in (line.get(across), line.get(up))]
        return [x for x, _ in known], [y for _, y in known]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the logs of runs, whose names are the ends of their folders' paths in which they differ.

    Args:
        folders: folders that contain ``run.jsonl``.

    Raises:
        ConfigurationError: as ``read_run``.
    """
    paths = [folder.resolve().parts for folder in folders]
    different = len(set(paths))
    count = next(count for count in range(1, max(map(len, paths)) + 1) if len({p[-count:] for p in paths}) == different)
    return [replace(read_run(folder), name=str(Path(*p[-count:]))) for folder, p in zip(folders, paths, strict=True)]


def read_run(folder: Path) -> Run:
    """Read the log of a run.

    Args:
        folder: folder that contains ``run.jsonl``.

    Raises:
        ConfigurationError: if it contains no log, or one that cannot be read or has no lines yet.
    """
    file = folder / FILE_NAME
    try:
        found: list[dict[str, Any]] = [*_complete(file.read_text().splitlines())]
        headers = [line for line in found if "method" in line]
        header = headers[-1]
        about = {name: header[name] for name in ("sends", "steps_until_repeated") if name in header}
        for rank in (rank for sends in about.get("sends", []) for message in sends for rank in message):
            range(header["ranks"]).index(rank)
        run = Run(folder.resolve().name, header["method"], header["ranks"], _lines(found), **about)
    except OSError as error:
        raise ConfigurationError(
            f"{file} cannot be read ({error.strerror}): optimizer.open_log({str(folder)!r}).write(loss=...) writes it"
        ) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigurationError(f"{file} is no log of a run ({type(error).__name__}: {error})") from error
    if not run.lines:
        raise ConfigurationError(f"{file} contains no numbers yet: log.write(loss=...) adds a line")
    return run


def _complete(lines: list[str]) -> Iterator[dict[str, Any]]:
    """The lines, without those that a program which was killed has not written to their ends."""
    for line in lines:
        if line.endswith("}"):
            yield json.loads(line)


def _lines(found: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The lines without those that a resumed run has written again; bytes continue from the last line before it.

    A run that is resumed from a checkpoint repeats the steps after it, and its optimizer counts bytes from zero.
    """
    lines: list[dict[str, float]] = []
    sent_before = 0.0
    for line in found:
        if "method" in line:
            sent_before = lines[-1]["bytes_sent"] if lines else 0.0
            continue
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        lines.append({**line, "bytes_sent": line["bytes_sent"] + sent_before})
    return lines
