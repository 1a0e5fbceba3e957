"""Output of the findings as a text report or as JSON."""

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import typer

from lentando.cli.doctor.facts import Facts
from lentando.cli.doctor.findings import Finding
from lentando.cli.doctor.watch import Outcome
from lentando.comm.claims import read_claims
from lentando.comm.errors import ranks_in_words

__all__ = ["print_json", "print_page"]

FORMAT = "lentando-doctor-1"
SECTIONS = ("versions", "MPI", "torchrun", "launcher", "job", "transports", "Horovod", "GPU", "network", "host")
WIDTH = 120
INDENT = 11
MOST_RANKS = 8
"""Above this number of ranks, the report shows findings without action for half as many ranks only."""
COLOURS = {"ok": typer.colors.GREEN, "note": typer.colors.YELLOW, "problem": typer.colors.RED}


def print_page(findings: Sequence[Finding], by_rank: dict[int, Facts]) -> None:
    """Print the findings by section, each with the command that fixes it, and the number of problems."""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    is_coloured = sys.stdout.isatty() and not _is_launched()
    lines = [_title(by_rank)]
    for section in SECTIONS:
        of_section = [finding for finding in findings if finding.section == section]
        if of_section:
            lines += ["", section]
        hidden = [finding for finding in of_section if _is_one_of_many(finding, by_rank)]
        for finding in [finding for finding in of_section if finding not in hidden]:
            text = _with_ranks(finding, by_rank)
            wrapped = textwrap.wrap(text, width - INDENT, break_long_words=False, break_on_hyphens=False)
            level = typer.style(finding.level, fg=COLOURS[finding.level], bold=finding.level == "problem")
            padding = " " * (INDENT - 2 - len(finding.level))
            lines.append(f"  {level if is_coloured else finding.level}{padding}{wrapped[0]}")
            lines += [" " * INDENT + line for line in wrapped[1:]]
            if finding.fix is not None:
                lines.append(f"{' ' * INDENT}$ {finding.fix}")  # never wrapped, so that it can be copied
        if hidden:
            lines.append(f"  ok       {len(hidden)} similar lines for other ranks (--json prints all)")
    lines += ["", _summary(findings)]
    typer.echo("\n".join(lines))  # in one write, because launchers interleave the lines of ranks


def print_json(findings: Sequence[Finding], by_rank: dict[int, Facts], outcome: Outcome) -> None:
    """Print one JSON document with the findings, the probe and the facts of all ranks."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "problems": _count(findings, "problem"),
        "notes": _count(findings, "note"),
        "findings": [asdict(finding) for finding in findings],
        "probe": {"end": outcome.end, "stage": outcome.stage, "last_output": outcome.last_output},
        "transports": outcome.tests,
        "ranks": {str(rank): facts for rank, facts in by_rank.items()},
    }
    typer.echo(json.dumps(document, allow_nan=False))


def _title(by_rank: dict[int, Facts]) -> str:
    hosts = {facts["host"] for facts in by_rank.values()}
    facts = next(iter(by_rank.values()))
    claims = read_claims(facts["environment"])
    by = f", started by {claims[0].launcher}" if claims else ", started alone"
    if facts["place"] is None:
        return f"lentando doctor: one process on {facts['host']}{by}; without facts from other ranks"
    words = f"{len(by_rank)} rank{'s' if len(by_rank) > 1 else ''} on {len(hosts)} host{'s' if len(hosts) > 1 else ''}"
    return f"lentando doctor: {words}{by}"


def _with_ranks(finding: Finding, by_rank: dict[int, Facts]) -> str:
    if finding.ranks is None or len(finding.ranks) == len(by_rank):
        return finding.text
    return f"{ranks_in_words(finding.ranks)}: {finding.text}"


def _is_one_of_many(finding: Finding, by_rank: dict[int, Facts]) -> bool:
    """Return whether a finding needs no action and concerns a single one of many ranks."""
    if finding.level != "ok" or len(by_rank) <= MOST_RANKS or finding.ranks is None:
        return False
    return len(finding.ranks) == 1 and finding.ranks[0] >= MOST_RANKS // 2


def _summary(findings: Sequence[Finding]) -> str:
    problems, notes = _count(findings, "problem"), _count(findings, "note")
    if not problems and not notes:
        return "no problems"
    words = [
        f"{number} {word}{'s' if number != 1 else ''}" for number, word in ((problems, "problem"), (notes, "note"))
    ]
    return ", ".join(words)


def _count(findings: Sequence[Finding], level: str) -> int:
    return sum(finding.level == level for finding in findings)


def _is_launched() -> bool:
    return bool(read_claims(os.environ))
