"""The control message: a few numbers that all ranks send before data move: disagreement is an error, not a hang.

Each round, and each collective of the user's, starts with one. The ranks see each other's numbers and decide alike.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from math import isnan, nan
from typing import cast

import numpy as np

from lentando.comm.capabilities import Notices
from lentando.comm.errors import MismatchError, grouped_by_rank
from lentando.comm.notices import count_optimizer, neighbors_of, optimizers_of
from lentando.comm.objects import allgather_object
from lentando.comm.stall import watched
from lentando.comm.transport import Transport
from lentando.comm.turns import SAME_CALLS, same_call_elsewhere

__all__ = ["CONTROL_BYTES", "Agreement", "Control", "Event", "agree", "fingerprint", "what_is_compared"]


class Event(IntEnum):
    """What a rank is about to do together with the others."""

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
    Event.STOP: "a look at whether a rank was told to stop",
    Event.CHANGE: "a change of which parameters are trained",
    Event.GOSSIP: "a gossip step",
    Event.RESTART: "restart() of an optimizer",
}
_WITHIN_TRAINING = (Event.GRADIENTS, Event.ROUND)
"""Control messages that come at the same steps of an optimizer on all ranks, by settings that were compared when it was
made. A rank that comes to one has begun all exchanges of that optimizer for which another rank can wait, and leaves no
notices if there is no other optimizer.

