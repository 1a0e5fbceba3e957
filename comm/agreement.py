"""The control message: a few numbers that all ranks exchange before data are sent, so that disagreement is an error.

Each outer step, and each collective operation of the user, begins with one. Every rank receives the numbers of all
ranks, so that all of them decide alike.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Protocol, cast, runtime_checkable

import numpy as np

from lentando.comm.capabilities import Notices
from lentando.comm.errors import MismatchError, grouped_by_rank
from lentando.comm.job import job_of
from lentando.comm.join_rounds import count_cancelled_joins
from lentando.comm.notices import Neighbors, count_optimizer, optimizers_of
from lentando.comm.numbering import numbers_of, subset_in_words
from lentando.comm.objects import allgather_object
from lentando.comm.stall import watched
from lentando.comm.transport import Array, Transport
from lentando.comm.turns import SAME_CALLS, Turns

__all__ = [
    "COLUMNS",
    "CONTROL_MESSAGE_BYTES",
    "Event",
    "Intent",
    "Participant",
    "RanksHaveJoinedError",
    "agree",
    "fingerprint",
    "ranks_where",
]


class Event(IntEnum):
    """Kinds of what the ranks do together."""

    SHUTDOWN = 0
    CONSTRUCT = 1
    GRADIENTS = 2
    ROUND = 3
    EVALUATE = 4
    OPERATION = 5
    SAVE = 6
    LOAD = 7
    STEP = 8
    STOP = 9
    CHANGE = 10
    GOSSIP = 11
    RESTART = 12
    ASYNCHRONOUS = 13
    PERIOD = 14
    JOIN = 15


_WORDS = {
    Event.SHUTDOWN: "shutdown(), or the end of the program",
    Event.CONSTRUCT: "the construction of an optimizer",
    Event.GRADIENTS: "an average of gradients",
    Event.ROUND: "an outer step",
    Event.EVALUATE: "an evaluation",
    Event.OPERATION: "a collective operation",
    Event.SAVE: "saving a checkpoint",
    Event.LOAD: "loading a checkpoint",
    Event.STEP: "a gossip step inside join",
    Event.STOP: "a check whether a rank has received a signal to stop",
    Event.CHANGE: "a change of which parameters are trained",
    Event.GOSSIP: "a gossip step",
    Event.RESTART: "restart() of an optimizer",
    Event.ASYNCHRONOUS: "an asynchronous operation",
    Event.PERIOD: "a comparison of how many steps the next round has",
    Event.JOIN: "join()",
}
_WITHIN_TRAINING = (Event.GRADIENTS, Event.ROUND)
"""Events that occur at the same steps of an optimizer on all ranks, because its settings were compared at construction.

A rank that reaches one of them has begun all exchanges of that optimizer for which another rank can wait. It leaves no
notices if there is no other optimizer. Event.STEP and Event.STOP do not belong here: a rank outside ``join``, or one
that does not save on signals, does not take part in them, but begins the next exchange.
"""


@dataclass(frozen=True)
class Intent:
    """What a rank is about to do with the other ranks. All fields must be equal on all ranks.

    Attributes:
        event: kind of operation.
        round: rounds that are complete.
        step: steps that are complete.
        subject: fingerprint of what the operation is about (layout and settings of a model, name and shape of a
            tensor); see ``fingerprint``.
    """

    event: Event
    round: int = 0
    step: int = 0
    subject: int = 0


class RanksHaveJoinedError(MismatchError):
    """Some ranks have called join(), and all others make the same call of a collective operation by the user.

    Raised if all of them attach the number ``joinable`` 1 to their control messages. They then decide together what
    follows.

    Attributes:
        joined: the ranks that have joined.
        calling: the first of the other ranks.
    """

    def __init__(self, joined: Sequence[int], calling: int) -> None:
        super().__init__("some ranks have called join()")
        self.joined = joined
        self.calling = calling


_COMPARED = 4
"""Number of fields of ``Intent``."""
COLUMNS = 27
"""The most numbers that a rank can attach to a control message.

All messages have the same size, whatever is attached to them: ranks that send messages of different sizes would hang,
or abort, before the mismatch between them is found. This number makes it 256 bytes. Beyond that size the fastest tenth
of the all-gathers of 4 ranks on one node take twice as long (Open MPI 5, two cores).
"""
CONTROL_MESSAGE_BYTES = 8 * (_COMPARED + COLUMNS + 1)
"""Bytes of one rank's control message: its intent, its numbers, and whether it has left notices for its neighbours."""


