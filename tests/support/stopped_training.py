"""A training under mpirun that is told to stop, started again, and compared with one that nobody has disturbed."""

import re
import signal
from pathlib import Path

from launching import Job, mpirun

SAVED_STATUS = 85
STEPS = 24


def run(program: Path, *arguments: str, stop: str = "", size: int = 2, timeout_seconds: float = 120.0) -> Job:
    """``stop``: ``"RANK@STEP RANK@STEP"``, ranks that send themselves SIGTERM before a step."""
    return mpirun(
        size,
        str(program),
        *arguments,
        timeout_seconds=timeout_seconds,
        environment={"STOP": stop, "STEPS": str(STEPS), "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


def ends(job: Job) -> list[str]:
    """What ranks have written of their parameters at the end, by rank."""
    assert job.status == 0, job.output
    found = re.findall(r"END (\d+) ([0-9a-f]+)", job.output)
    return [digest for _, digest in sorted(found)]


def resumed_after_a_signal_equals_undisturbed(program: Path, tmp_path: Path, *arguments: str, stop: str) -> Job:
    """Run with the signal, twice; returns the run that was stopped."""
    undisturbed = ends(run(program, str(tmp_path / "undisturbed"), *arguments))
    assert len(undisturbed) == 2
    stopped = run(program, str(tmp_path / "saved"), *arguments, stop=stop)
    assert stopped.status == SAVED_STATUS, stopped.output
    assert stopped.output.count(f"has received {signal.Signals.SIGTERM.name}") == len(stop.split()), stopped.output
    assert stopped.output.count("ending with status 85") == 1, stopped.output
    assert "END" not in stopped.output
    assert "Traceback" not in stopped.output
    assert ends(run(program, str(tmp_path / "saved"), *arguments)) == undisturbed
    return stopped
