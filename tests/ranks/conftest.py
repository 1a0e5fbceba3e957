"""Tests that run on every rank of a job at once, in lockstep: each rank is a pytest of its own, started by mpirun.

They hold for any number of ranks. A rank that fails ends the whole job, so that no other waits for it.
"""

import faulthandler
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from lentando.comm import world
from lentando.comm.objects import broadcast_object
from lentando.comm.transport import Transport

TEST_SECONDS = float(os.environ.get("LENTANDO_TEST_SECONDS", "120"))
"""A test that takes longer ends the job."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Join the job. Only rank 0 prints progress: the others' reporter, made after this, has no one to talk to."""
    hypothesis.settings.register_profile(  # all ranks try the same examples
        "ranks",
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )
    hypothesis.settings.load_profile("ranks")
    # The stall inspector asks MPI once a second, which lets messages progress: a test sees that nothing else does.
    os.environ["LENTANDO_STALL_SECONDS"] = "0"
    world.init()
    # Ranks that share pytest's own temporary folder tidy it at the same moment, and trip over each other.
    folder = tempfile.TemporaryDirectory(prefix="lentando-rank-")
    config.add_cleanup(folder.cleanup)
    config.option.basetemp = folder.name
    config.pluginmanager.register(RankPlugin(os.dup(sys.stderr.fileno())))
    gc.disable()  # while files are imported, which leaves next to no garbage
    if world.rank() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - open until the process ends


class RankPlugin:
    """Makes the verdict on a test one that all ranks share.

    Args:
        stderr: file descriptor that pytest does not capture.
    """

    def __init__(self, stderr: int) -> None:
        self.stderr = stderr
        self.passed = 0

    def pytest_collection_finish(self) -> None:
        """Garbage is looked for from here on, among what tests make."""
        gc.collect()
        gc.freeze()
        gc.enable()

    def pytest_runtest_logstart(self) -> None:
        """End the job, with a traceback of every thread, if a test hangs; even inside a call of MPI's."""
        faulthandler.dump_traceback_later(TEST_SECONDS, exit=True, file=self.stderr)

    def pytest_runtest_logfinish(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A failure on one rank is the failure of all."""
        if report.failed:
            self.end_job(f"{report.when} of {report.nodeid}", report)
        self.passed += report.when == "call" and report.passed

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Ranks that collect different tests would wait for each other."""
        if report.failed:
            self.end_job(f"collection of {report.nodeid}", report)

    def pytest_sessionfinish(self) -> None:
        """Every rank has run the same tests."""
        passed = world.transport().allgather(np.array([self.passed]))[:, 0].tolist()
        assert len(set(passed)) == 1, f"number of tests passed, by rank: {passed}"

    def end_job(self, what: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        captured = "".join(f"\n--- {title} ---\n{text}" for title, text in report.sections)
        rank = f"rank {world.rank()} of {world.size()}"
        os.write(self.stderr, f"\n===== {rank}: {what} failed =====\n{report.longreprtext}\n{captured}\n".encode())
        world.transport().abort(1)


@pytest.fixture(scope="session")
def transport() -> Transport:
    """The transport of the job that runs the tests."""
    return world.transport()


@pytest.fixture
def own_transport() -> Iterator[Transport]:
    """A transport over MPI for which no other test has opened anything, and which a test may leave in any state."""
    from lentando.comm.transports.mpi import MPITransport

    own = MPITransport()
    yield own
    own.close()


@pytest.fixture
def shared_path(transport: Transport, tmp_path: Path) -> Path:
    """A folder that all ranks see: rank 0's ``tmp_path``."""
    return Path(broadcast_object(transport, str(tmp_path)))