@runtime_checkable
class Participant(Protocol):
    """A policy that attaches its own numbers to control messages, and reads those of all ranks.

    Neither method may communicate. An optimizer also calls ``contribute`` when it is created, for every kind of event,
    to check that the names differ from those of other policies, and that the numbers fit into a message.
    """

    def contribute(self, event: Event) -> Mapping[str, float]:
        """Return numbers of this rank, by name, to attach to a message; for one event always the same names.

        The names are this policy's own. All policies together attach ``COLUMNS`` numbers at most.

        Args:
            event: kind of operation that the message precedes.
        """

    def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
        """Read the numbers of all ranks, which have the same intent.

        Args:
            event: as for ``contribute``.
            by_rank: everything that was attached to the message: for each name a float64 array of shape (size,).
        """


_NO_NUMBERS: Mapping[str, float] = MappingProxyType({})


def agree(
    transport: Transport, intent: Intent, describe: Callable[[], str], numbers: Mapping[str, float] = _NO_NUMBERS
) -> dict[str, Array]:
    """Send what this rank is about to do to all ranks, and receive the same from them. Collective.

    This is one all-gather of a few float64 numbers. Unlike an all-reduce it also shows which rank differs, at the same
    latency.

    Args:
        transport: transport that connects the participating ranks.
        intent: what this rank is about to do.
        describe: returns a description of that for error messages; called only if the ranks disagree.
        numbers: at most ``COLUMNS`` numbers of this rank, by name. All ranks with the same intent give the same names,
            in the same order.

    Returns:
        The numbers of all ranks: for each name a float64 array of shape (size,).

    Raises:
        MismatchError: on every rank, with what each is doing, if the intents differ, or if two threads of a rank have
            the same intent at once.
        RanksHaveJoinedError: on every rank, as described there.
    """
    if len(numbers) > COLUMNS:
        raise ValueError(f"a control message holds at most {COLUMNS} numbers, got {len(numbers)}: {', '.join(numbers)}")
    job = job_of(transport)
    neighbors, turns = job.find(Neighbors), job.find(Turns)
    if intent.event is Event.CONSTRUCT:
        count_optimizer(transport)
    is_announced = neighbors is not None and (intent.event not in _WITHIN_TRAINING or optimizers_of(transport) > 1)
    if neighbors is not None and is_announced:
        neighbors.announce(cast(Notices, transport))
    row = np.zeros(_COMPARED + COLUMNS + 1)
    row[:_COMPARED] = intent.event, intent.round, intent.step, intent.subject
    row[_COMPARED : _COMPARED + len(numbers)] = [*numbers.values()]
    row[-1] = is_announced
    other_thread = None if turns is None else turns.set_content(intent)
    if other_thread is not None:
        row[0] = -1 - intent.event  # not the value of any event: all ranks must see it, whatever their threads do
    with nullcontext() if intent.event is Event.JOIN else watched(transport, _WORDS[intent.event]):
        rows = transport.allgather(row)
    if neighbors is not None:
        neighbors.settle(cast(Notices, transport), ranks_where(rows[:, -1]))
    intents = rows[:, :_COMPARED]
    if row[0] >= 0 and (intents == row[:_COMPARED]).all():
        return {name: rows[:, column] for column, name in enumerate(numbers, _COMPARED)}
    has_joined = (rows[:, 0] == Event.JOIN) | (rows[:, 0] == -1 - Event.JOIN)
    if (rows[:, 0] < 0).any():
        if has_joined.any():
            count_cancelled_joins(transport)
        in_threads = "" if other_thread is None else f", as does its thread {other_thread!r}"
        by_rank = grouped_by_rank(allgather_object(transport, describe() + in_threads), numbers_of(transport))
        raise MismatchError(f"{SAME_CALLS}. {by_rank}")
    if has_joined.any() and not has_joined.all():
        calls = rows[~has_joined, : _COMPARED + 1]
        if (calls == calls[0]).all() and calls[0, 0] == Event.OPERATION and rows[:, _COMPARED].all():
            raise RanksHaveJoinedError(ranks_where(has_joined), int(np.flatnonzero(~has_joined)[0]))
    if has_joined.any():
        count_cancelled_joins(transport)
    by_rank = grouped_by_rank(allgather_object(transport, describe()), numbers_of(transport))
    raise MismatchError(
        f"the ranks{subset_in_words(transport)} are not about to do the same thing. {by_rank}. Every rank must take "
        "the same steps in the same order: check that all have equally many batches (or train inside join), the same "
        "model and the same settings"
    )


def ranks_where(values: Array) -> list[int]:
    """Ranks whose number is not zero.

    Args:
        values: one number per rank, as ``agree`` returns them.
    """
    ranks: list[int] = values.nonzero()[0].tolist()
    return ranks


def fingerprint(described: object) -> int:
    """48 bits of a hash of anything that JSON can hold; a float64 represents them exactly."""
    text = json.dumps(described, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
