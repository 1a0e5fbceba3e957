"""The report of a stall, in words: which ranks are missing, and which line of the program each rank executes."""

import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lentando
from lentando.comm.errors import ranks_of
from lentando.comm.numbering import in_words, subset_in_words
from lentando.comm.transport import Transport

__all__ = ["program_line", "report"]


def report(
    transport: Transport, operation: str, seconds: float, answers: Mapping[int, Mapping[str, Any]], can_ask: bool
) -> str:
    """Describe a stall.

    Args:
        transport: transport of the job, or of a subset of its ranks.
        operation: operation in which ranks wait for the others.
        seconds: how long this rank has waited.
        answers: what each rank does, by rank, as ``StallInspector`` exchanges it; ranks that do not answer are absent.
        can_ask: whether the other ranks could be asked.
    """
    present = sorted(rank for rank, answer in answers.items() if answer["waits_in"] == operation)
    have = "has" if len(present) == 1 else "have"
    lines = _lines_of(transport, answers, present)
    place = f"{operation}{subset_in_words(transport)}"
    text = f"{in_words(transport, present)} {have} waited for {seconds:.0f} s in {place} ({lines})"
    if not can_ask:
        return f"{text}. Transport {transport.name!r} has no way to find out which ranks are missing"
    missing = [
        f"{in_words(transport, [rank])} {_status(answers.get(rank))}"
        for rank in range(transport.size)
        if rank not in present
    ]
    text += _not_submitted_by_all(transport, answers)
    if not missing:
        return f"{text}. All ranks have reached this operation, but the network or the backend makes no progress"
    return f"{text}. Missing: {'; '.join(missing)}"


def _not_submitted_by_all(transport: Transport, answers: Mapping[int, Mapping[str, Any]]) -> str:
    """Which ranks have not submitted operations that others have submitted; empty without such operations."""
    by_name = ranks_of((rank, name) for rank, answer in sorted(answers.items()) for name in answer["submitted"])
    texts = []
    for name, ranks in by_name.items():
        absent = [rank for rank in range(transport.size) if rank not in ranks]
        if absent:
            have, lack = (in_words(transport, each) for each in (ranks, absent))
            texts.append(f"{name!r} was submitted by {have}, not by {lack}")
    more = f"; and {len(texts) - 5} more" if len(texts) > 5 else ""
    return f". Asynchronous operations: {'; '.join(texts[:5])}{more}" if texts else ""


def _lines_of(transport: Transport, answers: Mapping[int, Mapping[str, Any]], ranks: Sequence[int]) -> str:
    """The line of the user's program that each of these ranks executes, grouped by line."""
    by_line = ranks_of((rank, answers[rank]["at"]) for rank in ranks)
    if len(by_line) == 1:
        return f"at {next(iter(by_line))}"
    return "; ".join(f"{in_words(transport, same)} at {line}" for line, same in by_line.items())


def _status(answer: Mapping[str, Any] | None) -> str:
    if answer is None:
        return "does not answer: its process is stopped, dead or unreachable"
    if answer["waits_in"] is not None:
        return f"has waited for {answer['seconds']:.0f} s in {answer['waits_in']}, at {answer['at']}"
    return f"is at {answer['at']}, after {answer['last']}"


_LIBRARIES = tuple(
    {
        folder
        for path in (*(path for name, path in sysconfig.get_paths().items() if "lib" in name), *lentando.__path__)
        for folder in (path, str(Path(path).resolve()))
    }
)


def program_line(frame: FrameType | None) -> str:
    """File, line and function of the innermost frame of the user's program, outside all libraries."""
    while frame is not None:
        if not _is_library(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "no line of the program"  # which has ended


def _is_library(path: str) -> bool:
    """Whether a file belongs to Lentando, Python or an installed package."""
    return path.startswith(("<frozen", *_LIBRARIES))
