"""Findings, and the merging of those that several ranks share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

__all__ = ["Finding", "Level", "merged", "note", "ok", "problem"]

Level: TypeAlias = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ``problem`` prevents a job from working; ``note`` may cost time, or matter later.
        section: heading of the report under which the finding is printed.
        text: description of the finding.
        fix: shell command that fixes the problem.
        ranks: ranks with this finding; None if it concerns the whole job.
    """

    level: Level
    section: str
    text: str
    fix: str | None = None
    ranks: tuple[int, ...] | None = None


def ok(section: str, text: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding("ok", section, text)


def note(section: str, text: str, fix: str | None = None) -> Finding:
    """Return a finding that may cost time, or matter later."""
    return Finding("note", section, text, fix)


def problem(section: str, text: str, fix: str) -> Finding:
    """Return a finding that prevents a job from working, with a command that fixes it."""
    return Finding("problem", section, text, fix)


def merged(by_rank: Mapping[int, Sequence[Finding]]) -> list[Finding]:
    """Return the findings of several ranks, each once and with all its ranks, in order of first appearance."""
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in by_rank.items():
        for finding in findings:
            ranks.setdefault(finding, []).append(rank)
    return [replace(finding, ranks=tuple(numbers)) for finding, numbers in ranks.items()]
