"""The command ``lentando doctor``: collect facts, probe the job, and print the findings."""

import os
import sys
from typing import Annotated

import typer

from lentando.cli.doctor.checks import check_facts
from lentando.cli.doctor.facts import Facts, collect
from lentando.cli.doctor.findings import Finding
from lentando.cli.doctor.job import check_claims, check_outcome, check_tests, launcher_mismatch
from lentando.cli.doctor.page import print_json, print_page
from lentando.cli.doctor.watch import Outcome, watch_probe
from lentando.comm.claims import read_claims

__all__ = ["doctor"]

TIMEOUT_SECONDS = 60.0
"""Default limit for joining and testing: MPI starts a thousand ranks within seconds, imports may take longer."""
OTHER_RANKS_SECONDS = 10.0
"""Additional time for ranks other than 0: when a rank gives up, some launchers kill rank 0 before it has reported."""


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: one document, with the values of all ranks.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=1.0, metavar="SECONDS", help="Time limit for joining the job and testing it.")
    ] = TIMEOUT_SECONDS,
) -> int:
    """Diagnose why a job does not start or does not communicate, and print commands that fix it.

    Run it alone, or under the launcher of the training on the same nodes:

    lentando doctor

    mpirun -np 4 lentando doctor

    torchrun --nproc-per-node 4 -m lentando.cli doctor

    Exit status 1 if there is a problem, else 0.
    """
    claims = read_claims(os.environ)
    is_reporter = not claims or claims[0].rank in (0, None)
    facts = collect()
    limits = (timeout,) if is_reporter else (timeout + OTHER_RANKS_SECONDS, OTHER_RANKS_SECONDS)
    with watch_probe(facts, *limits) as outcome:
        if outcome.rank is not None and outcome.size != 1:  # in a job of one rank, every process is rank 0
            is_reporter = outcome.rank == 0
        if not is_reporter:
            _report_failure(facts, outcome, claims[0].rank if claims else outcome.rank)
            return 0  # the job has the status of rank 0, and any other status would end it before rank 0 has reported
        by_rank = _by_rank(facts, outcome)
        findings = _judge(facts, by_rank, outcome)
        if as_json:
            print_json(findings, by_rank, outcome)
        else:
            print_page(findings, by_rank)
        sys.stdout.flush()
    return int(any(finding.level == "problem" for finding in findings))


def _by_rank(facts: Facts, outcome: Outcome) -> dict[int, Facts]:
    if outcome.facts_by_rank is not None:
        return dict(enumerate(outcome.facts_by_rank))
    return {0: facts}


def _judge(facts: Facts, by_rank: dict[int, Facts], outcome: Outcome) -> list[Finding]:
    place = by_rank[0]["place"]
    return [
        *check_facts(by_rank),
        *check_claims(by_rank),
        *check_outcome(outcome, facts),
        *check_tests(outcome, place["transport"] if place else None),
    ]


def _report_failure(facts: Facts, outcome: Outcome, rank: int | None) -> None:
    """Print one line on a failure that rank 0 cannot see, unless all ranks fail the same way."""
    if outcome.rank is None and outcome.end == "died" and not launcher_mismatch(facts):
        reason = outcome.last_output[-1] if outcome.last_output else f"status {outcome.status}"
        typer.echo(f"lentando doctor: rank {rank} failed while {outcome.stage}: {reason}", err=True)
