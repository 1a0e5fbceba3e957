"""A job that runs Horovod's tests on some ranks, and what became of them."""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PLUGIN = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "rank_outcomes", "--color=no")
START_SECONDS = 180.0
"""How long imports and the end of a job may take, in addition to a test."""
SHOWN = 1500
SHOWN_OF_REASON = 400


@dataclass(frozen=True)
class Result:
    """What became of a test.

    Attributes:
        file: of Horovod, such as ``test_torch.py``.
        test: name.
        outcome: ``passed`` (on every rank), ``skipped``, ``failed``, or ``hung`` (also: a process died).
        reason: first line of the error, or reason of the skip, with the rank where ranks differ.
        text: end of the report.
    """

    file: str
    test: str
    outcome: str
    reason: str = ""
    text: str = ""

    def record(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Tests:
    """How the tests are started.

    Attributes:
        folder: ``test/parallel`` of Horovod's repository.
        python: finds them.
        launcher: starts Python on the ranks, which run them: ``("mpirun", "-np", "2", "python")``.
        size: number of ranks.
        environment: variables for the tests.
        seconds: that a single test may take.
    """

    folder: Path
    python: Path
    launcher: tuple[str, ...]
    size: int
    environment: dict[str, str]
    seconds: float

    def collect(self, file: str) -> list[str]:
        """Names of the tests in a file, or a RuntimeError that holds why it cannot be imported."""
        with tempfile.TemporaryDirectory(prefix="horovod-tests-") as temporary:
            output = self.start([str(self.python), *PLUGIN, "--collect-only", file], Path(temporary))
            found = Path(temporary, "collected.json")
            names: list[str] = json.loads(found.read_text()) if found.exists() else []
        if not names:
            raise RuntimeError(output[-SHOWN:])
        return names

    def run(self, file: str, only: str = "") -> Iterator[Result]:
        """Run a file's tests. After one that ranks leave in different ways, a new job runs the rest."""
        waiting = [name for name in self.collect(file) if only in name]
        while waiting:
            with tempfile.TemporaryDirectory(prefix="horovod-tests-") as temporary:
                folder = Path(temporary)
                folder.joinpath("wanted.json").write_text(json.dumps(waiting))
                output = self.start([*self.launcher, *PLUGIN, file], folder)
                results = [result for name in waiting if (result := self.result(folder, file, name, output))]
            results = results or [
                Result(file, waiting[0], "hung", "the job ended before the test began", output[-SHOWN:])
            ]
            yield from results
            done = {result.test for result in results}
            waiting = [name for name in waiting if name not in done]

    def result(self, folder: Path, file: str, test: str, output: str) -> Result | None:
        """What the ranks wrote about a test; None if no rank began it."""
        events = [events_of(folder, rank, test) for rank in range(self.size)]
        if not any(events):
            return None
        ends = [event[-1] if event and "outcome" in event[-1] else None for event in events]
        outcomes = [end["outcome"] if end else None for end in ends]
        if set(outcomes) == {"passed"}:
            return Result(file, test, "passed")
        if set(outcomes) == {"skipped"}:
            return Result(file, test, "skipped", in_one_line(ends[0]["reason"]) if ends[0] else "")
        stated: dict[str, list[int]] = {}
        texts = [end["text"] for end in ends if end and end["text"]]
        for rank, end in enumerate(ends):
            if end is None:
                where = blocked_in(folder, rank)
                message = (
                    f"{'was in the test' if 'failed' in outcomes else 'did not end'}{f', in {where}' if where else ''}"
                )
            elif end["outcome"] == "passed":
                message = "passed"
            else:
                message = in_one_line(end["reason"])
            stated.setdefault(message, []).append(rank)
        reason = "; ".join(
            message if len(stated) == 1 else f"rank {', '.join(map(str, ranks))}: {message}"
            for message, ranks in stated.items()
        )
        outcome = "failed" if "failed" in outcomes or None not in outcomes else "hung"
        return Result(file, test, outcome, reason, "\n".join(texts) or output[-SHOWN:])

    def start(self, command: list[str], folder: Path) -> str:
        """Run a command until it ends, or until no rank has written anything for too long."""
        environment = {
            **os.environ,
            **self.environment,
            "HOROVOD_TESTS_FOLDER": str(folder),
            "HOROVOD_TESTS_SECONDS": str(self.seconds),
        }
        with folder.joinpath("output").open("w+", errors="replace") as output:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while process.poll() is None and time.time() - last_written(folder) < self.seconds + START_SECONDS:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(1)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM if process.poll() is None else signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return folder.joinpath("output").read_text(errors="replace")


def last_written(folder: Path) -> float:
    """When the last event was written."""
    return max(path.stat().st_mtime for path in folder.iterdir())


def events_of(folder: Path, rank: int, test: str) -> list[dict[str, Any]]:
    path = folder / f"rank_{rank}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["test"] == test]


def blocked_in(folder: Path, rank: int) -> str:
    """The innermost call of the main thread of a process that was ended because it took too long."""
    path = folder / f"rank_{rank}.trace"
    frames = re.findall(
        r'File "([^"]+)", line (\d+) in (\S+)', path.read_text().rpartition("most recent call first")[2]
    )
    return next((f"{function} ({Path(file).name}:{line})" for file, line, function in frames), "")


def in_one_line(message: str) -> str:
    return " ".join(message.split())[:SHOWN_OF_REASON]
