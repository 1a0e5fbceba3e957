"""Stopping on a signal: control messages carry whether a rank has received one, so that all ranks stop together.

A batch system that wants the machines back sends SIGTERM to all ranks or to some, never at the same instant. All ranks
receive the flag with the same message, and save after the same step (``lentando.optimizers.replica.save_on_signal``).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol
from weakref import proxy

from lentando.comm.agreement import Event, ranks_where
from lentando.comm.elastic import transaction
from lentando.comm.transport import Array, Transport
from lentando.optimizers.replica.channel import Channel
from lentando.optimizers.replica.progress import Progress
from lentando.optimizers.replica.timing import Timing

__all__ = ["RequestedStop", "StopHandle", "Stopping"]


class StopHandle(AbstractContextManager["StopHandle"], Protocol):
    """The user's view of ``SaveOnSignal``. Used as a context manager, it is closed at the end of the block."""

    def check(self) -> None:
        """Save and end this rank if the ranks have agreed to stop.

        Collective then: all ranks call it at the same step.

        Raises:
            SystemExit: with ``SAVED_STATUS``.
            CheckpointError: on every rank, if one of them could not save.
        """

    def close(self) -> None:
        """Restore the previous signal handlers. Every rank calls it at the same step."""


class RequestedStop(StopHandle, Protocol):
    """What the ranks agree on: a ``StopHandle`` with the state of its signal handlers.

    Attributes:
        every: inner steps between messages that are sent only for this; None for no such messages.
        automatic: whether to act at the end of an optimizer's step, not only in ``check``.
        is_requested: whether this rank has received a signal.
    """

    every: int | None
    automatic: bool
    is_requested: bool

    def agree(self, ranks: Sequence[int]) -> None:
        """Set the ranks that have received a signal.

        Args:
            ranks: ranks that all ranks know of after a message. Empty if the only such rank has died since.
        """


class Stopping:
    """The ranks' agreement to stop: once it is asked for, all control messages carry whether a rank has got a signal.

    Args:
        transport: transport that connects the ranks that train together.
        progress: progress of the replica.
        channel: sends the control messages.
        timing: does not count the time of messages that are sent only for this.

    Attributes:
        handle: the user's ``save_on_signal``, None if there is none. All ranks set it to None at the same step.
    """

    def __init__(self, transport: Transport, progress: Progress, channel: Channel, timing: Timing) -> None:
        self.handle: RequestedStop | None = None
        self._transport = transport
        self._progress = progress
        self._channel: Channel = proxy(channel)  # see ``Channel.add``
        self._timing = timing

    def contribute(self, event: Event) -> Mapping[str, float]:
        """Attach whether this rank has received a signal."""
        return {"is_stopping": self.handle is not None and self.handle.is_requested}

    def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
        """Pass the ranks that have received a signal to the handle."""
        if self.handle is not None:
            self.handle.agree(ranks_where(by_rank["is_stopping"]))

    def expect(self, handle: RequestedStop) -> None:
        """Let every control message from now on carry whether a rank has received a signal. Collective."""
        self._ask("prepares to save on signals")
        self.handle = handle
        self._channel.attach(self)

    def steps_until_check(self) -> int | None:
        """Return the steps until the next message that is sent only for this, None if there is none."""
        every = self._steps_between_checks()
        return None if every is None else every - self._progress.inner_steps % every

    def check_if_due(self) -> None:
        """Exchange the message that is sent only for this, if it is due after this step. Collective then."""
        every = self._steps_between_checks()
        if every is not None and self._progress.inner_steps % every == 0:
            self._timing.pause()
            self._ask("checks whether a rank has received a signal to stop training")
            self._timing.resume()

    def stop_if_agreed(self, automatic: bool = True) -> None:
        """Save and exit between two steps, if the ranks have agreed to.

        Args:
            automatic: whether this is the end of an optimizer's step, and not a place that the user has chosen.
        """
        if self.handle is not None and (self.handle.automatic or not automatic):
            self.handle.check()

    def _steps_between_checks(self) -> int | None:
        """Return the steps between messages that are sent only for this.

        None inside ``join`` and in unequal rounds, where the ranks have taken unequally many steps.
        """
        if self.handle is None or self._progress.is_joined or self._progress.has_unequal_rounds:
            return None
        return self.handle.every

    def _ask(self, action: str) -> None:
        transaction(self._transport, lambda: self._channel.agree(Event.STOP, action))
