"""What doctor has to say: findings, and those of several ranks put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

__all__ = ["Finding", "Level", "merged", "note", "ok", "problem"]

Level: TypeAlias = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the page.

    Attributes:
        level: ``problem`` keeps a job from working; ``note`` may cost time, or matter later.
        section: the heading that it belongs under.
        text: what was found.
        fix: the line to paste into a shell.
        ranks: who found it; None where it is about the whole job.
    """

    level: Level
    section: str
    text: str
    fix: str | None = None
    ranks: tuple[int, ...] | None = None


def ok(section: str, text: str) -> Finding:
    """As it should be."""
    return Finding("ok", section, text)


def note(section: str, text: str, fix: str | None = None) -> Finding:
    """Worth knowing."""
    return Finding("note", section, text, fix)


def problem(section: str, text: str, fix: str) -> Finding:
    """To be mended, and how."""
    return Finding("problem", section, text, fix)


def merged(by_rank: Mapping[int, Sequence[Finding]]) -> list[Finding]:
    """What several ranks found, each finding once with all who found it, in the order in which they were met."""
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in by_rank.items():
        for finding in findings:
            ranks.setdefault(finding, []).append(rank)
    return [replace(finding, ranks=tuple(found)) for finding, found in ranks.items()]
