"""Watching of the probe process, which may refuse to join the job, hang, crash, or be ended by the launcher."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from lentando.cli.doctor.facts import Facts
from lentando.comm.claims import read_claims

__all__ = ["Outcome", "watch_probe"]

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
"""Time that the probe has to end after SIGTERM."""
LAST_LINES = 6
LINGER_SECONDS = 2.0
"""Time for which a failed rank lingers while the others fail on their own. Its exit status makes launchers end them,
and mpirun of Open MPI 5.0.11 sometimes hangs when it ends a rank that is just connecting to it."""


@dataclass
class Outcome:
    """Progress and end of the probe.

    Attributes:
        end: ``left`` after all tests; ``refused`` with an error message; ``hung``; ``died``; or ``ended`` by the
            launcher, together with this process.
        stage: stage that the probe had reached.
        refusal: message of the error.
        size: number of ranks that the probe saw, once joined.
        rank: rank of the transport, once all ranks have communicated.
        facts_by_rank: facts of all ranks, on rank 0.
        tests: results of every rank for each transport.
        status: exit status, or the negative number of a signal.
        last_output: last lines that the probe printed.
        waited_seconds: time for which this process waited.
    """

    end: Literal["left", "refused", "hung", "died", "ended"] = "died"
    stage: str = "starting a second process"
    refusal: str | None = None
    size: int | None = None
    rank: int | None = None
    facts_by_rank: list[Facts] | None = None
    tests: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    status: int | None = None
    last_output: list[str] = field(default_factory=list)
    waited_seconds: float = 0.0


@contextmanager
def watch_probe(facts: Facts, timeout_seconds: float, linger_seconds: float = LINGER_SECONDS) -> Iterator[Outcome]:
    """Start the probe and wait for it. In the ``with`` block it may still hang; when the block ends, it is killed.

    Some launchers end the whole job when a rank is killed or leaves a job that it could not join. The caller therefore
    reports in the block, and a rank that failed lingers after it.

    Args:
        facts: facts of this rank, which the probe sends to rank 0.
        timeout_seconds: time limit for the probe.
        linger_seconds: time for which a rank whose probe failed waits, unless it receives SIGTERM.
    """
    with tempfile.TemporaryFile("w+") as request, tempfile.TemporaryFile() as reports, tempfile.TemporaryFile() as log:
        json.dump(facts, request)
        request.seek(0)
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "lentando.cli.doctor.probe"],
            stdin=request,
            stdout=reports,
            stderr=log,
            close_fds=False,  # MPICH's launcher passes each rank an open connection
        )
        ended = threading.Event()  # after the launcher's SIGTERM this process has a little time left
        previous_handler = signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
        try:
            outcome = Outcome(
                _wait(process, started + timeout_seconds, ended),
                status=process.poll(),
                waited_seconds=time.monotonic() - started,
            )
            reports.seek(0)
            log.seek(0)
            _read(reports.read(), outcome)
            printed = log.read().decode(errors="replace").replace("\0", "")
            outcome.last_output = [line.strip() for line in printed.splitlines() if line.strip()][-LAST_LINES:]
            yield outcome
            if outcome.end != "left":
                ended.wait(linger_seconds if read_claims(os.environ) else 0)
        finally:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
                process.kill()
                process.wait()
            signal.signal(signal.SIGTERM, previous_handler)


def _wait(
    process: "subprocess.Popen[bytes]", deadline: float, ended: threading.Event
) -> Literal["left", "hung", "died", "ended"]:
    while process.poll() is None:
        if ended.is_set():
            return "ended"
        if time.monotonic() > deadline:
            return "hung"
        time.sleep(POLL_SECONDS)
    if process.returncode == -signal.SIGTERM:  # some launchers end the processes of a rank first
        return "ended"
    return "died" if process.returncode else "left"


def _read(reports: bytes, outcome: Outcome) -> None:
    for line in reports.splitlines():
        try:
            report = json.loads(line)
        except ValueError:  # an incomplete line
            continue
        outcome.stage = report.get("stage", outcome.stage)
        outcome.size = report.get("size", outcome.size)
        outcome.rank = report.get("rank", outcome.rank)
        outcome.facts_by_rank = report.get("facts_by_rank", outcome.facts_by_rank)
        if "transport" in report:
            outcome.tests[report["transport"]] = report["tests"]
        if "refused" in report:
            outcome.end, outcome.refusal = "refused", report["refused"]
