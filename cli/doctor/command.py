"""``lentando doctor``: what is wrong when a way to start a job does not work."""

import os
import sys
from typing import Annotated

import typer

from lentando.cli.doctor.checks import check_facts
from lentando.cli.doctor.facts import Facts, collect
from lentando.cli.doctor.findings import Finding
from lentando.cli.doctor.job import check_claims, check_outcome, check_tests, stranger
from lentando.cli.doctor.joining import Outcome, join
from lentando.cli.doctor.page import print_json, print_page
from lentando.comm.launch import read_claims

__all__ = ["doctor"]

TIMEOUT_SECONDS = 60.0
"""To join and to test: MPI on a thousand ranks starts within seconds, an import of a framework may take some."""
OTHERS_WAIT_SECONDS = 10.0
"""How much longer the other ranks wait: when one of them gives up, some launchers end rank 0 before it has spoken."""


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: one document, with the values of all ranks.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=1.0, metavar="SECONDS", help="How long joining the job and testing it may take.")
    ] = TIMEOUT_SECONDS,
) -> int:
    """Say what is wrong when a way to start a job does not work, and what to paste to mend it.

    Alone, or under the launcher of the training, on the same nodes:

    lentando doctor

    mpirun -np 4 lentando doctor

    Exit status 1 if there is a problem, else 0.
    """
    claims = read_claims(os.environ)
    speaks = not claims or claims[0].rank in (0, None)
    facts = collect()
    patience = (timeout,) if speaks else (timeout + OTHERS_WAIT_SECONDS, OTHERS_WAIT_SECONDS)
    with join(facts, *patience) as outcome:
        if outcome.rank is not None and outcome.size != 1:  # worlds of one are all rank 0
            speaks = outcome.rank == 0
        if not speaks:
            _leave_word(facts, outcome, claims[0].rank if claims else outcome.rank)
            return 0  # rank 0's status is the job's; to end with another would end the job before it has spoken
        by_rank = _by_rank(facts, outcome)
        findings = _judge(facts, by_rank, outcome)
        if as_json:
            print_json(findings, by_rank, outcome)
        else:
            print_page(findings, by_rank)
        sys.stdout.flush()
    return int(any(finding.level == "problem" for finding in findings))


def _by_rank(facts: Facts, outcome: Outcome) -> dict[int, Facts]:
    if outcome.everyone is not None:
        return dict(enumerate(outcome.everyone))
    return {0: facts}


def _judge(facts: Facts, by_rank: dict[int, Facts], outcome: Outcome) -> list[Finding]:
    place = by_rank[0]["place"]
    return [
        *check_facts(by_rank),
        *check_claims(by_rank),
        *check_outcome(outcome, facts),
        *check_tests(outcome, place["transport"] if place else None),
    ]


def _leave_word(facts: Facts, outcome: Outcome, rank: int | None) -> None:
    """What rank 0 cannot see, in a line: how this rank failed, if not as all do."""
    if outcome.rank is None and outcome.end == "died" and not stranger(facts):
        said = outcome.last_words[-1] if outcome.last_words else f"status {outcome.status}"
        typer.echo(f"lentando doctor: rank {rank} failed while {outcome.stage}: {said}", err=True)
