"""Stopping on a signal: all ranks save at the same step, and exit with a status that asks for a restart.

A batch system that wants the machines back sends SIGTERM to all ranks or to some, never at the same instant. The
handler only sets a flag, which is sent with the control messages that ranks exchange anyway: all ranks receive it with
the same message, and save after the same step. Python runs handlers between two lines of Python: a rank that waits
inside MPI runs its handler when MPI returns, which it does, because no rank waits on account of a signal. By then
another rank's flag may have arrived already, which does no harm.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet, proxy

from lentando.comm.agreement import Event, ranks_where
from lentando.comm.capabilities import VirtualTime
from lentando.comm.elastic import transaction
from lentando.comm.errors import ConfigurationError, MismatchError, grouped_by_rank
from lentando.comm.numbering import all_in_words, in_words, number_of, numbers_of
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Array, Transport
from lentando.optimizers.replica.channel import Channel
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.replica.state import Progress
from lentando.optimizers.replica.timing import Timing

__all__ = ["CHECK_STEPS", "SAVED_STATUS", "SaveOnSignal", "StopHandle", "Stopping"]

_log = logging.getLogger("lentando")

SAVED_STATUS = 85
"""Exit status of ranks that have saved because of a signal: start the job again.

It is HTCondor's status for a job that has made its checkpoint, and ERESTART of errno.h. It is not 143, the status of a
process that was killed by SIGTERM and has saved nothing, nor 75, the status of a job that stalled.
"""
CHECK_STEPS = 16
"""Inner steps between the messages that carry the flag if no other message does."""


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


class StoppableReplica(Protocol):
    """What ``SaveOnSignal`` needs of a replica.

    Attributes:
        transport: transport that connects the ranks that train together.
        setup: base algorithm and outer step.
        stopping: the ranks' agreement to stop.
    """

    transport: Transport
    setup: Setup
    stopping: "Stopping"

    @property
    def inner_steps(self) -> int:
        """Number of optimizer steps taken."""


class SaveOnSignal:
    """Saves all ranks and ends them after one has received a signal. Collective: made on every rank.

    Implements ``StopHandle``.

    Args:
        replica: the replica that is trained.
        save: saves all ranks, with the user's ``extra`` as its argument, and returns the folder.
        extra: argument of ``save``; if it can be called, its result at the time of saving.
        signals: numbers of the signals that ask a rank to stop.
        every: inner steps between messages that are sent only for this; None to send them only if no other message
            carries the flag.
        automatic: whether to act at the end of an optimizer's step, not only in ``check``.

    Raises:
        ConfigurationError: for settings that cannot work, outside the main thread, or in a simulation.
        MismatchError: on every rank, if the ranks give different arguments.

    Attributes:
        every: as given, or as chosen.
        automatic: as given.
        is_requested: whether this rank has received a signal.
    """

    def __init__(
        self,
        replica: StoppableReplica,
        save: Callable[[Any], Path],
        extra: Any,
        signals: Sequence[int],
        every: int | None,
        automatic: bool,
    ) -> None:
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ConfigurationError(f"every must be an integer >= 1 (inner steps) or None, got {every!r}")
        transport, setup = replica.transport, replica.setup
        if isinstance(transport, VirtualTime):
            raise ConfigurationError(
                "save_on_signal is not possible in a simulation, whose ranks share the process that signals are sent "
                "to: leave it out there"
            )
        if setup.settings.base.averages_gradients:
            every = None  # there is a message in every step
        elif every is None and not setup.has_common_rounds:
            every = CHECK_STEPS
        self.every = every
        self.automatic = automatic
        self._agreed: list[int] = []
        self._has_warned = False
        self._replica = replica
        self._save = save
        self._extra = extra
        self.is_requested = False
        self._process = os.getpid()
        names = [signal.Signals(number).name for number in signals]
        replica.stopping.expect(self)
        own = f"save_on_signal({', '.join(names)}; {every=}, {automatic=})"
        described = transaction(transport, lambda: allgather_object(transport, own))
        if len(set(described)) > 1:
            by_rank = grouped_by_rank(described, numbers_of(transport))
            raise MismatchError(f"the ranks call save_on_signal with different arguments: {by_rank}")
        self._previous: dict[int, Any] = {}
        _handling.add(self)
        try:
            for number in signals:
                previous = signal.signal(number, self._on_signal)
                self._previous[number] = signal.SIG_DFL if previous is None else previous
        except (ValueError, OSError) as error:
            self.close()
            raise ConfigurationError(
                f"signals can be handled only in the main thread, and some not at all ({error})"
            ) from error

    def agree(self, ranks: Sequence[int]) -> None:
        """Set the ranks that have received a signal.

        Args:
            ranks: ranks that all ranks know of after a message. Empty if the only such rank has died since.
        """
        if ranks and self._agreed and not self._has_warned and self._replica.transport.rank == 0:
            self._has_warned = True
            _log.warning(
                "%s received a signal to stop, all ranks have agreed to, and nothing has been saved since. Nothing can "
                "be saved within a graph: give fit() what save_on_signal returned, in callbacks=[...], or call its "
                "check() after each step",
                in_words(self._replica.transport, ranks),
            )
        self._agreed = list(ranks)

    def check(self) -> None:
        if not self._agreed:
            return
        signalled, self._agreed = self._agreed, []
        folder = self._save(self._extra() if callable(self._extra) else self._extra)
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)  # all that remains is to leave the job together
        transport = self._replica.transport
        if transport.rank == 0:
            sys.stderr.write(
                f"Lentando: {in_words(transport, signalled)} of {all_in_words(transport)} received a signal to stop: "
                f"saved to {folder} after inner step {self._replica.inner_steps}, exiting with status {SAVED_STATUS}\n"
            )
            sys.stderr.flush()
        raise SystemExit(SAVED_STATUS)

    def handled(self) -> list[int]:
        """Return the signals that this object handles."""
        return [number for number in self._previous if signal.getsignal(number) == self._on_signal]

    def restore(self) -> None:
        """Restore the previous handlers of these signals in this process."""
        for number in self.handled():
            signal.signal(number, self._previous[number])

    def close(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}
        self._replica.stopping.handle = None

    def __enter__(self) -> "SaveOnSignal":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # A rank that exits as agreed keeps ignoring signals, or the next one would end it before the other ranks.
        if not isinstance(error, SystemExit) or error.code != SAVED_STATUS:
            self.close()

    def _on_signal(self, number: int, _: object) -> None:
        """Set the flag, and restore the previous handler: by default, a second signal ends the process at once."""
        if os.getpid() != self._process:  # not seen by ``_restore_in_child``
            self.restore()
            signal.raise_signal(number)
            return
        self.is_requested = True
        signal.signal(number, self._previous[number])
        rank = number_of(self._replica.transport)
        text = (
            f"Lentando: rank {rank} has received {signal.Signals(number).name}: all ranks save and exit when they next "
            "communicate. Another signal ends this rank at once, without saving\n"
        )
        os.write(2, text.encode())  # not through a stream that may be in the middle of writing


class Stopping:
    """The ranks' agreement to stop: every control message carries whether a rank has received a signal.

    Args:
        transport: transport that connects the ranks that train together.
        progress: progress of the replica.
        channel: sends the control messages.
        timing: does not count the time of messages that are sent only for this.

    Attributes:
        handle: the user's ``save_on_signal``, None if there is none. All ranks set it to None at the same step.
    """

    def __init__(self, transport: Transport, progress: Progress, channel: Channel, timing: Timing) -> None:
        self.handle: SaveOnSignal | None = None
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

    def expect(self, handle: SaveOnSignal) -> None:
        """Let every control message from now on carry whether a rank has received a signal. Collective."""
        self._ask("prepares to save on signals")
        self.handle = handle

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

        None inside ``join``, where the ranks have taken unequally many steps.
        """
        return None if self.handle is None or self._progress.is_joined else self.handle.every

    def _ask(self, action: str) -> None:
        transaction(self._transport, lambda: self._channel.agree(Event.STOP, action))


_handling: WeakSet[SaveOnSignal] = WeakSet()
_masks: list[set[int]] = []


def _block_before_fork() -> None:
    """Block the signals: Python drops those that arrive in a child before it has cleared the signals of its parent."""
    numbers = {number for stop in _handling for number in stop.handled()}
    _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, numbers))


def _unblock_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _restore_in_child() -> None:
    """Restore the previous handlers in a process that a rank has forked, which is not a rank itself."""
    for stop in list(_handling):
        stop.restore()
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


os.register_at_fork(before=_block_before_fork, after_in_parent=_unblock_in_parent, after_in_child=_restore_in_child)
