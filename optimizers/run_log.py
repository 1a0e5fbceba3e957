"""A log of a training run: one line of numbers at a time, for ``lentando report`` and for programs of your own."""

import json
from collections.abc import Callable
from functools import partial
from math import isfinite
from numbers import Real
from os import SEEK_END, PathLike
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from lentando.comm.checked_calls import gather_objects
from lentando.comm.errors import ConfigurationError
from lentando.comm.numbering import numbers_of
from lentando.comm.topology import Topology
from lentando.comm.transport import Transport
from lentando.optimizers.flat_report import flat_report

__all__ = ["FILE_NAME", "GROUP", "MOST_GRAPHS", "LogFunction", "Logger", "RunLog", "ScalarWriter"]

LogFunction: TypeAlias = Callable[[dict[str, float], int], object]
"""Takes numbers by name, and the inner step: W&B's ``run.log``, ``mlflow.log_metrics``, a Lightning logger's."""


class ScalarWriter(Protocol):
    """A writer of single numbers, such as TensorBoard's ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int) -> object:
        """Write one number, under a name, for a step."""


Logger: TypeAlias = LogFunction | ScalarWriter
"""What a log of a run can also be written to."""

FILE_NAME = "run.jsonl"
"""File within the folder of a run."""
REPORTED = ("period", "rounds", "compute_seconds_by_rank", "waiting_seconds", "communication_seconds")
"""Entries of the optimizer's report that a line contains."""
TAKEN = {"method", "ranks", "step", "seconds", "bytes_sent", "consensus_distance", *REPORTED}
"""Names that numbers of the program cannot have."""
GROUP = "lentando/"
"""What the names of the optimizer's numbers begin with in other loggers."""
MOST_GRAPHS = 4
"""Number of steps whose messages are drawn."""


