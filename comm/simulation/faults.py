"""Faults by script: which messages are late, lost or doubled, and which rank dies when."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from random import Random

from lentando.comm.errors import ConfigurationError

__all__ = ["Death", "Delay", "Drop", "Duplicate", "Fault", "MessageFaults"]


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

    Args:
        rank: which.
        at_seconds: virtual time.
    """

    rank: int
    at_seconds: float


Fault = Delay | Drop | Duplicate | Death
"""What can go wrong in a simulation."""


class MessageFaults:
    """The message faults of a running simulation.

    Args:
        faults: what was asked for; deaths are none of its business.
        seed: of the probabilities.
    """

    def __init__(self, faults: Sequence[Fault], seed: int) -> None:
        self._faults = [fault for fault in faults if not isinstance(fault, Death)]
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
