"""The errors that users see. Each message says what was expected, what was found, on which rank, and what to do."""

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DeadlockError",
    "HorovodInternalError",
    "HostsUpdatedInterrupt",
    "LaunchError",
    "LentandoError",
    "MismatchError",
    "NonFiniteError",
    "NotInitializedError",
    "RankLostError",
    "SimulationError",
    "TransportError",
    "UnsupportedOperationError",
    "grouped_by_rank",
    "ranks_in_words",
    "ranks_of",
]

_T = TypeVar("_T", bound=Hashable)


class LentandoError(Exception):
    """Base class of every error that Lentando raises."""


class ConfigurationError(LentandoError, ValueError):
    """A setting cannot work. Raised on every rank when it is passed, before any data are sent.

    Attributes:
        is_of_begun_call: whether a collective operation has raised it that had been begun, which the ranks compare, so
            that no rank waits for another.
    """

    is_of_begun_call = False


class UnsupportedOperationError(ConfigurationError, RuntimeError):
    """A collective operation is not defined for its op or dtype. Where Horovod raises a RuntimeError, this is one."""


class CheckpointError(LentandoError, RuntimeError):
    """A checkpoint cannot be written, read, or continued from. Raised on every rank, with the reason."""


class NotInitializedError(LentandoError, RuntimeError, ValueError):
    """A function that needs the job was called before ``init()`` or after ``shutdown()``.

    Horovod raises a ValueError there, which programs catch to find out whether it has been initialised.
    """


class LaunchError(LentandoError, RuntimeError):
    """The launcher's variables and the transport disagree about the job."""


class HorovodInternalError(LentandoError, RuntimeError):
    """Horovod's name for a collective that has failed: base class of ``TransportError`` and ``MismatchError``."""


class HostsUpdatedInterrupt(LentandoError, RuntimeError):  # noqa: N818 - Horovod's name
    """Raised by a program inside ``elastic.run``, to be called again with its state as it is.

    Horovod raises it when hosts join. No rank can join a job of Lentando, which never raises it.

    Args:
        skip_sync: whether the state is not synchronized before the function is called again.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__("the function that elastic.run calls is called again")
        self.skip_sync = skip_sync


class TransportError(HorovodInternalError):
    """The backend (MPI, Horovod, NCCL) has failed, or does not support the operation."""


class RankLostError(TransportError):
    """A rank has died, or has reported a death. An elastic job continues without it (``capabilities.Elastic``)."""


class MismatchError(HorovodInternalError):
    """The ranks disagree about the model, the settings or the next operation. Raised on every rank before data move."""


class NonFiniteError(LentandoError, ArithmeticError):
    """An average is not finite. Raised on every rank, before any parameter has changed."""


class SimulationError(LentandoError, RuntimeError):
    """A simulated rank has failed. The message names the rank and its time; ``__cause__`` is its exception."""


class DeadlockError(SimulationError):
    """All simulated ranks wait. The message says for what each of them waits, and in which line."""


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Name ranks in a message.

    Example:
        >>> ranks_in_words([3])
        'rank 3'
        >>> ranks_in_words([0, 1, 2])
        'ranks 0, 1 and 2'
        >>> ranks_in_words(range(32))
        'ranks 0, 1, 2, 3 and 28 more'
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 8:
        return f"ranks {', '.join(map(str, ranks[:4]))} and {len(ranks) - 4} more"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def grouped_by_rank(texts: Sequence[str], ranks: Sequence[int] | None = None) -> str:
    """Describe a text that each rank has, with equal texts together.

    Args:
        texts: one text per rank.
        ranks: the ranks that the texts belong to; 0, 1, 2 and so on by default.

    Example:
        >>> grouped_by_rank(["red", "red", "blue"])
        'ranks 0 and 1: red; rank 2: blue'
    """
    by_text = ranks_of(zip(range(len(texts)) if ranks is None else ranks, texts, strict=True))
    return "; ".join(f"{ranks_in_words(ranks)}: {text}" for text, ranks in by_text.items())


def ranks_of(pairs: Iterable[tuple[int, _T]]) -> dict[_T, list[int]]:
    """Group (rank, value) pairs by value: the ranks that have each value, in the order of the pairs."""
    by_value: dict[_T, list[int]] = {}
    for rank, value in pairs:
        by_value.setdefault(value, []).append(rank)
    return by_value