class RunLog:
    """Writes numbers of a run, with those that its optimizer reports, to ``run.jsonl`` in a folder.

    ``optimizer.open_log(folder)`` makes it. Rank 0 writes, and each line is in the file when ``write`` returns. A log
    that exists is continued, as a resumed run needs it.

    Args:
        transport: transport of the ranks that train together.
        folder: folder of the run, which is created.
        description: the method and its settings.
        report: returns the report of this rank's optimizer.
        seconds: returns the time since the first step of the run.
        consensus_distance: returns the distance between the replicas. Collective.
        topology: graphs of gossip, for the picture of who sends to whom; None if there is none.
        to: where rank 0 writes each line, too; those of other ranks are ignored.

    Raises:
        ConfigurationError: on every rank, if rank 0 cannot write there, or cannot use ``to``.
        MismatchError: on every rank, if one of them does something else.
    """

    def __init__(
        self,
        transport: Transport,
        folder: str | PathLike[str],
        description: str,
        report: Callable[[], dict[str, Any]],
        seconds: Callable[[], float],
        consensus_distance: Callable[[], float],
        topology: Topology | None = None,
        to: Logger | None = None,
    ) -> None:
        self._transport = transport
        self._file = Path(folder) / FILE_NAME
        self._report = report
        self._seconds = seconds
        self._consensus_distance = consensus_distance
        self._log = None if to is None or transport.rank > 0 else _log_function(to)
        header: dict[str, Any] = {"method": description, "ranks": transport.size}
        if topology is not None and transport.rank == 0:
            header |= _first_messages(topology, transport.size)
        refused = to is not None and transport.rank == 0 and self._log is None
        self._append(
            "open_log",
            header,
            f"a log is written to a function of numbers by name and the step, such as run.log of W&B, or to a "
            f"SummaryWriter, got to={to!r} on rank 0"
            if refused
            else None,
        )

    def write(self, *, with_consensus: bool = False, **numbers: float) -> dict[str, float]:
        """Write one line, and return it. Collective.

        The line contains ``step`` (inner steps), ``seconds`` since the first step by rank 0's clock, ``bytes_sent`` by
        all ranks together, ``period``, ``rounds``, ``compute_seconds_by_rank/RANK``, and the means over all ranks of
        the given numbers, of ``waiting_seconds`` and of ``communication_seconds``.

        Args:
            with_consensus: whether to add ``consensus_distance``, which costs an average.
            **numbers: numbers of this rank, such as the loss since the last line. All ranks give the same names.

        Raises:
            ConfigurationError: on every rank, if a value is not a number, if a name is one of the log's own, or if rank
                0 cannot write.
            MismatchError: on every rank, if one of them does something else, or gives other names.
            Exception: on rank 0, whatever the function or writer raises that the log is also written to.
        """
        wrong = [f"{name}={value!r}" for name, value in numbers.items() if not isinstance(value, Real)]
        wrong += [f"{name}, a name of its own," for name in numbers if name.partition("/")[0] in TAKEN]
        report = self._report()
        own = {name: float(value) for name, value in numbers.items() if isinstance(value, Real)}
        own |= {name: report[name] for name in ("bytes_sent", "waiting_seconds", "communication_seconds")}
        found = gather_objects(self._transport, "log.write", [wrong, own, self._seconds()], sorted(numbers))
        refused = [
            f"{', '.join(values)} on rank {rank}"
            for rank, (values, _, _) in zip(numbers_of(self._transport), found, strict=True)
            if values
        ]
        if refused:
            raise ConfigurationError(f"a log takes numbers by name, got {'; '.join(refused)}")
        line: dict[str, float] = {"step": report["inner_steps"], "seconds": found[0][2]}
        line |= flat_report({name: report[name] for name in REPORTED})
        line |= {name: sum(theirs[name] for _, theirs, _ in found) / len(found) for name in own}
        line["bytes_sent"] = sum(theirs["bytes_sent"] for _, theirs, _ in found)
        if with_consensus:
            line["consensus_distance"] = self._consensus_distance()
        self._append("log.write", line)
        if self._log is not None:
            named = {name if name in numbers else GROUP + name: value for name, value in line.items() if name != "step"}
            self._log(named, int(line["step"]))
        return line

    def _append(self, operation: str, line: dict[str, Any], problem: str | None = None) -> None:
        """Append a line to the file, on rank 0. Collective. JSON has no number that is not finite: it becomes null."""
        if self._transport.rank == 0 and problem is None:
            plain = {
                name: None if isinstance(value, float) and not isfinite(value) else value
                for name, value in line.items()
            }
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with self._file.open("a+b") as file:
                    is_cut_off = file.seek(0, SEEK_END) > 0 and file.seek(-1, SEEK_END) >= 0 and file.read(1) != b"\n"
                    file.write(("\n" * is_cut_off + json.dumps(plain) + "\n").encode())
            except OSError as error:
                problem = f"rank 0 cannot write the log of the run, {self._file}: {error.strerror}"
        problem = gather_objects(self._transport, operation, problem, ["written"])[0]
        if problem is not None:
            raise ConfigurationError(problem)


def _log_function(to: Logger) -> LogFunction | None:
    """The function that writes a line; None if there is none."""
    if hasattr(to, "add_scalar"):
        return partial(_write_scalars, to)
    return to if callable(to) else None


def _write_scalars(writer: ScalarWriter, numbers: dict[str, float], step: int) -> None:
    for name, value in numbers.items():
        writer.add_scalar(name, value, step)


def _first_messages(topology: Topology, size: int) -> dict[str, Any]:
    """Who sends to whom in the first steps of gossip, as JSON, and after how many steps this repeats."""
    graphs = topology.for_size(size)
    steps = range(graphs.lead_steps, graphs.lead_steps + min(graphs.period_steps, MOST_GRAPHS))
    return {"sends": [graphs.messages(step) for step in steps], "steps_until_repeated": graphs.period_steps}
