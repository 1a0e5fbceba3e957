"""What each rank does for itself while all must succeed: an error on one rank is an error on every rank."""

from collections.abc import Callable
from typing import Any, TypeVar

from safetensors import SafetensorError

from lentando.comm.errors import CheckpointError, LentandoError, RankLostError, grouped_by_rank
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Transport

__all__ = ["run_on_all_ranks"]

T = TypeVar("T")

FAILURES = (
    LentandoError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    MemoryError,
    RecursionError,
    SafetensorError,
)
"""What writing and reading files, and a user's own ``extra``, can end in."""


def run_on_all_ranks(transport: Transport, doing: str, action: Callable[[], T]) -> list[T]:
    """Collective: run ``action`` on every rank. Returns what it returned, by rank: anything that JSON can hold.

    Raises:
        CheckpointError: on every rank, with what each rank says, if it failed on one of them.
    """
    failure: Exception | None = None
    outcome: dict[str, Any] = {}
    try:
        outcome["result"] = action()
    except RankLostError:
        raise
    except FAILURES as error:
        failure = error
        outcome["error"] = str(error) if isinstance(error, LentandoError) else f"{type(error).__name__}: {error}"
    outcomes = allgather_object(transport, outcome)
    if any("error" in one for one in outcomes):
        said = [one.get("error", "no failure here") for one in outcomes]
        raise CheckpointError(f"{doing} failed. {grouped_by_rank(said)}") from failure
    return [one["result"] for one in outcomes]
