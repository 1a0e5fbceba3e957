"""Handlers of signals that ask a rank to stop: all ranks save at the same step, and exit with a status for a restart.

The handler only sets a flag, which ``lentando.optimizers.replica.stopping`` sends with the control messages. Python
runs handlers between two lines of Python: a rank that waits inside MPI runs its handler when MPI returns, which it
does, because no rank waits on account of a signal. By then another rank's flag may have arrived already, which does no
harm.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

from lentando.comm.capabilities import VirtualTime
from lentando.comm.elastic import transaction
from lentando.comm.errors import ConfigurationError, MismatchError, grouped_by_rank
from lentando.comm.numbering import all_in_words, in_words, number_of, numbers_of
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Transport
from lentando.optimizers.replica.setup import Setup
from lentando.optimizers.replica.stopping import Stopping

__all__ = ["CHECK_STEPS", "SAVED_STATUS", "SaveOnSignal"]

_log = logging.getLogger("lentando")

SAVED_STATUS = 85
"""Exit status of ranks that have saved because of a signal: start the job again.

It is HTCondor's status for a job that has made its checkpoint, and ERESTART of errno.h. It is not 143, the status of a
process that was killed by SIGTERM and has saved nothing, nor 75, the status of a job that stalled.
"""
CHECK_STEPS = 16
"""Inner steps between the messages that carry the flag if no other message does."""


class StoppableReplica(Protocol):
    """What ``SaveOnSignal`` needs of a replica.

    Attributes:
        transport: transport that connects the ranks that train together.
        setup: base algorithm and outer step.
        stopping: the ranks' agreement to stop.
    """

    transport: Transport
    setup: Setup
    stopping: Stopping

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
