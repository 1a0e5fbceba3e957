"""The control messages of one replica, with the numbers of every policy that takes part in them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar
from zlib import crc32

from lentando.comm.agreement import COLUMNS, Event, Intent, Participant, agree, fingerprint
from lentando.comm.array_module import to_host
from lentando.comm.elastic import is_elastic, transaction
from lentando.comm.errors import ConfigurationError, MismatchError
from lentando.comm.job import job_of
from lentando.comm.numbering import number_of
from lentando.comm.transport import Array, as_bytes
from lentando.comm.turns import turn
from lentando.optimizers.fixed_state import fixed_state_of
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.setup import Setup

__all__ = ["Channel"]

T = TypeVar("T")

_NAMES_OF_CALLS = ("has_overflowed", "is_finite", "loss", "rate", "seconds", "weights_set")
"""Names of all numbers that ``Channel.agree`` is called with. No participant may use them, for whatever event."""
_EVENTS = (
    Event.GRADIENTS, Event.ROUND, Event.PERIOD, Event.STEP, Event.EVALUATE,
    Event.RESTART, Event.CHANGE, Event.SAVE, Event.LOAD, Event.STOP,
)  # fmt: skip
"""Kinds of what a replica sends messages for."""

JOINED = fingerprint("inside a join block")
"""Changes the subject of messages sent inside ``join``, so that they never match those of ranks outside it."""

STARTED = "started from parameters with checksum"
"""Precedes the checksum of the parameters in the description of what a rank does."""

DIFFERENT_START = (
    "The parameters differed between ranks when the first step was taken. Either they were loaded or set after the "
    "optimizer was wrapped, and not on every rank; or the first forward pass changed them in place, on each rank by "
    "its own batch, as torch.nn.Embedding(max_norm=...) does. In the latter case bring all rows a little below the "
    "bound (torch.renorm), on every rank, before the optimizer is wrapped. Where every step averages gradients and "
    "there are no outer steps, do so after each step in place of max_norm, which would keep the replicas apart"
)

STATE_ON_SOME_RANKS = (
    "Some ranks begin to train, and others continue: if only these have loaded a saved state, load it on all ranks, or "
    "broadcast it afterwards (broadcast_optimizer_state)"
)


@dataclass
class _ReplicaCount:
    """Number of replicas that one job has made so far. All ranks make them in the same order."""

    number: int = 0


class Channel:
    """Sends the control messages of one replica.

    Args:
        setup: transport, framework and method of the replica.
        progress: step counts, which must be equal on all ranks.
    """

    def __init__(self, setup: Setup, progress: Progress) -> None:
        self._setup = setup
        self._progress = progress
        self._is_elastic = is_elastic(setup.transport)
        self._participants: tuple[Participant, ...] = ()
        self._waiting: tuple[Participant, ...] = ()
        self._start_checksum = 0
        # The number keeps models of equal layout, such as those of a GAN, from being averaged with each other when
        # ranks take the steps of their optimizers in different orders.
        self._replicas = job_of(setup.transport).get(_ReplicaCount)
        self._replicas.number += 1
        self._number = self._replicas.number
        self._identity = fingerprint(["replica", self._number])

    def add(self, *participants: Participant, waiting: bool = False) -> None:
        """Let policies take part in all messages from now on, in this order. All ranks add the same ones.

        Args:
            *participants: the policies. One that sends messages itself refers to this channel by ``weakref.proxy``:
                a cycle would keep the model of a dropped optimizer in memory until garbage is collected.
            waiting: whether they take part only after ``attach``. Their numbers are reserved.

        Raises:
            ConfigurationError: if two policies attach numbers of the same name, or more numbers than a message holds.
        """
        if waiting:
            self._waiting += participants
        else:
            self._participants += participants
        for event in _EVENTS:
            self._attached(event, (*self._waiting, *self._all_participants()))

    def attach(self, participant: Participant) -> None:
        """Let a policy that was waiting take part from now on. All ranks call it between the same two messages."""
        if participant in self._waiting:
            self._waiting = tuple(other for other in self._waiting if other is not participant)
            self._participants += (participant,)

    def detach(self, participant: Participant) -> None:
        """Let a policy wait again. All ranks call it between the same two messages."""
        self._participants = tuple(other for other in self._participants if other is not participant)
        self._waiting += (participant,)

    def expect_start(self) -> None:
        """Let the next message check that training starts from the same parameters on all ranks.

        Statistics are left out: the first forward pass has already moved them.
        """
        for buffer in self._setup.framework.buffers:
            for part in buffer.layout.ranges:
                if part.group is not None:
                    elements = to_host(buffer.array[part.start : part.stop])
                    self._start_checksum = crc32(as_bytes(elements).data, self._start_checksum)
        if state := fixed_state_of(self._setup.framework):
            values = [sorted(part.items()) for _, part in state]  # names of layers may differ
            self._start_checksum = crc32(repr(values).encode(), self._start_checksum)

    def forget_start(self) -> None:
        """Drop the checksum of the start: it has been compared, or training starts from other parameters."""
        self._start_checksum = 0

    def agree(
        self, event: Event, action: str, *, subject: int = 0, details: str = "", **numbers: float
    ) -> dict[str, Array]:
        """Exchange a control message with all ranks. Collective.

        Args:
            event: kind of operation that follows.
            action: the operation in words, such as "evaluates the average of", for error messages.
            subject: fingerprint of what the ranks must agree on besides the model, the method and the step counts.
            details: the subject in words.
            **numbers: numbers of this rank that concern this message only, by name.

        Returns:
            The numbers of all ranks and of all participants: for each name a float64 array of shape (size,).

        Raises:
            MismatchError: on every rank, if the ranks are not about to do the same.
            ConfigurationError: as ``add``, for a policy that now attaches other numbers than when it was added.
        """
        assert numbers.keys() <= set(_NAMES_OF_CALLS), "names that participants may not use are listed there"
        setup, progress = self._setup, self._progress
        checksum = self._start_checksum
        subject ^= setup.subject ^ self._identity ^ checksum
        if not self._is_elastic:  # there the message may be repeated, with ranks that have not sent it yet
            self._start_checksum = 0
        step = progress.inner_steps
        if progress.is_joined:
            subject ^= JOINED
        if progress.has_unequal_rounds or (progress.is_joined and event is Event.ROUND):
            step -= progress.steps  # where the round began: ranks may have taken unequally many steps in it
        participants = self._all_participants()
        numbers |= self._attached(event, participants)

        def describe() -> str:
            since = f"{STARTED} {checksum:08x}" if checksum else f"{progress.rounds} rounds"
            where = " inside join" if progress.is_joined else ""
            where = " with the others, having run out of its own batches," if progress.has_ended else where
            which = "" if self._replicas.number == 1 else f" (optimizer {self._number} of this job)"
            return f"{action} its model{where}{details}, after {progress.inner_steps} steps and {since}{which}"

        try:
            by_rank = agree(setup.transport, Intent(event, progress.rounds, step, subject), describe, numbers)
        except MismatchError as error:
            starts = set(re.findall(rf"{STARTED} (\w+)", str(error)))
            if len(starts) > 1:
                raise MismatchError(f"{error}. {DIFFERENT_START}") from None
            if starts and re.search(r"after \d+ steps and \d+ rounds", str(error)):
                raise MismatchError(f"{error}. {STATE_ON_SOME_RANKS}") from None
            raise
        for participant in participants:
            participant.receive(event, by_rank)
        return by_rank

    def _all_participants(self) -> tuple[Participant, ...]:
        """The policies, and the base algorithm if it takes part in control messages."""
        base = self._setup.base_participant
        return self._participants if base is None else (*self._participants, base)

    def _attached(self, event: Event, participants: Iterable[Participant]) -> dict[str, float]:
        """The numbers that these participants attach to a message.

        Raises:
            ConfigurationError: if they cannot be attached to one message.
        """
        attached: dict[str, float] = {}
        owners = dict.fromkeys(_NAMES_OF_CALLS, "the replica itself")
        for participant in participants:
            owner = type(participant).__name__
            for name, number in participant.contribute(event).items():
                if name in owners:
                    raise ConfigurationError(
                        f"{owner}.contribute(Event.{event.name}) returns a number named {name!r} on rank "
                        f"{number_of(self._setup.transport)}, a name that {owners[name]} uses: choose another one"
                    )
                owners[name], attached[name] = owner, number
        if len(owners) > COLUMNS:
            counts = ", ".join(f"{owner} {count}" for owner, count in Counter(owners.values()).items())
            raise ConfigurationError(
                f"a control message holds at most {COLUMNS} numbers, and {len(owners)} are attached on rank "
                f"{number_of(self._setup.transport)} to Event.{event.name} ({counts}): combine or leave out some"
            )
        return attached

    def together(self, attempt: Callable[[], T], undo: Callable[[], object] | None = None) -> T:
        """Run an operation of all ranks that begins with a message as a transaction. Collective.

        Args:
            attempt: runs the operation; see ``lentando.comm.elastic.transaction``.
            undo: restores what ``attempt`` has changed, if ranks have died meanwhile.
        """
        if self._is_elastic:
            result = transaction(self._setup.transport, attempt, undo)
        else:
            with turn(self._setup.transport):
                result = attempt()
        self._start_checksum = 0
        return result
