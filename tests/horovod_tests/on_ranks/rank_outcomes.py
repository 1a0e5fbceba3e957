"""Plugin of pytest that runs on every rank: notes what became of each test, and ends a job after a failure.

It needs nothing but pytest, because it also runs in an environment with the real Horovod.

Each rank appends to a file of its own. After each test the ranks wait for each other through these files, not through
the library under test. If a test failed on one rank, or differently on different ranks, the job ends: the ranks may be
in the middle of different calls. A test that takes too long ends its process from a thread of C, whatever its Python
threads are blocked in.
"""

import faulthandler
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ["HOROVOD_TESTS_FOLDER"])
SECONDS = float(os.environ["HOROVOD_TESTS_SECONDS"])
AFTER_A_FAILURE_SECONDS = 5.0
"""How long a rank whose test failed waits for the others, which may be in a call that it never makes."""
START_SECONDS = 120.0
"""How long a rank waits for the others to begin a test."""
STARTED_ALONE = {"rank": 0, "size": 1}
NAMES = {
    "rank": ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    "size": ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
}
RANK, SIZE = (
    next((int(os.environ[name]) for name in NAMES[what] if name in os.environ), STARTED_ALONE[what]) for what in NAMES
)
ORDER = ("passed", "skipped", "failed")
TEXT = 4000


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly:
        config.pluginmanager.register(Rank())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Write down what there is, or keep what is asked for."""
    # An inherited method of tf.test.TestCase, which pytest takes for a test.
    items[:] = [item for item in items if item.name != "test_session"]
    if config.option.collectonly:
        FOLDER.joinpath("collected.json").write_text(json.dumps([item.name for item in items]))
        return
    wanted = json.loads(FOLDER.joinpath("wanted.json").read_text())
    items[:] = [item for item in items if item.name in set(wanted)]


class Rank:
    """What this rank writes and waits for."""

    def __init__(self) -> None:
        self.events = FOLDER.joinpath(f"rank_{RANK}.jsonl").open("a", buffering=1)
        self.trace = FOLDER.joinpath(f"rank_{RANK}.trace").open("w")
        self.outcome, self.reason, self.text = "passed", "", ""

    def note(self, **event: Any) -> None:
        self.events.write(json.dumps(event) + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.outcome, self.reason, self.text = "passed", "", ""
        self.note(test=item.name, started=True)
        self.wait_for_the_start(item.name)
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=self.trace)
        result = yield
        # From here on, only the time of the others counts: the end of this process would end them, too.
        faulthandler.cancel_dump_traceback_later()
        self.note(test=item.name, outcome=self.outcome, reason=self.reason, text=self.text)
        until = time.monotonic() + AFTER_A_FAILURE_SECONDS + (SECONDS if self.outcome != "failed" else 0.0)
        ends = [self.of_rank(rank, item.name, until) for rank in range(SIZE)]
        if any(end != ends[0] for end in ends) and any(end["outcome"] == "failed" for end in ends):
            os._exit(0)  # without the library's own end, which may wait for a rank that is elsewhere
        return result

    def wait_for_the_start(self, test: str) -> None:
        """Wait until all ranks are about to run a test: one may take long to import what the first one needs."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and not all(self.events_of(rank, test) for rank in range(SIZE)):
            time.sleep(0.01)

    def of_rank(self, rank: int, test: str, until: float) -> dict[str, str]:
        """Wait until a rank has finished a test. One that has not counts as failed."""
        while time.monotonic() < until:
            for event in self.events_of(rank, test):
                if "outcome" in event:
                    return {"outcome": event["outcome"], "reason": event["reason"]}
            time.sleep(0.01)
        return {"outcome": "failed", "reason": "did not finish"}

    def events_of(self, rank: int, test: str) -> list[dict[str, Any]]:
        """What a rank has written about a test so far."""
        path = FOLDER.joinpath(f"rank_{rank}.jsonl")
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for line in lines if line.endswith("}") and (event := json.loads(line))["test"] == test]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst of set-up, call and tear-down."""
        if ORDER.index(report.outcome) <= ORDER.index(self.outcome):
            return
        self.outcome = report.outcome
        if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
            self.reason = report.longrepr[2].removeprefix("Skipped: ")
        else:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.reason = crash.message if crash else report.longreprtext
            self.text = report.longreprtext[-TEXT:]
