"""A rank that dies takes the job down, under every launcher: soon, with a reason; the last checkpoint is whole."""

import os
import random
import re
import time
from pathlib import Path

import pytest
from case_selection import selected_cases
from launchers import HOROVOD_GLOO, HOROVOD_MPI, OPEN_MPI, WITH_MPICH, Launcher
from launching import Job

PROGRAM = str(Path(__file__).parent / "launchers/dies.py")
SIZE = 3
SECONDS = 30.0
"""In which everything must have ended after the death."""

LAUNCHERS_WORDS = {
    OPEN_MPI: r"prterun (noticed that process rank {rank} .* exited|has exited due to process rank {rank} )",
    HOROVOD_MPI: r"prterun (noticed that process rank {rank} .* exited|has exited due to process rank {rank} )",
    WITH_MPICH: r"BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES",
    HOROVOD_GLOO: r"Process {rank} exit with status code",
}
"""What a launcher writes when a rank has died, before it kills the others, which are then not asked."""
LEFT = (HOROVOD_GLOO, WITH_MPICH)
"""Launchers that take a rank which leaves with status 0 for one that has done its work."""
CASES = selected_cases(
    [
        (OPEN_MPI, "gossip", "killed"),
        (OPEN_MPI, "gradients", "crashed"),
        (WITH_MPICH, "gradients", "left"),
        (HOROVOD_GLOO, "gossip", "killed"),
        (HOROVOD_GLOO, "gradients", "left"),
        (HOROVOD_MPI, "gradients", "crashed"),
    ],
    [
        (launcher, method, kind)
        for launcher in (OPEN_MPI, WITH_MPICH, HOROVOD_GLOO, HOROVOD_MPI)
        for method, kind in (("gossip", "killed"), ("gradients", "left"), ("gradients", "crashed"))
    ],
)
SAME = "Horovod failed: a rank has died, or has left the job without the others."
FOUND = r"the process of rank \d has ended: this rank waits for a message of it, or for it to read one"
"""What ranks of a node say whose gossip finds out before the launcher does: of the dead rank, or of one that has ended
because of it."""


def left_over(mark: str) -> list[str]:
    """Processes that have this in their environment or command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            stated = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:  # it has ended, or is no one's business
            continue
        if mark.encode() in stated and process.name != str(os.getpid()):
            found.append(f"{process.name}: {stated[:200]!r}")
    return found


def died(launcher: Launcher, folder: Path, method: str, kind: str, seed: str) -> tuple[Job, int, float]:
    """A job of which one rank dies; which one, and how long everything took to end after that."""
    chosen = random.Random(seed)
    rank, seconds = chosen.randrange(SIZE), chosen.uniform(0.2, 1.0)
    job = launcher.run(
        SIZE, PROGRAM, str(folder), method, str(rank), kind, f"{seconds:.3f}", timeout_seconds=90,
        environment={"LENTANDO_TEST_MARK": str(folder)},
    )  # fmt: skip
    moments = re.findall(r"DIES ([0-9.]+)", job.output)
    assert len(moments) == 1, job.output
    died_at = float(moments[0])
    while left_over(str(folder)) and time.time() - died_at < SECONDS:  # a launcher may end before those that it kills
        time.sleep(0.1)
    return job, rank, time.time() - died_at


@pytest.mark.parametrize(("launcher", "method", "kind"), CASES, ids=lambda value: getattr(value, "name", value))
def test_death_of_a_rank_ends_the_job_and_leaves_a_checkpoint(
    launcher: Launcher, method: str, kind: str, tmp_path: Path
) -> None:
    launcher.need()
    folder = tmp_path / "saved"
    job, rank, seconds = died(launcher, folder, method, kind, f"{launcher.name} {method} {kind}")
    assert seconds < SECONDS, job.output
    assert left_over(str(folder)) == []
    if not (kind == "left" and launcher in LEFT):
        assert job.status not in (0, None), job.output
        assert re.search(LAUNCHERS_WORDS[launcher].format(rank=rank), job.output), job.output
    elif launcher is HOROVOD_GLOO:  # which lets the others find out, and say so
        assert job.status not in (0, None), job.output
        assert SAME in job.output
    # MPICH's mpiexec kills the others without a word, and reports success: no process is left that could object.
    stated = set(re.findall(r"(?:Error|Exception): (.*)", "".join(re.findall(r".*lentando\.comm.*\n?", job.output))))
    assert all(text.startswith(SAME) or re.fullmatch(FOUND, text) for text in stated), job.output
    # Horovod's Python binding, over which ranks of horovodrun --gloo meet, imports PyTorch.
    prepared = "lentando.torch" if launcher is HOROVOD_GLOO else None
    loaded = launcher.run(SIZE, PROGRAM, str(folder), method, "--load", prepared=prepared)
    assert loaded.status == 0, loaded.output
    assert len(set(re.findall(r"LOADED (\d+)", loaded.output))) == 1, loaded.output
