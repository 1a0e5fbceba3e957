"""Starts the tests below ``tests/ranks`` under a real mpirun, once for each top-level folder and number of ranks."""

import fcntl
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from case_selection import selected_cases
from launching import PYTEST, RANKS, mpirun

SIZES = {
    "tensorflow": selected_cases([2], [1, 2, 3]),
    "torch": selected_cases([2], [1, 2, 3]),
    "c10d": selected_cases([1, 3], [1, 2, 3, 5, 8]),
    "optimizers": selected_cases([1, 2, 5], [1, 2, 3, 5, 8]),
    "comm": selected_cases([1, 2, 5], [1, 2, 3, 5, 8]),
    "trainers": selected_cases([2], [1, 2, 3]),
}
"""Five ranks have all that eight would add, three strides of the exponential graphs. Folders whose ranks take long run
with one number of ranks: what they call is tested with the others in ``comm`` and ``optimizers``, and with one rank in
tests that need no launcher."""
PARTS = {"tensorflow": 2}
"""Jobs among which the files of a folder are shared, where one alone would end after all others."""
OF_THREE = [f"torch/test_{name}.py" for name in ("movements", "overlap", "unfreezing")]
"""Which test more with three ranks than with two: one bad rank among several, and sums that depend on their order."""
PREPARED = {"tensorflow": "lentando.tensorflow", **dict.fromkeys(("torch", "c10d", "trainers"), "lentando.torch")}
"""What ranks have imported when they begin, by folder."""
FOLDERS = sorted({path.relative_to(RANKS).parts[0] for path in RANKS.rglob("test_*.py")}, reverse=True)  # longest first


def jobs() -> Iterator[Any]:
    """Paths of tests, and the number of ranks that run them."""
    for folder in FOLDERS:
        files = sorted(str(path.relative_to(RANKS)) for path in (RANKS / folder).rglob("test_*.py"))
        parts = PARTS.get(folder, 1)
        for size in SIZES.get(folder, [1, 2, 3, 5]):
            for part in range(parts):
                name = f"{folder}-{size}" + f", part {part + 1}" * (parts > 1)
                yield pytest.param(files[part::parts], size, id=name)
    if 3 not in SIZES["torch"]:
        yield pytest.param(OF_THREE, 3, id="torch-3")


@pytest.mark.long
@pytest.mark.timeout(900)  # a test that hangs in there ends much sooner, and says where
@pytest.mark.parametrize(("paths", "size"), [*jobs()])
def test_tests_that_need_ranks_pass(paths: list[str], size: int) -> None:
    folder = Path(paths[0]).parts[0]
    files = [str(RANKS / path) for path in paths]
    job = mpirun(size, *PYTEST, *files, timeout_seconds=880, prepared=PREPARED.get(folder))
    assert job.status == 0, job.output
    assert int(re.findall(r"(\d+) passed", job.output)[0]) > 0, job.output


# The same harness must fail when a test does: each of these files breaks on one of three ranks.


def test_failure_on_one_rank_ends_the_job_with_its_traceback() -> None:
    job = mpirun(3, *PYTEST, str(RANKS / "harness/one_rank_fails.py"))
    assert job.status not in (0, None)
    assert "rank 2 of 3: call of tests/ranks/harness/one_rank_fails.py::test_last_rank_fails failed" in job.output
    assert "this rank fails" in job.output
    assert "written before the failure" in job.output
    assert job.seconds < 100


def test_hang_on_one_rank_ends_the_job_with_its_traceback() -> None:
    job = mpirun(3, *PYTEST, str(RANKS / "harness/one_rank_hangs.py"), environment={"LENTANDO_TEST_SECONDS": "3"})
    assert job.status not in (0, None)
    assert "test_last_rank_waits_for_a_message_that_no_rank_sends" in job.output
    assert job.seconds < 100


def test_crash_of_one_rank_ends_the_job() -> None:
    job = mpirun(3, *PYTEST, str(RANKS / "harness/one_rank_crashes.py"))
    assert job.status not in (0, None)
    assert job.seconds < 100


def test_file_that_one_rank_cannot_import_ends_the_job() -> None:
    job = mpirun(3, *PYTEST, str(RANKS / "harness/one_rank_lacks_a_test.py"))
    assert job.status not in (0, None)
    assert "this rank cannot import the file" in job.output
    assert job.seconds < 100


def test_job_that_hangs_is_stopped_with_all_its_ranks(tmp_path: Path) -> None:
    program = f"""
import fcntl, os, time
from pathlib import Path

held = Path({str(tmp_path)!r}, str(os.getpid())).open("w")
fcntl.flock(held, fcntl.LOCK_EX)
time.sleep(200)
"""
    job = mpirun(2, "-c", program, timeout_seconds=15)  # both have started by then, on a busy machine too
    assert job.status is None
    locks = list(tmp_path.iterdir())
    assert len(locks) == 2
    for lock in locks:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # returns when the rank that held it is gone
    assert job.seconds < 60


def test_plain_pytest_does_not_run_these_tests_automatically(request: pytest.FixtureRequest) -> None:
    assert not [item for item in request.session.items if item.path.is_relative_to(RANKS)]
