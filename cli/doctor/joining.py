"""Joining the job in a second process, which may refuse, hang, crash, or be ended by the launcher: what came of it."""

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
from lentando.comm.launch import read_claims

__all__ = ["Outcome", "join"]

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0
"""How long a process has to end itself."""
LAST_LINES = 6
LAST_WORDS_SECONDS = 2.0
"""How long a rank that failed leaves the others to fail by themselves: its status makes launchers end them, and mpirun
of Open MPI 5.0.11 sometimes hangs when it ends a rank that is just connecting to it."""


@dataclass
class Outcome:
    """How far the process came that joined.

    Attributes:
        end: ``left`` after all tests; ``refused`` by an error that says why; ``hung``; ``died``; or ``ended`` by the
            launcher, together with this process.
        stage: what it was about when it ended.
        refusal: the error's message.
        size: of the world that it saw, once joined.
        rank: by the transport, once all ranks have talked.
        everyone: the facts of all ranks, on rank 0.
        tests: by transport, what every rank found.
        status: exit status, or the negative number of a signal.
        last_words: what it printed last.
        waited_seconds: how long it was waited for.
    """

    end: Literal["left", "refused", "hung", "died", "ended"] = "died"
    stage: str = "starting a second process"
    refusal: str | None = None
    size: int | None = None
    rank: int | None = None
    everyone: list[Facts] | None = None
    tests: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    status: int | None = None
    last_words: list[str] = field(default_factory=list)
    waited_seconds: float = 0.0


@contextmanager
def join(facts: Facts, timeout_seconds: float, last_words_seconds: float = LAST_WORDS_SECONDS) -> Iterator[Outcome]:
    """Start the process and wait for it. Inside, it may still be there, hanging; at the end it is gone.

    To kill a rank makes some launchers end the whole job, so whoever has something to say says it inside. So does a
    rank that leaves a job which it could not join: it stays for ``last_words_seconds``, or until it is told to end.
    """
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as words:
        json.dump(facts, given)
        given.seek(0)
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "lentando.cli.doctor.probe"],
            stdin=given,
            stdout=told,
            stderr=words,
            close_fds=False,  # MPICH's launcher gives each rank a connection that it has opened
        )
        ended = threading.Event()  # once the launcher has asked this process to end, it has little time left, but some
        before = signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
        try:
            outcome = Outcome(
                _wait(process, started + timeout_seconds, ended),
                status=process.poll(),
                waited_seconds=time.monotonic() - started,
            )
            told.seek(0)
            words.seek(0)
            _read(told.read(), outcome)
            printed = words.read().decode(errors="replace").replace("\0", "")
            outcome.last_words = [line.strip() for line in printed.splitlines() if line.strip()][-LAST_LINES:]
            yield outcome
            if outcome.end != "left":
                ended.wait(last_words_seconds if read_claims(os.environ) else 0)
        finally:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
                process.kill()
                process.wait()
            signal.signal(signal.SIGTERM, before)


def _wait(
    process: "subprocess.Popen[bytes]", deadline: float, ended: threading.Event
) -> Literal["left", "hung", "died", "ended"]:
    while process.poll() is None:
        if ended.is_set():
            return "ended"
        if time.monotonic() > deadline:
            return "hung"
        time.sleep(POLL_SECONDS)
    if process.returncode == -signal.SIGTERM:  # some launchers end whatever a rank has started first
        return "ended"
    return "died" if process.returncode else "left"


def _read(reports: bytes, outcome: Outcome) -> None:
    for line in reports.splitlines():
        try:
            report = json.loads(line)
        except ValueError:  # cut off
            continue
        outcome.stage = report.get("stage", outcome.stage)
        outcome.size = report.get("size", outcome.size)
        outcome.rank = report.get("rank", outcome.rank)
        outcome.everyone = report.get("everyone", outcome.everyone)
        if "transport" in report:
            outcome.tests[report["transport"]] = report["tests"]
        if "refused" in report:
            outcome.end, outcome.refusal = "refused", report["refused"]
