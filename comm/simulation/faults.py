"""Faults by script: which messages are late, lost or doubled, which rank dies when, stops, or is slow."""

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
    "RankFault",
    "RankFaults",
    "Slow",
]


@dataclass(frozen=True, kw_only=True)
class _MessageFault:
    """Which messages a fault befalls: those that meet every condition.

    Args:
        sender: sent by this rank; any if None.
        receiver: sent to this rank.
        tag: with this tag.
        nth: only the one that is number ``nth``, from 0, of those that meet the conditions above.
        after_seconds: sent at this virtual time or later.
        probability: each that meets the conditions, with this probability.
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
    """These messages are there so much later. Those behind them wait for them, unless the network reorders.

    Args:
        seconds: how much later.
    """

    seconds: float = field(kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seconds < inf:
            raise ConfigurationError(f"seconds must be finite and >= 0, got {self.seconds}")


@dataclass(frozen=True)
class Drop(_MessageFault):
    """These messages never arrive; their senders do not notice."""


@dataclass(frozen=True)
class Duplicate(_MessageFault):
    """These messages arrive twice."""


@dataclass(frozen=True)
class Death:
    """A rank dies: what it has sent arrives, nothing more comes from it, and its result is None.

    Exactly one moment is given. What a rank does is numbered from 0.

    Args:
        rank: which, by its number when the simulation began.
        at_seconds: virtual time.
        at_message: instead of sending its message of this number; those before it have left, of the same exchange too.
        in_collective: when it has joined its collective (or vote) of this number, and before it leaves it.
        in_repair: when it has joined its repair of this number, and before it leaves it.
    """

    rank: int
    at_seconds: float | None = None
    at_message: int | None = field(default=None, kw_only=True)
    in_collective: int | None = field(default=None, kw_only=True)
    in_repair: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        moments = (self.at_seconds, self.at_message, self.in_collective, self.in_repair)
        if sum(moment is not None for moment in moments) != 1:
            raise ConfigurationError(f"a death has one moment, expected one of four, got {self}")


@dataclass(frozen=True)
class Pause:
    """A rank stops, as one that is swapped out or got SIGSTOP, and goes on later. What is sent to it arrives.

    Args:
        rank: which.
        at_seconds: it stops before what it does first at this virtual time or later.
        seconds: for how long.
    """

    rank: int
    at_seconds: float
    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.seconds < inf:
            raise ConfigurationError(f"seconds must be finite and >= 0, got {self.seconds}")


@dataclass(frozen=True)
class Slow:
    """A rank's training steps take so many times longer, beside what the compute model says.

    Args:
        rank: which.
        factor: how many times.
    """

    rank: int
    factor: float

    def __post_init__(self) -> None:
        if not 0 <= self.factor < inf:
            raise ConfigurationError(f"factor must be finite and >= 0, got {self.factor}")


MessageFault = Delay | Drop | Duplicate
RankFault = Death | Pause | Slow
Fault = MessageFault | RankFault
"""What can go wrong in a simulation."""


class MessageFaults:
    """The message faults of a running simulation.

    Args:
        faults: what was asked for; what befalls ranks is none of its business.
        seed: of the probabilities.
    """

    def __init__(self, faults: Sequence[Fault], seed: int) -> None:
        self._faults = [fault for fault in faults if isinstance(fault, MessageFault)]
        self._met = [0] * len(self._faults)
        self._random = Random(f"faults {seed}")

    def __bool__(self) -> bool:
        return bool(self._faults)

    def befall(self, now: float, sender: int, receiver: int, tag: int) -> tuple[float, int]:
        """What happens to a message that is sent now.

        Returns:
            seconds that it is late, and copies that arrive: 1, or 0 if it is lost.
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
            self._met[number] += 1
            if fault.nth not in (None, self._met[number] - 1):
                continue
            if fault.probability < 1 and self._random.random() >= fault.probability:
                continue
            if isinstance(fault, Delay):
                late_seconds += fault.seconds
            else:
                copies = 0 if isinstance(fault, Drop) else 2 * copies
        return late_seconds, copies


class RankFaults:
    """What befalls one rank of a running simulation, by what it does.

    Args:
        faults: what was asked for.
        rank: whose.
    """

    def __init__(self, faults: Sequence[Fault], rank: int) -> None:
        own = [fault for fault in faults if isinstance(fault, RankFault) and fault.rank == rank]
        deaths = [fault for fault in own if isinstance(fault, Death)]
        self.dies_at_seconds = min((d.at_seconds for d in deaths if d.at_seconds is not None), default=None)
        self._at_messages = {death.at_message for death in deaths}
        self._in_collectives = {death.in_collective for death in deaths}
        self._in_repairs = {death.in_repair for death in deaths}
        self._pauses = [fault for fault in own if isinstance(fault, Pause)]
        self.slowness = prod(fault.factor for fault in own if isinstance(fault, Slow))
        self._messages = self._collectives = self._repairs = 0

    def pause_seconds(self, now: float) -> float:
        """How long the rank stops, now that it is about to do something."""
        begun = [pause for pause in self._pauses if pause.at_seconds <= now]
        self._pauses = [pause for pause in self._pauses if pause not in begun]
        return sum(pause.seconds for pause in begun)

    def messages_before_death(self, count: int) -> int | None:
        """How many of the next ``count`` messages it still sends, if it does not live to send them all."""
        first = self._messages
        self._messages += count
        return next((number for number in range(count) if first + number in self._at_messages), None)

    def dies_in_collective(self) -> bool:
        """Whether it dies in the collective that it is about to join."""
        self._collectives += 1
        return self._collectives - 1 in self._in_collectives

    def dies_in_repair(self) -> bool:
        """Whether it dies in the repair that it is about to join."""
        self._repairs += 1
        return self._repairs - 1 in self._in_repairs
