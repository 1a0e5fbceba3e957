"""torchrun starts all ranks again after a death, and they resume from their last checkpoint, bit-identically."""

import re
import sys
from pathlib import Path

import pytest
from launching import Job, launch
from pages import ROOT
from prepared_python import prepared_python

SUPPORT = Path(__file__).parent / "support"
SCRIPT = ROOT / "examples/resume_torch.py"


def train(folder: Path, *deaths: str, restarts: int = 2, is_prepared: bool = True) -> Job:
    """The example on two ranks, of which some kill themselves: ``LIFE:RANK:STEPS``."""
    python = prepared_python("lentando.torch") if is_prepared else [sys.executable]
    options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}", "--no-python"]
    program = [str(SUPPORT / "restarted_training.py"), str(SCRIPT), str(folder), *deaths]
    return launch([*python, "-m", "torch.distributed.run", *options, *python, *program], 200)


def weights(job: Job) -> set[str]:
    """The checksums of the final weights, of which every rank prints one."""
    found = re.findall(r"rank \d of 2 ended with weights ([0-9a-f]{8})", job.output)
    assert len(found) == 2, job.output
    return set(found)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    job = train(tmp_path_factory.mktemp("undisturbed"))
    assert job.status == 0, job.output
    assert "resumed" not in job.output
    return weights(job)


def test_ranks_that_are_killed_change_nothing(tmp_path: Path, undisturbed: set[str]) -> None:
    """Rank 1 dies in the middle of a round, after the restart rank 0 does so at the end of one."""
    job = train(tmp_path, "0:1:25", "1:0:28")
    assert job.status == 0, job.output
    assert re.findall(r"resumed after step (\d+)", job.output) == ["20", "40"]
    assert len(undisturbed) == 1
    assert weights(job) == undisturbed


def test_death_without_a_restart_ends_the_job(tmp_path: Path) -> None:
    job = train(tmp_path, "0:1:25", restarts=0, is_prepared=False)
    assert job.status not in (0, None), job.output
    assert "ended with weights" not in job.output
    assert "Signal 9 (SIGKILL)" in job.output
    assert job.seconds < 150
