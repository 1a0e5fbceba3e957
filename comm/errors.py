"""The errors that users see. Each message says what was expected, what was found, on which rank, and what to do."""

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DeadlockError",
    "LaunchError",
    "LentandoError",
    "MismatchError",
    "NonFiniteError",
    "NotInitializedError",
    "RankLostError",
    "SimulationError",
    "TransportError",
    "grouped_by_rank",
    "ranks_in_words",
    "ranks_of",
]

_T = TypeVar("_T", bound=Hashable)


class LentandoError(Exception):
    """Base class of every error that Lentando raises."""


class ConfigurationError(LentandoError, ValueError):
    """A setting that cannot work: found when it is given, on every rank, before anything is sent."""


class CheckpointError(LentandoError, RuntimeError):
    """A checkpoint that cannot be written, read, or continued from here. On every rank, with the reason."""


class NotInitializedError(LentandoError, RuntimeError):
    """Something that needs the job was used before ``init()`` or after ``shutdown()``."""


class LaunchError(LentandoError, RuntimeError):
    """What the launcher promises and what the transport sees do not agree."""


class TransportError(LentandoError, RuntimeError):
    """The engine underneath (MPI, ...) failed, or cannot do what was asked."""


class RankLostError(TransportError):
    """A rank has died, or found one dead and said so. An elastic job goes on without it; see ``transport.Elastic``."""


class MismatchError(LentandoError, RuntimeError):
    """The ranks disagree: about the model, the settings, or what happens next. On every rank, before data move."""


class NonFiniteError(LentandoError, ArithmeticError):
    """An average is not finite. Raised on every rank, before any parameter has changed."""


class SimulationError(LentandoError, RuntimeError):
    """A simulated rank failed. The message says which, and when by its clock; ``__cause__`` is what it raised."""


class DeadlockError(SimulationError):
    """No simulated rank can go on. The message says which rank waits for what, and where."""


def ranks_in_words(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0, 1 and 2``, or ``ranks 0, 1, 2, 3 and 28 more``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 8:
        return f"ranks {', '.join(map(str, ranks[:4]))} and {len(ranks) - 4} more"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def grouped_by_rank(texts: Sequence[str], ranks: Sequence[int] | None = None) -> str:
    """Says who says what: ``ranks 0 and 1: red; rank 2: blue`` for the texts of ranks 0, 1 and 2, or of ``ranks``."""
    saying = ranks_of(zip(range(len(texts)) if ranks is None else ranks, texts, strict=True))
    return "; ".join(f"{ranks_in_words(ranks)}: {text}" for text, ranks in saying.items())


def ranks_of(pairs: Iterable[tuple[int, _T]]) -> dict[_T, list[int]]:
    """Who has what: each value with the ranks that have it, in the order in which they come as (rank, value)."""
    having: dict[_T, list[int]] = {}
    for rank, value in pairs:
        having.setdefault(value, []).append(rank)
    return having
