"""Trainings under mpirun that are asked to stop, started again, and compared with those that no rank has disturbed."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launching import Job, mpirun

SAVED_STATUS = 85
STEPS = 24


@dataclass(frozen=True)
class Case:
    """A training and its end.

    Attributes:
        what: its method and options, as the program takes them: ``"METHOD:OPTION:..."``.
        saved: after which inner step it is saved.
        stop: ``"RANK@STEP RANK@STEP"``, ranks that send themselves SIGTERM before a step.
    """

    what: str
    saved: int
    stop: str = "1@6"


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        stopped: the job that was asked to stop.
        resumed: what each rank has written of its parameters at the end, after it was resumed.
        undisturbed: the same of a training that no rank has stopped.
    """

    stopped: Job
    resumed: list[str]
    undisturbed: list[str]


def run(
    program: Path, *trainings: str, stop: str = "", timeout_seconds: float = 120.0, prepared: str | None = None
) -> Job:
    """One training after the other in one job: ``"FOLDER:METHOD:OPTION:..."`` each."""
    return mpirun(
        2,
        str(program),
        *trainings,
        timeout_seconds=timeout_seconds,
        environment={"STOP": stop, "STEPS": str(STEPS), "TF_CPP_MIN_LOG_LEVEL": "3"},
        prepared=prepared,
    )


def outcomes(program: Path, folder: Path, cases: Sequence[Case], prepared: str) -> list[Outcome]:
    """Each is stopped in a job of its own. A last job resumes all, and trains all again: most of a job is its start."""
    saved = [f"{folder / str(number)}:{case.what}" for number, case in enumerate(cases)]
    again = [f"{folder / f'{number} again'}:{case.what}" for number, case in enumerate(cases)]
    stopped = [
        run(program, training, stop=case.stop, prepared=prepared) for training, case in zip(saved, cases, strict=True)
    ]
    job = run(program, *saved, *again, timeout_seconds=240, prepared=prepared)
    ends = [
        sorted(re.findall(rf"END (\d+) ([0-9a-f]+) {re.escape(training)}\n", job.output)) for training in saved + again
    ]
    digests = [[digest for _, digest in found] for found in ends]
    assert job.status == 0, "".join(one.output for one in (*stopped, job))
    return [Outcome(*found) for found in zip(stopped, digests[: len(cases)], digests[len(cases) :], strict=True)]


def assert_nothing_is_lost(case: Case, outcome: Outcome) -> None:
    output = outcome.stopped.output
    assert outcome.stopped.status == SAVED_STATUS, output
    assert output.count(f"has received {signal.Signals.SIGTERM.name}") == len(case.stop.split()), output
    assert output.count("exiting with status 85") == 1, output
    assert f"after inner step {case.saved}," in output
    assert "END" not in output
    assert "Traceback" not in output
    assert len(outcome.undisturbed) == 2
    assert outcome.resumed == outcome.undisturbed
