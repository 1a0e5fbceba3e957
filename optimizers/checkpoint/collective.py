"""Work that each rank does locally, but that must succeed on all: an error on one rank is an error on every rank."""

from collections.abc import Callable
from typing import Any, TypeVar

from safetensors import SafetensorError

from lentando.comm.errors import CheckpointError, LentandoError, RankLostError, grouped_by_rank
from lentando.comm.numbering import numbers_of
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
"""Errors that reading and writing files, and a user's own ``extra``, can raise."""


def run_on_all_ranks(transport: Transport, doing: str, action: Callable[[], T]) -> list[T]:
    """Run an action on every rank, and raise on every rank if it fails on one of them. Collective.

    Args:
        transport: transport that connects the ranks.
        doing: what the ranks are doing, for the error message.
        action: function to run; what it returns must fit into JSON.

    Returns:
        The results, by rank.

    Raises:
        CheckpointError: on every rank, with the failures by rank, if the action failed on one of them.
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
    if any("error" in each for each in outcomes):
        errors = [each.get("error", "no failure here") for each in outcomes]
        raise CheckpointError(f"{doing} failed. {grouped_by_rank(errors, numbers_of(transport))}") from failure
    return [each["result"] for each in outcomes]
