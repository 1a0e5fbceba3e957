"""Scripted faults: messages that are late, lost or duplicated, and ranks that die, pause or are slow."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, prod
from random import Random

from lentando.comm.errors import ConfigurationError

__all__ = [
    "Death",
    "Delay",
    "Drop",
    "Duplicate",
    "Fault",
    "MessageFault",
    "MessageFaults",
    "Pause",
    "Pauses",
    "RankFault",
    "RankFaults",
    "Slow",
]


@dataclass(frozen=True, kw_only=True)
class _MessageFault:
    """The messages that a fault affects: those that meet every condition.

    Args:
        sender: rank that sends the message; any rank if None.
        receiver: rank that receives the message; any rank if None.
        tag: tag of the message; any tag if None.
        nth: number of the affected message, from 0, among those that meet the other conditions; all of them if None.
        after_seconds: virtual time from which messages are affected.
        probability: probability with which a message that meets the conditions is affected.
    """

    sender: int | None = None
    receiver: int | None = None
    tag: int | None = None
    nth: int | None = None
    after_seconds: float = 0.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigurationError(f"probability must be between 0 and 1, got {self.probability}")


@dataclass(frozen=True)
class Delay(_MessageFault):
    """These messages arrive late. Later messages wait for them, unless the network reorders messages.

    Args:
        seconds: additional time until the message arrives.
    """

    seconds: float = field(kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seconds < inf:
            raise ConfigurationError(f"seconds must be finite and >= 0, got {self.seconds}")


@dataclass(frozen=True)
class Drop(_MessageFault):
    """These messages never arrive. Their senders get no error."""


@dataclass(frozen=True)
class Duplicate(_MessageFault):
    """These messages arrive twice."""


@dataclass(frozen=True)
class Death:
    """A rank dies: messages that it has sent arrive, it sends no more, and its result is None.

    Exactly one of the four moments is given. A rank's messages, collectives and repairs are numbered from 0.

    Args:
        rank: number of the rank when the simulation began.
        at_seconds: virtual time of the death.
        at_message: number of the message that the rank dies instead of sending. All messages before it are sent, those
            of the same exchange included.
        in_collective: number of the collective, or vote, that the rank has joined and not left when it dies.
        in_repair: number of the repair that the rank has joined and not left when it dies.
    """

    rank: int
    at_seconds: float | None = None
    at_message: int | None = field(default=None, kw_only=True)
    in_collective: int | None = field(default=None, kw_only=True)
    in_repair: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        moments = (self.at_seconds, self.at_message, self.in_collective, self.in_repair)
        if sum(moment is not None for moment in moments) != 1:
            raise ConfigurationError(
                f"a death needs exactly one of at_seconds, at_message, in_collective and in_repair, got {self}"
            )


@dataclass(frozen=True)
class Pause:
    """A rank stops for some time, like a process that is swapped out or received SIGSTOP. Messages to it arrive.

    Args:
        rank: number of the rank.
        at_seconds: virtual time. The rank stops before its first operation at this time or later.
        seconds: length of the pause.
    """

    rank: int
    at_seconds: float
    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.seconds < inf:
            raise ConfigurationError(f"seconds must be finite and >= 0, got {self.seconds}")


@dataclass(frozen=True)
class Slow:
    """The training steps of a rank take longer than the compute model says.

    Args:
        rank: number of the rank.
        factor: factor by which the steps take longer.
    """

    rank: int
    factor: float

    def __post_init__(self) -> None:
        if not 0 <= self.factor < inf:
            raise ConfigurationError(f"factor must be finite and >= 0, got {self.factor}")


MessageFault = Delay | Drop | Duplicate
RankFault = Death | Pause | Slow
Fault = MessageFault | RankFault
"""Any fault of a simulation."""


class MessageFaults:
    """The message faults of a running simulation.

    Args:
        faults: faults of the simulation; those of ranks are ignored.
        seed: seed of the simulation.
    """

    def __init__(self, faults: Sequence[Fault], seed: int) -> None:
        self._faults = [fault for fault in faults if isinstance(fault, MessageFault)]
        self._matches = [0] * len(self._faults)
        self._random = Random(f"faults {seed}")

    def __bool__(self) -> bool:
        return bool(self._faults)

    def effect_on(self, now: float, sender: int, receiver: int, tag: int) -> tuple[float, int]:
        """Apply the faults to a message that is sent now.

        Returns:
            additional seconds until the message arrives, and number of copies that arrive: 0 if it is lost.
        """
        late_seconds, copies = 0.0, 1
        for number, fault in enumerate(self._faults):
            if not (
                fault.sender in (None, sender)
                and fault.receiver in (None, receiver)
                and fault.tag in (None, tag)
                and now >= fault.after_seconds
            ):
                continue
            self._matches[number] += 1
            if fault.nth not in (None, self._matches[number] - 1):
                continue
            if fault.probability < 1 and self._random.random() >= fault.probability:
                continue
            if isinstance(fault, Delay):
                late_seconds += fault.seconds
            else:
                copies = 0 if isinstance(fault, Drop) else 2 * copies
        return late_seconds, copies


class Pauses:
    """The pauses of a rank that have not begun; a copy is for what the rank does in the background.

    Args:
        pauses: all of them.
    """

    def __init__(self, pauses: Sequence[Pause]) -> None:
        self._pauses = pauses

    def seconds(self, now: float) -> float:
        """Return how long the rank pauses before the operation that it is about to begin at time ``now``."""
        begun = [pause for pause in self._pauses if pause.at_seconds <= now]
        self._pauses = [pause for pause in self._pauses if pause not in begun]
        return sum(pause.seconds for pause in begun)


class RankFaults:
    """The faults of one rank of a running simulation.

    Args:
        faults: faults of the simulation; those of other ranks and of messages are ignored.
        rank: number of the rank.
    """

    def __init__(self, faults: Sequence[Fault], rank: int) -> None:
        of_rank = [fault for fault in faults if isinstance(fault, RankFault) and fault.rank == rank]
        deaths = [fault for fault in of_rank if isinstance(fault, Death)]
        self.dies_at_seconds = min((d.at_seconds for d in deaths if d.at_seconds is not None), default=None)
        self._at_messages = {death.at_message for death in deaths}
        self._in_collectives = {death.in_collective for death in deaths}
        self._in_repairs = {death.in_repair for death in deaths}
        self.pauses = Pauses([fault for fault in of_rank if isinstance(fault, Pause)])
        self.slowness = prod(fault.factor for fault in of_rank if isinstance(fault, Slow))
        self._messages = self._collectives = self._repairs = 0

    def messages_before_death(self, count: int) -> int | None:
        """Return how many of the next ``count`` messages are sent before the rank dies; None if all of them."""
        first = self._messages
        self._messages += count
        return next((number for number in range(count) if first + number in self._at_messages), None)

    def dies_in_collective(self) -> bool:
        """Whether the rank dies in the collective that it is about to join."""
        self._collectives += 1
        return self._collectives - 1 in self._in_collectives

    def dies_in_repair(self) -> bool:
        """Whether the rank dies in the repair that it is about to join."""
        self._repairs += 1
        return self._repairs - 1 in self._in_repairs