Event.STEP and Event.STOP do not belong here: a rank outside join, or one that does not save on signals, does not come
to them, but begins the next exchange.
"""


@dataclass(frozen=True)
class Control:
    """One rank's share of a control message; all numbers, sent as float64.

    Attributes:
        event: what this rank is about to do. Must be equal on all ranks, like the next three.
        round: rounds completed.
        step: inner steps completed.
        subject: fingerprint of what the event is about (layout and settings of a model, name and shape of a tensor).
        loss: mean loss of this rank since the last message, NaN if it has none.
        weight: this rank's share in averages: 0 if it has run out of batches, and only adopts them.
        learning_rate: mean learning rate of this rank since the last message.
        weighted_rate: the same with a weight for each parameter group, by which ranks see whether the groups' rates
            differ. NaN if they are not to be compared.
        flag: true if something happened on this rank that all should know.
        clock: this rank's clock in seconds; decisions about time go by rank 0's.
        compute_seconds: mean compute time of this rank's steps, NaN if none was measured.
        compute_deviation_seconds: standard deviation of a step's, NaN if unknown.
        agreed_seconds: how long this rank's last control message of a round took, waiting included, NaN if none did.
        finite: false if this rank has found values of its own that are not finite.
        stopping: true if this rank was told to stop.
        early: what of this rank's gradients its buckets hold; see ``BucketCoverage`` of ``lentando.optimizers``.
        weights_set: true if the program has set weights of this rank that training has not reached by itself.
    """

    event: Event
    round: int = 0
    step: int = 0
    subject: int = 0
    loss: float = nan
    weight: float = 1.0
    learning_rate: float = 0.0
    weighted_rate: float = nan
    flag: bool = False
    clock: float = 0.0
    compute_seconds: float = nan
    compute_deviation_seconds: float = nan
    agreed_seconds: float = nan
    finite: bool = True
    stopping: bool = False
    early: int = 0
    weights_set: bool = False


_COMPARED = ("event", "round", "step", "subject")
CONTROL_BYTES = 8 * (len(fields(Control)) + 1)
"""Of one rank's share: the control, and whether the rank has left notices for its neighbours before."""


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after a control message.

    Attributes:
        loss: mean of the ranks' losses, NaN if none has one.
        weight: sum of the weights.
        learning_rate: mean of the learning rates.
        learning_rates: by rank.
        weighted_rates: by rank.
        flagged: ranks whose flag was set.
        clock: rank 0's clock in seconds.
        compute_seconds: by rank, like the next two; see ``Control``.
        compute_deviation_seconds: by rank.
        agreed_seconds: by rank.
        losses: by rank, NaN where there is none.
        non_finite: ranks that have found values of their own that are not finite.
        stopping: ranks that were told to stop.
        early: the least of what any rank's buckets hold.
        weights_set: ranks whose weights the program has set.
    """

    loss: float
    weight: float
    learning_rate: float
    learning_rates: list[float]
    weighted_rates: list[float]
    flagged: list[int]
    clock: float
    compute_seconds: list[float]
    compute_deviation_seconds: list[float]
    agreed_seconds: list[float]
    losses: list[float]
    non_finite: list[int]
    stopping: list[int]
    early: int
    weights_set: list[int]


def what_is_compared(control: Control) -> tuple[int, ...]:
    """What must be equal on all ranks: calls that share it cannot be told apart."""
    return control.event, control.round, control.step, control.subject


def agree(transport: Transport, control: Control, doing: Callable[[], str]) -> Agreement:
    """Tell all ranks what this one is about to do, and learn the same of them.

    One all-gather of a few numbers: unlike an all-reduce it also tells who differs, in the same single latency.

    Args:
        transport: ranks that take part.
        control: this rank's share.
        doing: says in words what this rank is about to do; called only when the ranks disagree.

    Raises:
        MismatchError: on every rank, with what each is doing, if they are not about to do the same, or if two threads
            of a rank are about to do the same at once.
    """
    neighbors = neighbors_of(transport)
    if control.event is Event.CONSTRUCT:
        count_optimizer(transport)
    is_announced = neighbors is not None and (control.event not in _WITHIN_TRAINING or optimizers_of(transport) > 1)
    if neighbors is not None and is_announced:
        neighbors.announce(cast(Notices, transport))
    own = np.array((*vars(control).values(), is_announced), np.float64)  # in the order of the fields
    other_thread = same_call_elsewhere(transport, what_is_compared(control))
    if other_thread is not None:
        own[0] = -1 - control.event  # which no event is: the others must know, whatever their own threads do
    with watched(transport, _WORDS[control.event]):
        rows = transport.allgather(own)
    if neighbors is not None:
        neighbors.settle(cast(Notices, transport), np.flatnonzero(rows[:, -1]).tolist())
    columns = {field.name: rows[:, number] for number, field in enumerate(fields(Control))}
    if (columns["event"] < 0).any():
        in_threads = "" if other_thread is None else f", as does its thread {other_thread!r}"
        raise MismatchError(f"{SAME_CALLS}. {grouped_by_rank(allgather_object(transport, doing() + in_threads))}")
    if any((columns[name] != columns[name][0]).any() for name in _COMPARED):
        found = grouped_by_rank(allgather_object(transport, doing()))
        raise MismatchError(
            f"the ranks are not about to do the same thing. {found}. Every rank must take the same steps in the same "
            "order: check that all have equally many batches (or train inside join), the same model and the same "
            "settings"
        )
    losses = [float(loss) for loss in columns["loss"] if not isnan(loss)]
    return Agreement(
        loss=sum(losses) / len(losses) if losses else nan,
        weight=float(columns["weight"].sum()),
        learning_rate=float(columns["learning_rate"].mean()),
        learning_rates=columns["learning_rate"].tolist(),
        weighted_rates=columns["weighted_rate"].tolist(),
        flagged=[int(rank) for rank in np.flatnonzero(columns["flag"])],
        clock=float(columns["clock"][0]),
        compute_seconds=columns["compute_seconds"].tolist(),
        compute_deviation_seconds=columns["compute_deviation_seconds"].tolist(),
        agreed_seconds=columns["agreed_seconds"].tolist(),
        losses=columns["loss"].tolist(),
        non_finite=[int(rank) for rank in np.flatnonzero(columns["finite"] == 0)],
        stopping=[int(rank) for rank in np.flatnonzero(columns["stopping"])],
        early=int(columns["early"].min()),
        weights_set=[int(rank) for rank in np.flatnonzero(columns["weights_set"])],
    )


def fingerprint(described: object) -> int:
    """48 bits, which a float64 holds exactly, of a hash of anything that JSON can hold."""
    text = json.dumps(described, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
